"""Accuracy against path length: what a curve gives at a matched length, where it leaves its start, where it falls.

Accuracies are in percent, path lengths in active units per path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ShapeError, UndefinedMeasure
from .advantage import EQUIVALENCE_MARGIN, Interval, mean_interval

Standing = Literal["kept", "lost", "open"]


@dataclass(frozen=True)
class Part:
    """Part of a curve between neighboring points: their places, and its slope in accuracy points per unit of length."""

    longer: int
    shorter: int
    slope: Interval


def accuracy_at(length: ArrayLike, accuracy: ArrayLike, at: ArrayLike) -> NDArray[np.float64]:
    """Accuracy of a curve at given path lengths, linear between its points.

    Points of equal length are averaged, points with a NaN left out; outside of the curve there is no value.

    Args: length, accuracy: the points [P].  at: lengths [M].
    Returns: [M], percent; NaN outside of the curve.
    Raises: ShapeError: shapes do not fit.
    """
    x, y, wanted = (np.asarray(column, dtype=np.float64) for column in (length, accuracy, at))
    if x.ndim != 1 or x.shape != y.shape or wanted.ndim != 1:
        raise ShapeError(
            f"accuracy_at: found length {x.shape}, accuracy {y.shape} and at {wanted.shape}, expected [P], [P] and [M]"
        )
    there = np.isfinite(x) & np.isfinite(y)
    if not there.any():
        return np.full(wanted.shape, np.nan)
    points, place = np.unique(x[there], return_inverse=True)
    means = np.bincount(place, weights=y[there]) / np.bincount(place)
    return np.asarray(np.interp(wanted, points, means, left=np.nan, right=np.nan))


def standing(difference: Interval, *, margin: float = EQUIVALENCE_MARGIN) -> Standing:
    """Say whether a difference to the dense network is above -margin ("kept"), below it ("lost"), or "open".

    By the ends of its 95 % interval; "open" without one. More accurate than the dense network is "kept".

    Raises: UndefinedMeasure: the margin is not positive.
    """
    if not margin > 0:
        raise UndefinedMeasure(f"standing: found margin {margin}, expected a positive number of accuracy points")
    if difference.low > -margin:
        return "kept"
    return "lost" if difference.high < -margin else "open"


def kept_and_lost(standings: Sequence[Standing]) -> tuple[int | None, int | None]:
    """Return the last place up to which all is "kept", and the first from which on all is "lost".

    Args: standings: in order of falling path length.
    Returns: places; None where the first is not kept, or the last not lost.
    """
    kept = next((place for place, one in enumerate(standings) if one != "kept"), len(standings)) - 1
    rising = standings[::-1]
    lost = len(standings) - next((place for place, one in enumerate(rising) if one != "lost"), len(standings))
    return (kept if kept >= 0 else None), (lost if lost < len(standings) else None)


def steepest(length: ArrayLike, accuracy: ArrayLike) -> Part | None:
    """Return the part of a curve with the greatest mean slope  (a_i - a_j) / (l_i - l_j),  and its interval over seeds.

    It is picked from all parts, so its interval is too good: exploratory.

    Args: length, accuracy: [P, S] of each point and seed, mean lengths falling.
    Returns: None for fewer than two points.
    Raises: ShapeError: shapes do not fit.
    """
    x, y = np.asarray(length, dtype=np.float64), np.asarray(accuracy, dtype=np.float64)
    if x.ndim != 2 or x.shape != y.shape:
        raise ShapeError(f"steepest: found length {x.shape} and accuracy {y.shape}, expected [P, S] twice")
    steps = x[:-1] - x[1:]
    # Two networks of the same path length have no slope between them.
    slopes = np.where(steps > 0, (y[:-1] - y[1:]) / np.where(steps > 0, steps, 1.0), np.nan)
    parts = [Part(place, place + 1, mean_interval(row)) for place, row in enumerate(slopes)]
    parts = [part for part in parts if part.slope.n]
    return max(parts, key=lambda part: part.slope.mean, default=None)
