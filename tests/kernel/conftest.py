"""What the tests of the kernel share: the zoo, and every kind of device that a kernel is computed on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="session")
def zoo() -> ModuleType:
    """Small networks, each with something that an engine may get wrong: tests/problems.py."""
    name = "ntkdyn_tests_problems"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "problems.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that this machine has; the others are skipped with a reason."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)
