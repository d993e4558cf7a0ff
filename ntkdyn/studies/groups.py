"""Arms of a sweep that agree in everything but what a study compares, and the runs that belong beside them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import arms

if TYPE_CHECKING:
    import pandas as pd

    from ..results import Sweep


@dataclass(frozen=True)
class Group:
    """Arms of one task.

    Attributes:
        label: the task, and the settings in which the groups differ.
        task: label rule or data set.
        rows: the arms, accuracies in percent.
        shared: settings in which groups differ that also trunks have; what is beside the arms has the same.
    """

    label: str
    task: str
    rows: pd.DataFrame
    shared: Mapping[str, str]


def missing(sweep: Sweep, experiment: str, columns: Sequence[str]) -> str | None:
    """Return why a sweep is not one of an experiment, None where it has all columns."""
    absent = [name for name in columns if name not in sweep.table]
    if absent:
        return f"the sweep has no column {', '.join(absent)}; this study needs a sweep of {experiment}"
    return None


def groups(sweep: Sweep, *, compared: Collection[str], **settings: Any) -> list[Group]:
    """Return the arms with these settings, parted by task and by every varied setting that is not ``compared``."""
    found: list[Group] = []
    table = sweep.table
    for task in sorted(set(arms.tasks_of(table).tolist())):
        rows = arms.select(sweep, task=task, **settings)
        others = _varied(sweep, rows, compared)
        if rows.empty:
            continue
        in_trunks = [name for name in others if _in_trunks(sweep, rows, name)]
        keys = [rows[name].astype(str) for name in others]
        parts = rows.groupby(keys, sort=False) if keys else [((), rows)]
        for key, part in parts:
            named = dict(zip(others, (str(value) for value in key), strict=True))
            label = ", ".join([task, *(f"{name} = {value}" for name, value in named.items())])
            shared = {name: value for name, value in named.items() if name in in_trunks}
            found.append(Group(label.removeprefix(", "), task, part, shared))
    return found


def beside(sweep: Sweep, group: Group, **settings: Any) -> pd.DataFrame:
    """Return the runs with these settings on the data, with the network and the training of a group."""
    rows = arms.select(sweep, task=group.task, **settings)
    for name, value in group.shared.items():
        rows = rows[rows[name].astype(str) == value]
    return rows


def _varied(sweep: Sweep, rows: pd.DataFrame, compared: Collection[str]) -> list[str]:
    if rows.empty:
        return []
    settings = sweep.runs[str(rows["run"].iloc[0])].config
    # Settings named like a column of every table have another name in it.
    columns = {*settings, *(f"setting_{name}" for name in settings)} & set(rows.columns)
    columns -= {"kind", "run", "seed", "task", *compared}
    return sorted(name for name in columns if rows[name].astype(str).nunique() > 1)


def _in_trunks(sweep: Sweep, rows: pd.DataFrame, name: str) -> bool:
    """Whether arms always agree in a setting with the dense run that they branch from."""
    of_runs = dict(zip(sweep.table["run"], sweep.table[name].astype(str), strict=True))
    for run in rows["run"]:
        trunk = arms.trunk_run(sweep, str(run))
        if trunk in of_runs and of_runs[trunk] != of_runs[run]:
            return False
    return True
