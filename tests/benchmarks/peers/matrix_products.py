"""The machine's rate in float32 matrix products: what torch and NumPy offer, on the benchmark's threads."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernel_cases import Case

TOOLS = {"torch mm": "ieee", "torch mm, fast float32": "bf16", "NumPy matmul": None}
SIZE = 2048
FLOPS = 2 * SIZE**3


def versions() -> dict[str, str]:
    """Versions for the report."""
    return {"numpy": importlib.metadata.version("numpy")}


def prepare(tool: str, case: Case, folder: Path, device: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """One product [2048, 2048] @ [2048, 2048].

    Raises: ArithmeticError: the fast path rounds its factors to fewer bits than float32 has.
    """
    left = torch.randn(SIZE, SIZE, device=device)
    if TOOLS[tool] is None:
        first = left.cpu().numpy()
        second = np.ascontiguousarray(first.T)
        return lambda: first @ second, np.asarray
    right = left.T.contiguous()
    if TOOLS[tool] == "bf16":
        # Where the CPU has no bfloat16 tiles this still computes in float32, by another library; so ask the numbers.
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        ones = torch.full((SIZE, SIZE), 1 + 2**-12, device=device)
        if not torch.equal(torch.mm(ones, torch.eye(SIZE, device=device)), ones):
            raise ArithmeticError("rounds to bfloat16 on this machine")
    return lambda: torch.mm(left, right), lambda product: product.cpu().numpy()
