"""What counts as a kernel array: checked float64 copies, norms and centering.

One kernel is [N, M] (trace, mean, one output) or [N, M, C, C] (full). A stack has one axis more, in front: snapshots,
layers or outputs. So 2 and 4 axes mean one kernel, 3 and 5 axes a stack. Nothing here writes into its arguments.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ShapeError, UndefinedMeasure

FloatArray: TypeAlias = NDArray[np.float64]

Measure: TypeAlias = Any
"""float for one kernel, float64 [B] for a stack of B kernels."""


def as_kernels(kernel: ArrayLike, *, where: str, square: bool = True) -> FloatArray:
    """Kernel or stack of kernels as finite float64 [B, N, M, C, C], with B = 1 for one kernel and C = 1 for [N, M].

    Raises: ShapeError: fewer than 2 or more than 5 axes, or an empty one; unequal output axes; with `square` also
    unequal sample axes.  UndefinedMeasure: a value that is not finite.
    """
    array = np.asarray(kernel, dtype=np.float64)
    if not 2 <= array.ndim <= 5 or 0 in array.shape:
        raise ShapeError(
            f"{where}: kernel has shape {array.shape}; expected [N, N] or [N, N, C, C], or a stack of them along one "
            f"axis in front"
        )
    if array.ndim in (2, 4):
        array = array[None]
    if array.ndim == 3:
        array = array[..., None, None]
    if array.shape[3] != array.shape[4]:
        raise ShapeError(f"{where}: kernel has output axes {array.shape[3:]}; expected [N, N, C, C] with equal ones")
    if square and array.shape[1] != array.shape[2]:
        raise ShapeError(f"{where}: kernel has sample axes {array.shape[1:3]}; expected a square kernel [N, N]")
    if not np.isfinite(array).all():
        raise UndefinedMeasure(f"{where}: kernel holds NaN or infinity; expected finite values; leave that step out")
    return array


def is_stack(kernel: ArrayLike) -> bool:
    """Whether the array holds several kernels: 3 or 5 axes."""
    return np.ndim(kernel) in (3, 5)


def unpacked(values: FloatArray, *, stack: bool) -> Measure:
    """Values [B] as they are for a stack, the only one as a float for one kernel."""
    return values if stack else float(values[0])


def centered(kernels: FloatArray) -> FloatArray:
    """H K H with H = I - 1 1^T / N over both sample axes, for kernels [B, N, M, C, C]; a new array."""
    rows = kernels - kernels.mean(axis=1, keepdims=True)
    rows -= rows.mean(axis=2, keepdims=True)
    return np.asarray(rows, dtype=np.float64)


def scaled(kernels: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Kernels [B, ...] divided by their largest absolute value, and those values [B]; zero kernels stay zero.

    Squares of values below 1e-154 vanish in float64 and squares above 1e154 overflow; scaled kernels have neither.
    """
    largest = np.abs(kernels).reshape(len(kernels), -1).max(axis=1)
    # Not kernels / largest: the reciprocal of a sub-normal number overflows, and frexp keeps the mantissas exact.
    exponent = np.frexp(largest)[1]
    shape = (-1,) + (1,) * (kernels.ndim - 1)
    return np.ldexp(kernels, -exponent.reshape(shape)), largest


def normalized(kernels: FloatArray, *, center: bool, where: str) -> FloatArray:
    """Kernels [B, N, M, C, C], centered or not, as unit vectors [B, N*M*C*C].

    Raises: UndefinedMeasure: a kernel is zero, or nothing but rounding error is left of it after centering.
    """
    kernels, _ = scaled(kernels)
    flat = kernels.reshape(len(kernels), -1)
    norms = np.sqrt(np.einsum("bi,bi->b", flat, flat))
    if not norms.all():
        raise UndefinedMeasure(
            f"{where}: kernel {int(np.argmin(norms))} of {len(norms)} is zero and has no direction; leave that step out"
        )
    if center:
        flat = centered(kernels).reshape(len(kernels), -1)
        before, norms = norms, np.sqrt(np.einsum("bi,bi->b", flat, flat))
        # Means of N values are off by about N roundings: what is smaller than that is not a kernel.
        constant = norms <= np.finfo(np.float64).eps * max(kernels.shape[1:3]) * before
        if constant.any():
            raise UndefinedMeasure(
                f"{where}: kernel {int(np.argmax(constant))} of {len(norms)} is constant over samples, so the centered "
                f"kernel is zero; use the uncentered measure"
            )
    return np.asarray(flat / norms[:, None], dtype=np.float64)
