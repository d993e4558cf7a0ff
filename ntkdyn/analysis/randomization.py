"""Randomization tests of paired differences: sign flips over seeds, jointly for many comparisons.

Under the null hypothesis a seed's differences may change sign together: late and early carry exchangeable labels. So
the only assumption is that differences are symmetric around zero; neither normality nor independence of the
comparisons, which share arms, is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ShapeError, UndefinedMeasure

EXACT_SEEDS = 13
"""Up to this number of seeds all sign flips are taken, above it `RANDOM_FLIPS` random ones."""

RANDOM_FLIPS = 4096
"""Flips where not all are taken, the identity among them, which is the +1 of the p value."""

# Statistics closer than this, relatively, are the same number computed along two ways.
_TIE = 1e-6

_BISECTIONS = 40


@dataclass(frozen=True)
class SignFlips:
    """Outcome of a sign-flip test.

    Attributes:
        p: two-sided, NaN for fewer than two differences.
        n: differences.
        flips: distinct flips that were compared.
        exact: all of them were.
    """

    p: float
    n: int
    flips: int
    exact: bool


@dataclass(frozen=True)
class MaxT:
    """Several comparisons, adjusted over all of them; every array has one entry a comparison, NaN where n < 2.

    Attributes:
        mean: mean difference.
        p: of each comparison alone, two-sided.
        adjusted: p with the greatest |t| of all comparisons as reference.
        low, high: simultaneous interval, the means that the adjusted test does not reject; infinite where too few
            seeds allow no rejection.
        n: differences.
        flips, exact: as in ``SignFlips``.
    """

    mean: NDArray[np.float64]
    p: NDArray[np.float64]
    adjusted: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    n: NDArray[np.int64]
    flips: int
    exact: bool


def sign_flip_test(differences: ArrayLike) -> SignFlips:
    """Test whether paired differences are symmetric around zero, by flipping the sign of each seed.

    p = (flips with |t| at least the observed one) / flips,  t = mean √n / standard deviation

    The identity counts as a flip, so p is never below 1 / 2^(n-1): with 5 seeds .06.

    Args: differences: [n] in any unit; NaN is left out.
    Raises: ShapeError: not one-dimensional.
    Source: Fisher 1935, The Design of Experiments, section 21.

    >>> sign_flip_test([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).p
    0.03125
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1:
        raise ShapeError(f"sign_flip_test: found differences of shape {values.shape}, expected [n]")
    kept = values[np.isfinite(values)]
    signs, exact = _signs(len(kept))
    if len(kept) < 2:
        return SignFlips(math.nan, len(kept), len(signs), exact)
    statistics = _t(signs @ kept, float(kept @ kept), len(kept))
    return SignFlips(_share(statistics, statistics[0]), len(kept), len(signs), exact)


def max_t(differences: ArrayLike, *, level: float = 0.05) -> MaxT:
    """Adjust several paired comparisons over all of them by joint sign flips of whole seeds.

    A flip changes the sign of a seed in every comparison, so that what the comparisons share, arms and seeds, is in
    the reference distribution of max_j |t_j|. Adjusted p: share of flips whose greatest |t| reaches |t_j|. The
    simultaneous interval of comparison j holds every d for which differences - d are not rejected at ``level``,
    the other comparisons as they are; it excludes 0 exactly where the adjusted p is at most ``level``.

    Args: differences: [comparisons, seeds], one seed at the same place everywhere, NaN where a pair is missing.
        level: one less the simultaneous coverage.
    Raises: ShapeError: not two-dimensional.  UndefinedMeasure: level outside of (0, 1).
    Source: Westfall and Young 1993, Resampling-Based Multiple Testing (single step); Romano and Wolf 2005.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 2:
        raise ShapeError(f"max_t: found differences of shape {values.shape}, expected [comparisons, seeds]")
    if not 0 < level < 1:
        raise UndefinedMeasure(f"max_t: found level {level}, expected a number inside (0, 1)")
    there = np.isfinite(values)
    used = there.any(axis=0)
    values, there = values[:, used], there[:, used]
    n = there.sum(axis=1)
    signs, exact = _signs(values.shape[1])
    filled = np.where(there, values, 0.0)
    squares = (filled**2).sum(axis=1)
    judged = np.flatnonzero(n >= 2)
    statistics = np.full((len(values), len(signs)), -math.inf)
    for j in judged:
        statistics[j] = _t(signs @ filled[j], float(squares[j]), int(n[j]))
    columns = {name: np.full(len(values), math.nan) for name in ("mean", "p", "adjusted", "low", "high")}
    for j in judged:
        others = np.delete(statistics, j, axis=0).max(axis=0, initial=-math.inf)
        columns["mean"][j] = filled[j].sum() / n[j]
        columns["p"][j] = _share(statistics[j], statistics[j, 0])
        columns["adjusted"][j] = _share(np.maximum(statistics[j], others), statistics[j, 0])
        columns["low"][j], columns["high"][j] = _interval(filled[j], there[j], signs, others, level)
    return MaxT(**columns, n=n.astype(np.int64), flips=len(signs), exact=exact)


def _signs(seeds: int) -> tuple[NDArray[np.float64], bool]:
    """Signs [flips, seeds], the identity first, and whether these are all; a flip and its mirror image have one |t|."""
    if seeds <= EXACT_SEEDS:
        bits = (np.arange(2 ** max(seeds - 1, 0))[:, None] >> np.arange(max(seeds - 1, 0))) & 1
        return np.hstack([np.ones((len(bits), min(seeds, 1))), 1.0 - 2.0 * bits]), True
    # A fixed generator: the same recording gives the same number every time.
    drawn = np.random.default_rng(0).choice([-1.0, 1.0], size=(RANDOM_FLIPS, seeds))
    drawn[0] = 1.0
    return drawn, False


def _t(sums: NDArray[np.float64], squares: float, n: int) -> NDArray[np.float64]:
    """|t| of values with these sums; flips do not change the sum of their squares."""
    if squares == 0:
        return np.zeros(len(sums))
    # Share of the mean in the squares; 1 where all values are equal, whose |t| would be infinite.
    share = np.minimum(sums**2 / (n * squares), 1 - 1e-9)
    return np.asarray(np.sqrt((n - 1) * share / (1 - share)))


def _share(statistics: NDArray[np.float64], observed: float) -> float:
    return float(np.mean(statistics >= observed * (1 - _TIE)))


def _interval(
    values: NDArray[np.float64],
    there: NDArray[np.bool_],
    signs: NDArray[np.float64],
    others: NDArray[np.float64],
    level: float,
) -> tuple[float, float]:
    """Ends of the set of means that are not rejected, sought outwards from the observed mean."""
    n = int(there.sum())
    mean = float(values.sum()) / n
    sums, weights = signs @ values, signs @ there.astype(np.float64)

    def rejected(shift: float) -> bool:
        squares = float(((values - shift)[there] ** 2).sum())
        statistics = _t(sums - shift * weights, squares, n)
        return _share(np.maximum(statistics, others), statistics[0]) <= level

    scale = float(np.sqrt(((values - mean)[there] ** 2).sum() / max(n - 1, 1) / n))
    ends = []
    for side in (-1.0, 1.0):
        if scale == 0:
            ends.append(mean if rejected(mean + side * max(abs(mean), 1.0)) else side * math.inf)
            continue
        inside, outside = 0.0, 1.0
        while not rejected(mean + side * outside * scale) and outside < 1e6:
            inside, outside = outside, 2 * outside
        if outside >= 1e6:
            ends.append(side * math.inf)
            continue
        for _ in range(_BISECTIONS):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejected(mean + side * middle * scale) else (middle, outside)
        ends.append(mean + side * outside * scale)
    return ends[0], ends[1]
