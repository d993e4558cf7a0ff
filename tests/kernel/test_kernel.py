"""Every engine against the loop of the oracle, over the whole zoo."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ntkdyn import empirical_ntk
from ntkdyn.kernel import ENGINES, REDUCTIONS

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def _zoo() -> ModuleType:
    # By path: the names are needed at collection, before there are fixtures.
    path = Path(__file__).parents[1] / "problems.py"
    spec = importlib.util.spec_from_file_location("ntkdyn_tests_problems_at_collection", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ZOO = _zoo().ZOO


def error(found: Any, expected: Any) -> float:
    """The worse of the relative errors in the Frobenius norm and in the largest entry, over all blocks."""
    if not isinstance(expected, dict):
        found, expected = {"": found}, {"": expected}
    assert list(found) == list(expected)
    worst = 0.0
    for name, exact in expected.items():
        assert found[name].shape == exact.shape, name
        difference = found[name].double() - exact
        if exact.abs().max() == 0:
            assert difference.abs().max() == 0, name
            continue
        relative = max(difference.norm() / exact.norm(), difference.abs().max() / exact.abs().max())
        worst = max(worst, float(relative))
    return worst


@pytest.mark.parametrize("symmetric", [True, False], ids=["x1", "x1-x2"])
@pytest.mark.parametrize("name", ZOO)
def test_equals_loop(name: str, symmetric: bool, oracles: ModuleType) -> None:
    problem = ZOO[name]()
    further = {"forward": problem.forward, "parameters": problem.parameters}
    inputs = (problem.x1,) if symmetric else (problem.x1, problem.x2)
    expected = {
        (reduce, per): oracles.ntk_by_loop(problem.model, *inputs, reduce=reduce, per=per, **further)
        for reduce in REDUCTIONS
        for per in (None, "layer", "parameter")
    }
    for engine in ENGINES:
        for (reduce, per), exact in expected.items():
            for dtype, tolerance in TOLERANCE.items():
                found = empirical_ntk(
                    problem.model, *inputs, reduce=reduce, per=per, engine=engine, dtype=dtype, **further
                )
                assert error(found, exact) <= tolerance, (engine, reduce, per, dtype)
                blocks = found.values() if isinstance(found, dict) else [found]
                assert all(block.dtype == dtype for block in blocks)
