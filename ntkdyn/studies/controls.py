"""What the advantage needs: learned or random mask, weights or mask, which budget, which survivors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import plots
from . import arms
from .comparisons import INTERACTION, NUMBERS, by_seed, comparisons, contrasts, control_arms, words
from .recorded import Datasets, Table, variable

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from ..results import Sweep

MEASURES = {
    "test_accuracy": ("percent", "final test accuracy"),
    "active_units": ("units", "active units"),
    "weighted_units": ("units", "units weighted by |1 - slope|"),
    "survivor_nonlinearity": ("1", "mean |1 - slope| of the survivors"),
    "napl": ("units per path", "normalized average path length"),
    "weighted_napl": ("units per path", "normalized average path length weighted by |1 - slope|"),
}

CONTRAST_NUMBERS = {
    "mean": ("percentage points", "paired difference, mean"),
    "low": ("percentage points", "lower end of its 95 % interval"),
    "high": ("percentage points", "upper end of its 95 % interval"),
    "n": ("seeds", "pairs"),
    **NUMBERS,
}


class Controls:
    """Mask {learned, random} × start {early, late}, late mask and path from the start, budget and survivor rules."""

    name = "controls"
    title = "Controls"
    reading = (
        "Upper panel: final accuracy of each kind of arm, mean and 95 % interval; middle: differences paired by seed, "
        "which exclude zero where their interval does; lower: mean |1 - slope| of the units that stay nonlinear: "
        "matched count is not matched nonlinearity."
    )
    scope = "sweep"

    def unavailable(self, source: Sweep, /) -> str | None:
        """Need arms at two start epochs and at least one control."""
        reason = arms.need(source)
        if reason is not None:
            return reason
        for task in arms.tasks(source):
            if len(control_arms(source, task)) > 2:
                return None
        return "the sweep has no control arm; add arms with mask = random, late or late-path, or other survivors"

    def measure(self, source: Sweep, /) -> xr.Dataset:
        """Return results [task, arm, seed] and paired differences [task, contrast]."""
        import xarray as xr

        from ..analysis.advantage import mean_interval

        names, seeds = arms.tasks(source), arms.seeds_of(source)
        found = {task: control_arms(source, task) for task in names}
        # The order of the task with most arms: others only lack some.
        fullest = sorted(found.values(), key=len, reverse=True)
        labels = list(dict.fromkeys(label for parts in fullest for label in parts))
        measured = {measure: np.full((len(names), len(labels), len(seeds)), np.nan) for measure in MEASURES}
        for i, task in enumerate(names):
            for label, rows in found[task].items():
                for measure, values in measured.items():
                    values[i, labels.index(label)] = by_seed(rows, measure, seeds)
        accuracy = measured["test_accuracy"]
        intervals = np.array(
            [[_triple(mean_interval(accuracy[i, j])) for j in range(len(labels))] for i in range(len(names))]
        )

        judged = comparisons(source)
        differences = {task: contrasts(source, task, seeds) for task in names}
        kept = list(dict.fromkeys(label for task in names for label in differences[task]))
        # The interaction of all others stands last.
        kept.sort(key=lambda label: label == INTERACTION)
        table = np.full((len(names), len(kept), len(CONTRAST_NUMBERS)), np.nan)
        for i, task in enumerate(names):
            for label, values in differences[task].items():
                found_one = mean_interval(values[np.isfinite(values)])
                numbers = judged[task, label].numbers
                table[i, kept.index(label)] = (*_triple(found_one), found_one.n, *numbers)
        return xr.Dataset(
            {
                **{
                    name: variable(("task", "arm", "seed"), measured[name], *MEASURES[name])
                    for name in MEASURES
                    if np.isfinite(measured[name]).any()
                },
                **{
                    f"accuracy_{name}": variable(
                        ("task", "arm"), intervals[..., place], "percent", f"{name} of accuracy"
                    )
                    for place, name in enumerate(("mean", "low", "high"))
                },
                **{
                    f"contrast_{name}": variable(("task", "contrast"), table[..., place], unit, text)
                    for place, (name, (unit, text)) in enumerate(CONTRAST_NUMBERS.items())
                },
            },
            coords={
                "task": ("task", names),
                "arm": ("arm", labels),
                "contrast": ("contrast", kept),
                "seed": ("seed", seeds),
            },
        )

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say every contrast with its interval, and how nonlinear the matched arms are."""
        lines = []
        for dataset in datasets.values():
            for task in dataset["task"].values:
                one = dataset.sel(task=task)
                for contrast in dataset["contrast"].values:
                    entry = one.sel(contrast=contrast)
                    mean, low, high = (float(entry[f"contrast_{name}"]) for name in ("mean", "low", "high"))
                    n = entry["contrast_n"].item()
                    # NaN: a contrast that only another task has.
                    if not n >= 1:
                        continue
                    interval = (
                        f"95 % interval {low:.1f} to {high:.1f}, n = {n:.0f}" if n > 1 else "one seed, no interval"
                    )
                    judged = words([float(entry[f"contrast_{name}"]) for name in NUMBERS])
                    lines.append(f"{task}, {contrast}: {mean:+.1f} points ({interval}{judged}).")
                lines += _mismatch(one, str(task))
        return lines

    def tables(self, datasets: Datasets, /) -> list[Table]:
        """Give every arm's accuracy beside its counts and path lengths, means over seeds."""
        tables = []
        for dataset in datasets.values():
            names = [name for name in MEASURES if name in dataset]
            for task in dataset["task"].values:
                one = dataset.sel(task=task)
                rows = [
                    (str(arm), *(_text(one[name].sel(arm=arm).values) for name in names))
                    for arm in dataset["arm"].values
                    if np.isfinite(one["test_accuracy"].sel(arm=arm).values).any()
                ]
                heads = tuple(f"{MEASURES[name][1]} ({MEASURES[name][0]})" for name in names)
                tables.append(Table(f"{task}: means over seeds", ("arm", *heads), tuple(rows)))
        return tables

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw accuracies, contrasts and nonlinearity; a color and marker a task."""
        dataset = next(iter(datasets.values()))
        labels, contrasts = list(dataset["arm"].values), list(dataset["contrast"].values)
        rows = [len(labels), max(len(contrasts), 1), len(labels)]
        lower = "survivor_nonlinearity" in dataset
        axes = plots.stacked(figure, [0.13 * count + 0.42 for count in rows[: 3 if lower else 2]])
        for index, task in enumerate(dataset["task"].values):
            one = dataset.sel(task=task)
            plots.draw_rows(
                labels,
                *(one[f"accuracy_{name}"].values for name in ("mean", "low", "high")),
                ax=axes[0],
                label=f"task {task}",
                index=index,
                of=dataset.sizes["task"],
            )
            plots.draw_rows(
                contrasts,
                *(one[f"contrast_{name}"].values for name in ("mean", "low", "high")),
                ax=axes[1],
                label=f"task {task}",
                index=index,
                of=dataset.sizes["task"],
            )
            if lower:
                values = one["survivor_nonlinearity"].values
                mean = np.array([row[np.isfinite(row)].mean() if np.isfinite(row).any() else np.nan for row in values])
                plots.draw_rows(
                    labels, mean, mean, mean, ax=axes[2], label=f"task {task}", index=index, of=dataset.sizes["task"]
                )
        axes[0].set_xlabel("final test accuracy (%)")
        axes[1].axvline(0, color=plots.GRAY, linewidth=0.8)
        axes[1].set_xlabel("difference (percentage points)")
        if lower:
            axes[2].set_xlabel("survivors' mean |1 - slope| (1)")
        plots.finish(figure)


def _triple(interval: Any) -> tuple[float, float, float]:
    return interval.mean, interval.low, interval.high


def _mismatch(dataset: xr.Dataset, task: str) -> list[str]:
    """How nonlinear the survivors of the early and the late arm are: matched count is not matched nonlinearity."""
    lines: list[str] = []
    if "survivor_nonlinearity" not in dataset:
        return lines
    for rule in (
        "learned",
        *sorted({str(a).rsplit(",", 1)[0] for a in dataset["arm"].values if "survivors" in str(a)}),
    ):
        pair = [f"{rule}, {when}" for when in ("early", "late")]
        if not set(pair) <= set(dataset["arm"].values.tolist()):
            continue
        early, late = (dataset.sel(arm=arm) for arm in pair)
        texts = [_text(part["survivor_nonlinearity"].values) for part in (early, late)]
        if "" in texts:
            continue
        count = ""
        if "active_units" in dataset:
            count = f" at {_text(early['active_units'].values)} and {_text(late['active_units'].values)} active units"
        means = [float(np.nanmean(part["survivor_nonlinearity"].values)) for part in (early, late)]
        # A tenth is far above rounding and far below what the survivor rules make of it.
        apart = abs(means[0] - means[1]) > 0.1 * max(means)
        judged = "matched count is not matched nonlinearity" if apart else "count and nonlinearity are matched"
        lines.append(
            f"{task}, {rule}: the survivors' mean |1 - slope| is {texts[0]} early and {texts[1]} late{count}; {judged}."
        )
    return lines


def _text(values: np.ndarray) -> str:
    values = values[np.isfinite(values)]
    return f"{values.mean():.3g}" if len(values) else ""
