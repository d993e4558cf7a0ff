"""Whether the kernel's drift goes with the accuracy of arms, beside what the start epoch alone gives.

These correlations describe; what may be concluded beyond start epoch and seed is in the study relation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .. import plots
from ..analysis.advantage import relation
from . import arms
from .drifts import DRIFTS, drifts_of
from .recorded import KERNEL_NEED, Datasets, Table, kernel_sets, variable

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from ..results import Sweep

RIVALS = DRIFTS | {"dense_accuracy": "dense accuracy at t0"}
"""Drifts, and progress at the switch: a rival explanation that belongs in the same table."""

NUMBERS = {
    "pooled": "Spearman correlation over all arms",
    "start_only": "Spearman correlation of the start epoch alone",
    "within": "correlation of ranks within start epochs",
}


class DriftGap:
    """Remaining drift of the kernel against the final accuracy of the arms, with its baselines."""

    name = "drift-gap"
    title = "Kernel drift against final accuracy"
    reading = (
        "Each point is one arm, centered kernel distances on the test probe set; points of one start epoch share a "
        "marker: a trend across markers alone is what the start epoch gives by itself, only a trend within one marker "
        "would tie accuracy to the drift."
    )
    scope = "sweep"

    def unavailable(self, source: Sweep, /) -> str | None:
        """Need linearized arms whose trunks have recorded kernels."""
        reason = arms.need(source)
        if reason is not None:
            return reason
        if any(_recorded(source, task) for task in arms.tasks(source)):
            return None
        return f"no arm has a trunk with kernels: {KERNEL_NEED}"

    def measure(self, source: Sweep, /) -> xr.Dataset:
        """Return drifts [task, set, arm], accuracies [task, arm] and relations [task, set, drift] of primary arms."""
        import xarray as xr

        names = [task for task in arms.tasks(source) if _recorded(source, task)]
        parts = [_measure_task(source, task) for task in names]
        joined = xr.concat(
            parts, dim="task", join="outer", coords="minimal", compat="override", combine_attrs="override"
        )
        return joined.assign_coords(task=("task", names))

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say the correlations on one probe set with their baselines, or that they cannot be judged."""
        lines = []
        for dataset in datasets.values():
            probe_set = _shown(dataset)
            for task in dataset["task"].values:
                one = dataset.sel(task=task, set=probe_set)
                found = relation(one["start_epoch"], one["seed"], one["remaining"], one["accuracy"])
                if found.pooled_note:
                    lines.append(f"{task}: {found.pooled_note}.")
                    continue
                words = [
                    f"{text} {float(one['pooled'].sel(drift=name)):+.2f}"
                    for name, text in RIVALS.items()
                    if np.isfinite(float(one["pooled"].sel(drift=name)))
                ]
                lines.append(
                    f"{task}, probe set {probe_set}, Spearman correlation with the final accuracy of {found.arms} "
                    f"arms: {'; '.join(words)}; the start epoch alone gives "
                    f"{float(one['start_only'].sel(drift='remaining')):+.2f}."
                )
                within = "; ".join(
                    f"{text} {float(one['within'].sel(drift=name)):+.2f}"
                    for name, text in RIVALS.items()
                    if np.isfinite(float(one["within"].sel(drift=name)))
                )
                lines.append(f"{task}: {found.within_note or f'within start epochs, {within}'}.")
        return lines

    def tables(self, datasets: Datasets, /) -> list[Table]:
        """Give every correlation on every probe set."""
        tables = []
        for dataset in datasets.values():
            for task in dataset["task"].values:
                rows = [
                    (
                        str(probe_set),
                        text,
                        *(
                            "" if not np.isfinite(value) else f"{value:+.2f}"
                            for value in (
                                float(dataset[number].sel(task=task, set=probe_set, drift=name))
                                for number in ("pooled", "start_only", "within")
                            )
                        ),
                    )
                    for probe_set in dataset["set"].values
                    for name, text in RIVALS.items()
                ]
                columns = ("probe set", "against final accuracy", "pooled", "start epoch alone", "within start epochs")
                caption = f"{task}: rank correlations (1); empty where they cannot be judged or were not recorded"
                tables.append(Table(caption, columns, tuple(rows)))
        return tables

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw the trunk's remaining drift and the branch's own drift against accuracy, two panels a task."""
        dataset = next(iter(datasets.values()))
        probe_set = _shown(dataset)
        drifts = [name for name in ("remaining", "own") if np.isfinite(dataset[name].values).any()]
        places = [(task, drift) for task in dataset["task"].values for drift in drifts]
        axes = plots.panels(figure, len(places), height=1.7)
        starts = np.unique(dataset["start_epoch"].values[np.isfinite(dataset["start_epoch"].values)])
        for ax, (task, drift) in zip(axes, places, strict=True):
            one = dataset.sel(task=task, set=probe_set)
            for index, start in enumerate(starts):
                here = one["start_epoch"].values == start
                plots.draw_points(
                    one[drift].values[here],
                    one["accuracy"].values[here],
                    ax=ax,
                    label=f"t0 = epoch {start:g}",
                    index=index,
                )
            ax.set_xlabel(f"{DRIFTS[drift]} (1)")
            ax.set_ylabel("test accuracy (%)")
            plots.title(ax, f"task: {task}")
        plots.finish(figure, columns=3)


def _shown(dataset: xr.Dataset) -> str:
    """The probe set of figure and sentences: unseen data where there are any."""
    return "test" if "test" in dataset["set"].values else str(dataset["set"].values[0])


def _recorded(sweep: Sweep, task: str) -> bool:
    """Whether an arm of the task's primary line has a trunk with kernels."""
    for line in arms.lines(sweep, task)[:1]:
        for name in line.rows["run"]:
            trunk = arms.trunk_run(sweep, str(name))
            if trunk is not None and trunk in sweep.runs and kernel_sets(sweep.runs[trunk]):
                return True
    return False


