"""Nonlinear advantage: what late instead of early linearization is worth, and what may be said about it.

All accuracies are in percent, differences in accuracy points (percentage points). A diverged run is NaN: its pair is
counted as diverged and never enters a gap. The start epoch belongs to the design, so a correlation over start epochs
alone proves nothing: two independent functions of it correlate at .71 on average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ..errors import ShapeError, UndefinedMeasure
from .power import POWER_CORRELATION, within_power

EQUIVALENCE_MARGIN = 1.0
"""Largest difference, in accuracy points, that still counts as "no gap"; fixed before any run was looked at."""

FEWEST_START_EPOCHS = 5
"""Below this number of start epochs a rank correlation over them cannot be judged."""

FEWEST_SEEDS = 10
"""Below this number of seeds the relation within start epochs cannot be judged."""


@dataclass(frozen=True)
class Interval:
    """Mean of n values with a two-sided t interval; ``diverged`` values (NaN) were left out.

    ``low`` and ``high`` are NaN for n < 2, ``mean`` too for n = 0.
    """

    mean: float
    low: float
    high: float
    n: int
    diverged: int = 0

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes zero, else 0."""
        if self.low > 0:
            return 1
        return -1 if self.high < 0 else 0


@dataclass(frozen=True)
class Equivalence:
    """Outcome of two one-sided t tests: ``equivalent`` when |mean difference| < margin at the stated level."""

    equivalent: bool
    p: float
    margin: float
    n: int


@dataclass(frozen=True)
class Relation:
    """Spearman correlation of a drift with the final accuracy of arms, with what must stand beside it.

    Attributes:
        pooled: over all arms; NaN where it cannot be judged.
        start_only: of the start epoch with the final accuracy: what the design alone gives.
        within: of ranks within start epochs; NaN where it cannot be judged.
        power: chance to find a correlation of 0.3 within start epochs with this design, at level .05.
        arms, starts, seeds: counts.
        pooled_note, within_note: one sentence where a value cannot be judged, else "".
    """

    pooled: float
    start_only: float
    within: float
    power: float
    arms: int
    starts: int
    seeds: int
    pooled_note: str
    within_note: str


def mean_interval(values: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Return the mean with its two-sided t interval  m ± t_(n-1) s/√n; NaN values count as diverged.

    Args: values: [n], any unit.  confidence: coverage of the interval.
    Raises: ShapeError: values is not one-dimensional.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ShapeError(f"mean_interval: found values of shape {array.shape}, expected [n]")
    kept = array[np.isfinite(array)]
    n, diverged = len(kept), len(array) - len(kept)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0, diverged)
    mean = float(kept.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1, diverged)
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * float(kept.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n, diverged)


