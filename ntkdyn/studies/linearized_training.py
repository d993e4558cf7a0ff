"""What is lost when training goes on linear in the weights, or in most units, from epoch t on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .. import plots
from . import arms
from .comparisons import by_seed, margin_of
from .groups import Group, beside, groups, missing
from .over_seeds import finite, mean, means, numbers, stored
from .recorded import Datasets, Table, kernel_sets, path_of, trace_kernels, variable
from .wording import bounds, difference, with_interval

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.figure import Figure

    from ..results import Sweep

CHILDREN = {"weights": "linear in the weights", "units": "linear in most units"}

NEEDED = ("child", "start_epoch", "test_accuracy", "dense_accuracy")

# A trunk is recorded at whole epochs, where children start; no snapshot within this distance is none of theirs.
_NEAR = 0.25


class LinearizedTraining:
    """Final accuracy of children linear in the weights or in most units, against the epoch they start from."""

    name = "linearized-training"
    title = "Linear in the weights, linear in the units"
    reading = (
        "Upper panel: final test accuracy of what trains on from epoch t linear in the weights, or with most units "
        "linear, beside the network itself and what it had reached at t, mean and 95 % interval over seeds; middle: "
        "accuracy of the network minus that of the child, paired by seed; lower, where kernels are recorded: the "
        "centered distance of the network's kernel at t to its last. All are functions of t, so that they fall "
        "together relates none to another."
    )
    scope = "sweep"

    def unavailable(self, source: Sweep, /) -> str | None:
        """Need the network itself and children of it."""
        reason = missing(source, self.name, NEEDED)
        if reason is not None:
            return reason
        found = _groups(source)
        if not found:
            return "the sweep has no child; sweep over child=weights,units and start_epoch"
        if not any(len(beside(source, group, child="network")) for group in found):
            return "the sweep has not the network itself; add child=network"
        return None

    def measure(self, source: Sweep, /) -> xr.Dataset:
        """Return accuracies [group, child, start_epoch, seed], advantages [group, child, start_epoch], drift."""
        import xarray as xr

        from ..analysis.advantage import mean_interval

        found, seeds = _groups(source), arms.seeds_of(source)
        rows = [{child: _child(source, group, child) for child in CHILDREN} for group in found]
        starts = sorted({float(value) for parts in rows for part in parts.values() for value in part["start_epoch"]})
        size = (len(found), len(CHILDREN), len(starts), len(seeds))
        accuracy, dense, diverged = np.full(size, np.nan), np.full(size, np.nan), np.zeros(size)
        network = np.full((len(found), len(seeds)), np.nan)
        for i, group in enumerate(found):
            network[i] = by_seed(beside(source, group, child="network"), "test_accuracy", seeds)
            for j, child in enumerate(CHILDREN):
                accuracy[i, j] = arms.pivot(rows[i][child], "test_accuracy", starts, seeds)
                dense[i, j] = arms.pivot(rows[i][child], "dense_accuracy", starts, seeds)
                diverged[i, j] = np.nan_to_num(arms.pivot(rows[i][child], "diverged", starts, seeds))
        # Children of one trunk leave the same network.
        reached = np.where(np.isfinite(dense[:, 0]), dense[:, 0], dense[:, 1])
        lost = network[:, None, None, :] - accuracy
        advantage = np.array(
            [
                [[numbers(mean_interval(finite(row))) for row in per_child] for per_child in per_group]
                for per_group in lost
            ]
        ).reshape(*size[:3], 4)
        between = np.array(
            [[numbers(mean_interval(finite(row))) for row in part[0] - part[1]] for part in accuracy]
        ).reshape(size[0], size[2], 4)
        intervals = np.array(
            [[[numbers(mean_interval(row)) for row in per_child] for per_child in per_group] for per_group in accuracy]
        ).reshape(*size[:3], 4)
        probe_set, drift = _drift(source, found, starts, seeds)
        dims, points = ("group", "child", "start_epoch"), "percentage points"
        ends = ("mean", "low", "high")
        return xr.Dataset(
            {
                "accuracy": variable((*dims, "seed"), accuracy, "percent", "final test accuracy of the child"),
                "network_accuracy": variable(
                    ("group", "seed"), network, "percent", "final test accuracy of the network itself"
                ),
                "reached": variable(
                    ("group", "start_epoch", "seed"), reached, "percent", "test accuracy of the network at t"
                ),
                "diverged": variable((*dims, "seed"), diverged, "1", "1 where the run diverged"),
                "margin": margin_of(source),
                **{
                    f"accuracy_{end}": variable(dims, intervals[..., place], "percent", f"{end} of 95 %")
                    for place, end in enumerate(ends)
                },
                **{
                    f"advantage_{end}": variable(
                        dims,
                        advantage[..., place],
                        "seeds" if end == "n" else points,
                        f"network - child, paired, {end}",
                    )
                    for place, end in enumerate((*ends, "n"))
                },
                **{
                    f"between_{end}": variable(
                        ("group", "start_epoch"),
                        between[..., place],
                        "seeds" if end == "n" else points,
                        f"linear in the weights - linear in most units, paired, {end}",
                    )
                    for place, end in enumerate((*ends, "n"))
                },
                "drift": variable(
                    ("group", "start_epoch", "seed"), drift, "1", "centered kernel distance S(K_t, K_T) of the network"
                ),
            },
            coords={
                "group": ("group", [group.label for group in found]),
                "child": ("child", list(CHILDREN)),
                "start_epoch": ("start_epoch", starts, {"units": "epoch"}),
                "seed": ("seed", seeds),
            },
            attrs={"probe_set": probe_set},
        )

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say up to which start each child loses, how the two compare, and how far the kernel still moves."""
        lines = []
        for dataset in datasets.values():
            for group in dataset["group"].values:
                one = dataset.sel(group=group)
                texts = [f"the network itself reaches {mean(one['network_accuracy'].values):.1f} %."]
                texts += [_advantage_text(one.sel(child=child), text) for child, text in CHILDREN.items()]
                texts += [*_between_texts(one), *_drift_text(one)]
                lines += [f"{group}: {text}" for text in texts if text]
                failed = int(one["diverged"].sum())
                if failed:
                    lines.append(f"{group}: {failed} children diverged; they are in no mean and no difference.")
        return lines

    def tables(self, datasets: Datasets, /) -> list[Table]:
        """Give accuracies and differences at every start."""
        columns = (
            "t (epochs)", "network at t (%)", "linear in the weights from t (%)", "NA_w(t) (points)",
            "linear in most units from t (%)", "NA_u(t) (points)", "S(K_t, K_T) (1)",
        )  # fmt: skip
        tables = []
        for dataset in datasets.values():
            for group in dataset["group"].values:
                rows = []
                for start in dataset["start_epoch"].values:
                    one = dataset.sel(group=group, start_epoch=start)
                    cells: list[str] = []
                    for child in CHILDREN:
                        for name in ("accuracy", "advantage"):
                            entry = one.sel(child=child)
                            cells.append(
                                with_interval(*(float(entry[f"{name}_{end}"]) for end in ("mean", "low", "high")))
                            )
                    reached, drift = mean(one["reached"].values), mean(one["drift"].values)
                    rows.append(
                        (
                            f"{start:g}",
                            f"{reached:.1f}" if np.isfinite(reached) else "",
                            *cells,
                            f"{drift:.3g}" if np.isfinite(drift) else "",
                        )
                    )
                caption = f"{group}: means over seeds with 95 % intervals; NA = network - child, paired"
                tables.append(Table(caption, columns, tuple(rows)))
        return tables

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw accuracies, differences and, where recorded, the remaining drift, against the start."""
        dataset = next(iter(datasets.values()))
        x, with_drift = dataset["start_epoch"].values, bool(np.isfinite(dataset["drift"].values).any())
        count = 3 if with_drift else 2
        axes = plots.panels(figure, count * dataset.sizes["group"], height=1.6)
        for place, group in enumerate(dataset["group"].values):
            above, middle, *below = axes[count * place : count * (place + 1)]
            one = dataset.sel(group=group)
            plots.draw_reference(mean(one["network_accuracy"].values), ax=above, label="network itself")
            plots.draw_lines(x, means(one["reached"].values), ax=above, label="network at t", index=6, dash=2)
            for index, (child, text) in enumerate(CHILDREN.items()):
                for ax, name in ((above, "accuracy"), (middle, "advantage")):
                    curve = one.sel(child=child)
                    there = np.isfinite(curve[f"{name}_mean"].values)
                    if there.any():
                        plots.draw_intervals(
                            x[there],
                            *(curve[f"{name}_{end}"].values[there] for end in ("mean", "low", "high")),
                            ax=ax,
                            label=text,
                            index=index,
                        )
            middle.axhline(0, color=plots.GRAY, linewidth=0.8)
            plots.title(above, f"task: {group}")
            above.set_ylabel("test accuracy (%)")
            plots.within(above, 0, 100)
            middle.set_ylabel("network - child\n(percentage points)")
            for ax in below:
                there = np.isfinite(one["drift"].values).any(1)
                plots.draw_lines(
                    x[there], one["drift"].values[there].T, ax=ax, label="S(K_t, K_T) of the network", index=2
                )
                ax.set_ylabel("kernel distance (1)")
                ax.set_ylim(bottom=0)
        axes[-1].set_xlabel("start t of the child (epochs)")
        plots.finish(figure)


def _groups(sweep: Sweep) -> list[Group]:
    """Groups of the settings in which children in the units differ; those in the weights belong to each of them."""
    found = groups(sweep, compared=("start_epoch",), child="units")
    return found or groups(sweep, compared=("start_epoch",), child="weights")


def _child(sweep: Sweep, group: Group, child: str) -> pd.DataFrame:
    return group.rows if (group.rows["child"] == child).all() else beside(sweep, group, child=child)


def _drift(sweep: Sweep, found: list[Group], starts: list[float], seeds: list[int]) -> tuple[str, NDArray[np.float64]]:
    """Probe set, and distance of the network's kernel at each start to its last [group, start, seed]."""
    from ..analysis import kernel_distance_centered

    drift = np.full((len(found), len(starts), len(seeds)), np.nan)
    used = ""
    for i, group in enumerate(found):
        rows = beside(sweep, group, child="network")
        for name, seed in zip(rows["run"], rows["seed"], strict=True):
            run = sweep.runs[str(name)]
            sets = kernel_sets(run)
            if not sets:
                continue
            used = "test" if "test" in sets else sets[0]
            kernels = trace_kernels(run, used)
            epochs = np.asarray(run.epochs(path_of("ntk", used, "")), dtype=np.float64)
            for j, start in enumerate(starts):
                near = np.abs(epochs - start)
                if np.isfinite(near).any() and np.nanmin(near) <= _NEAR:
                    distance = kernel_distance_centered(kernels[int(np.nanargmin(near))], kernels[-1])
                    drift[i, j, seeds.index(int(seed))] = float(distance)
    return used, drift


