"""The arms on which the relation of drift and accuracy rests: what was measured of each, and changes paired by seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from . import arms
from .drifts import DRIFTS, drifts_of
from .recorded import kernel_sets
from .rivals import RIVALS, rivals_of

if TYPE_CHECKING:
    from ..results import Sweep

FloatArray = NDArray[np.float64]

REGRESSORS = {name: ("1", text) for name, text in DRIFTS.items()} | RIVALS
"""Everything that may go with the accuracy: unit and name."""


@dataclass(frozen=True)
class RelationArms:
    """Arms of one line of a task, with and without interventions before the switch.

    Attributes:
        label: the line.
        probe_set: on which kernels and gates were recorded.
        start, seed, accuracy: [arm], accuracy in percent, NaN where the run diverged.
        family, change: [arm], "" without intervention.
        values: regressor -> [arm], NaN where it was not recorded.
    """

    label: str
    probe_set: str
    start: FloatArray
    seed: NDArray[np.int64]
    accuracy: FloatArray
    family: tuple[str, ...]
    change: tuple[str, ...]
    values: Mapping[str, FloatArray]

    @property
    def intervened(self) -> bool:
        """Whether any arm has an intervention before the switch."""
        return any(self.change)

    @property
    def drift(self) -> str:
        """The drift of the relation: what interventions before the switch move, else the trunk's remaining drift."""
        return "before" if self.intervened else "remaining"

    @property
    def recorded(self) -> list[str]:
        """Regressors that more than half of the arms with an accuracy have; the others would cost too many arms."""
        there = np.isfinite(self.accuracy)
        return [name for name, column in self.values.items() if np.isfinite(column[there]).mean() > 0.5]

    def families(self) -> dict[str, list[str]]:
        """Return the names of the interventions by family, in the order of the settings."""
        pairs = sorted(set(zip(self.family, self.change, strict=True)) - {("", "")}, key=self._place)
        found: dict[str, list[str]] = {}
        for family, change in pairs:
            found.setdefault(family, []).append(change)
        return found

    def changed(self, change: str, values: FloatArray) -> FloatArray:
        """Return what an intervention changes, [start, seed]: its arm less the one without, at its start epochs."""
        here = np.array([name == change for name in self.change])
        none = np.array([not name for name in self.change])
        starts, seeds = np.unique(self.start[here]), np.unique(self.seed)
        return self._table(here, values, starts, seeds) - self._table(none, values, starts, seeds)

    def _table(
        self, rows: NDArray[np.bool_], values: FloatArray, starts: FloatArray, seeds: NDArray[np.int64]
    ) -> FloatArray:
        table = np.full((len(starts), len(seeds)), np.nan)
        for start, seed, value in zip(self.start[rows], self.seed[rows], values[rows], strict=True):
            if start in starts:
                table[np.searchsorted(starts, start), np.searchsorted(seeds, seed)] = value
        return table

    @staticmethod
    def _place(pair: tuple[str, str]) -> tuple[int, float, str]:
        family, change = pair
        value = change.rsplit(" = ", 1)[-1]
        try:
            size = float(value)
        except ValueError:
            size = 0.0
        return list(arms.BEFORE).index(family) if family in arms.BEFORE else len(arms.BEFORE), size, change


def relation_arms(sweep: Sweep, task: str) -> RelationArms | None:
    """Return the arms with interventions of a task, else those of its first line; None where no trunk has kernels."""
    line = arms.intervened_line(sweep, task) or next(iter(arms.lines(sweep, task)), None)
    if line is None:
        return None
    rows = line.rows.sort_values(["start_epoch", "seed"], kind="stable")
    records = rows.to_dict("records")
    names = rows["run"].astype(str).tolist()
    starts = rows["start_epoch"].to_numpy(dtype=np.float64)
    drifts = drifts_of(sweep, zip(names, starts.tolist(), strict=True))
    sets = list(dict.fromkeys(probe_set for column in drifts for probe_set in column))
    if not sets:
        return None
    # Unseen data where there are any.
    probe_set = "test" if "test" in sets else sets[0]
    columns = {name: np.full(len(rows), np.nan) for name in REGRESSORS}
    for place, name in enumerate(names):
        trunk = sweep.runs.get(arms.trunk_run(sweep, name) or "")
        settings = {str(key): value for key, value in records[place].items()}
        rivals = rivals_of(sweep.runs[name], trunk, settings, probe_set, float(starts[place]))
        for key, value in {**drifts[place].get(probe_set, {}), **rivals}.items():
            columns[key][place] = value
    masks = sorted(set(rows["mask"].astype(str)) - {"learned"})
    changes = [arms.change_of({str(key): value for key, value in record.items()}) for record in records]
    return RelationArms(
        label=", ".join([line.label, *(f"{mask} masks" for mask in masks)]),
        probe_set=probe_set,
        start=starts,
        seed=rows["seed"].to_numpy(dtype=np.int64),
        accuracy=rows["test_accuracy"].to_numpy(dtype=np.float64),
        family=tuple(family for family, _ in changes),
        change=tuple(change for _, change in changes),
        values=columns,
    )


def has_trunk_kernels(sweep: Sweep) -> bool:
    """Return whether any linearized arm has a trunk with kernels."""
    table = sweep.table
    for name in table.loc[table["intervention"] == "linearize", "run"].astype(str):
        trunk = sweep.runs.get(arms.trunk_run(sweep, name) or "")
        if trunk is not None and kernel_sets(trunk):
            return True
    return False
