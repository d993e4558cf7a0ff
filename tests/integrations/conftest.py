"""One small network and one recorder for every framework."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntkdyn as nd


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """32 samples and their classes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 4, generator=generator), torch.randint(3, (32,), generator=generator)


@pytest.fixture
def network() -> Callable[[], nn.Sequential]:
    """Build the same network again."""

    def build() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 6), nd.Gate(6), nn.Dropout(0.2), nn.Linear(6, 3))

    return build


@pytest.fixture
def recorder_of(data: tuple[Tensor, Tensor]) -> Callable[[nn.Module, Path], nd.Recorder]:
    """A recorder of a network into a folder."""

    def build(model: nn.Module, path: Path) -> nd.Recorder:
        sets = {"test": (data[0][:5], data[1][:5])}
        return nd.Recorder(model, ["ntk", "gates", "units", "outputs"], sets, path=path, schedule=nd.every(2))

    return build


@pytest.fixture
def same_recording() -> Callable[[Path, Path], None]:
    """Assert that two runs hold the same steps and arrays."""

    def check(first: Path, second: Path) -> None:
        one, other = nd.Run.open(first), nd.Run.open(second)
        assert one.names() == other.names()
        assert "learning_rate/sum" in one
        for name in one.names():
            assert np.array_equal(one[name], other[name]), name
        for probe in ("ntk", "units"):
            assert one.steps(probe).tolist() == other.steps(probe).tolist()

    return check


def _weights(model: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def weights() -> Callable[[nn.Module], dict[str, Any]]:
    """Copies of all parameters and buffers."""
    return _weights