def _advantage_text(one: xr.Dataset, text: str) -> str:
    """At which starts a child loses, and from which on it does not."""
    from ..analysis.advantage import Interval
    from ..analysis.collapse import kept_and_lost, standing

    found = {float(start): stored(one.sel(start_epoch=start), "advantage") for start in one["start_epoch"].values}
    losses = {start: loss for start, loss in found.items() if loss.n}
    if not losses:
        return ""
    starts = sorted(losses, reverse=True)
    # A loss of the child is the advantage with its sign turned.
    turned = [Interval(-loss.mean, -loss.high, -loss.low, loss.n) for loss in (losses[start] for start in starts)]
    kept, lost = kept_and_lost([standing(loss, margin=float(one["margin"])) for loss in turned])
    margin = f"{float(one['margin']):g} point"

    def at(place: int) -> str:
        loss = losses[starts[place]]
        return f"t = {starts[place]:g} ({loss.mean:+.1f} points, {bounds(loss)})"

    words = [
        f"more than {margin} is lost up to {at(lost)}"
        if lost is not None
        else f"that more than {margin} is lost is not shown at the earliest start, {at(-1)}",
        f"no more than {margin} from {at(kept)} on"
        if kept is not None
        else f"that no more than {margin} is lost is not shown at the latest, {at(0)}",
    ]
    return f"{text}, {'; '.join(words)}."


