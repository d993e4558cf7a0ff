"""Whether a positive outcome is the same whatever a network began with: paired ratios and what they allow to say.

Ratios are geometric: means, intervals and spreads of logarithms, so that a half and a double are equally far from 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ShapeError, UndefinedMeasure
from .advantage import mean_interval

INVARIANCE_MARGIN = 1.25
"""Largest factor between two outcomes that still counts as "the same"; fixed before any sweep was looked at."""

Judgement = Literal["supported", "contradicted", "cannot be judged"]


@dataclass(frozen=True)
class Ratio:
    """Ratio of paired outcomes: geometric mean with its 95 % interval, and one adjusted for several comparisons.

    ``n`` pairs are in it; ``left_out`` have a value that is not positive.
    """

    mean: float
    low: float
    high: float
    adjusted_low: float
    adjusted_high: float
    n: int
    left_out: int


def paired_ratio(first: ArrayLike, second: ArrayLike, *, comparisons: int = 1) -> Ratio:
    """Return the geometric mean of first / second over seeds,  exp(m ± t_(n-1) s/√n)  of the logarithms.

    Args:
        first, second: outcomes [n] in one unit, the same seed at the same place; NaN where there is none.
        comparisons: number of ratios that are judged together; the adjusted interval has coverage 1 - .05 / number.
    Raises: ShapeError: lengths differ.  UndefinedMeasure: no comparison.
    Source: Bonferroni's inequality for the adjustment.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ShapeError(f"paired_ratio: found shapes {a.shape} and {b.shape}, expected twice [n]")
    if comparisons < 1:
        raise UndefinedMeasure(f"paired_ratio: found {comparisons} comparisons, expected at least 1")
    there = np.isfinite(a) & np.isfinite(b)
    positive = there & (a > 0) & (b > 0)
    logs = np.log(a[positive] / b[positive])
    plain = mean_interval(logs)
    adjusted = mean_interval(logs, confidence=1 - 0.05 / comparisons)
    mean, low, high = (math.exp(value) for value in (plain.mean, plain.low, plain.high))
    adjusted_low, adjusted_high = math.exp(adjusted.low), math.exp(adjusted.high)
    return Ratio(mean, low, high, adjusted_low, adjusted_high, plain.n, int(there.sum() - positive.sum()))


def invariance(ratio: Ratio, *, margin: float = INVARIANCE_MARGIN) -> Judgement:
    """Say whether "the same" is supported: the interval lies within a factor ``margin`` of 1.

    Contradicted: the adjusted interval lies outside of that; else it cannot be judged, as where a pair is left out.
    That all of several ratios are the same needs each of them to be supported, and no adjustment.

    Raises: UndefinedMeasure: the margin is not above 1.
    Source: two one-sided tests on logarithms, Schuirmann 1987; its interval is the 95 % one here, not the 90 % one.
    """
    if not margin > 1:
        raise UndefinedMeasure(f"invariance: found margin {margin}, expected a factor above 1")
    if ratio.left_out or ratio.n < 2:
        return "cannot be judged"
    if 1 / margin < ratio.low and ratio.high < margin:
        return "supported"
    if ratio.adjusted_low > margin or ratio.adjusted_high < 1 / margin:
        return "contradicted"
    return "cannot be judged"


def spread_factor(values: ArrayLike) -> float:
    """Factor by which an outcome varies between seeds:  exp of the root mean variance of its logarithms.

    Args: values: [K, n], settings by seeds; values that are not positive are left out. Variances are unbiased.
    Returns: 1 where seeds agree; NaN where no setting has two seeds.
    Raises: ShapeError: other shapes.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2:
        raise ShapeError(f"spread_factor: found values of shape {array.shape}, expected [K, n]")
    squares, freedom = 0.0, 0
    for row in array:
        logs = np.log(row[np.isfinite(row) & (row > 0)])
        if len(logs) > 1:
            squares += float(((logs - logs.mean()) ** 2).sum())
            freedom += len(logs) - 1
    return math.exp(math.sqrt(squares / freedom)) if freedom else math.nan


def share_between(active: ArrayLike, low: float, high: float) -> NDArray[np.float64]:
    """Share of the active units between two relative depths; layer l of L covers (l - 1)/L to l/L, evenly.

    Args: active: active units per layer [..., L], from input to output.  low, high: relative depths, 0 ... 1.
    Returns: [...], dimensionless; ``high - low`` where all layers keep as many; NaN where nothing is active.
    Raises: ShapeError: no layer.  UndefinedMeasure: depths out of order.
    """
    counts = np.asarray(active, dtype=np.float64)
    if counts.ndim < 1 or not counts.shape[-1]:
        raise ShapeError(f"share_between: found active of shape {counts.shape}, expected [..., L]")
    if not 0 <= low < high <= 1:
        raise UndefinedMeasure(f"share_between: found depths {low} and {high}, expected 0 <= low < high <= 1")
    layers = counts.shape[-1]
    edges = np.linspace(0, 1, layers + 1)
    inside = np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None) * layers
    total = counts.sum(-1)
    return np.asarray(np.where(total > 0, (counts * inside).sum(-1) / np.where(total > 0, total, 1), np.nan))
