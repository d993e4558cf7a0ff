"""Products with transposed matrices by the fastest exact library at hand, and half of those that are symmetric.

Products of stacks of matrices, and those that are added to a kernel in place, are torch's in any case: NumPy has no
such function.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import blas
from torch import Tensor

from .precision import openblas

FloatArray = NDArray[np.floating[Any]]


def by_openblas(tensor: Tensor) -> bool:
    """Whether OpenBLAS multiplies such tensors faster than torch; ``symmetric_product`` is for these alone."""
    return tensor.device.type == "cpu" and torch.get_num_threads() == 1 and openblas() is not None


def times_transposed(first: Tensor, second: Tensor, out: Tensor) -> Tensor:
    """Write first [m, p] @ second [n, p]ᵀ into out [m, n]."""
    if by_openblas(out):
        np.matmul(_for_blas(first), _for_blas(second).T, out=out.numpy())
        return out
    return torch.mm(first, second.T, out=out)


def symmetric_product(rows: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """Write R [n, p] @ Rᵀ into a contiguous out [n, n], or add it; below the diagonal it means nothing afterwards.

    Where ``by_openblas`` alone. Other threads of Python wait meanwhile: SciPy holds their lock.
    """
    if rows.shape[1] == 0:  # BLAS refuses such rows
        return out if add else out.zero_()
    update = blas.ssyrk if rows.dtype == torch.float32 else blas.dsyrk
    # BLAS counts columns first: what it calls the lower triangle is the upper one here.
    columns, target = rows.contiguous().numpy().T, out.numpy().T
    update(1.0, columns, beta=float(add), c=target, trans=1, lower=1, overwrite_c=1)
    return out


def _for_blas(matrix: Tensor) -> FloatArray:
    # NumPy multiplies matrices of any other layout without BLAS.
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    fits = (right == 1 and down >= columns) or (down == 1 and right >= rows)
    return cast(FloatArray, (matrix if fits else matrix.contiguous()).numpy())
