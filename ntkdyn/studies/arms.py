"""What a sweep of the nonlinear-advantage protocol holds: its arms by task, survivor rule and start epoch.

Arms and trunks with an intervention before the switch are left out of everything but what asks for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

    from ..results import Sweep

NEEDED = ("task", "intervention", "start_epoch", "survivors", "mask", "budget", "data_order", "test_accuracy")

BEFORE = {
    "rate_before": 1.0,
    "scale_before": 1.0,
    "labels_before": "own",
    "train_before": "all",
    "anchor_before": 0.0,
}
"""Families of interventions before the switch, and the value that is none."""

DESIGN = ("task", "intervention", "start_epoch", "survivors", "mask", "budget", "data_order", *BEFORE)
"""Settings that the protocol itself varies; any other varied setting splits the arms into lines of their own."""

PRIMARY = "common"
"""Survivor rule of the primary comparison: survivors at one slope are matched by design, the others are not."""


@dataclass(frozen=True)
class Line:
    """Arms that differ in start epoch and seed only."""

    label: str
    primary: bool
    rows: pd.DataFrame
    survivors: str
    others: Mapping[str, str]

    def values(self, measure: str, starts: Sequence[float], seeds: Sequence[int]) -> NDArray[np.float64]:
        """Return a result [start, seed], NaN where there is no such arm or it diverged."""
        return pivot(self.rows, measure, starts, seeds)

    def by_change(self) -> dict[str, pd.DataFrame]:
        """Return the rows of each intervention before the switch by its name, those without one under ""."""
        names = [change_of(row)[1] for row in _settings(self.rows, BEFORE)]
        return {name: self.rows[[other == name for other in names]] for name in sorted(set(names))}


def need(sweep: Sweep) -> str | None:
    """Return why a sweep holds no linearized arms, None where it does."""
    table = sweep.table
    missing = [name for name in NEEDED if name not in table]
    if missing:
        return f"the sweep has no column {', '.join(missing)}; this study needs a sweep of nonlinear-advantage"
    if not (table["intervention"] == "linearize").any():
        return "the sweep has no linearized arm; sweep over start_epoch with intervention=linearize"
    return None


def task_of(settings: Mapping[str, Any]) -> str:
    """Return the name of a run's task: its label rule on digit pairs, else the name of its data."""
    named = [value for value in (settings.get("task"), settings.get("data")) if isinstance(value, str)]
    return Path(named[0]).name if named else ""


def tasks_of(table: pd.DataFrame) -> NDArray[np.str_]:
    """Return the task of each row of a sweep's table."""
    return np.array([task_of(row) for row in _settings(table, ("task", "data"))], dtype=np.str_)


