"""TorchJD's autogram engine: the Gramian of the Jacobian of all outputs, or of one output at a time for the trace."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_cases import OUTPUTS, Case
from kernel_networks import read
from torch import Tensor, nn
from torchjd.autogram import Engine

TOOLS = {"TorchJD autogram": None}


class Affine(nn.Module):
    """What a BatchNorm2d in evaluation mode computes, with the same parameters: the engine refuses the class."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.register_buffer("mean", norm.running_mean)
        self.register_buffer("variance", norm.running_var)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        return nn.functional.batch_norm(x, self.mean, self.variance, self.weight, self.bias, eps=self.eps)


def versions() -> dict[str, str]:
    """Versions for the report."""
    return {"torchjd": importlib.metadata.version("torchjd")}


def prepare(tool: str, case: Case, folder: Path, device: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The call, and what turns its result into an array of the case's shape."""
    network, x = read(case, folder, device)
    for owner in list(network.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(owner, name, Affine(child))
    engine = Engine(network, batch_dim=0)

    def full() -> Tensor:
        gramian = engine.compute_gramian(network(x))
        return gramian.view(case.samples, OUTPUTS, case.samples, OUTPUTS).permute(0, 2, 1, 3)

    def trace() -> Tensor:
        kernel = torch.zeros(case.shape(), device=x.device)
        for output in range(OUTPUTS):
            kernel += engine.compute_gramian(network(x)[:, output])
        return kernel

    return full if case.reduce == "full" else trace, lambda kernel: kernel.detach().cpu().numpy()
