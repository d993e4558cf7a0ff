"""ntkdyn's empirical_ntk, as a user calls it; and the reference in float64."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_cases import Case
from kernel_networks import read

import ntkdyn as nd

TOOLS = {"ntkdyn": None, "reference": torch.float64}


def versions() -> dict[str, str]:
    """Versions for the report."""
    return {"ntkdyn": importlib.metadata.version("ntkdyn")}


def prepare(tool: str, case: Case, folder: Path, device: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The call, and what turns its result into an array of the case's shape."""
    network, x = read(case, folder, device)
    dtype = TOOLS[tool]
    return (
        lambda: nd.empirical_ntk(network, x, reduce=case.reduce, dtype=dtype),  # type: ignore[call-overload]
        lambda kernel: kernel.cpu().numpy(),
    )
