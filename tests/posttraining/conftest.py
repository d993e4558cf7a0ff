"""A task that is learned in a second: which of three waves an image shows, and networks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ntkdyn.experiments.networks import GatedResNet
from ntkdyn.gates import Gate

CLASSES = 3


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 8, 8] with noise, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    phase = torch.rand(count, 1, 1, generator=generator) * 6
    row = torch.arange(8.0)[None, :, None]
    wave = torch.sin(row * (0.7 + labels[:, None, None]) + phase).expand(-1, 8, 8)
    return (wave + 0.3 * torch.randn(count, 8, 8, generator=generator))[:, None], labels


def mlp(seed: int = 0, width: int = 12) -> nn.Module:
    """Two hidden layers of ReLUs."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )


def resnet(seed: int = 0) -> nn.Module:
    """Residual network with BatchNorm, whose gates are ReLUs again."""
    torch.manual_seed(seed)
    model = GatedResNet(1, CLASSES, blocks=1, widths=(4, 6))
    for module in list(model.modules()):
        for name in [name for name, child in module.named_children() if isinstance(child, Gate)]:
            setattr(module, name, nn.ReLU())
    return model


NETWORKS = {"mlp": mlp, "resnet": resnet}


@dataclass
class Task:
    """Batches of the waves, and networks for them."""

    train: list[tuple[Tensor, Tensor]]
    test: list[tuple[Tensor, Tensor]]

    def network(self, kind: str = "mlp", seed: int = 0) -> nn.Module:
        """An untrained network with ReLUs."""
        return NETWORKS[kind](seed)

    def trained(self, kind: str = "mlp", seed: int = 0, epochs: int = 8) -> nn.Module:
        """A trained one."""
        model = self.network(kind, seed)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for inputs, targets in self.train * epochs:
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        return model.eval()


@pytest.fixture(scope="session")
def task() -> Task:
    """16 batches of 32 for training, two for testing."""
    inputs, labels = images(512, 0)
    others, truth = images(256, 1)
    return Task(
        list(zip(inputs.split(32), labels.split(32), strict=True)),
        list(zip(others.split(128), truth.split(128), strict=True)),
    )


@pytest.fixture(scope="session")
def trained(task: Task) -> Callable[..., nn.Module]:
    """Trained networks by kind and seed, each trained once; nobody may change one."""
    known: dict[Any, nn.Module] = {}

    def network(kind: str = "mlp", seed: int = 0) -> nn.Module:
        if (kind, seed) not in known:
            known[kind, seed] = task.trained(kind, seed)
        return known[kind, seed]

    return network