def _measure_task(sweep: Sweep, task: str) -> xr.Dataset:
    import xarray as xr

    line = arms.lines(sweep, task)[0]
    rows = line.rows.sort_values(["start_epoch", "seed"], kind="stable")
    starts, seeds = rows["start_epoch"].to_numpy(dtype=float), rows["seed"].to_numpy(dtype=int)
    columns = drifts_of(sweep, zip(rows["run"].astype(str), starts, strict=True))
    sets = list(dict.fromkeys(probe_set for column in columns for probe_set in column))
    accuracy = rows["test_accuracy"].to_numpy(dtype=float)
    dense = rows["dense_accuracy"].to_numpy(dtype=float) if "dense_accuracy" in rows else np.full(len(rows), np.nan)
    values = {
        drift: np.array([[column.get(s, {}).get(drift, np.nan) for column in columns] for s in sets])
        for drift in DRIFTS
    }
    relations = np.full((len(NUMBERS), len(sets), len(RIVALS)), np.nan)
    for i in range(len(sets)):
        for j, drift in enumerate(RIVALS):
            column = dense if drift == "dense_accuracy" else values[drift][i]
            found_relation = relation(starts, seeds, column, accuracy)
            relations[:, i, j] = [getattr(found_relation, number) for number in NUMBERS]
    return xr.Dataset(
        {
            **{drift: variable(("set", "arm"), values[drift], "1", f"centered, {DRIFTS[drift]}") for drift in DRIFTS},
            "start_epoch": variable("arm", starts, "epoch", "start of linearization"),
            "seed": variable("arm", seeds, "1", "seed"),
            "accuracy": variable("arm", accuracy, "percent", "final test accuracy"),
            "dense_accuracy": variable("arm", dense, "percent", "test accuracy of the dense network at t0"),
            **{
                number: variable(("set", "drift"), relations[place], "1", text)
                for place, (number, text) in enumerate(NUMBERS.items())
            },
        },
        coords={
            "set": ("set", sets),
            "drift": ("drift", list(RIVALS)),
            "arm": ("arm", [f"start {start:g}, seed {seed}" for start, seed in zip(starts, seeds, strict=True)]),
        },
    )
