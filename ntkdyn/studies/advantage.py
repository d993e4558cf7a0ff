"""What late instead of early linearization is worth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .. import plots
from . import arms
from .comparisons import NUMBERS, Comparison, comparisons, margin_of, p_words, words
from .recorded import Datasets, variable

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from ..analysis.advantage import Equivalence, Interval
    from ..results import Sweep


PLANNED = {
    "mean": ("percentage points", "planned comparison, mean difference; of a measure that is no accuracy in its unit"),
    "low": ("percentage points", "lower end of its 95 % interval"),
    "high": ("percentage points", "upper end of its 95 % interval"),
    "n": ("seeds", "pairs"),
    "p": ("1", "p of sign flips over seeds"),
    "equivalence_p": ("1", "p of two one-sided tests against the planned margin"),
    "margin": ("percentage points", "planned margin"),
}


class Advantage:
    """Final accuracy against the start epoch of linearization, and the gap late - early."""

    name = "advantage"
    title = "Accuracy against start epoch"
    reading = (
        "Each point is the final test accuracy of networks linearized from that epoch on, with equal total epochs, "
        "mean and 95 % interval over seeds; a rise to the right is an advantage of late linearization; the verdict "
        "rests on differences paired by seed, which are more exact than the intervals drawn."
    )
    scope = "sweep"

    def unavailable(self, source: Sweep, /) -> str | None:
        """Need arms with learned masks and equal total budget at two start epochs."""
        reason = arms.need(source)
        if reason is not None:
            return reason
        if any(len(arms.starts_of([line])) > 1 for task in arms.tasks(source) for line in arms.lines(source, task)):
            return None
        return "all arms start at one epoch; sweep over at least two values of start_epoch"

    def measure(self, source: Sweep, /) -> xr.Dataset:
        """Return accuracies [task, line, start_epoch, seed], references [task, seed] and gaps [task, line]."""
        import xarray as xr

        from ..analysis.advantage import equivalence, mean_interval, paired_gap

        names, seeds = arms.tasks(source), arms.seeds_of(source)
        found = {task: arms.lines(source, task) for task in names}
        labels = list(dict.fromkeys(line.label for lines in found.values() for line in lines))
        starts = arms.starts_of([line for lines in found.values() for line in lines])
        accuracy = np.full((len(names), len(labels), len(starts), len(seeds)), np.nan)
        diverged = np.zeros_like(accuracy)
        main = np.zeros((len(names), len(labels)), dtype=bool)
        intervals = np.full((len(names), len(labels), len(starts), 3), np.nan)
        gaps = np.full((len(names), len(labels), 8 + len(NUMBERS)), np.nan)
        judged = comparisons(source)
        named = source.primary
        margin = margin_of(source)
        planned = np.full(len(PLANNED), np.nan)
        if named is not None:
            planned = np.array(_planned(judged["", str(named)], named.margin or np.nan))
        for i, task in enumerate(names):
            for line in found[task]:
                j = labels.index(line.label)
                main[i, j] = line.primary
                accuracy[i, j] = line.values("test_accuracy", starts, seeds)
                diverged[i, j] = np.nan_to_num(line.values("diverged", starts, seeds))
                for k in range(len(starts)):
                    interval = mean_interval(accuracy[i, j, k])
                    intervals[i, j, k] = interval.mean, interval.low, interval.high
                own = [starts.index(start) for start in arms.starts_of([line])]
                late, early = accuracy[i, j, own[-1]], accuracy[i, j, own[0]]
                # A seed without such an arm is no pair; one whose arm diverged is counted as diverged.
                pairs = np.isfinite(late + early) | (diverged[i, j, own[-1]] + diverged[i, j, own[0]] > 0)
                gap = paired_gap(late[pairs], early[pairs])
                test = equivalence(late[pairs], early[pairs], margin=float(margin[1]))
                gaps[i, j] = (
                    *(gap.mean, gap.low, gap.high, gap.n, gap.diverged, test.p),
                    *(starts[own[0]], starts[own[-1]]),
                    *judged[task, line.label].numbers,
                )
        references = {
            name: np.stack([arms.reference(source, task, intervention, seeds) for task in names])
            for name, intervention in (("relu", "none"), ("linear", "linear"))
        }
        line_dims = ("task", "line")
        points = "percentage points"
        return xr.Dataset(
            {
                "accuracy": variable((*line_dims, "start_epoch", "seed"), accuracy, "percent", "final test accuracy"),
                "diverged": variable((*line_dims, "start_epoch", "seed"), diverged, "1", "1 where the run diverged"),
                "main": variable(line_dims, main, "1", "the task's first line, to which its controls belong"),
                **{
                    f"accuracy_{name}": variable((*line_dims, "start_epoch"), intervals[..., place], "percent", text)
                    for place, (name, text) in enumerate(
                        {"mean": "mean", "low": "lower end of 95 %", "high": "upper end of 95 %"}.items()
                    )
                },
                **{
                    name: variable(line_dims, gaps[..., place], unit, text)
                    for place, (name, unit, text) in enumerate(
                        (
                            ("gap", points, "late - early, paired by seed"),
                            ("gap_low", points, "lower end of its 95 % interval"),
                            ("gap_high", points, "upper end of its 95 % interval"),
                            ("gap_n", "seeds", "pairs"),
                            ("gap_diverged", "seeds", "pairs left out because a run diverged"),
                            ("equivalence_p", "1", "p of two one-sided tests against the margin"),
                            ("early", "epoch", "start of the early arm"),
                            ("late", "epoch", "start of the late arm"),
                            *((name, unit, text) for name, (unit, text) in NUMBERS.items()),
                        )
                    )
                },
                **{
                    f"reference_{name}": variable(
                        ("task", "seed"), values, "percent", f"final accuracy, {name} network"
                    )
                    for name, values in references.items()
                },
                "margin": margin,
                "planned": variable((), str(named or ""), "1", "the comparison that the plan of the sweep names"),
                **{
                    f"planned_{name}": variable((), planned[place], unit, text)
                    for place, (name, (unit, text)) in enumerate(PLANNED.items())
                },
            },
            coords={
                "task": ("task", names),
                "line": ("line", labels),
                "start_epoch": ("start_epoch", starts, {"units": "epoch"}),
                "seed": ("seed", seeds),
            },
        )

    def verdict(self, datasets: Datasets, /) -> list[str]:
        """Say the planned comparison and the gap of each task's first line, the hardest task first."""
        from ..analysis.advantage import difficulty, verdict

        lines = []
        for dataset in datasets.values():
            lines += _planned_words(dataset)
            relu, linear = (
                {
                    str(task): _mean(values)
                    for task, values in zip(dataset["task"].values, dataset[name].values, strict=True)
                }
                for name in ("reference_relu", "reference_linear")
            )
            worth = {task: value for task, value in difficulty(relu, linear).items() if np.isfinite(value)}
            for task, line, gap, test in sorted(_gaps(dataset, main=True), key=lambda item: -worth.get(item[0], 0.0)):
                value = f"; nonlinearity is worth {worth[task]:.1f} points there" if task in worth else ""
                start = dataset.sel(task=task, line=line)
                lines.append(
                    f"{task} ({line}{value}), start at epoch {float(start['late']):g} against "
                    f"{float(start['early']):g}: {verdict(gap, test)}{_judged(start)}."
                )
        return lines

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say the verdict, then the gaps of the other lines and the references."""
        from ..analysis.advantage import verdict

        lines = self.verdict(datasets)
        for dataset in datasets.values():
            for task, line, gap, test in _gaps(dataset, main=False):
                judged = _judged(dataset.sel(task=task, line=line))
                lines.append(f"{task} ({line}): {verdict(gap, test)}{judged}.")
            for task in dataset["task"].values:
                chosen = dataset.sel(task=task)
                words = [
                    f"{text} {_mean(chosen[name].values):.1f} %"
                    for name, text in (("reference_relu", "ReLU network"), ("reference_linear", "linear network"))
                    if np.isfinite(chosen[name].values).any()
                ]
                if words:
                    lines.append(f"Reference on {task}: {', '.join(words)}.")
                failed = int(np.nansum(chosen["diverged"].values))
                if failed:
                    lines.append(f"{failed} runs on {task} diverged; they are in no mean and no gap.")
        return lines

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw one panel a task, a curve a line, and the references."""
        dataset = next(iter(datasets.values()))
        axes = plots.panels(figure, dataset.sizes["task"])
        for ax, task in zip(axes, dataset["task"].values, strict=True):
            chosen = dataset.sel(task=task)
            for name, text, dash in (("relu", "ReLU network", 1), ("linear", "linear network", 2)):
                level = _mean(chosen[f"reference_{name}"].values)
                if np.isfinite(level):
                    plots.draw_reference(level, ax=ax, label=text, dash=dash)
            for index, line in enumerate(dataset["line"].values):
                curve = chosen.sel(line=line)
                there = np.isfinite(curve["accuracy_mean"].values)
                if there.any():
                    plots.draw_intervals(
                        dataset["start_epoch"].values[there],
                        *(curve[f"accuracy_{name}"].values[there] for name in ("mean", "low", "high")),
                        ax=ax,
                        label=str(line),
                        index=index,
                    )
            plots.title(ax, f"task: {task}")
            ax.set_ylabel("test accuracy (%)")
            ax.set_xticks(dataset["start_epoch"].values)
        axes[-1].set_xlabel("start of linearization (epochs)")
        plots.finish(figure)


