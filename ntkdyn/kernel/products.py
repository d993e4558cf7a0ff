"""Products with transposed matrices by the fastest exact library at hand, and half of those that are symmetric."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import blas
from torch import Tensor

from .precision import openblas


def halves(tensor: Tensor) -> bool:
    """Whether ``symmetric_product`` is there for such tensors, and faster than whole products of panels."""
    return tensor.device.type == "cpu" and torch.get_num_threads() == 1 and openblas() is not None


def times_transposed(first: Tensor, second: Tensor, out: Tensor) -> Tensor:
    """Write first [m, p] @ second [n, p]ᵀ into out [m, n]."""
    if halves(out):
        np.matmul(first.numpy(), second.numpy().T, out=out.numpy())
        return out
    return torch.mm(first, second.T, out=out)


def symmetric_product(rows: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """Write R [n, p] @ Rᵀ into out [n, n], or add it; what is below the diagonal means nothing afterwards.

    Both must be contiguous; only where ``halves``.
    """
    update = blas.ssyrk if rows.dtype == torch.float32 else blas.dsyrk
    # BLAS counts columns first: what it calls the lower triangle is the upper one here.
    update(1.0, rows.numpy().T, beta=float(add), c=out.numpy().T, trans=1, lower=1, overwrite_c=1)
    return out
