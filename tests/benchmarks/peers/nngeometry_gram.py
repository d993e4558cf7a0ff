"""nngeometry's Gram matrix of the Jacobian."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernel_cases import OUTPUTS, Case
from kernel_networks import read
from nngeometry.gram import GramMatrix
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

TOOLS = {"nngeometry": None}
BLOCKS = 4  # of the batch; it skips the blocks below the diagonal, so blocks save almost half of the work


def versions() -> dict[str, str]:
    """Versions for the report."""
    return {"nngeometry": importlib.metadata.version("nngeometry")}


def prepare(tool: str, case: Case, folder: Path, device: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The call, and what turns its result into an array of the case's shape."""
    network, x = read(case, folder, device)
    loader = DataLoader(TensorDataset(x), batch_size=max(1, case.samples // BLOCKS))

    def gram(function: Callable[[Tensor], Tensor]) -> Tensor:
        return GramMatrix(network, loader, function=function).data

    def full() -> Tensor:
        return gram(network).permute(1, 3, 0, 2)

    def trace() -> Tensor:
        # One output at a time: it knows no trace, and the full kernel costs ten times as much.
        blocks = (gram(lambda *d, c=c: network(d[0])[:, c : c + 1]).squeeze() for c in range(OUTPUTS))  # type: ignore[misc]
        return sum(blocks)  # type: ignore[return-value]

    return full if case.reduce == "full" else trace, lambda kernel: kernel.detach().cpu().numpy()
