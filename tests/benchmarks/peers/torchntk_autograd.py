"""torchntk's autograd_ntk, which knows one output: the trace is a sum over outputs, the full kernel out of reach."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernel_cases import OUTPUTS, Case
from kernel_networks import read
from torch import Tensor
from torchntk.autograd import autograd_ntk

TOOLS = {"torchntk": None}


def versions() -> dict[str, str]:
    """Versions for the report: it states none."""
    return {"torchntk": "376fb72"}


def prepare(tool: str, case: Case, folder: Path, device: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The call, and what turns its result into an array of the case's shape."""
    if case.reduce != "trace":
        raise NotImplementedError("one output only, no full kernel")
    network, x = read(case, folder, device)

    def trace() -> Tensor:
        return sum(autograd_ntk(network, network(x)[:, c]) for c in range(OUTPUTS))  # type: ignore[return-value]

    return trace, lambda kernel: kernel.cpu().numpy()