def _between_texts(one: xr.Dataset) -> list[str]:
    """The two children at the first and the last start that both have."""
    from ..analysis.advantage import equivalence, mean_interval

    both = [start for start in one["start_epoch"].values if float(one["between_n"].sel(start_epoch=start)) > 0]
    lines = []
    for start in dict.fromkeys((both[0], both[-1]) if both else ()):
        accuracy = one["accuracy"].sel(start_epoch=start)
        values = finite((accuracy.sel(child="weights") - accuracy.sel(child="units")).values)
        test = equivalence(values, np.zeros(len(values)), margin=float(one["margin"]))
        words = difference("children linear in the weights", "those linear in most units", mean_interval(values), test)
        lines.append(f"exploratory, both from t = {start:g}: {words}.")
    return lines


def _drift_text(one: xr.Dataset) -> list[str]:
    starts, distances = one["start_epoch"].values, means(one["drift"].values)
    known = [(start, distance) for start, distance in zip(starts, distances, strict=True) if np.isfinite(distance)]
    if len(known) < 2:
        return []
    (first, before), (last, after) = known[0], known[-1]
    return [
        f"the network's kernel at t = {first:g} is {before:.3g} from its last, at t = {last:g} it is {after:.3g} "
        "(centered, mean over seeds); distance and loss are both functions of t, which alone does not relate them."
    ]
