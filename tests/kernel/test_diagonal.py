"""The kernel's diagonal against the diagonal of the whole kernel, over the zoo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkdyn import Projection, SummedOutputs, empirical_ntk, ntk_diagonal


def _own(kernel: Tensor, reduce: Any) -> Tensor:
    samples = torch.arange(kernel.shape[0 if reduce != "each" else 1])
    return kernel[:, samples, samples] if reduce == "each" else kernel[samples, samples]


@pytest.mark.parametrize("reduce", ["trace", "mean", "each", "full", Projection(2, seed=0), SummedOutputs()], ids=str)
def test_is_the_diagonal(zoo: Any, reduce: Any) -> None:
    for name, build in zoo.ZOO.items():
        problem = build()
        further = {
            "forward": problem.forward,
            "parameters": problem.parameters,
            "dtype": torch.float64,
            "reduce": reduce,
        }
        for per in (None, "parameter"):
            expected = empirical_ntk(problem.model, problem.x1, per=per, engine="reference", **further)
            found = ntk_diagonal(problem.model, problem.x1, per=per, **further)
            if per is None:
                expected, found = {"": expected}, {"": found}
            assert list(found) == list(expected)
            for key, block in expected.items():
                own = _own(block, reduce)
                assert found[key].shape == own.shape
                assert (found[key] - own).abs().max() <= 1e-10 * own.abs().max() + 1e-25, (name, per, key)


def test_metric_and_tiles() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 4)).double()
    x = torch.randn(50, 2, 6, 6, dtype=torch.float64)
    metric = {"0.weight": torch.rand(3, 2, 3, 3), "3.*": 0.5}
    expected = empirical_ntk(model, x, metric=metric).diagonal()
    torch.testing.assert_close(ntk_diagonal(model, x, metric=metric), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ntk_diagonal(model, x, metric=metric, max_memory=2**28), expected, rtol=1e-12, atol=0)
