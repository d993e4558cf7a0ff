"""Every comparison of a sweep that is paired by seed: the primary one, and the others adjusted over all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import arms
from .recorded import variable

if TYPE_CHECKING:
    import pandas as pd

    from ..primary import PrimaryComparison
    from ..results import Sweep

CONTRASTS = (
    ("learned: late - early", "learned, late", "learned, early"),
    ("random: late - early", "random, late", "random, early"),
    ("late mask from start - learned early", "late mask, early", "learned, early"),
    ("late path from start - learned early", "late path, early", "learned, early"),
    ("learned late - late mask from start", "learned, late", "late mask, early"),
    ("equal epochs after switch: late - early", "after switch, late", "after switch, early"),
)

INTERACTION = "interaction: learned - random"


@dataclass(frozen=True)
class Comparison:
    """Differences of two kinds of arms by seed, in accuracy points, and how they are judged.

    Attributes:
        differences: [seed], NaN where an arm is missing or diverged.
        primary: the one comparison that is not adjusted; the others are exploratory.
        named: the sweep's plan names it; else it is the gap of the first task's first line.
        p: sign flips over seeds, this comparison alone.
        adjusted, low, high: p and simultaneous 95 % interval over all exploratory comparisons of the sweep (max-T);
            NaN for the primary one, which is not adjusted.
        among: number of exploratory comparisons.
    """

    differences: NDArray[np.float64]
    primary: bool
    named: bool
    p: float
    adjusted: float
    low: float
    high: float
    among: int

    @property
    def numbers(self) -> tuple[float, ...]:
        """The values that ``NUMBERS`` names."""
        flags = float(self.primary), float(self.named)
        return (*flags, self.p, self.adjusted, self.low, self.high, float(self.among))


def comparisons(sweep: Sweep) -> dict[tuple[str, str], Comparison]:
    """Return (task, label) -> comparison: gaps of all lines, contrasts of the controls, interventions against none.

    The one that the sweep's plan names has the key ("", its words) too. The same differences under two labels count
    once.
    """
    from ..analysis import max_t, sign_flip_test

    seeds = arms.seeds_of(sweep)
    found: dict[tuple[str, str], NDArray[np.float64]] = {}
    for task in arms.tasks(sweep):
        for line in arms.lines(sweep, task):
            found[task, line.label] = gap(line, seeds)
        found |= {(task, label): values for label, values in contrasts(sweep, task, seeds).items()}
        found |= {(task, label): values for label, values in changes(sweep, task, seeds).items()}
    named = sweep.primary
    if named is None:
        primary = next(iter(found.values()), np.array([]))
    else:
        primary = found["", str(named)] = named_differences(sweep, named, seeds)
    exploratory: list[NDArray[np.float64]] = []
    for values in found.values():
        if np.isfinite(values).sum() > 1 and not any(_same(values, other) for other in (primary, *exploratory)):
            exploratory.append(values)
    joint = max_t(np.stack(exploratory)) if exploratory else None
    judged = {}
    for key, values in found.items():
        adjusted = low = high = math.nan
        for place, other in enumerate(exploratory):
            if joint is not None and _same(values, other):
                adjusted, low, high = (float(column[place]) for column in (joint.adjusted, joint.low, joint.high))
        p = sign_flip_test(values).p
        is_primary = _same(values, primary)
        flags = is_primary, is_primary and named is not None
        judged[key] = Comparison(values, *flags, p, adjusted, low, high, len(exploratory))
    return judged


NUMBERS = {
    "primary": ("1", "1 for the primary comparison; the others are exploratory"),
    "named": ("1", "1 where the plan of the sweep names it"),
    "p": ("1", "p of sign flips over seeds, this difference alone"),
    "adjusted_p": ("1", "p adjusted over all exploratory comparisons of the sweep (max-T)"),
    "adjusted_low": ("percentage points", "lower end of its simultaneous 95 % interval"),
    "adjusted_high": ("percentage points", "upper end of its simultaneous 95 % interval"),
    "among": ("1", "number of exploratory comparisons"),
}
"""What datasets keep of a comparison, with unit and long name, in the order of ``Comparison.numbers``."""


def words(numbers: Sequence[float]) -> str:
    """Return what stands behind an interval: the sign flips of the primary comparison, the adjustment of others.

    Args: numbers: in the order of ``NUMBERS``.
    """
    primary, named, p, adjusted, low, high, among = (float(number) for number in numbers)
    if primary:
        whose = "named in the plan" if named else "by default, as no plan names one"
        return f"; primary comparison {whose}" + (f", sign flips {p_words(p)}" if np.isfinite(p) else "")
    if not np.isfinite(adjusted):
        return "; exploratory"
    ends = f"{low:.1f} to {high:.1f}" if np.isfinite([low, high]).all() else "unbounded with so few seeds"
    return f"; exploratory, adjusted over {among:.0f} comparisons {p_words(adjusted)}, simultaneous interval {ends}"


def p_words(p: float) -> str:
    """Return a p value as text.

    >>> p_words(0.0123), p_words(0.00001)
    ('p = 0.012', 'p < 0.001')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def margin_of(sweep: Sweep, unit: str = "accuracy points") -> tuple[Any, ...]:
    """Return the largest difference that counts as none, as a dataset variable in that unit.

    The margin of the sweep's plan where that is in the same unit, else ``EQUIVALENCE_MARGIN``.
    """
    from ..analysis.advantage import EQUIVALENCE_MARGIN

    named = sweep.primary
    margin = named.margin if named is not None and named.unit == unit else None
    value = EQUIVALENCE_MARGIN if margin is None else margin
    return variable((), value, unit, "largest difference that counts as none, set beforehand")


