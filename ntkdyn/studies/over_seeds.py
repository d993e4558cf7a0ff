"""Values over seeds: those that are there, their mean and interval."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import xarray as xr

    from ..analysis.advantage import Interval


def finite(values: ArrayLike) -> NDArray[np.float64]:
    """Return the values that are there, in their order."""
    array = np.asarray(values, dtype=np.float64).ravel()
    return array[np.isfinite(array)]


def mean(values: ArrayLike) -> float:
    """Return the mean of the values that are there, NaN of none."""
    kept = finite(values)
    return float(kept.mean()) if len(kept) else float("nan")


def means(rows: Iterable[ArrayLike]) -> NDArray[np.float64]:
    """Return the mean of the values that are there of each row."""
    return np.array([mean(row) for row in rows])


def numbers(interval: Interval) -> tuple[float, float, float, float]:
    """Return mean, ends and number of values of an interval."""
    return interval.mean, interval.low, interval.high, float(interval.n)


def stored(dataset: xr.Dataset, name: str) -> Interval:
    """Return the interval that one entry of a dataset holds as ``<name>_mean``, ``_low``, ``_high`` and ``_n``."""
    from ..analysis.advantage import Interval

    center, low, high, n = (float(dataset[f"{name}_{part}"]) for part in ("mean", "low", "high", "n"))
    return Interval(center, low, high, int(n) if n > 0 else 0)
