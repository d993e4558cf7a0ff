"""What choosing single channels is worth over choosing whole layers, at the same share of units."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .. import plots
from . import arms
from .comparisons import by_seed, margin_of, p_words
from .groups import Group, beside, groups, missing
from .over_seeds import finite, mean, means, numbers, stored
from .recorded import Datasets, Table, variable
from .wording import adjustment, bounds, difference, measured, outcome, with_interval

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.figure import Figure

    from ..results import Sweep

GRANULARITIES = {"channel": "channel by channel", "layer": "layer by layer"}

MEASURES = {
    "test_accuracy": ("percent", "final test accuracy"),
    "active_share": ("1", "share of units that are active"),
    "napl": ("units per path", "normalized average path length"),
    "survivor_nonlinearity": ("1", "mean |1 - slope| of the survivors"),
}

NEEDED = ("granularity", "remaining", "intervention", *MEASURES)

MATCHED = {"share": "equal share of units", "napl": "equal NAPL"}

# A hundredth of all units is far above rounding to whole units and far below the shares that are compared.
_EQUAL_SHARES = 0.01


class LayerwiseVsChannelwise:
    """Accuracy of networks linearized channel by channel and layer by layer."""

    name = "layerwise-vs-channelwise"
    title = "Channels against layers"
    reading = (
        "Upper panels: final test accuracy, mean and 95 % interval over seeds, against the share of units left active "
        "and against path length; lower panel: channel by channel minus layer by layer at the same share, paired by "
        "seed, which is more exact than the intervals above."
    )
    scope = "sweep"

    def unavailable(self, source: Sweep, /) -> str | None:
        """Need linearized arms of both granularities."""
        reason = missing(source, self.name, NEEDED)
        if reason is not None:
            return reason
        for group in _groups(source):
            if set(GRANULARITIES) <= set(group.rows["granularity"]):
                return None
        return "the sweep has not both granularities; sweep over granularity=channel,layer with intervention=linearize"

    def measure(self, source: Sweep, /) -> xr.Dataset:
        """Return results [group, granularity, remaining, seed] and paired gaps [group, matched, remaining]."""
        import xarray as xr

        from ..analysis.advantage import mean_interval

        found, seeds = _groups(source), arms.seeds_of(source)
        shares = sorted({float(value) for group in found for value in group.rows["remaining"]}, reverse=True)
        size: tuple[int, ...] = (len(found), len(GRANULARITIES), len(shares), len(seeds))
        results = {name: np.full(size, np.nan) for name in (*MEASURES, "diverged")}
        dense = {name: np.full((*size[:2], len(seeds)), np.nan) for name in ("test_accuracy", "napl")}
        for i, group in enumerate(found):
            for j, granularity in enumerate(GRANULARITIES):
                own = group.rows[group.rows["granularity"] == granularity]
                for k, share in enumerate(shares):
                    for name, values in results.items():
                        values[i, j, k] = by_seed(own[own["remaining"] == share], name, seeds)
                for name, values in dense.items():
                    values[i, j] = by_seed(_dense(source, group, granularity), name, seeds)
        gaps, joint = zip(*(_gaps(results, dense, i) for i in range(len(found))), strict=True)
        overall = [mean_interval(finite(_seed_means(results["test_accuracy"][i]))) for i in range(len(found))]
        intervals = np.array(
            [[[numbers(mean_interval(row)) for row in rows] for rows in part] for part in results["test_accuracy"]]
        ).reshape(*size[:3], 4)
        dims, points = ("group", "granularity", "remaining"), "percentage points"
        return xr.Dataset(
            {
                **{name: variable((*dims, "seed"), results[name], *MEASURES[name]) for name in MEASURES},
                "diverged": variable(
                    (*dims, "seed"), np.nan_to_num(results["diverged"]), "1", "1 where the run diverged"
                ),
                "margin": margin_of(source),
                "dense_accuracy": variable(
                    (*dims[:2], "seed"), dense["test_accuracy"], "percent", "final accuracy of the dense network"
                ),
                **{
                    f"accuracy_{name}": variable(dims, intervals[..., place], "percent", text)
                    for place, (name, text) in enumerate(
                        (("mean", "mean"), ("low", "lower end of 95 %"), ("high", "upper end of 95 %"))
                    )
                },
                **{
                    f"gap_{name}": variable(("group", "matched", "remaining"), np.array(gaps)[..., place], unit, text)
                    for place, (name, unit, text) in enumerate(
                        (
                            ("mean", points, "channel by channel - layer by layer, paired by seed"),
                            ("low", points, "lower end of its 95 % interval"),
                            ("high", points, "upper end of its 95 % interval"),
                            ("n", "seeds", "pairs"),
                            ("adjusted_p", "1", "p of sign flips, adjusted over all shares (max-T)"),
                        )
                    )
                },
                "comparisons": variable(
                    ("group", "matched"), np.array(joint)[..., 0], "1", "comparisons that are judged together"
                ),
                "least_p": variable(
                    ("group", "matched"), np.array(joint)[..., 1], "1", "least p that so many seeds allow"
                ),
                "mean_gap": variable(
                    ("group", "seed"),
                    [_seed_means(part) for part in results["test_accuracy"]],
                    points,
                    "channel by channel - layer by layer, mean over the shares in both",
                ),
                "mean_gap_low": variable("group", [one.low for one in overall], points, "lower end of 95 %"),
                "mean_gap_high": variable("group", [one.high for one in overall], points, "upper end of 95 %"),
            },
            coords={
                "group": ("group", [group.label for group in found]),
                "granularity": ("granularity", list(GRANULARITIES)),
                "remaining": ("remaining", shares, {"units": "1"}),
                "matched": ("matched", list(MATCHED)),
                "seed": ("seed", seeds),
            },
        )

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say the mean gap, the gap at each share, and the largest one, which is exploratory."""
        from ..analysis.advantage import equivalence, mean_interval

        lines = []
        for dataset in datasets.values():
            for group in dataset["group"].values:
                one = dataset.sel(group=group)
                values = finite(one["mean_gap"].values)
                test = equivalence(values, np.zeros(len(values)), margin=float(one["margin"]))
                text = difference(
                    "networks linearized channel by channel", "those layer by layer", mean_interval(values), test
                )
                lines.append(f"{group}, mean over all shares: {text}.")
                lines += [f"{group}: {text}" for text in (*_share_texts(one), *_mismatch(one))]
                failed = int(one["diverged"].sum())
                if failed:
                    lines.append(f"{group}: {failed} runs diverged; they are in no mean and no gap.")
        return lines

    def tables(self, datasets: Datasets, /) -> list[Table]:
        """Give both granularities and their gap at every share."""
        heads = [f"{text} ({unit})" for name, (unit, text) in MEASURES.items() if name != "test_accuracy"]
        columns = ("remaining", "slopes", *heads, "accuracy (%)", "channel - layer (points)", "at equal NAPL (points)")
        tables = []
        for dataset in datasets.values():
            for group in dataset["group"].values:
                rows = []
                for remaining in dataset["remaining"].values:
                    for granularity, text in GRANULARITIES.items():
                        one = dataset.sel(group=group, remaining=remaining, granularity=granularity)
                        if not np.isfinite(float(one["accuracy_mean"])):
                            continue
                        gaps = [
                            with_interval(
                                *(float(one[f"gap_{end}"].sel(matched=matched)) for end in ("mean", "low", "high"))
                            )
                            for matched in MATCHED
                        ]
                        rows.append(
                            (
                                f"{remaining:g}",
                                text,
                                *(measured(one[name].values) for name in MEASURES if name != "test_accuracy"),
                                with_interval(*(float(one[f"accuracy_{end}"]) for end in ("mean", "low", "high"))),
                                *(gaps if granularity == "channel" else ["", ""]),
                            )
                        )
                tables.append(Table(f"{group}: means over seeds with 95 % intervals", columns, tuple(rows)))
        return tables

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw accuracy against share and against path length, and the gap where there are pairs."""
        dataset = next(iter(datasets.values()))
        names = list(dataset["group"].values)
        paired = [
            bool(np.isfinite(dataset["gap_mean"].sel(group=group, matched="share").values).any()) for group in names
        ]
        axes = iter(plots.panels(figure, 2 * len(names) + sum(paired), height=1.6))
        for group, has_gap in zip(names, paired, strict=True):
            above, middle = next(axes), next(axes)
            for index, (granularity, text) in enumerate(GRANULARITIES.items()):
                one = dataset.sel(group=group, granularity=granularity)
                for ax, name in ((above, "active_share"), (middle, "napl")):
                    x = means(one[name].values)
                    order = np.argsort(x)[: int(np.isfinite(x).sum())]
                    plots.draw_intervals(
                        x[order],
                        *(one[f"accuracy_{end}"].values[order] for end in ("mean", "low", "high")),
                        ax=ax,
                        label=text,
                        index=index,
                    )
            level = mean(dataset["dense_accuracy"].sel(group=group).values)
            for ax in (above, middle):
                if np.isfinite(level):
                    plots.draw_reference(level, ax=ax, label="dense network")
                ax.set_ylabel("test accuracy (%)")
                plots.within(ax, 0, 100)
            plots.title(above, f"task: {group}")
            above.set_xlabel("active share of the units (1)")
            middle.set_xlabel("NAPL (active units per path)")
            if not has_gap:
                continue
            below = next(axes)
            gap = dataset.sel(group=group, matched="share")
            plots.draw_intervals(
                dataset["remaining"].values,
                *(gap[f"gap_{end}"].values for end in ("mean", "low", "high")),
                ax=below,
                label="channel - layer, paired",
                index=2,
            )
            below.axhline(0, color=plots.GRAY, linewidth=0.8)
            below.set_ylabel("difference\n(percentage points)")
            below.set_xlabel("active share of the units, as planned (1)")
        plots.finish(figure)


def _groups(sweep: Sweep) -> list[Group]:
    return groups(sweep, compared=("granularity", "remaining"), intervention="linearize")


def _dense(sweep: Sweep, group: Group, granularity: str) -> pd.DataFrame:
    rows = beside(sweep, group, intervention="none", granularity=granularity)
    # Both dense networks are the same training; a plan may hold but one of them.
    return rows if len(rows) else beside(sweep, group, intervention="none")


def _gaps(
    results: dict[str, NDArray[np.float64]], dense: dict[str, NDArray[np.float64]], i: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gaps of a group at equal share and equal length [matched, remaining, 5], how many and least p [matched, 2]."""
    from ..analysis import max_t
    from ..analysis.advantage import mean_interval
    from ..analysis.collapse import accuracy_at

    channel, layer = results["test_accuracy"][i]
    lengths, layer_lengths = results["napl"][i]
    at_length = np.full_like(layer, np.nan)
    for seed in range(layer.shape[1]):
        x = np.append(lengths[:, seed], dense["napl"][i, 0, seed])
        y = np.append(channel[:, seed], dense["test_accuracy"][i, 0, seed])
        at_length[:, seed] = accuracy_at(x, y, layer_lengths[:, seed])
    gaps, joint = [], []
    for differences in (channel - layer, at_length - layer):
        together = max_t(differences)
        joint.append(((together.n > 1).sum(), 1 / together.flips))
        gaps.append(
            [(*numbers(mean_interval(finite(row))), p) for row, p in zip(differences, together.adjusted, strict=True)]
        )
    return np.array(gaps), np.array(joint)