def named_differences(sweep: Sweep, named: PrimaryComparison, seeds: Sequence[int]) -> NDArray[np.float64]:
    """Return the differences [seed] that a plan names; accuracies in points, diverged runs as NaN."""
    table = sweep.table
    # Before the difference, as everywhere: the same comparison must be the same to the last digit.
    scale = 100 if named.measure.endswith("accuracy") else 1
    sides = []
    for folder in (named.of_runs, named.minus_runs):
        rows = table[table["run"].astype(str).str.startswith(f"{folder}/")]
        sides.append(scale * by_seed(rows, named.measure, seeds))
    return np.asarray(sides[0] - sides[1])


def gap(line: arms.Line, seeds: Sequence[int]) -> NDArray[np.float64]:
    """Return the differences late - early [seed] of a line; NaN throughout where it has one start epoch only."""
    starts = arms.starts_of([line])
    if len(starts) < 2:
        return np.full(len(seeds), np.nan)
    values = line.values("test_accuracy", [starts[0], starts[-1]], seeds)
    return np.asarray(values[1] - values[0])


def contrasts(sweep: Sweep, task: str, seeds: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """Return the differences [seed] of the controls, by label; those without a single pair are left out."""
    rows = control_arms(sweep, task)

    def accuracy(label: str) -> NDArray[np.float64]:
        return by_seed(rows[label], "test_accuracy", seeds) if label in rows else np.full(len(seeds), np.nan)

    survivors = sorted({label.rsplit(",", 1)[0] for label in rows if label.startswith("survivors ")})
    wanted = [*CONTRASTS, *((f"{rule}: late - early", f"{rule}, late", f"{rule}, early") for rule in survivors)]
    found = {label: accuracy(first) - accuracy(second) for label, first, second in wanted}
    learned, random = (accuracy(f"{mask}, late") - accuracy(f"{mask}, early") for mask in ("learned", "random"))
    found[INTERACTION] = learned - random
    return {label: values for label, values in found.items() if np.isfinite(values).any()}


def changes(sweep: Sweep, task: str, seeds: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """Return what each intervention before the switch changes [seed], mean over its start epochs, by its name."""
    line = arms.intervened_line(sweep, task)
    if line is None:
        return {}
    found = {}
    by_change = line.by_change()
    none = by_change.pop("")
    for name, rows in by_change.items():
        starts = sorted({float(start) for start in rows["start_epoch"]})
        values = arms.pivot(rows, "test_accuracy", starts, seeds) - arms.pivot(none, "test_accuracy", starts, seeds)
        # A seed counts where it has all start epochs: means over other epochs would be no fair differences.
        found[name] = values.mean(axis=0)
    return found


def control_arms(sweep: Sweep, task: str) -> dict[str, pd.DataFrame]:
    """Return the rows of each kind of arm by a short label.

    Early and late are the first and the last start epoch of the task's first line, whose other settings all share.
    """
    lines = arms.lines(sweep, task)
    if not lines:
        return {}
    line = lines[0]
    starts = arms.starts_of([line])
    early, late = starts[0], starts[-1]

    def rows(start: float, **settings: Any) -> pd.DataFrame:
        found = arms.like(sweep, task, line, **settings)
        return found[found["start_epoch"] == start]

    wanted: dict[str, pd.DataFrame] = {}
    for mask in ("learned", "random"):
        for when, start in (("early", early), ("late", late)):
            wanted[f"{mask}, {when}"] = rows(start, mask=mask, budget="total")
    wanted["late mask, early"] = rows(early, mask="late", budget="total")
    wanted["late path, early"] = rows(early, mask="late-path", budget="total")
    wanted["after switch, early"] = rows(early, mask="learned", budget="after-switch")
    after = rows(late, mask="learned", budget="after-switch")
    # At the latest start both budget rules are the same training, so a plan need not run it twice.
    same = len(wanted["after switch, early"]) > 0 and after.empty
    wanted["after switch, late"] = wanted["learned, late"] if same else after
    for other in lines[1:]:
        if dict(other.others) == dict(line.others):
            for when, start in (("early", early), ("late", late)):
                wanted[f"survivors {other.survivors}, {when}"] = other.rows[other.rows["start_epoch"] == start]
    dense = arms.select(sweep, task=task, intervention="none", data_order=0)
    wanted["ReLU network"] = dense[dense["start_epoch"] == 0]
    wanted["linear network"] = arms.select(sweep, task=task, intervention="linear")
    return {label: found for label, found in wanted.items() if len(found)}


def by_seed(rows: pd.DataFrame, measure: str, seeds: Sequence[int]) -> NDArray[np.float64]:
    """Return a result [seed] of rows, NaN where there is none; a diverged run has none but that it did."""
    values = np.full(len(seeds), np.nan)
    if measure in rows:
        # Units and path length too: they are those of a network that was on its way to fewer.
        failed = rows["diverged"] > 0 if measure != "diverged" and "diverged" in rows else [False] * len(rows)
        for seed, value, lost in zip(rows["seed"], rows[measure], failed, strict=True):
            if int(seed) in seeds and not lost:
                values[list(seeds).index(int(seed))] = value
    return values


def _same(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    return np.array_equal(first, second, equal_nan=True)
