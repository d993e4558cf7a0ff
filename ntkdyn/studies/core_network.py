"""What a fixed price per unit leaves of networks of several widths and depths: is it the same core?"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .. import plots
from . import arms
from .comparisons import by_seed
from .core_ratios import MEASURES, NUMBERS, between_tasks, contrasts_of, ratios_of
from .groups import Group, groups, missing
from .over_seeds import finite, means
from .recorded import Datasets, Table, variable
from .units import NEED
from .wording import measured

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.figure import Figure

    from ..results import Sweep

SHORT = {
    "active_units": "active units",
    "napl": "NAPL",
    "width_per_path": "width per path",
    "width_per_layer": "width per layer",
}
"""The same in a few words, of sentences and figure."""

NEEDED = ("width", "depth", "penalty_weight", "intervention", "napl", "active_units", "test_accuracy")

MIDDLE = (1 / 3, 2 / 3)
"""Relative depths between which the middle of a network lies."""

AT_REST = (5.0, 1.0)
"""A core is at rest where the last quarter of the ramp took at most so many percent of its units, or units."""


class CoreNetwork:
    """Active units per layer, effective depth and width, for each starting width and depth."""

    name = "core-network"
    title = "The core that is left"
    reading = (
        "Upper panels: active units of each layer at the end against its relative depth, mean and 95 % interval over "
        "seeds, a curve a starting width and depth; lower panels: outcomes of the largest start over those of the "
        "smallest, paired by seed; the same core whatever the start would put every ratio into the gray band."
    )
    scope = "sweep"

    def unavailable(self, source: Sweep, /) -> str | None:
        """Need arms of a priced linearization that began with two widths or depths, and their unit counts."""
        reason = missing(source, self.name, NEEDED)
        if reason is not None:
            return reason
        found = _groups(source)
        if not found:
            return "the sweep has no linearized arm; sweep over width and depth with intervention=linearize"
        if all("units/active" not in source.runs[str(run)] for group in found for run in group.rows["run"]):
            return NEED
        if not any(contrasts_of(list(_starts(group))) for group in found):
            return "all arms began with one width and depth; sweep over at least two values of width or depth"
        return None

    def measure(self, source: Sweep, /) -> xr.Dataset:
        """Return outcomes [group, start, seed], shapes with a layer axis, ratios [group, contrast, measure]."""
        import xarray as xr

        from ..analysis import effective_width
        from ..analysis.ratios import share_between, spread_factor

        found, seeds = _groups(source), arms.seeds_of(source)
        starts = sorted({start for group in found for start in _starts(group)})
        layers = max(shape.size for group in found for shape in _shapes(source, group.rows, seeds).values())
        outcomes = {name: np.full((len(found), len(starts), len(seeds)), np.nan) for name in (*MEASURES, "accuracy")}
        shape = np.full((len(found), len(starts), layers, len(seeds)), np.nan)
        depth = np.full((len(found), len(starts), layers), np.nan)
        middle = np.full((len(found), len(starts), len(seeds)), np.nan)
        late = np.full((2, len(found), len(starts), len(seeds)), np.nan)
        total = np.full((len(found), len(starts)), np.nan)
        diverged = np.zeros((len(found), len(starts), len(seeds)))
        for i, group in enumerate(found):
            for start, rows in _starts(group).items():
                j = starts.index(start)
                for name, column in (("active_units",) * 2, ("napl",) * 2, ("accuracy", "test_accuracy")):
                    outcomes[name][i, j] = by_seed(rows, column, seeds)
                diverged[i, j] = np.nan_to_num(by_seed(rows, "diverged", seeds))
                total[i, j] = _total(source, rows)
                for seed, both in _late_counts(source, rows, seeds).items():
                    late[:, i, j, seeds.index(seed)] = both
                for seed, counts in _shapes(source, rows, seeds).items():
                    shape[i, j, : counts.size, seeds.index(seed)] = counts
                    depth[i, j, : counts.size] = (np.arange(counts.size) + 0.5) / counts.size
                    middle[i, j, seeds.index(seed)] = share_between(counts, *MIDDLE)
                    widths = effective_width(counts, outcomes["napl"][i, j, seeds.index(seed)])
                    outcomes["width_per_path"][i, j, seeds.index(seed)] = widths.per_path
                    outcomes["width_per_layer"][i, j, seeds.index(seed)] = widths.per_layer
        widths_of_starts = np.array([start[0] for start in starts])[None, :, None]
        with np.errstate(invalid="ignore"):
            off = np.abs(outcomes["width_per_path"] / widths_of_starts - 1) > 1e-6
        constructed = ~off.any((1, 2))
        contrasts = contrasts_of(starts)
        ratios = ratios_of(outcomes, contrasts, starts, total, constructed)
        spread = np.array([[spread_factor(outcomes[name][i]) for name in MEASURES] for i in range(len(found))])
        pairs, between = between_tasks(found, outcomes)
        return xr.Dataset(
            {
                **{name: variable(("group", "start", "seed"), outcomes[name], *MEASURES[name]) for name in MEASURES},
                "accuracy": variable(
                    ("group", "start", "seed"), outcomes["accuracy"], "percent", "final test accuracy"
                ),
                "diverged": variable(("group", "start", "seed"), diverged, "1", "1 where the run diverged"),
                "total": variable(("group", "start"), total, "units", "units"),
                "active_of_layer": variable(("group", "start", "layer", "seed"), shape, "units", "active units"),
                "relative_depth": variable(("group", "start", "layer"), depth, "1", "relative depth of the layer"),
                "middle_share": variable(
                    ("group", "start", "seed"), middle, "1", "share of active units in the middle third of the layers"
                ),
                "active_before_the_end": variable(
                    ("group", "start", "seed"), late[0], "units", "active units three quarters through the ramp"
                ),
                "active_at_the_end": variable(
                    ("group", "start", "seed"), late[1], "units", "active units at the end of the ramp"
                ),
                "by_construction": variable(
                    "group", constructed, "1", "active units per NAPL is the starting width in every run"
                ),
                "spread": variable(("group", "measure"), spread, "1", "factor between seeds of one start"),
                **{
                    f"ratio_{name}": variable(("group", "contrast", "measure"), ratios[name], unit, text)
                    for name, unit, text in (
                        *((name, "seeds" if name == "n" else "1", text) for name, text in NUMBERS.items()),
                        ("left_out", "seeds", "pairs in which nothing is left of a network"),
                        ("judgement", "1", "whether the same core is supported"),
                    )
                },
                **{
                    f"task_ratio_{name}": variable(
                        ("task_pair", "measure"), between[..., place], "seeds" if name == "n" else "1", text
                    )
                    for place, (name, text) in enumerate(NUMBERS.items())
                },
            },
            coords={
                "group": ("group", [group.label for group in found]),
                "start": ("start", [f"width {width}, depth {depth}" for width, depth in starts]),
                "layer": ("layer", np.arange(1, layers + 1)),
                "contrast": ("contrast", list(contrasts)),
                "measure": ("measure", list(MEASURES)),
                "task_pair": ("task_pair", pairs),
                "seed": ("seed", seeds),
            },
        )

    def verdict(self, datasets: Datasets, /) -> list[str]:
        """Say for what the same core is supported, contradicted, or cannot be judged."""
        from ..analysis.ratios import INVARIANCE_MARGIN

        lines = []
        for dataset in datasets.values():
            for group in dataset["group"].values:
                one = dataset.sel(group=group)
                found: dict[str, dict[str, list[str]]] = {}
                for contrast, name in _judged(one):
                    judgement = str(one["ratio_judgement"].sel(contrast=contrast, measure=name).values)
                    found.setdefault(judgement, {}).setdefault(contrast, []).append(SHORT[name])
                words = [
                    f"{judgement} for {', '.join(names)} over {contrast}"
                    for judgement, places in sorted(found.items(), reverse=True)
                    for contrast, names in places.items()
                ]
                lines.append(
                    f"{group}, that the same core is left whatever the start, within a factor of "
                    f"{INVARIANCE_MARGIN:g}: {'; '.join(words) or 'cannot be judged, there is no pair of starts'}."
                )
        return lines

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say the verdict, the ratios beside the variation between seeds, and where the active units lie."""
        from ..analysis.advantage import mean_interval

        lines = self.verdict(datasets)
        for dataset in datasets.values():
            for group in dataset["group"].values:
                one = dataset.sel(group=group)
                lines += [f"{group}, {text}" for text in _ratio_texts(one)]
                lines += [f"{group}: {text}" for text in _remarks(one)]
                share = mean_interval(finite(100 * means(one["middle_share"].values.T)))
                if share.n > 1:
                    lines.append(
                        f"{group}: {share.mean:.0f} % of the active units (95 % interval {max(share.low, 0):.0f} to "
                        f"{min(share.high, 100):.0f}, mean over starts, n = {share.n}) lie in the middle third; "
                        "33 % if all layers kept the same number."
                    )
            for pair in dataset["task_pair"].values:
                entry = dataset.sel(task_pair=pair)
                words = [
                    f"{SHORT[name]} {_ratio_text(entry.sel(measure=name), 'task_ratio')}"
                    for name in ("active_units", "napl")
                    if float(entry["task_ratio_n"].sel(measure=name)) > 0
                ]
                if words:
                    lines.append(f"exploratory, {pair}, ratio over the starts in both: {'; '.join(words)}.")
        return lines

    def tables(self, datasets: Datasets, /) -> list[Table]:
        """Give what is left of each start."""
        columns = (
            "start", "units (units)", *(f"{text} ({unit})" for unit, text in MEASURES.values()),
            "in the middle third (%)", "accuracy (%)", "active units per layer, from the input on (units)",
        )  # fmt: skip
        tables = []
        for dataset in datasets.values():
            for group in dataset["group"].values:
                rows = []
                for start in dataset["start"].values:
                    one = dataset.sel(group=group, start=start)
                    if not np.isfinite(one["active_units"].values).any():
                        continue
                    shape = [measured(row) for row in one["active_of_layer"].values]
                    rows.append(
                        (
                            str(start),
                            f"{float(one['total']):g}",
                            *(measured(one[name].values) for name in MEASURES),
                            measured(100 * one["middle_share"].values),
                            measured(one["accuracy"].values),
                            " ".join(text for text in shape if text),
                        )
                    )
                tables.append(Table(f"{group}: means over seeds", columns, tuple(rows)))
        return tables

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw the shapes, a panel a group, and the ratios, a panel a contrast."""
        from ..analysis.advantage import mean_interval
        from ..analysis.ratios import INVARIANCE_MARGIN

        dataset = next(iter(datasets.values()))
        names, contrasts = list(dataset["group"].values), list(dataset["contrast"].values)
        rows = 0.5 + 0.045 * len(MEASURES) * (1 + len(names))
        axes = plots.stacked(figure, [1.3] * len(names) + [rows] * len(contrasts))
        for ax, group in zip(axes, names, strict=False):
            for index, start in enumerate(dataset["start"].values):
                one = dataset.sel(group=group, start=start)
                there = np.isfinite(one["relative_depth"].values)
                intervals = [mean_interval(row) for row in one["active_of_layer"].values[there]]
                if intervals:
                    plots.draw_intervals(
                        one["relative_depth"].values[there],
                        *([getattr(one, end) for one in intervals] for end in ("mean", "low", "high")),
                        ax=ax,
                        label=str(start),
                        index=index,
                    )
            plots.title(ax, str(group))
            ax.set_ylabel("active (units)")
            ax.set_xlim(0, 1)
            ax.set_ylim(bottom=0)
        axes[len(names) - 1].set_xlabel("relative depth of the layer (1)")
        for ax, contrast in zip(axes[len(names) :], contrasts, strict=True):
            for index, group in enumerate(names):
                one = dataset.sel(group=group, contrast=contrast)
                plots.draw_rows(
                    [SHORT[name] for name in MEASURES],
                    *(one[f"ratio_{end}"].values for end in ("mean", "low", "high")),
                    ax=ax,
                    label=f"ratio, {group}",
                    # From the last color on, as the first are those of the starts.
                    index=len(plots.COLORS) - 1 - index,
                    of=len(names),
                    place=index,
                )
            plots.logarithmic(ax, axis="x")
            ax.axvspan(1 / INVARIANCE_MARGIN, INVARIANCE_MARGIN, color=plots.GRAY, alpha=0.15, linewidth=0)
            plots.title(ax, contrast)
        axes[-1].set_xlabel("ratio of outcomes (1)")
        plots.finish(figure)


def _groups(sweep: Sweep) -> list[Group]:
    return groups(sweep, compared=("width", "depth"), intervention="linearize")


def _starts(group: Group) -> dict[tuple[int, int], pd.DataFrame]:
    """Rows by starting width and depth; networks of no given size have none."""
    rows = group.rows[group.rows["width"].notna() & group.rows["depth"].notna()]
    sizes = sorted(set(zip(rows["width"].astype(int), rows["depth"].astype(int), strict=True)))
    return {size: rows[(rows["width"] == size[0]) & (rows["depth"] == size[1])] for size in sizes}


def _shapes(sweep: Sweep, rows: pd.DataFrame, seeds: list[int]) -> dict[int, NDArray[np.float64]]:
    """Active units of each layer at the last snapshot by seed; a diverged run has no core."""
    found = {}
    for name, seed, accuracy in zip(rows["run"], rows["seed"], rows["test_accuracy"], strict=True):
        run = sweep.runs[str(name)]
        if int(seed) in seeds and np.isfinite(accuracy) and "units/active" in run:
            found[int(seed)] = np.asarray(run["units/active"][-1], dtype=np.float64)
    return found


def _late_counts(sweep: Sweep, rows: pd.DataFrame, seeds: list[int]) -> dict[int, tuple[float, float]]:
    """Active units three quarters through the ramp and at its end, by seed, of runs that recorded both."""
    found = {}
    for name, seed, accuracy in zip(rows["run"], rows["seed"], rows["test_accuracy"], strict=True):
        run = sweep.runs[str(name)]
        if int(seed) not in seeds or not np.isfinite(accuracy) or "units/active" not in run:
            continue
        length = float(run.config["ramp_epochs"])
        end = float(run.config.get("start_epoch", 0)) + length
        epochs = np.asarray(run.epochs("units"), dtype=np.float64)
        active = np.asarray(run["units/active"], dtype=np.float64).reshape(len(epochs), -1).sum(1)
        last = [np.flatnonzero(epochs <= epoch) for epoch in (end - length / 4, end)]
        if all(len(places) for places in last) and last[0][-1] < last[1][-1] and epochs[last[0][-1]] >= end - length:
            found[int(seed)] = float(active[last[0][-1]]), float(active[last[1][-1]])
    return found


def _total(sweep: Sweep, rows: pd.DataFrame) -> float:
    for name in rows["run"]:
        run = sweep.runs[str(name)]
        if "units/total" in run:
            return float(np.asarray(run["units/total"]).sum())
    return float("nan")


def _judged(one: xr.Dataset) -> list[tuple[str, str]]:
    return [
        (str(contrast), str(name))
        for contrast, name in itertools.product(one["contrast"].values, one["measure"].values)
        if str(one["ratio_judgement"].sel(contrast=contrast, measure=name).values) != "not judged"
    ]


def _ratio_texts(one: xr.Dataset) -> list[str]:
    words: dict[str, list[str]] = {}
    for contrast, name in _judged(one):
        entry = one.sel(contrast=contrast, measure=name)
        spread = float(one["spread"].sel(measure=name))
        beside = f", between seeds a factor of {spread:.2f}" if np.isfinite(spread) else ""
        words.setdefault(contrast, []).append(f"{SHORT[name]} {_ratio_text(entry, 'ratio', beside)}")
    return [f"{contrast}: {'; '.join(parts)}." for contrast, parts in words.items()]


def _ratio_text(entry: xr.Dataset, prefix: str, beside: str = "") -> str:
    mean, low, high, n = (float(entry[f"{prefix}_{name}"]) for name in NUMBERS)
    if n < 1:
        return "cannot be compared, as no pair has something left"
    interval = f"95 % interval {low:.2f} to {high:.2f}, n = {int(n)}" if n > 1 else "one seed, no interval"
    return f"x {mean:.2f} ({interval}{beside})"


def _remarks(one: xr.Dataset) -> list[str]:
    """What makes ratios mean less than they seem to."""
    lines = []
    if bool(one["by_construction"]):
        lines.append(
            "active units per NAPL is the starting width in every run, as in a plain network of one width it must be, "
            "and says nothing; over widths at most one of active units and NAPL can stay the same there."
        )
    before, after = (finite(one[f"active_{name}_the_end"].values) for name in ("before", "at"))
    if len(before):
        taken = before - after
        percent = 100 * taken / np.maximum(before, 1)
        moving = int(((percent > AT_REST[0]) & (taken > AT_REST[1])).sum())
        took, bound = "the last quarter of the ramp", f"{AT_REST[0]:g} % of the units that were there"
        lines.append(
            f"in {moving} of {len(before)} runs {took} still took more than {bound} "
            f"(at most {percent.max():.0f} %): these had not come to rest, and what is left of them is no core yet."
            if moving
            else f"the count had come to rest in all {len(before)} runs: {took} took at most {bound}, or one unit."
        )
    active, total = one["active_units"].values, one["total"].values
    dead = int((active == 0).sum())
    if dead:
        lines.append(f"in {dead} of {int(np.isfinite(active).sum())} runs no unit is left; such pairs are in no ratio.")
    whole = [
        str(start)
        for start, values, units in zip(one["start"].values, active, total, strict=True)
        if np.isfinite(values).any() and (finite(values) == units).all()
    ]
    if whole:
        lines.append(f"the price takes no unit from {'; '.join(whole)}, so no core is seen there.")
    failed = int(one["diverged"].sum())
    if failed:
        lines.append(f"{failed} runs diverged; they are in no mean and no ratio.")
    return lines
