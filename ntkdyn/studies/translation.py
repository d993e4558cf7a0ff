"""What late instead of early linearization is worth in translation, and how BLEU falls with path length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .. import plots
from . import arms
from .comparisons import by_seed, margin_of
from .groups import Group, beside, groups, missing
from .over_seeds import finite, mean, means, numbers, stored
from .recorded import Datasets, Table, variable
from .wording import adjustment, bounds, difference, measured, with_interval

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from ..results import Sweep

NEEDED = ("test_bleu", "start_epoch", "remaining", "intervention", "mask", "napl")

INTERACTION = "interaction: learned - random"

ENDS = ("mean", "low", "high")

_PARTS = (
    ("mean", "mean"), ("low", "lower end of 95 %"), ("high", "upper end of 95 %"), ("n", "number of seeds"),
)  # fmt: skip


class Translation:
    """BLEU against start epoch and against path length, and the gap late - early."""

    name = "translation"
    title = "Translation: BLEU after linearization"
    reading = (
        "Upper panel: BLEU on the test pairs of networks whose feed-forward units are linearized from that epoch on, "
        "with equal total epochs, mean and 95 % interval over seeds; lower panel: BLEU against path length, networks "
        "that differ in the share of units alone; differences are paired by seed, which is more exact."
    )
    scope = "sweep"

    def unavailable(self, source: Sweep, /) -> str | None:
        """Need linearized arms with BLEU at two start epochs, or of two shares of units."""
        reason = missing(source, self.name, NEEDED)
        if reason is None and not (_lines(source) or _curves(source)):
            return "no two linearized arms differ in start or share of units alone; sweep over start_epoch or remaining"
        return reason

    def measure(self, source: Sweep, /) -> xr.Dataset:
        """Return BLEU [line, start_epoch, seed] and [curve, network, seed], gaps [contrast], references [seed]."""
        import xarray as xr

        from ..analysis import max_t
        from ..analysis.advantage import mean_interval

        seeds, lines, curves = arms.seeds_of(source), _lines(source), _curves(source)
        starts = sorted({float(start) for line in lines for start in line.rows["start_epoch"]})
        bleu = np.full((len(lines), len(starts), len(seeds)), np.nan)
        ends = np.full((len(lines), 2), np.nan)
        gaps: dict[str, NDArray[np.float64]] = {}
        for i, line in enumerate(lines):
            bleu[i] = arms.pivot(line.rows, "test_bleu", starts, seeds)
            own = sorted({float(start) for start in line.rows["start_epoch"]})
            ends[i] = own[0], own[-1]
            gaps[line.label] = bleu[i, starts.index(own[-1])] - bleu[i, starts.index(own[0])]
        gaps |= _interactions(gaps)
        together = max_t(np.stack(list(gaps.values()))) if gaps else None
        shares = sorted({float(share) for curve in curves for share in curve.rows["remaining"]}, reverse=True)
        size = (len(curves), 1 + len(shares), len(seeds))
        on_curve = {name: np.full(size, np.nan) for name in ("test_bleu", "napl", "active_units")}
        for i, curve in enumerate(curves):
            dense = beside(source, curve, kind="trunk", intervention="none")
            parts = [dense, *(curve.rows[curve.rows["remaining"] == share] for share in shares)]
            for name, values in on_curve.items():
                values[i] = [by_seed(part, name, seeds) for part in parts]
        first = (lines or curves)[0]
        references = {
            "dense": by_seed(beside(source, first, kind="trunk", intervention="none"), "test_bleu", seeds),
            "linear": by_seed(beside(source, first, intervention="linear"), "test_bleu", seeds),
        }
        line_bleu = np.array([[numbers(mean_interval(row)) for row in rows] for rows in bleu]).reshape(
            *bleu.shape[:2], 4
        )
        curve_bleu = np.array([[numbers(mean_interval(row)) for row in rows] for rows in on_curve["test_bleu"]])
        gap_bleu = np.array([numbers(mean_interval(finite(row))) for row in gaps.values()]).reshape(len(gaps), 4)
        return xr.Dataset(
            {
                "bleu": variable(("line", "start_epoch", "seed"), bleu, "BLEU", "BLEU on the test pairs"),
                "early": variable("line", ends[:, 0], "epoch", "start of the early arm"),
                "late": variable("line", ends[:, 1], "epoch", "start of the late arm"),
                **{
                    f"line_{name}": variable(
                        ("line", "start_epoch"), line_bleu[..., place], "seeds" if name == "n" else "BLEU", text
                    )
                    for place, (name, text) in enumerate(_PARTS)
                },
                "difference": variable(
                    ("contrast", "seed"),
                    np.array(list(gaps.values())).reshape(len(gaps), len(seeds)),
                    "BLEU",
                    "late - early",
                ),
                **{
                    f"gap_{name}": variable(
                        "contrast", gap_bleu[:, place], "seeds" if name == "n" else "BLEU", f"late - early, {text}"
                    )
                    for place, (name, text) in enumerate(_PARTS)
                },
                "gap_adjusted_p": variable(
                    "contrast",
                    together.adjusted if together is not None else np.full(0, np.nan),
                    "1",
                    "p of sign flips, adjusted over all contrasts (max-T)",
                ),
                "margin": margin_of(source, "BLEU"),
                "least_p": variable(
                    (), 1 / together.flips if together is not None else np.nan, "1", "least p that so many seeds allow"
                ),
                "curve_bleu": variable(("curve", "network", "seed"), on_curve["test_bleu"], "BLEU", "BLEU"),
                "napl": variable(
                    ("curve", "network", "seed"), on_curve["napl"], "units per path", "normalized average path length"
                ),
                "active_units": variable(
                    ("curve", "network", "seed"), on_curve["active_units"], "units", "active units"
                ),
                **{
                    f"curve_{name}": variable(
                        ("curve", "network"),
                        curve_bleu.reshape(*size[:2], 4)[..., place],
                        "seeds" if name == "n" else "BLEU",
                        text,
                    )
                    for place, (name, text) in enumerate(_PARTS)
                },
                **{
                    f"reference_{name}": variable("seed", values, "BLEU", f"BLEU of the {name} network")
                    for name, values in references.items()
                },
            },
            coords={
                "line": ("line", [line.label for line in lines]),
                "start_epoch": ("start_epoch", starts, {"units": "epoch"}),
                "contrast": ("contrast", list(gaps)),
                "curve": ("curve", [curve.label for curve in curves]),
                "network": ("network", ["dense", *(f"remaining {share:g}" for share in shares)]),
                "seed": ("seed", seeds),
            },
        )

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say the references, the gap late - early of every line, and where BLEU is lost along the curve."""
        from ..analysis.advantage import equivalence

        lines = []
        for dataset in datasets.values():
            words = [
                f"{text} {measured(dataset[f'reference_{name}'].values)} BLEU"
                for name, text in (("dense", "dense network"), ("linear", "linear feed-forward parts"))
                if np.isfinite(dataset[f"reference_{name}"].values).any()
            ]
            lines += [f"Reference: {', '.join(words)}."] if words else []
            for line in dataset["line"].values:
                one = dataset.sel(line=line, contrast=line)
                values = finite(one["difference"].values)
                text = difference(
                    f"networks linearized from epoch {float(one['late']):g} on",
                    f"those from epoch {float(one['early']):g} on",
                    stored(one, "gap"),
                    equivalence(values, np.zeros(len(values)), margin=float(dataset["margin"])),
                    unit="BLEU",
                )
                lines.append(f"{line}: {text}.")
            for contrast in dataset["contrast"].values:
                if str(contrast) not in dataset["line"].values:
                    gap = stored(dataset.sel(contrast=contrast), "gap")
                    lines.append(f"exploratory, {contrast}: {gap.mean:+.1f} BLEU ({bounds(gap)}).")
            if (dataset["gap_n"].values > 1).any():
                sure = dataset["contrast"].values[dataset["gap_adjusted_p"].values < 0.05].tolist()
                together = adjustment(sure, dataset.sizes["contrast"], float(dataset["least_p"]))
                lines.append(f"All of these, {together}.")
            lines += [f"{curve}: {_curve_text(dataset.sel(curve=curve))}" for curve in dataset["curve"].values]
        return lines

    def tables(self, datasets: Datasets, /) -> list[Table]:
        """Give BLEU at every start, and along every curve."""
        tables = []
        for dataset in datasets.values():
            starts = dataset["start_epoch"].values
            rows = [
                (
                    str(line),
                    *(
                        with_interval(
                            *(float(dataset[f"line_{end}"].sel(line=line, start_epoch=start)) for end in ENDS)
                        )
                        for start in starts
                    ),
                )
                for line in dataset["line"].values
            ]
            if rows:
                heads = tuple(f"from epoch {start:g} on (BLEU)" for start in starts)
                tables.append(Table("linearized early and late, with 95 % intervals", ("arms", *heads), tuple(rows)))
            for curve in dataset["curve"].values:
                one = dataset.sel(curve=curve)
                rows = [
                    (
                        str(network),
                        measured(one["active_units"].sel(network=network).values, 4),
                        measured(one["napl"].sel(network=network).values),
                        with_interval(*(float(one[f"curve_{end}"].sel(network=network)) for end in ENDS)),
                    )
                    for network in dataset["network"].values
                    if np.isfinite(float(one["curve_mean"].sel(network=network)))
                ]
                columns = ("network", "active units (units)", "NAPL (units per path)", "BLEU")
                tables.append(Table(f"{curve}: means over seeds with 95 % intervals", columns, tuple(rows)))
        return tables

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw BLEU against start epoch and against path length."""
        dataset = next(iter(datasets.values()))
        kinds = [kind for kind in ("line", "curve") if dataset.sizes[kind]]
        axes = plots.panels(figure, len(kinds))
        for ax, kind in zip(axes, kinds, strict=True):
            for name, text, dash in (("dense", "dense network", 1), ("linear", "linear feed-forward parts", 2)):
                level = mean(dataset[f"reference_{name}"].values)
                if np.isfinite(level):
                    plots.draw_reference(level, ax=ax, label=text, dash=dash)
            for index, label in enumerate(dataset[kind].values):
                one = dataset.sel({kind: label})
                x = dataset["start_epoch"].values if kind == "line" else means(one["napl"].values)
                there = np.isfinite(x) & np.isfinite(one[f"{kind}_mean"].values)
                plots.draw_intervals(
                    x[there],
                    *(one[f"{kind}_{end}"].values[there] for end in ENDS),
                    ax=ax,
                    label=str(label),
                    # Other colors than those of the lines: a curve is another choice of arms.
                    index=index if kind == "line" else len(plots.COLORS) - 1 - index,
                )
            ax.set_ylabel("test pairs (BLEU)")
            plots.within(ax, 0, 100)
            ax.set_xlabel("start of linearization (epochs)" if kind == "line" else "NAPL (active units per path)")
            if kind == "line":
                ax.set_xticks(dataset["start_epoch"].values)
        plots.finish(figure)


def _lines(sweep: Sweep) -> list[Group]:
    """Arms that differ in their start alone, at least two."""
    found = groups(sweep, compared=("start_epoch",), intervention="linearize")
    return [group for group in found if group.rows["start_epoch"].nunique() > 1]


def _curves(sweep: Sweep) -> list[Group]:
    """Arms that differ in their share of units alone, at least two."""
    found = groups(sweep, compared=("remaining",), intervention="linearize")
    return [group for group in found if group.rows["remaining"].nunique() > 1]


def _interactions(gaps: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """Gap of learned masks minus that of random ones, where two lines differ in their mask alone."""
    found = {}
    for label, values in gaps.items():
        random = gaps.get(label.replace("mask = learned", "mask = random"))
        if "mask = learned" in label and random is not None:
            found[f"{INTERACTION} ({label})"] = values - random
    return found


def _curve_text(one: xr.Dataset) -> str:
    """The least path length at which BLEU is kept, and what is left at the shortest."""
    from ..analysis.advantage import paired_gap
    from ..analysis.collapse import kept_and_lost, standing

    lengths, dense = means(one["napl"].values), one["curve_bleu"].sel(network="dense").values
    order = [
        place
        for place in np.argsort(-lengths)
        if np.isfinite(lengths[place]) and str(one["network"].values[place]) != "dense"
    ]
    losses = []
    for place in order:
        values = one["curve_bleu"].values[place]
        both = np.isfinite(values + dense)
        losses.append(paired_gap(values[both], dense[both]))
    kept, lost = kept_and_lost([standing(loss, margin=float(one["margin"])) for loss in losses])

    def at(place: int) -> str:
        return f"NAPL {lengths[order[place]]:.3g} ({losses[place].mean:+.1f} BLEU, {bounds(losses[place])})"

    margin = f"{float(one['margin']):g} BLEU"
    words = [
        f"that the dense network's BLEU is kept to within {margin} is not shown even at {at(0)}"
        if kept is None
        else f"the dense network's BLEU is kept or exceeded, to within {margin}, down to {at(kept)}",
        f"that more than {margin} is lost is not shown at the shortest, {at(-1)}"
        if lost is None
        else f"from {at(lost)} on more than {margin} is lost",
    ]
    return f"{'; '.join(words)}."