def paired_gap(late: ArrayLike, early: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Return the mean of late - early over seeds with its paired t interval.

    Args: late, early: final accuracies [n] in percent, the same seed at the same place.
    Returns: Interval in accuracy points; pairs with a NaN count as diverged.
    Raises: ShapeError: lengths differ.
    """
    return mean_interval(_differences(late, early), confidence=confidence)


def interaction(
    learned_late: ArrayLike, learned_early: ArrayLike, random_late: ArrayLike, random_early: ArrayLike
) -> Interval:
    """Return (learned late - learned early) - (random late - random early) over seeds, in accuracy points.

    Args: four arrays [n] in percent, the same seed at the same place.
    """
    return paired_gap(_differences(learned_late, learned_early), _differences(random_late, random_early))


def equivalence(
    late: ArrayLike, early: ArrayLike, *, margin: float = EQUIVALENCE_MARGIN, level: float = 0.05
) -> Equivalence:
    """Test whether |mean of late - early| is below a margin, by two one-sided paired t tests.

    Equivalent to: the (1 - 2 level) interval lies inside (-margin, margin).
    Raises: UndefinedMeasure: the margin is not positive.
    Source: Schuirmann 1987.
    """
    if not margin > 0:
        raise UndefinedMeasure(f"equivalence: found margin {margin}, expected a positive number of accuracy points")
    differences = _differences(late, early)
    kept = differences[np.isfinite(differences)]
    n = len(kept)
    if n < 2:
        return Equivalence(False, math.nan, margin, n)
    mean, error = float(kept.mean()), float(kept.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        p = 0.0 if abs(mean) < margin else 1.0
    else:
        p = max(float(stats.t.sf((mean + margin) / error, n - 1)), float(stats.t.cdf((mean - margin) / error, n - 1)))
    return Equivalence(p < level, p, margin, n)


def relation(start: ArrayLike, seed: ArrayLike, drift: ArrayLike, accuracy: ArrayLike) -> Relation:
    """Return the rank correlation of drift with final accuracy over arms, its start-only baseline and within value.

    The gap is never used: it shares one late arm a seed and is zero by construction at the last start. These values
    describe; inference, with effects of start epoch and seed, is in ``arm_models``.

    Args:
        start, seed: start epoch and seed of each arm [n].
        drift: any drift of the kernel, [n].
        accuracy: final accuracy [n] in percent; arms with a NaN in drift or accuracy are left out.
    Raises: ShapeError: lengths differ.
    """
    columns = [np.asarray(column, dtype=np.float64) for column in (start, seed, drift, accuracy)]
    if any(column.ndim != 1 or len(column) != len(columns[0]) for column in columns):
        raise ShapeError(f"relation: found shapes {[column.shape for column in columns]}, expected four times [n]")
    kept = np.isfinite(columns[2]) & np.isfinite(columns[3])
    starts, seeds, drifts, accuracies = (column[kept] for column in columns)
    n_starts, n_seeds = len(np.unique(starts)), len(np.unique(seeds))
    power = within_power(starts=n_starts, seeds=n_seeds)
    pooled = start_only = within = math.nan
    pooled_note = within_note = ""
    if n_starts < FEWEST_START_EPOCHS:
        pooled_note = (
            f"no correlation can be judged: {n_starts} start epochs, at least {FEWEST_START_EPOCHS} are needed"
        )
    else:
        pooled, start_only = _spearman(drifts, accuracies), _spearman(starts, accuracies)
    if n_seeds < FEWEST_SEEDS:
        within_note = (
            f"within start epochs the relation cannot be judged: {n_seeds} seeds, at least {FEWEST_SEEDS} are needed "
            f"(power for a correlation of {POWER_CORRELATION}: {power:.0%})"
        )
    else:
        within = _within(starts, drifts, accuracies)
    return Relation(pooled, start_only, within, power, len(starts), n_starts, n_seeds, pooled_note, within_note)


def verdict(gap: Interval, test: Equivalence) -> str:
    """Return in words what a gap late - early allows to say; "no gap" needs the equivalence test.

    >>> verdict(Interval(15.6, 11.0, 20.2, 5), Equivalence(False, 1.0, 1.0, 5))
    'late linearization ends higher by 15.6 points (95 % interval 11.0 to 20.2, n = 5)'
    """
    diverged = f"; {gap.diverged} pairs diverged and are left out" if gap.diverged else ""
    if gap.n == 0:
        return f"no gap can be given: all {gap.diverged} pairs diverged" if gap.diverged else "no pair of runs"
    if gap.n == 1:
        return f"one pair of runs only ({gap.mean:+.1f} points): no interval, nothing can be judged{diverged}"
    numbers = f"95 % interval {gap.low:.1f} to {gap.high:.1f}, n = {gap.n}{diverged}"
    if test.equivalent:
        return (
            f"no gap beyond {test.margin:g} points ({gap.mean:+.1f}; two one-sided tests at 5 %, {_p_value(test.p)}; "
            f"{numbers})"
        )
    if gap.sign > 0:
        return f"late linearization ends higher by {gap.mean:.1f} points ({numbers})"
    if gap.sign < 0:
        return f"late linearization ends lower by {-gap.mean:.1f} points ({numbers})"
    return (
        f"late and early are not distinguishable ({gap.mean:+.1f} points, {numbers}); "
        f"that is no proof of equality (margin {test.margin:g} points, {_p_value(test.p)})"
    )


def difficulty(relu: Mapping[str, float], linear: Mapping[str, float]) -> dict[str, float]:
    """Return per task what nonlinearity is worth at all: accuracy of the ReLU network minus that of the linear one.

    Args: relu, linear: mean final accuracy in percent by task.
    Returns: accuracy points by task, for tasks in both.
    """
    return {task: relu[task] - linear[task] for task in relu if task in linear}


def _differences(late: ArrayLike, early: ArrayLike) -> NDArray[np.float64]:
    first, second = np.asarray(late, dtype=np.float64), np.asarray(early, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ShapeError(f"paired values: found shapes {first.shape} and {second.shape}, expected twice [n]")
    return first - second


def _p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _spearman(a: NDArray[Any], b: NDArray[Any]) -> float:
    return _pearson(stats.rankdata(a), stats.rankdata(b))


def _pearson(a: NDArray[Any], b: NDArray[Any]) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else math.nan


def _within(starts: NDArray[Any], drift: NDArray[Any], accuracy: NDArray[Any]) -> float:
    """Correlation of ranks within start epochs, less their means."""
    ranks = np.empty((2, len(starts)))
    for epoch in np.unique(starts):
        here = starts == epoch
        for layer, values in enumerate((drift, accuracy)):
            ranked = stats.rankdata(values[here])
            ranks[layer, here] = ranked - ranked.mean()
    return _pearson(*ranks)