def _gaps(dataset: xr.Dataset, *, main: bool) -> Iterator[tuple[str, str, Interval, Equivalence]]:
    """Task, line, gap and equivalence test of every line with a gap."""
    from ..analysis.advantage import Equivalence, Interval

    for task in dataset["task"].values:
        for line in dataset["line"].values:
            one = dataset.sel(task=task, line=line)
            if bool(one["main"]) is not main or not np.isfinite(float(one["early"])):
                continue
            if float(one["early"]) == float(one["late"]):
                continue
            mean, low, high = (float(one[name]) for name in ("gap", "gap_low", "gap_high"))
            n, p = int(one["gap_n"]), float(one["equivalence_p"])
            gap = Interval(mean, low, high, n, int(one["gap_diverged"]))
            yield str(task), str(line), gap, Equivalence(bool(p < 0.05), p, float(one["margin"]), n)


def _planned(one: Comparison, margin: float) -> tuple[float, ...]:
    """Numbers of the planned comparison in the order of ``PLANNED``."""
    from ..analysis.advantage import equivalence, mean_interval

    gap = mean_interval(one.differences[np.isfinite(one.differences)])
    same = np.nan
    if np.isfinite(margin):
        same = equivalence(one.differences, np.zeros(len(one.differences)), margin=margin).p
    return (gap.mean, gap.low, gap.high, float(gap.n), one.p, same, margin)


def _planned_words(dataset: xr.Dataset) -> list[str]:
    """Sentence on the planned comparison, where no line's gap is that comparison and says it."""
    if not str(dataset["planned"].values) or bool((dataset["primary"] == 1).any()):
        return []
    mean, low, high, n, p, same, margin = (float(dataset[f"planned_{name}"]) for name in PLANNED)
    head = f"Primary comparison named in the plan, {dataset['planned'].values!s}"
    if n < 2:
        return [f"{head}: {n:.0f} pairs, nothing can be judged."]
    test = f"; two one-sided tests against {margin:g} {p_words(same)}" if np.isfinite(same) else ""
    interval = f"95 % interval {low:.3g} to {high:.3g}, n = {n:.0f}"
    return [f"{head}: {mean:+.3g} ({interval}; sign flips {p_words(p)}{test})."]


def _judged(one: xr.Dataset) -> str:
    return words([float(one[name]) for name in NUMBERS])


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