def change_of(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Return the family and the name of a run's intervention before the switch, "" twice where it has none.

    >>> change_of({"rate_before": 0.1, "labels_before": "own"})
    ('rate_before', 'rate_before = 0.1')
    """
    changed = {
        name: value
        for name, none in BEFORE.items()
        if (value := settings.get(name, none)) is not None and value == value and value != none
    }
    return " and ".join(changed), ", ".join(f"{name} = {_plain(value)}" for name, value in changed.items())


def altered(table: pd.DataFrame) -> NDArray[np.bool_]:
    """Return which rows of a sweep's table have an intervention before the switch."""
    return np.array([bool(change_of(row)[0]) for row in _settings(table, BEFORE)], dtype=np.bool_)


def tasks(sweep: Sweep) -> list[str]:
    """Return the tasks that have linearized arms, those first to which nonlinearity is worth most."""
    table = sweep.table
    names = sorted({str(task) for task in tasks_of(table[table["intervention"] == "linearize"])})
    seeds = seeds_of(sweep)
    worth = {
        task: float(np.mean(reference(sweep, task, "none", seeds)) - np.mean(reference(sweep, task, "linear", seeds)))
        for task in names
    }
    return sorted(names, key=lambda task: -worth[task] if np.isfinite(worth[task]) else np.inf)


def select(sweep: Sweep, *, task: str, interventions: bool = False, **settings: Any) -> pd.DataFrame:
    """Return the rows of a task with these settings, accuracies in percent, those of diverged runs as NaN.

    Args: interventions: with the runs that have an intervention before the switch.
    """
    rows: pd.DataFrame = sweep.table
    for name, value in settings.items():
        rows = rows[rows[name] == value]
    rows = rows[tasks_of(rows) == task]
    rows = rows.copy() if interventions else rows[~altered(rows)].copy()
    failed = rows["diverged"].fillna(0).to_numpy(dtype=float) > 0 if "diverged" in rows else np.zeros(len(rows), bool)
    for name in ("test_accuracy", "dense_accuracy"):
        if name in rows:
            rows[name] = np.where(failed & (name == "test_accuracy"), np.nan, 100 * rows[name].to_numpy(dtype=float))
    return rows


def lines(sweep: Sweep, task: str, *, interventions: bool = False, **settings: Any) -> list[Line]:
    """Return the lines of a task, the primary one first; by default learned masks and equal total epochs."""
    wanted = {"intervention": "linearize", "mask": "learned", "budget": "total", "data_order": 0} | settings
    rows = select(sweep, task=task, interventions=interventions, **wanted)
    others = _varied(sweep, rows)
    found = []
    for key, part in rows.groupby([rows[name].astype(str) for name in ("survivors", *others)], sort=True):
        survivors, *values = (str(value) for value in key)
        rest = dict(zip(others, values, strict=True))
        words = [f"survivors {survivors}", *(f"{name} = {value}" for name, value in rest.items())]
        found.append(Line(", ".join(words), survivors == PRIMARY, part, survivors, rest))
    if found and not any(line.primary for line in found):
        found[0] = replace(found[0], primary=True)
    # One primary line: the one that the plan names, else of several (another setting is varied) the first.
    first = next((place for place, line in enumerate(found) if line.primary), 0)
    named = sweep.primary
    if named is not None:
        folders = (f"{named.of_runs}/", f"{named.minus_runs}/")
        holds = [line.rows["run"].astype(str).str.startswith(folders).any() for line in found]
        first = next((place for place, held in enumerate(holds) if held), first)
    ordered = [*found[first : first + 1], *found[:first], *found[first + 1 :]]
    return [replace(line, primary=place == 0) for place, line in enumerate(ordered)]


def intervened_line(sweep: Sweep, task: str) -> Line | None:
    """Return the first line of a task with interventions before the switch beside arms without, None where none has.

    Learned masks come first; with interventions the mask may be random, which needs no ramp to be learned.
    """
    table = sweep.table
    present = table[(table["intervention"] == "linearize") & (tasks_of(table) == task)]
    for mask in sorted(set(present["mask"].astype(str)), key=lambda name: (name != "learned", name)):
        for line in lines(sweep, task, interventions=True, mask=mask):
            if len(line.by_change()) > 1 and "" in line.by_change():
                return line
    return None


def like(sweep: Sweep, task: str, line: Line, **settings: Any) -> pd.DataFrame:
    """Return the linearized arms of a task that share a line's other settings; ``settings`` override the protocol's."""
    rows = select(sweep, task=task, **({"intervention": "linearize", "survivors": line.survivors} | settings))
    for name, value in line.others.items():
        rows = rows[rows[name].astype(str) == value]
    return rows


def starts_of(rows: Sequence[Line]) -> list[float]:
    """Return the start epochs of some lines in order."""
    return sorted({float(start) for line in rows for start in line.rows["start_epoch"]})


def first_and_last(sweep: Sweep, task: str) -> dict[str, float]:
    """Return the primary arms of the first and of the last start epoch, run -> start epoch."""
    found = lines(sweep, task)
    if not found:
        return {}
    line = found[0]
    ends = {starts_of([line])[0], starts_of([line])[-1]}
    rows = line.rows.sort_values(["start_epoch", "seed"], kind="stable")
    return {
        str(name): float(start)
        for name, start in zip(rows["run"], rows["start_epoch"], strict=True)
        if float(start) in ends
    }


def seeds_of(sweep: Sweep) -> list[int]:
    """Return the seeds of a sweep in order."""
    return sorted({int(seed) for seed in sweep.table["seed"]})


def pivot(rows: pd.DataFrame, measure: str, starts: Sequence[float], seeds: Sequence[int]) -> NDArray[np.float64]:
    """Return a result [start, seed] of rows, NaN where there is none."""
    values = np.full((len(starts), len(seeds)), np.nan)
    if measure in rows:
        for start, seed, value in zip(rows["start_epoch"], rows["seed"], rows[measure], strict=True):
            if float(start) in starts and int(seed) in seeds:
                values[list(starts).index(float(start)), list(seeds).index(int(seed))] = value
    return values


def reference(sweep: Sweep, task: str, intervention: str, seeds: Sequence[int]) -> NDArray[np.float64]:
    """Return the final accuracy [seed] of the dense ("none") or the fully linear ("linear") network."""
    rows = select(sweep, task=task, intervention=intervention, data_order=0)
    rows = rows[rows["start_epoch"] == 0] if (rows["start_epoch"] == 0).any() else rows
    values = np.full(len(seeds), np.nan)
    for seed, value in zip(rows["seed"], rows["test_accuracy"], strict=True):
        if int(seed) in seeds:
            values[list(seeds).index(int(seed))] = value
    return values


def trunk_run(sweep: Sweep, run: str) -> str | None:
    """Return the name of the trunk that a run branches from, None where it has none."""
    try:
        return sweep.trunk_of(run)
    except (KeyError, LookupError, ValueError):
        return None


def _settings(table: pd.DataFrame, names: Iterable[str]) -> list[dict[str, Any]]:
    """These columns of each row, as far as the table has them."""
    columns = {name: table[name].tolist() for name in names if name in table}
    return [{name: values[row] for name, values in columns.items()} for row in range(len(table))]


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _varied(sweep: Sweep, rows: pd.DataFrame) -> list[str]:
    if rows.empty:
        return []
    keys: set[str] = set()
    config: Mapping[str, Any] = sweep.runs[str(rows["run"].iloc[0])].config
    keys.update(config)
    return sorted(name for name in keys if name in rows and name not in DESIGN and rows[name].astype(str).nunique() > 1)