def _share_texts(one: xr.Dataset) -> list[str]:
    lines = []
    # In a plain network of one width equal shares are equal path lengths.
    by_share, by_length = (one["gap_mean"].sel(matched=matched).values for matched in MATCHED)
    same = np.allclose(by_share, by_length, equal_nan=True)
    for matched, text in {"share": "equal share of units and equal NAPL"}.items() if same else MATCHED.items():
        chosen = one.sel(matched=matched)
        outcomes: dict[str, list[str]] = {}
        adjusted = []
        for remaining in one["remaining"].values:
            entry = chosen.sel(remaining=remaining)
            found = outcome(stored(entry, "gap"), higher="channels higher", lower="layers higher")
            outcomes.setdefault(found, []).append(f"{remaining:g}")
            if float(entry["gap_adjusted_p"]) < 0.05:
                adjusted.append(f"{remaining:g}")
        outcomes.pop("no pair", None)
        if not outcomes:
            continue
        words = [f"{found} at {', '.join(places)}" for found, places in sorted(outcomes.items())]
        together = adjustment(adjusted, float(chosen["comparisons"]), float(chosen["least_p"]))
        lines.append(f"exploratory, at {text}: {'; '.join(words)} ({together}).")
        sizes = np.abs(np.where(chosen["gap_n"].values > 0, chosen["gap_mean"].values, np.nan))
        if np.isfinite(sizes).sum() > 1:
            entry = chosen.isel(remaining=int(np.nanargmax(sizes)))
            gap = stored(entry, "gap")
            p = float(entry["gap_adjusted_p"])
            lines.append(
                f"exploratory, the largest of {int(np.isfinite(sizes).sum())} gaps channel - layer at {text} is at "
                f"{float(entry['remaining']):g}: {gap.mean:+.1f} points ({bounds(gap)}"
                f"{f'; adjusted for the choice {p_words(p)}' if np.isfinite(p) else ''})."
            )
    return lines


def _mismatch(one: xr.Dataset) -> list[str]:
    """Shares that are not equal, and how nonlinear the survivors are: matched count is not matched nonlinearity."""
    lines = []
    shares = [means(rows) for rows in one["active_share"].values]
    apart = [
        f"{remaining:g} ({channel:.3f} and {layer:.3f})"
        for remaining, channel, layer in zip(one["remaining"].values, *shares, strict=True)
        if abs(channel - layer) > _EQUAL_SHARES
    ]
    if apart:
        lines.append(
            f"whole layers cannot meet every share; the shares of channels and layers differ at {', '.join(apart)}."
        )
    slopes = [mean(rows) for rows in one["survivor_nonlinearity"].values]
    if np.isfinite(slopes).all():
        lines.append(
            f"the survivors' mean |1 - slope| is {slopes[0]:.2f} by channel and {slopes[1]:.2f} by layer, over all "
            "shares; matched count is not matched nonlinearity."
        )
    return lines


def _seed_means(accuracy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean gap of each seed over the shares that both granularities have in it."""
    differences = accuracy[0] - accuracy[1]
    return means(differences.T)
