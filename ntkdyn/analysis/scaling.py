"""How kernels at initialization scatter as networks get wider: relative spread, deviation, and their exponents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ..errors import ShapeError, UndefinedMeasure

Array = NDArray[np.float64]


@dataclass(frozen=True)
class WidthExponent:
    """Slope of log value against log width, with its interval; values [W] are those that were fitted."""

    values: Array
    slope: float
    low: float
    high: float


def kernel_spread(kernels: ArrayLike) -> Array:
    """Relative spread over draws  sqrt(Σ_ij Var_d K_ij) / |mean_d K|_F  of kernels; dimensionless.

    Args: kernels: [..., D, N, N] of D >= 2 independent initializations; the variance is the unbiased one.
    Returns: [...]
    Raises: ShapeError: fewer than two draws.  UndefinedMeasure: the mean kernel is zero.
    """
    draws = _draws(kernels, where="kernel_spread", least=2)
    size = np.linalg.norm(draws.mean(-3), axis=(-2, -1))
    if not (size > 0).all():
        raise UndefinedMeasure("kernel_spread: the mean kernel is zero; a relative spread has no value")
    return np.asarray(np.sqrt(draws.var(-3, ddof=1).sum((-2, -1))) / size)


def kernel_deviation(kernels: ArrayLike, reference: ArrayLike) -> Array:
    """Relative deviation  sqrt(mean_d |K_d - R|_F²) / |R|_F  of kernels from a reference; dimensionless.

    Args: kernels: [..., D, N, N].  reference: [..., N, N], e.g. the analytic kernel.
    Returns: [...]
    Raises: ShapeError: shapes do not fit.  UndefinedMeasure: the reference is zero.
    """
    draws, target = _draws(kernels, where="kernel_deviation", least=1), np.asarray(reference, dtype=np.float64)
    if target.shape != draws.shape[:-3] + draws.shape[-2:]:
        raise ShapeError(
            f"kernel_deviation: found kernels {draws.shape} and reference {target.shape}, expected "
            f"{draws.shape[:-3] + draws.shape[-2:]}"
        )
    size = np.linalg.norm(target, axis=(-2, -1))
    if not (size > 0).all():
        raise UndefinedMeasure("kernel_deviation: the reference is zero; a relative deviation has no value")
    squares = ((draws - target[..., None, :, :]) ** 2).sum((-2, -1)).mean(-1)
    return np.asarray(np.sqrt(squares) / size)


def width_exponent(
    widths: ArrayLike, kernels: ArrayLike, reference: ArrayLike | None = None, *, confidence: float = 0.95
) -> WidthExponent:
    """Least-squares slope of log spread (or deviation from a reference) against log width; -1/2 is expected.

    The interval is slope ± t_(D-1) s with s the jackknife standard error over draws: all but one draw of every width,
    D times. Draw d may be correlated between widths.

    Args:
        widths: [W], W >= 2 different positive numbers.
        kernels: [W, D, N, N] of D >= 3 independent initializations a width.
        reference: [W, N, N]; None: the spread, which needs no reference.
    Raises: ShapeError: shapes do not fit, too few widths or draws.  UndefinedMeasure: all draws of a width agree.
    Source: Efron and Tibshirani 1993, chapter 11, for the jackknife.
    """
    sizes, draws = np.asarray(widths, dtype=np.float64), _draws(kernels, where="width_exponent", least=3)
    if sizes.ndim != 1 or draws.shape[:-3] != sizes.shape or len(np.unique(sizes)) < 2 or not (sizes > 0).all():
        raise ShapeError(
            f"width_exponent: found widths {sizes.shape} and kernels {draws.shape}, expected [W] with two or more "
            "different positive widths and [W, D, N, N]"
        )
    measure: Callable[[Array], Array] = kernel_spread
    if reference is not None:
        target = np.asarray(reference, dtype=np.float64)
        measure = lambda kept: kernel_deviation(kept, target)  # noqa: E731
    centered = np.log(sizes) - np.log(sizes).mean()

    def slope(kept: Array) -> float:
        values = measure(kept)
        if not (values > 0).all():
            raise UndefinedMeasure("width_exponent: all kernels of a width agree; an exponent has no value")
        return float(centered @ np.log(values) / (centered @ centered))

    count = draws.shape[1]
    without = np.array([slope(np.delete(draws, one, axis=1)) for one in range(count)])
    error = math.sqrt((count - 1) / count * float(((without - without.mean()) ** 2).sum()))
    half = float(stats.t.ppf(0.5 + confidence / 2, count - 1)) * error
    center = slope(draws)
    return WidthExponent(measure(draws), center, center - half, center + half)


def _draws(kernels: ArrayLike, *, where: str, least: int) -> Array:
    array = np.asarray(kernels, dtype=np.float64)
    if array.ndim < 3 or array.shape[-3] < least or array.shape[-1] != array.shape[-2]:
        raise ShapeError(f"{where}: found kernels {array.shape}, expected [..., D, N, N] with D >= {least}")
    return array
