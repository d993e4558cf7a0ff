"""Ratios of what is left of networks that began larger or smaller, or that learned another task."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .groups import Group
from .over_seeds import finite

MEASURES = {
    "active_units": ("units", "active units"),
    "napl": ("units per path", "effective depth (NAPL)"),
    "width_per_path": ("units", "effective width per path (active units / NAPL)"),
    "width_per_layer": ("units", "effective width per layer (mean over layers with an active unit)"),
}
"""Outcomes that are compared: unit and what it is."""

NUMBERS = {
    "mean": "geometric mean over seeds, paired",
    "low": "lower end of its 95 % interval",
    "high": "upper end of its 95 % interval",
    "n": "pairs",
}

Start = tuple[int, int]
"""Width and depth before training."""


def contrasts_of(starts: list[Start]) -> dict[str, tuple[Start, Start]]:
    """Largest and smallest start that differ in width, or in depth, alone."""
    found = {}
    for depth in sorted({start[1] for start in starts}):
        widths = sorted(start[0] for start in starts if start[1] == depth)
        if len(widths) > 1:
            found[f"width {widths[-1]} / {widths[0]} at depth {depth}"] = ((widths[-1], depth), (widths[0], depth))
    for width in sorted({start[0] for start in starts}):
        depths = sorted(start[1] for start in starts if start[0] == width)
        if len(depths) > 1:
            found[f"depth {depths[-1]} / {depths[0]} at width {width}"] = ((width, depths[-1]), (width, depths[0]))
    return found


def ratios_of(
    outcomes: dict[str, NDArray[np.float64]],
    contrasts: dict[str, tuple[Start, Start]],
    starts: list[Start],
    total: NDArray[np.float64],
    constructed: NDArray[np.bool_],
) -> dict[str, NDArray[Any]]:
    """Ratios of outcomes of the larger start to those of the smaller, and what they say about the same core."""
    from ..analysis.ratios import invariance, paired_ratio

    count = len(total)
    size = (count, len(contrasts), len(MEASURES))
    found: dict[str, NDArray[Any]] = {name: np.full(size, np.nan) for name in (*NUMBERS, "left_out")}
    judgement = np.full(size, "not judged", dtype="<U16")
    for i in range(count):
        judged = (len(MEASURES) - int(constructed[i])) * len(contrasts)
        for j, (large, small) in enumerate(contrasts.values()):
            a, b = starts.index(large), starts.index(small)
            active = outcomes["active_units"][i]
            untouched = any(np.isfinite(active[k]).any() and (finite(active[k]) == total[i, k]).all() for k in (a, b))
            for k, name in enumerate(MEASURES):
                ratio = paired_ratio(outcomes[name][i, a], outcomes[name][i, b], comparisons=judged)
                for number in (*NUMBERS, "left_out"):
                    found[number][i, j, k] = getattr(ratio, number)
                if ratio.n + ratio.left_out and not (name == "width_per_path" and constructed[i]):
                    # Where a price takes no unit there is no core to compare.
                    judgement[i, j, k] = "cannot be judged" if untouched else invariance(ratio)
    return found | {"judgement": judgement}


def between_tasks(
    found: list[Group], outcomes: dict[str, NDArray[np.float64]]
) -> tuple[list[str], NDArray[np.float64]]:
    """Ratios of outcomes of two tasks at equal settings: geometric means over the starts in both, paired by seed."""
    from ..analysis.ratios import paired_ratio

    pairs, rows = [], []
    for (i, first), (j, second) in itertools.combinations(enumerate(found), 2):
        rest = [group.label.removeprefix(group.task).removeprefix(", ") for group in (first, second)]
        if first.task == second.task or rest[0] != rest[1]:
            continue
        pairs.append(f"{first.task} / {second.task}" + (f", {rest[0]}" if rest[0] else ""))
        numbers = []
        for name in MEASURES:
            both = np.isfinite(outcomes[name][i]) & np.isfinite(outcomes[name][j])
            both &= (outcomes[name][i] > 0) & (outcomes[name][j] > 0)
            logs = np.where(
                both, np.log(np.where(both, outcomes[name][i], 1) / np.where(both, outcomes[name][j], 1)), 0
            )
            ratios = np.where(both.any(0), logs.sum(0) / np.maximum(both.sum(0), 1), np.nan)
            ratio = paired_ratio(np.exp(ratios), np.ones(len(ratios)))
            numbers.append([getattr(ratio, number) for number in NUMBERS])
        rows.append(numbers)
    return pairs, np.array(rows, dtype=np.float64).reshape(len(rows), len(MEASURES), len(NUMBERS))
