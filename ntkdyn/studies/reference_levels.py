"""How large a kernel distance is by chance: two children of one snapshot, and two seeds."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from .. import plots
from . import arms
from .curves import time_label, time_of
from .recorded import KERNEL_NEED, Datasets, kernel_sets, path_of, spread, trace_kernels, variable

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from ..results import Run, Sweep


class ReferenceLevels:
    """Centered kernel distance between children of one snapshot and between seeds, beside the remaining drift."""

    name = "reference-levels"
    title = "Reference levels of the kernel distance"
    reading = (
        "The remaining drift is the distance to the trunk's own end; two children continue one snapshot with other "
        "mini-batches, and their distance at the end is what the noise of the gradients alone makes; two seeds differ "
        "in initial weights and data: a drift below the children's level cannot be told from noise."
    )
    scope = "sweep"

    def unavailable(self, source: Sweep, /) -> str | None:
        """Need trunks with kernels, and two of a task or one with a child."""
        trunks = {task: _trunks(source, task) for task in _tasks(source)}
        if not any(trunks.values()):
            return KERNEL_NEED
        if any(len(runs) > 1 for runs in trunks.values()) or any(_children(source, task) for task in trunks):
            return None
        return "one seed and no sibling run (intervention=none, data_order=1): there is nothing to compare"

    def measure(self, source: Sweep, /) -> xr.Dataset:
        """Return the remaining drift [task, set, seed, step] and the distances of seeds and of children."""
        import xarray as xr

        names = [task for task in _tasks(source) if _trunks(source, task)]
        parts = [_measure_task(source, task) for task in names]
        joined = xr.concat(
            parts, dim="task", join="outer", coords="minimal", compat="override", combine_attrs="override"
        )
        # Tasks may be recorded at other steps: the joined epochs come from whichever has the step.
        known = {
            int(step): float(epoch) for part in parts for step, epoch in zip(part["step"], part["epoch"], strict=True)
        }
        epochs = [known[int(step)] for step in joined["step"].values]
        return joined.assign_coords(task=("task", names), epoch=("step", epochs, {"units": "epoch"}))

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say both levels at the end of training, and from when the remaining drift is below the children's."""
        lines = []
        for dataset in datasets.values():
            for task, probe_set in itertools.product(dataset["task"].values, dataset["set"].values):
                one = dataset.sel(task=task, set=probe_set)
                words = []
                for name, text in (("children", "two children of one snapshot"), ("seeds", "two seeds")):
                    values = _level(one, name)
                    if len(values):
                        words.append(f"{text} end {spread(values)} apart")
                start = one["remaining"].values[:, 0]
                words.append(f"the whole drift from the first snapshot is {spread(start)}")
                lines.append(f"{task}, probe set {probe_set}, centered: {'; '.join(words)}.")
        return lines

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw remaining drift and both levels, a panel a task and probe set."""
        dataset = next(iter(datasets.values()))
        places = list(itertools.product(dataset["task"].values, dataset["set"].values))
        axes = plots.panels(figure, len(places))
        x = time_of(dataset)
        for ax, (task, probe_set) in zip(axes, places, strict=True):
            one = dataset.sel(task=task, set=probe_set)
            # Zero at the last snapshot by definition: it has no place on a logarithmic axis.
            remaining = np.where(one["remaining"].values > 0, one["remaining"].values, np.nan)
            plots.draw_lines(x, remaining, ax=ax, label="remaining drift S(t, end)", index=0)
            if one.sizes.get("pair"):
                plots.draw_lines(x, one["seeds"].values, ax=ax, label="two seeds, same step", index=1)
            if one.sizes.get("child"):
                starts, values = one["child_start"].values, one["children"].values
                there = np.isfinite(values)
                plots.draw_points(starts[there], values[there], ax=ax, label="two children of t0, at end", index=2)
            plots.logarithmic(ax)
            ax.set_ylabel("kernel distance S (1)")
            plots.title(ax, ", ".join(part for part in (f"task: {task}", f"probe set: {probe_set}") if part))
        axes[-1].set_xlabel(time_label(dataset).replace("training time", "training time or t0"))
        plots.finish(figure)


def levels(sweep: Sweep, task: str) -> dict[str, xr.DataArray]:
    """Return the mean distances [set] at the end of training: ``level_children`` and ``level_seeds``.

    Children of the first t0 only: the later they part, the less they differ, and the distance is from the start.
    """
    import xarray as xr

    if not _trunks(sweep, task):
        return {}
    dataset = _measure_task(sweep, task)
    first = dataset["child_start"].values == dataset["child_start"].values.min(initial=np.inf)
    dataset = dataset.isel(child=np.flatnonzero(first))
    return {
        f"level_{name}": xr.DataArray(
            [_mean(_level(dataset.sel(set=probe_set), name)) for probe_set in dataset["set"].values],
            dims="set",
            coords={"set": dataset["set"].values},
            attrs={"units": "1", "long_name": f"centered kernel distance at the end, {text}"},
        )
        for name, text in (("children", "two children of one snapshot"), ("seeds", "two seeds"))
    }


def _measure_task(sweep: Sweep, task: str) -> xr.Dataset:
    import xarray as xr

    from ..analysis import kernel_distance_centered

    trunks, children = _trunks(sweep, task), _children(sweep, task)
    first = next(iter(trunks.values()))
    sets = kernel_sets(first)
    steps = sorted(set.intersection(*(set(run.steps(path_of("ntk", sets[0], "")).tolist()) for run in trunks.values())))
    group = path_of("ntk", sets[0], "")
    epochs = dict(zip(first.steps(group).tolist(), first.epochs(group), strict=True))
    pairs = list(itertools.combinations(trunks, 2))
    remaining = np.full((len(sets), len(trunks), len(steps)), np.nan)
    seeds = np.full((len(sets), len(pairs), len(steps)), np.nan)
    siblings = np.full((len(sets), len(children)), np.nan)
    for i, probe_set in enumerate(sets):
        kernels = {seed: _at(run, probe_set, steps) for seed, run in trunks.items()}
        for j, stack in enumerate(kernels.values()):
            remaining[i, j, :-1] = kernel_distance_centered(stack[:-1], stack[-1]) if len(steps) > 1 else 0.0
            remaining[i, j, -1] = 0.0  # by definition; computed, it is a rounding error that spoils a logarithmic axis
        for j, (a, b) in enumerate(pairs):
            seeds[i, j] = kernel_distance_centered(kernels[a], kernels[b])
        for j, (child, _, seed) in enumerate(children):
            # The trunk itself is the sibling: it continued the same snapshot with the first data order.
            siblings[i, j] = kernel_distance_centered(_at(child, probe_set, steps[-1:])[0], kernels[seed][-1])
    return xr.Dataset(
        {
            "remaining": variable(("set", "seed", "step"), remaining, "1", "centered distance to the trunk's own end"),
            "seeds": variable(("set", "pair", "step"), seeds, "1", "centered distance of two seeds at equal steps"),
            "child_start": variable(
                "child", np.array([start for _, start, _ in children], dtype=float), "epoch", "t0 of the children"
            ),
            "children": variable(("set", "child"), siblings, "1", "centered distance of two children at the end"),
        },
        coords={
            "set": ("set", sets),
            "seed": ("seed", list(trunks)),
            "pair": ("pair", [f"{a} - {b}" for a, b in pairs]),
            "child": ("child", [f"t0 = {start:g}, seed {seed}" for _, start, seed in children]),
            "step": ("step", np.asarray(steps), {"units": "step"}),
            "epoch": ("step", np.array([epochs[step] for step in steps]), {"units": "epoch"}),
        },
    )


def _tasks(sweep: Sweep) -> list[str]:
    return sorted({str(task) for task in arms.tasks_of(sweep.table)})


def _trunks(sweep: Sweep, task: str) -> dict[int, Run]:
    """Trunks with kernels and without intervention of a task by seed; of several kinds of trunk the first."""
    table = sweep.table
    rows = table[(table["kind"] == "trunk") & (arms.tasks_of(table) == task) & ~arms.altered(table)]
    found: dict[int, Run] = {}
    for name, seed in zip(rows["run"], rows["seed"], strict=True):
        run = sweep.runs[str(name)]
        if kernel_sets(run):
            found.setdefault(int(seed), run)
    return found


def _children(sweep: Sweep, task: str) -> list[tuple[Run, float, int]]:
    """Sibling runs with kernels at the trunk's last step: run, start epoch, seed."""
    table = sweep.table
    if "data_order" not in table or "intervention" not in table:
        return []
    sibling = (table["intervention"] == "none") & (table["data_order"] != 0) & ~arms.altered(table)
    rows = table[sibling & (arms.tasks_of(table) == task)]
    trunks = _trunks(sweep, task)
    found = []
    for name, start, seed in sorted(
        zip(rows["run"], rows["start_epoch"], rows["seed"], strict=True), key=lambda row: (row[1], row[2])
    ):
        run = sweep.runs[str(name)]
        sets = kernel_sets(run)
        if int(seed) not in trunks or not sets:
            continue
        group = path_of("ntk", sets[0], "")
        if run.steps(group)[-1] == trunks[int(seed)].steps(group)[-1]:
            found.append((run, float(start), int(seed)))
    return found


def _at(run: Run, probe_set: str, steps: list[int]) -> np.ndarray:
    recorded = np.asarray(run.steps(path_of("ntk", probe_set, "")))
    return trace_kernels(run, probe_set)[np.searchsorted(recorded, steps)]


def _level(dataset: xr.Dataset, name: str) -> np.ndarray:
    """Distances at the end: of the children, or of the seeds at the last step."""
    if not dataset[name].size:
        return np.array([])
    values = dataset[name].values if name == "children" else dataset[name].values[:, -1]
    return np.asarray(values[np.isfinite(values)])


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
