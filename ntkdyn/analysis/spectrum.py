"""Spectrum of a kernel and what is read off it.

Every measure takes eigenvalues [N] (any order), one kernel, or a stack of kernels, see `kernels`; two axes always
mean a kernel. Decompose once with `eigenvalues` where several measures are wanted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ShapeError, UndefinedMeasure
from .kernels import FloatArray, Measure, as_kernels, is_stack, unpacked

ROUNDING = 1e-5
"""Asymmetry and negative eigenvalues up to this share of the largest value count as rounding of float32 kernels."""


class PowerLaw(NamedTuple):
    """lambda_i ~ i^slope over the indices first ... last (from 1, inclusive); r_squared is NaN for a flat spectrum."""

    slope: float
    r_squared: float
    first: int
    last: int


def eigenvalues(kernel: ArrayLike) -> FloatArray:
    """Eigenvalues of a kernel, largest first, in the unit of the kernel.

    Args: kernel: symmetric [N, N] or full [N, N, C, C] (its NC x NC matrix), or a stack of them.
    Returns: float64 [N] or [NC]; for a stack [B, N] or [B, NC].
    Raises: ShapeError: not square.  UndefinedMeasure: not finite, or asymmetric beyond rounding.
    """
    where = "eigenvalues"
    kernels = as_kernels(kernel, where=where)
    size = kernels.shape[1] * kernels.shape[3]
    # Axes must be moved before reshaping: [N, N, C, C] -> [N, C, N, C].
    matrices = kernels.transpose(0, 1, 3, 2, 4).reshape(len(kernels), size, size)
    asymmetry = np.abs(matrices - matrices.swapaxes(1, 2)).max(axis=(1, 2))
    largest = np.abs(matrices).max(axis=(1, 2))
    if (asymmetry > ROUNDING * largest).any():
        worst = int(np.argmax(asymmetry - ROUNDING * largest))
        raise UndefinedMeasure(
            f"{where}: kernel {worst} of {len(kernels)} is not symmetric (largest asymmetry {asymmetry[worst]:.3g}, "
            f"largest value {largest[worst]:.3g}); expected the kernel of one set of samples with itself"
        )
    values = np.linalg.eigvalsh(0.5 * matrices + 0.5 * matrices.swapaxes(1, 2))[:, ::-1]
    return np.asarray(values if is_stack(kernel) else values[0], dtype=np.float64)


def _spectra(spectrum: ArrayLike, *, where: str) -> tuple[FloatArray, bool]:
    """Non-negative eigenvalues [B, N] relative to the largest, largest first; whether a stack was given."""
    array = np.asarray(spectrum, dtype=np.float64)
    if array.ndim != 1:
        values = np.atleast_2d(eigenvalues(array))
    elif not array.size:
        raise ShapeError(f"{where}: no eigenvalues; expected [N] with N >= 1")
    elif not np.isfinite(array).all():
        raise UndefinedMeasure(f"{where}: eigenvalues hold NaN or infinity; expected finite values")
    else:
        values = np.sort(array)[None, ::-1]
    largest = values[:, :1]
    if not (largest > 0).all():
        raise UndefinedMeasure(f"{where}: the largest eigenvalue is {largest.min():.3g}; expected a positive one")
    if (values[:, -1:] < -ROUNDING * largest).any():
        raise UndefinedMeasure(
            f"{where}: smallest eigenvalue {values[:, -1].min():.3g} with largest {largest.max():.3g}; expected a "
            f"positive semi-definite kernel"
        )
    return np.maximum(values / largest, 0.0), is_stack(array)


def participation_ratio(spectrum: ArrayLike) -> Measure:
    """Participation ratio  (sum lambda)^2 / sum lambda^2, in [1, N]; dimensionless.

    Args: spectrum: eigenvalues [N], a kernel, or a stack of kernels.
    Returns: float, or [B] for a stack.
    Raises: ShapeError, UndefinedMeasure: no kernel, zero, not finite, or not positive semi-definite.

    >>> round(participation_ratio([4, 2, 1, 1]), 6)
    2.909091
    """
    values, stack = _spectra(spectrum, where="participation_ratio")
    return unpacked(values.sum(axis=1) ** 2 / (values**2).sum(axis=1), stack=stack)


def effective_rank(spectrum: ArrayLike) -> Measure:
    """Entropy effective rank  exp(-sum p ln p),  p = lambda / sum lambda, in [1, N]; dimensionless.

    Args, returns, raises: as `participation_ratio`.
    Source: Roy and Vetterli 2007.
    """
    values, stack = _spectra(spectrum, where="effective_rank")
    shares = values / values.sum(axis=1, keepdims=True)
    logarithms = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return unpacked(np.exp(-(shares * logarithms).sum(axis=1)), stack=stack)


def intrinsic_rank(spectrum: ArrayLike) -> Measure:
    """Intrinsic rank  Tr K / lambda_max, in [1, N]; dimensionless.

    Args, returns, raises: as `participation_ratio`.
    Source: Tropp 2015 (arXiv 1501.01571), "intrinsic dimension".
    """
    values, stack = _spectra(spectrum, where="intrinsic_rank")
    return unpacked(values.sum(axis=1), stack=stack)


def condition_number(spectrum: ArrayLike) -> Measure:
    """Condition number  lambda_max / lambda_min; dimensionless, infinite for a singular kernel.

    A smallest eigenvalue below N roundings of the largest counts as zero. Kernels stored in float32 have no smaller
    ones than about 1e-7 of the largest: condition numbers above that are those of rounding.

    Args, returns, raises: as `participation_ratio`.
    """
    values, stack = _spectra(spectrum, where="condition_number")
    smallest = values[:, -1]
    regular = smallest > np.finfo(np.float64).eps * values.shape[1]
    return unpacked(np.where(regular, 1 / np.where(regular, smallest, 1.0), np.inf), stack=stack)


def power_law(spectrum: ArrayLike, *, first: int = 1, last: int | None = None) -> PowerLaw:
    """Least-squares slope of log lambda_i against log i on a stated window of indices, with its R^2.

    Args: spectrum: eigenvalues [N] or one kernel.  first, last: window of indices from 1, inclusive; default all.
    Returns: PowerLaw(slope, r_squared, first, last); dimensionless, slope negative for a decaying spectrum.
    Raises: ShapeError: a stack, or a window outside of 1 ... N or with fewer than 2 indices.  UndefinedMeasure: an
        eigenvalue in the window is not positive.
    """
    where = "power_law"
    if is_stack(spectrum):
        raise ShapeError(f"{where}: got a stack of shape {np.shape(spectrum)}; expected eigenvalues [N] or one kernel")
    values = _spectra(spectrum, where=where)[0][0]
    end = len(values) if last is None else last
    if not 1 <= first < end <= len(values):
        raise ShapeError(
            f"{where}: window {first} ... {end} of {len(values)} eigenvalues; expected 1 <= first < last <= "
            f"{len(values)}"
        )
    window = values[first - 1 : end]
    if not (window > 0).all():
        raise UndefinedMeasure(
            f"{where}: eigenvalue {first + int(np.argmax(window <= 0))} is not positive; end the window before it"
        )
    x, y = np.log(np.arange(first, end + 1)), np.log(window)
    x, y = x - x.mean(), y - y.mean()
    slope = float(x @ y / (x @ x))
    spread = float(y @ y)
    flat = spread <= len(y) * np.finfo(np.float64).eps ** 2
    return PowerLaw(slope, float("nan") if flat else 1 - float(np.sum((y - slope * x) ** 2)) / spread, first, end)
