"""How studies say paired differences and intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from ..analysis.advantage import Equivalence, Interval


def bounds(interval: Interval) -> str:
    """Return the 95 % interval and the number of seeds in words.

    >>> from ntkdyn.analysis import mean_interval
    >>> bounds(mean_interval([1.0, 2.0, 3.0]))
    '95 % interval -0.5 to 4.5, n = 3'
    """
    if interval.n < 2:
        return f"no interval, n = {interval.n}"
    return f"95 % interval {interval.low:.1f} to {interval.high:.1f}, n = {interval.n}"


def difference(first: str, second: str, gap: Interval, test: Equivalence, unit: str = "points") -> str:
    """Say which of two kinds of networks ends higher, that none does beyond a margin, or that it cannot be said.

    Args: first, second: in the plural.  gap: first - second.  test: of the same pairs.  unit: of both.
    """
    if gap.n == 0:
        return f"{first} and {second} cannot be compared: no pair of runs"
    if gap.n == 1:
        return f"{first} and {second}: one pair of runs only ({gap.mean:+.1f} {unit}), nothing can be judged"
    if test.equivalent:
        return (
            f"{first} and {second} differ by no more than {test.margin:g} {unit} ({gap.mean:+.1f}; two one-sided tests "
            f"at 5 %; {bounds(gap)})"
        )
    if gap.sign:
        direction = "higher" if gap.sign > 0 else "lower"
        return f"{first} end {direction} than {second} by {abs(gap.mean):.1f} {unit} ({bounds(gap)})"
    return (
        f"{first} and {second} are not distinguishable ({gap.mean:+.1f} {unit}, {bounds(gap)}), which is no proof of "
        "equality"
    )


def outcome(gap: Interval, *, higher: str, lower: str) -> str:
    """Return which side of zero a 95 % interval lies on, in words."""
    if gap.n < 2:
        return "one pair, not judged" if gap.n else "no pair"
    return {1: higher, -1: lower, 0: "not distinguishable"}[gap.sign]


def adjustment(places: Sequence[str], comparisons: float, least_p: float) -> str:
    """Say what stays of several exploratory comparisons when all are judged together (max-T).

    Args: places: where the adjusted p is below .05.  least_p: the least p that so many seeds allow.
    """
    head = f"each by its own 95 % interval; judged together, {comparisons:.0f} comparisons by max-T"
    if least_p > 0.05:
        return f"{head}, nothing can be told: so few seeds allow no p below {least_p:.2g}"
    return f"{head}, p < 0.05 at {', '.join(places)}" if places else f"{head}, p < 0.05 at none"


def measured(values: ArrayLike, digits: int = 3) -> str:
    """Return the mean of the finite values, "" where there is none."""
    array = np.asarray(values, dtype=np.float64)
    array = array[np.isfinite(array)]
    return f"{array.mean():.{digits}g}" if len(array) else ""


def with_interval(mean: float, low: float, high: float) -> str:
    """Return a mean with its interval for a cell of a table, "" where there is none."""
    if not np.isfinite(mean):
        return ""
    return f"{mean:.1f} ({low:.1f} to {high:.1f})" if np.isfinite(low) else f"{mean:.1f}"
