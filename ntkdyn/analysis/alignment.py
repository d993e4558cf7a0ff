"""How well kernels agree with targets and with each other. All values are dimensionless.

Kernels are symmetric [N, N], or stacks [B, N, N] (snapshots, layers, outputs), which give one value each.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ConfigurationError, ShapeError, UndefinedMeasure
from .kernels import FloatArray, Measure, as_kernels, centered, is_stack, normalized, scaled, unpacked

Estimator: TypeAlias = Literal["biased", "unbiased"]


def one_hot(labels: ArrayLike, classes: int | None = None) -> FloatArray:
    """Class labels [N] as targets [N, C] of zeros and ones.

    Args: labels: integers from 0.  classes: C; default one more than the largest label.
    Raises: ShapeError: labels are not a non-empty integer vector, or outside of 0 ... C - 1.
    """
    array = np.asarray(labels)
    if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
        raise ShapeError(f"one_hot: labels have shape {array.shape} and type {array.dtype}; expected integers [N]")
    count = int(array.max()) + 1 if classes is None else classes
    if array.min() < 0 or array.max() >= count:
        raise ShapeError(
            f"one_hot: labels lie in {int(array.min())} ... {int(array.max())}; expected 0 ... {count - 1}"
        )
    return np.asarray(np.eye(count)[array], dtype=np.float64)


def _as_targets(targets: ArrayLike, samples: int, *, where: str) -> FloatArray:
    array = np.asarray(targets, dtype=np.float64)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or len(array) != samples:
        raise ShapeError(
            f"{where}: targets have shape {np.shape(targets)}; expected [{samples}, C] or [{samples}], one row per "
            f"sample of the kernel"
        )
    if not np.isfinite(array).all() or not array.any():
        raise UndefinedMeasure(f"{where}: targets are zero or not finite; the alignment has no value")
    return np.asarray(array / np.abs(array).max(), dtype=np.float64)


def _as_trace_kernels(kernel: ArrayLike, *, where: str) -> FloatArray:
    if np.ndim(kernel) not in (2, 3):
        raise ShapeError(
            f"{where}: kernel has shape {np.shape(kernel)}; expected a trace kernel [N, N] or a stack [B, N, N]"
        )
    return as_kernels(kernel, where=where)


def target_alignment(kernel: ArrayLike, targets: ArrayLike, *, centered: bool = False) -> Measure:
    """Kernel-target alignment  A = <K, Y Y^T> / (|K|_F |Y Y^T|_F)  of a trace kernel.

    Args:
        kernel: trace kernel [N, N], or a stack [B, N, N].
        targets: one-hot or real [N, C], same order; [N] is one real output, class labels go through `one_hot` first.
        centered: the same with HKH and HY, H = I - 1 1^T / N, that is cka(K, Y Y^T).
    Returns: float, or [B] for a stack; in [-1, 1], in [0, 1] for positive semi-definite K.
    Raises: ShapeError: sizes differ.  UndefinedMeasure: K or Y is zero, not finite, or constant where centered.
    Source: Cristianini et al. 2001; Y Y^T in place of y y^T for several outputs.

    >>> round(target_alignment([[3, 0], [0, 1]], [1, -1]), 7)
    0.6324555
    """
    where = "target_alignment"
    kernels = _as_trace_kernels(kernel, where=where)
    samples = kernels.shape[1]
    outputs = _as_targets(targets, samples, where=where)
    if centered:
        spread = outputs - outputs.mean(axis=0)
        if np.abs(spread).max() <= np.finfo(np.float64).eps * samples:
            raise UndefinedMeasure(f"{where}: targets are constant over samples; use centered=False")
        outputs = spread
    directions = normalized(kernels, center=centered, where=where).reshape(-1, samples, samples)
    along = np.einsum("nc,bnc->b", outputs, directions @ outputs)
    return unpacked(np.clip(along / np.linalg.norm(outputs.T @ outputs), -1.0, 1.0), stack=is_stack(kernel))


def target_alignment_full(kernel: ArrayLike, targets: ArrayLike) -> Measure:
    """Kernel-target alignment  A = y^T K y / (|K|_F |y|^2)  of a full kernel, with all outputs and their covariances.

    y is the flattened Y, K the NC x NC matrix. For one output the same as `target_alignment`.

    Args: kernel: full kernel [N, N, C, C], or a stack [B, N, N, C, C].  targets: one-hot or real [N, C]; [N] for
        C = 1.
    Returns: float, or [B] for a stack; in [-1, 1], in [0, 1] for positive semi-definite K.
    Raises: ShapeError: sizes differ.  UndefinedMeasure: K or Y is zero or not finite.
    Source: Cristianini et al. 2001; Baratin et al. 2021 (arXiv 2008.00938) for the full kernel.
    """
    where = "target_alignment_full"
    if np.ndim(kernel) not in (4, 5):
        raise ShapeError(
            f"{where}: kernel has shape {np.shape(kernel)}; expected a full kernel [N, N, C, C] or a stack of them; "
            f"for a trace kernel use target_alignment"
        )
    kernels = as_kernels(kernel, where=where)
    outputs = _as_targets(targets, kernels.shape[1], where=where)
    if outputs.shape[1] != kernels.shape[3]:
        raise ShapeError(
            f"{where}: targets have {outputs.shape[1]} columns and the kernel {kernels.shape[3]} outputs; expected "
            f"equal numbers"
        )
    directions = normalized(kernels, center=False, where=where).reshape(kernels.shape)
    along = np.einsum("nc,bnmcd,md->b", outputs, directions, outputs, optimize=True)
    return unpacked(np.clip(along / np.sum(outputs**2), -1.0, 1.0), stack=is_stack(kernel))


def _pair(K: ArrayLike, L: ArrayLike, estimator: str, *, where: str) -> tuple[FloatArray, FloatArray]:
    if estimator not in ("biased", "unbiased"):
        raise ConfigurationError(f"{where}: estimator is {estimator!r}; expected 'biased' or 'unbiased'")
    first, second = (_as_trace_kernels(kernel, where=where) for kernel in (K, L))
    if first.shape[1:] != second.shape[1:] or (len(first) != len(second) and 1 not in (len(first), len(second))):
        raise ShapeError(
            f"{where}: kernels have shapes {np.shape(K)} and {np.shape(L)}; expected equal ones, or a stack and one "
            f"kernel"
        )
    if estimator == "unbiased" and first.shape[1] < 4:
        raise ShapeError(f"{where}: {first.shape[1]} samples; the unbiased estimator needs at least 4")
    return first[..., 0, 0], second[..., 0, 0]


def _without_diagonal(kernels: FloatArray) -> FloatArray:
    """Copies [B, N, N] with zero diagonal and off-diagonal mean zero.

    The mean does not change HSIC_1 (a U-statistic), but taking it off keeps digits: it is most of a tangent kernel.
    """
    samples = kernels.shape[1]
    off = ~np.eye(samples, dtype=bool)
    mean = (kernels * off).sum(axis=(1, 2), keepdims=True) / (samples * (samples - 1))
    return np.asarray(np.where(off, kernels - mean, 0.0))


def _hsic_1(first: FloatArray, second: FloatArray) -> FloatArray:
    """HSIC_1 of kernels [B, N, N] without diagonal."""
    n = first.shape[1]
    trace = np.asarray((first * second.swapaxes(1, 2)).sum(axis=(1, 2)))
    sums = first.sum(axis=(1, 2)) * second.sum(axis=(1, 2))
    rows = (first.sum(axis=1) * second.sum(axis=2)).sum(axis=1)
    return np.asarray((trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3)))


def _rounding_of_hsic(kernels: FloatArray) -> FloatArray:
    """HSIC_1(K, K) of scaled kernels [B, N, N] without diagonal that is no more than rounding error, of either sign."""
    samples = kernels.shape[1]
    epsilon = np.finfo(np.float64).eps
    squares = (kernels**2).mean(axis=(1, 2))
    return np.asarray(8 * epsilon * squares + (samples * epsilon) ** 2)


def hsic(K: ArrayLike, L: ArrayLike, *, estimator: Estimator = "unbiased") -> Measure:
    """Hilbert-Schmidt independence criterion of two kernels on the same samples.

    biased:    tr(K H L H) / (n - 1)^2,  H = I - 1 1^T / n
    unbiased:  [tr(K' L') + 1^T K' 1 1^T L' 1 / ((n - 1)(n - 2)) - 2 / (n - 2) 1^T K' L' 1] / (n (n - 3)),
               K' is K with zero diagonal; do not center first.

    Args: K, L: kernels [N, N], or stacks [B, N, N]; a stack against one kernel repeats the one.
    Returns: float, or [B] for a stack, in units of K times L; the unbiased one may be negative.
    Raises: ShapeError: sizes differ, or fewer than 4 samples where unbiased (2 where biased).  UndefinedMeasure: a
        value is not finite.  ConfigurationError: unknown estimator.
    Source: Gretton et al. 2005; Song et al. 2012 (HSIC_1).
    """
    where = "hsic"
    first, second = _pair(K, L, estimator, where=where)
    n = first.shape[1]
    if estimator == "unbiased":
        values = _hsic_1(_without_diagonal(first), _without_diagonal(second))
    elif n < 2:
        raise ShapeError(f"{where}: 1 sample; the biased estimator needs at least 2")
    else:
        once = centered(first[..., None, None])[..., 0, 0]
        values = (once * second.swapaxes(1, 2)).sum(axis=(1, 2)) / (n - 1) ** 2
    return unpacked(values, stack=is_stack(K) or is_stack(L))


def cka(K: ArrayLike, L: ArrayLike, *, estimator: Estimator = "biased") -> Measure:
    """Centered kernel alignment  HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)).

    biased:    <HKH, HLH>_F / (|HKH|_F |HLH|_F), equal to 1 - kernel_distance_centered(K, L). Large for independent
               data when features outnumber samples.
    unbiased:  with HSIC_1; about 0 for independent data, may be negative, NaN where HSIC_1(K, K) or HSIC_1(L, L) is
               not positive.

    Args: K, L: kernels [N, N], or stacks [B, N, N]; a stack against one kernel repeats the one.
    Returns: float, or [B] for a stack.
    Raises: ShapeError: sizes differ, or fewer than 4 samples where unbiased.  UndefinedMeasure: a kernel is not
        finite, zero, or (biased) constant over samples.  ConfigurationError: unknown estimator.
    Source: Cortes et al. 2012 (arXiv 1203.0550); Kornblith et al. 2019 (arXiv 1905.00414); Song et al. 2012.
    """
    where = "cka"
    first, second = _pair(K, L, estimator, where=where)
    stack = is_stack(K) or is_stack(L)
    if estimator == "biased":
        first, second = (normalized(kernels[..., None, None], center=True, where=where) for kernels in (first, second))
        return unpacked(np.clip((first * second).sum(axis=1), -1.0, 1.0), stack=stack)
    (first, largest), (second, largest_second) = scaled(first), scaled(second)
    if not (largest.all() and largest_second.all()):
        raise UndefinedMeasure(f"{where}: a kernel is zero and has no alignment; leave that step out")
    first, second = _without_diagonal(first), _without_diagonal(second)
    across, own, own_second = _hsic_1(first, second), _hsic_1(first, first), _hsic_1(second, second)
    judged = (own > _rounding_of_hsic(first)) & (own_second > _rounding_of_hsic(second))
    product = np.where(judged, own * own_second, 1.0)
    return unpacked(np.where(judged, across / np.sqrt(product), np.nan), stack=stack)
