"""How far a kernel moved: distances, angle, velocity. Dimensionless unless said otherwise.

Arguments are one kernel or a stack along a leading axis, see `kernels`: `kernel_distance(run["ntk/test/kernel"],
final)` gives one distance per snapshot.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ShapeError, UndefinedMeasure
from .kernels import FloatArray, Measure, as_kernels, is_stack, normalized, scaled, unpacked


class Velocity(NamedTuple):
    """First steps of the pairs [P] and the kernel velocity there [P], 1/epoch."""

    steps: NDArray[np.int64]
    values: FloatArray


def _directions(K: ArrayLike, L: ArrayLike, *, center: bool, where: str) -> tuple[FloatArray, FloatArray, bool]:
    """Unit vectors of both arguments, and whether either is a stack."""
    first, second = (as_kernels(kernel, where=where, square=False) for kernel in (K, L))
    if first.shape[1:] != second.shape[1:] or (len(first) != len(second) and 1 not in (len(first), len(second))):
        raise ShapeError(
            f"{where}: kernels have shapes {np.shape(K)} and {np.shape(L)}; expected equal ones, or a stack and one "
            f"kernel"
        )
    first, second = (normalized(kernels, center=center, where=where) for kernels in (first, second))
    return first, second, is_stack(K) or is_stack(L)


def _distance(K: ArrayLike, L: ArrayLike, *, center: bool, where: str) -> Measure:
    first, second, stack = _directions(K, L, center=center, where=where)
    difference = first - second
    # 1 - <k, l> of unit vectors is half their squared distance; the difference keeps all digits of a small distance,
    # 1 - cosine only those above 1e-16 (see test_small_distances_keep_their_digits).
    return unpacked(np.minimum(0.5 * np.einsum("bi,bi->b", difference, difference), 2.0), stack=stack)


def kernel_distance(K: ArrayLike, L: ArrayLike) -> Measure:
    """Kernel distance  S = 1 - <K, L> / (|K|_F |L|_F), without centering.

    Blind to positive scale. It mostly sees the constant direction of the kernel: print `constant_share` beside it and
    take `kernel_distance_centered` as the primary measure.

    Args: K, L: kernels [N, M] or [N, M, C, C] of equal shape, or stacks [B, ...]; a stack against one kernel repeats
        the one.
    Returns: float, or [B] for a stack; in [0, 2], in [0, 1] for positive semi-definite kernels.
    Raises: ShapeError: sizes differ.  UndefinedMeasure: a kernel is zero or not finite.
    Source: Fort et al. 2020 (arXiv 2010.15110).

    >>> round(kernel_distance([[2, 1], [1, 2]], [[2, 0], [0, 2]]), 7)
    0.1055728
    """
    return _distance(K, L, center=False, where="kernel_distance")


def kernel_distance_centered(K: ArrayLike, L: ArrayLike) -> Measure:
    """Centered kernel distance  S = 1 - <HKH, HLH> / (|HKH|_F |HLH|_F),  H = I - 1 1^T / N; the primary drift.

    Equals 1 - cka(K, L, estimator="biased"). A full kernel is centered over samples for every pair of outputs.

    Args, returns: as `kernel_distance`.
    Raises: ShapeError: sizes differ.  UndefinedMeasure: a kernel is zero, not finite, or constant over samples.
    Source: Fort et al. 2020 (arXiv 2010.15110) for S; Cortes et al. 2012 (arXiv 1203.0550) for the centering.
    """
    return _distance(K, L, center=True, where="kernel_distance_centered")


def kernel_angle(K: ArrayLike, L: ArrayLike, *, centered: bool = False) -> Measure:
    """Angle between two kernels  arccos(1 - S), a metric on directions, in radians.

    Computed as 2 arctan(|k - l| / |k + l|) of the normalized kernels, which is exact to rounding for all angles;
    arccos(1 - S) loses all digits below 1e-8.

    Args: K, L: as in `kernel_distance`.  centered: angle between HKH and HLH.
    Returns: float, or [B] for a stack; in [0, pi], in [0, pi/2] for positive semi-definite kernels.
    Raises: as `kernel_distance` and `kernel_distance_centered`.
    Source: Fort et al. 2020 (arXiv 2010.15110); Kahan 2006 for the formula.
    """
    first, second, stack = _directions(K, L, center=centered, where="kernel_angle")
    apart = np.linalg.norm(first - second, axis=1)
    together = np.linalg.norm(first + second, axis=1)
    return unpacked(2 * np.arctan2(apart, together), stack=stack)


def distance_matrix(kernels: ArrayLike, *, centered: bool = True) -> FloatArray:
    """Kernel distances between all snapshots  S[s, t], symmetric with zero diagonal.

    One normalization per kernel and one Gram matrix. The mean direction is taken off first, so rounding errors are
    relative to the spread of the kernels: about 1e-16 times the largest distance.

    Args: kernels: stack [S, N, M] or [S, N, M, C, C].
    Returns: float64 [S, S], entries in [0, 2].
    Raises: ShapeError: no stack.  UndefinedMeasure: as `kernel_distance` and `kernel_distance_centered`.
    """
    if not is_stack(kernels):
        raise ShapeError(
            f"distance_matrix: kernels have shape {np.shape(kernels)}; expected a stack [S, N, N] or [S, N, N, C, C]"
        )
    where = "distance_matrix"
    directions = normalized(as_kernels(kernels, where=where, square=False), center=centered, where=where)
    directions -= directions.mean(axis=0)
    gram = directions @ directions.T
    squares = np.diagonal(gram)
    distances = np.clip(0.5 * (squares[:, None] + squares[None, :]) - gram, 0.0, 2.0)
    np.fill_diagonal(distances, 0.0)
    return 0.5 * (distances + distances.T)


def kernel_velocity(
    steps: ArrayLike, kernels: ArrayLike, *, dt: int | ArrayLike, epochs_per_step: float, centered: bool = True
) -> Velocity:
    """Kernel velocity  v(t) = S(K_t, K_{t + dt}) / dt  at one fixed dt, over all recorded pairs (t, t + dt).

    S grows like dt^2 for smooth motion and like dt for gradient noise, so velocities of different dt cannot be
    compared: there is no way to mix them here.

    Args:
        steps: recorded steps [S], increasing.
        kernels: stack [S, N, M] or [S, N, M, C, C].
        dt: distance of a pair in steps; a sequence (as np.diff gives) must hold one value only.
        epochs_per_step: length of a step, 1 / steps per epoch.
        centered: which distance.
    Returns: Velocity(steps [P] of the first snapshots, values [P] in 1/epoch).
    Raises: ShapeError: steps do not fit the kernels or do not increase.  UndefinedMeasure: several dt, no pair at
        dt, dt or epochs_per_step not positive, or a distance is undefined.
    Source: Fort et al. 2020 (arXiv 2010.15110).
    """
    where = "kernel_velocity"
    times = np.asarray(steps)
    if not is_stack(kernels) or times.shape != (len(np.asarray(kernels)),):
        raise ShapeError(
            f"{where}: steps have shape {times.shape} and kernels {np.shape(kernels)}; expected [S] and [S, N, N]"
        )
    if (np.diff(times) <= 0).any():
        raise ShapeError(f"{where}: steps {times.tolist()} do not increase; sort the snapshots by step")
    intervals = np.unique(np.asarray(dt))
    if len(intervals) != 1:
        raise UndefinedMeasure(
            f"{where}: dt holds {len(intervals)} values {intervals[:5].tolist()}; velocities of different dt cannot be "
            f"compared; record pairs with schedule.paired(..., dt) and give that one dt"
        )
    interval = intervals[0]
    if interval <= 0 or not epochs_per_step > 0:
        raise UndefinedMeasure(
            f"{where}: dt is {interval} and epochs_per_step {epochs_per_step}; expected positive numbers"
        )
    second = np.searchsorted(times, times + interval)
    first = np.flatnonzero(times[np.minimum(second, len(times) - 1)] == times + interval)
    if not len(first):
        raise UndefinedMeasure(
            f"{where}: no two of the steps {times[:8].tolist()} are {interval} apart; record pairs with "
            f"schedule.paired(..., dt={interval}) or give a dt that was recorded"
        )
    stack = np.asarray(kernels)
    distance = kernel_distance_centered if centered else kernel_distance
    values = np.asarray(distance(stack[first], stack[second[first]]), dtype=np.float64)
    return Velocity(times[first].astype(np.int64), values / (float(interval) * epochs_per_step))


def relative_change(K: ArrayLike, reference: ArrayLike) -> Measure:
    """Relative change  |K - K_0|_F / |K_0|_F; unlike S it sees the scale.

    Args: K: kernel or stack.  reference: K_0, one kernel or a stack of the same length.
    Returns: float, or [B] for a stack; >= 0.
    Raises: ShapeError: sizes differ.  UndefinedMeasure: the reference is zero, or a value is not finite.
    Source: Geiger et al. 2020 (arXiv 1906.08034).
    """
    where = "relative_change"
    first, second = (as_kernels(kernel, where=where, square=False) for kernel in (K, reference))
    if first.shape[1:] != second.shape[1:] or len(second) not in (1, len(first)):
        raise ShapeError(
            f"{where}: kernels have shapes {np.shape(K)} and {np.shape(reference)}; expected equal ones, or a stack "
            f"and one reference"
        )
    small, largest = scaled(second)
    if not largest.all():
        raise UndefinedMeasure(f"{where}: the reference kernel is zero; take another reference step")
    exponent = np.frexp(largest)[1].reshape(-1, 1, 1, 1, 1)
    difference = (np.ldexp(first, -exponent) - small).reshape(len(first), -1)
    norms = np.linalg.norm(small.reshape(len(small), -1), axis=1)
    return unpacked(np.linalg.norm(difference, axis=1) / norms, stack=is_stack(K))


def constant_share(K: ArrayLike) -> Measure:
    """Share of the kernel's squared norm along the constant direction  (u^T K u)^2 / |K|_F^2,  u = 1 / sqrt(N).

    The uncentered kernel distance mostly sees this direction when the share is near 1. For a full kernel the squares
    of all output pairs are added.

    Args: K: kernel [N, M] or [N, M, C, C], or a stack.
    Returns: float, or [B] for a stack; in [0, 1].
    Raises: UndefinedMeasure: the kernel is zero or not finite.
    """
    where = "constant_share"
    kernels = as_kernels(K, where=where, square=False)
    unit = normalized(kernels, center=False, where=where).reshape(kernels.shape)
    along = unit.sum(axis=(1, 2)) ** 2 / (kernels.shape[1] * kernels.shape[2])
    return unpacked(np.minimum(along.sum(axis=(1, 2)), 1.0), stack=is_stack(K))
