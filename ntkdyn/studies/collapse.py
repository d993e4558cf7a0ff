"""How far accuracy falls with path length, and what shallow networks from scratch reach at the same length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import plots
from . import arms
from .comparisons import by_seed, margin_of
from .groups import Group, beside, groups, missing
from .over_seeds import finite, mean, means, numbers, stored
from .recorded import Datasets, Table, variable
from .wording import adjustment, bounds, measured, outcome, with_interval

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.figure import Figure

    from ..results import Sweep

ORIGINS = {
    "extracted": "extracted late",
    "scratch": "from scratch",
    "scratch-wide": "from scratch, as many parameters",
    "linear": "linear from the start",
}

LENGTHS = {"napl": "NAPL", "weighted_napl": "NAPL weighted by |1 - slope|"}

MEASURES = {
    "accuracy": ("percent", "final test accuracy"),
    "napl": ("units per path", "normalized average path length"),
    "weighted_napl": ("units per path", "normalized average path length weighted by |1 - slope|"),
    "active_units": ("units", "active units"),
    "parameters": ("1", "parameters, slopes left out"),
}

NEEDED = ("intervention", "remaining", "test_accuracy", "napl", "weighted_napl")

DENSE = "dense"


class Collapse:
    """Accuracy of extracted networks against path length, down to linear, beside networks from scratch."""

    name = "collapse"
    title = "Accuracy against path length"
    reading = (
        "Each point is the final test accuracy of one kind of network, mean and 95 % interval over seeds, at its mean "
        "path length; upper panel: every active unit counts as one; lower: it counts as |1 - slope|, as equal counts "
        "are not equal nonlinearity; differences to networks from scratch are paired by seed and read off the "
        "extracted curve of that seed at the same length."
    )
    scope = "sweep"

    def unavailable(self, source: Sweep, /) -> str | None:
        """Need networks linearized to two shares of units, or one kind beside dense ones, and their path lengths."""
        reason = missing(source, self.name, NEEDED)
        if reason is not None:
            return reason
        found = _groups(source)
        if not found:
            return (
                "no two networks differ in the share of units alone; sweep over remaining with intervention=linearize, "
                "or vary nothing but the seeds of one share beside dense networks"
            )
        if not any(np.isfinite(group.rows["napl"]).any() for group in found):
            return "no linearized network has a path length; it could not be traced"
        return None

    def measure(self, source: Sweep, /) -> xr.Dataset:
        """Return results [group, network, seed], losses [group, network], differences [group, length, network]."""
        import xarray as xr

        from ..analysis.advantage import mean_interval

        found, seeds = _groups(source), arms.seeds_of(source)
        networks = [_networks(source, group) for group in found]
        labels = _ordered(networks)
        results = {name: np.full((len(found), len(labels), len(seeds)), np.nan) for name in MEASURES}
        for i, present in enumerate(networks):
            for label, (_, rows) in present.items():
                for name, values in results.items():
                    column = "test_accuracy" if name == "accuracy" else name
                    values[i, labels.index(label)] = by_seed(rows, column, seeds)
        origins = [next(present[label][0] for present in networks if label in present) for label in labels]
        lost = np.zeros((len(found), len(labels), len(seeds)))
        for i, present in enumerate(networks):
            for label, (_, rows) in present.items():
                lost[i, labels.index(label)] = np.nan_to_num(by_seed(rows, "diverged", seeds))
        intervals = np.array([[numbers(mean_interval(row)) for row in values] for values in results["accuracy"]])
        compared = _compared(results, origins, labels)
        points = "percentage points"
        return xr.Dataset(
            {
                **{
                    name: variable(("group", "network", "seed"), values, *MEASURES[name])
                    for name, values in results.items()
                },
                "diverged": variable(("group", "network", "seed"), lost, "1", "1 where the run diverged"),
                "margin": margin_of(source),
                **{
                    f"accuracy_{name}": variable(("group", "network"), intervals[..., place], "percent", text)
                    for place, (name, text) in enumerate(
                        (("mean", "mean"), ("low", "lower end of 95 %"), ("high", "upper end of 95 %"))
                    )
                },
                **{
                    f"loss_{name}": variable(("group", "network"), compared["loss"][..., place], unit, text)
                    for place, (name, unit, text) in enumerate(
                        (
                            ("mean", points, "extracted - dense, paired by seed"),
                            ("low", points, "lower end of its 95 % interval"),
                            ("high", points, "upper end of its 95 % interval"),
                            ("n", "seeds", "pairs"),
                        )
                    )
                },
                **{
                    f"difference_{name}": variable(
                        ("group", "length", "network"), compared["difference"][..., place], unit, text
                    )
                    for place, (name, unit, text) in enumerate(
                        (
                            ("mean", points, "extracted - from scratch at equal path length, paired by seed"),
                            ("low", points, "lower end of its 95 % interval"),
                            ("high", points, "upper end of its 95 % interval"),
                            ("n", "seeds", "pairs"),
                            ("adjusted_p", "1", "p of sign flips, adjusted over all comparisons of the group (max-T)"),
                        )
                    )
                },
                "comparisons": variable("group", compared["joint"][:, 0], "1", "comparisons that are judged together"),
                "least_p": variable("group", compared["joint"][:, 1], "1", "least p that so many seeds allow"),
                **{
                    f"steepest_{name}": variable("group", compared["steepest"][:, place], unit, text)
                    for place, (name, unit, text) in enumerate(
                        (
                            ("from", "units per path", "longer end of the steepest part, mean NAPL"),
                            ("to", "units per path", "shorter end of the steepest part, mean NAPL"),
                            ("mean", f"{points} per unit", "slope of the steepest part of the extracted curve"),
                            ("low", f"{points} per unit", "lower end of its 95 % interval"),
                            ("high", f"{points} per unit", "upper end of its 95 % interval"),
                            ("n", "seeds", "seeds"),
                            ("parts", "1", "parts it is picked from"),
                            ("before", f"{points} per unit", "mean slope from the dense network down to it"),
                        )
                    )
                },
            },
            coords={
                "group": ("group", [group.label for group in found]),
                "network": ("network", labels),
                "origin": ("network", origins),
                "length": ("length", list(LENGTHS)),
                "seed": ("seed", seeds),
            },
        )

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say where the dense accuracy is lost, and how networks from scratch compare at equal length."""
        lines = []
        for dataset in datasets.values():
            for group in dataset["group"].values:
                one = dataset.sel(group=group)
                prefix = f"{group}: "
                lines += [prefix + text for text in (*_loss_text(one), *_steepest_text(one), *_scratch_text(one))]
                failed = int(one["diverged"].sum())
                if failed:
                    lines.append(f"{prefix}{failed} runs diverged; they are in no mean and no difference.")
        return lines

    def tables(self, datasets: Datasets, /) -> list[Table]:
        """Give every network with its size, length and accuracy, and the differences at equal length."""
        columns = (
            "network", "seeds (1)", "parameters (1)", "active units (units)", "NAPL (units per path)",
            "weighted NAPL (units per path)", "accuracy (%)", "extracted - this at its NAPL (points)",
            "at its weighted NAPL (points)",
        )  # fmt: skip
        tables = []
        for dataset in datasets.values():
            for group in dataset["group"].values:
                rows = []
                for network in dataset["network"].values:
                    one = dataset.sel(group=group, network=network)
                    if not np.isfinite(float(one["accuracy_mean"])):
                        continue
                    accuracy = with_interval(*(float(one[f"accuracy_{name}"]) for name in ("mean", "low", "high")))
                    gaps = [
                        with_interval(
                            *(float(one[f"difference_{name}"].sel(length=length)) for name in ("mean", "low", "high"))
                        )
                        for length in LENGTHS
                    ]
                    sizes = [
                        measured(one[name].values, digits)
                        for name, digits in (("parameters", 6), ("active_units", 4), ("napl", 3), ("weighted_napl", 3))
                    ]
                    seeds = str(int(np.isfinite(one["accuracy"]).sum()))
                    rows.append((str(network), seeds, *sizes, accuracy, *gaps))
                tables.append(Table(f"{group}: means over seeds with 95 % intervals", columns, tuple(rows)))
        return tables

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw accuracy against both path lengths, a panel a group and length."""
        dataset = next(iter(datasets.values()))
        places = [(group, length) for group in dataset["group"].values for length in LENGTHS]
        axes = plots.panels(figure, len(places))
        for ax, (group, length) in zip(axes, places, strict=True):
            one = dataset.sel(group=group)
            for index, (origin, label) in enumerate(ORIGINS.items()):
                chosen = one.isel(network=np.flatnonzero(one["origin"].values == origin))
                x = means(chosen[length].values)
                order = np.argsort(x)
                order = order[np.isfinite(x[order])]
                if len(order):
                    plots.draw_intervals(
                        x[order],
                        *(chosen[f"accuracy_{name}"].values[order] for name in ("mean", "low", "high")),
                        ax=ax,
                        label=label,
                        index=index,
                    )
            plots.title(ax, f"task: {group}")
            ax.set_xlabel(f"{LENGTHS[length]} (active units per path)")
            ax.set_ylabel("test accuracy (%)")
            plots.within(ax, 0, 100)
        plots.finish(figure, columns=1)


def _groups(sweep: Sweep) -> list[Group]:
    """Curves: networks that differ in their share of units alone, at least two; of any experiment that has them.

    Where all linearized networks are of one kind, they and the dense ones are a curve of two points.
    """
    found = groups(sweep, compared=("remaining",), intervention="linearize", **_origin(sweep, "extracted"))
    if len(found) == 1 and DENSE in _networks(sweep, found[0]):
        return found
    return [group for group in found if group.rows["remaining"].nunique() > 1]


def _origin(sweep: Sweep, origin: str) -> dict[str, str]:
    """The setting that tells the experiment collapse where a network is from; others have extracted ones only."""
    return {"setting_kind": origin} if "setting_kind" in sweep.table else {}


def _networks(sweep: Sweep, group: Group) -> dict[str, tuple[str, pd.DataFrame]]:
    """Rows of every kind of network by its label, with its origin."""
    extracted = _origin(sweep, "extracted")
    found: dict[str, tuple[str, pd.DataFrame]] = {
        DENSE: ("extracted", beside(sweep, group, kind="trunk", intervention="none", **extracted))
    }
    for remaining, rows in sorted(group.rows.groupby("remaining"), key=lambda part: -_key(part[0])):
        found[f"remaining {_key(remaining):g}"] = ("extracted", rows)
    found[ORIGINS["linear"]] = ("linear", beside(sweep, group, intervention="linear", **extracted))
    for origin in ("scratch", "scratch-wide") if extracted else ():
        for depth, rows in beside(sweep, group, setting_kind=origin).groupby("shallow_depth"):
            found[f"{ORIGINS[origin]}, depth {_key(depth):g}"] = (origin, rows)
    return {label: (origin, rows) for label, (origin, rows) in found.items() if len(rows)}


def _ordered(networks: list[dict[str, tuple[str, pd.DataFrame]]]) -> list[str]:
    """All labels, the order of origins and within it that of the group with most."""
    fullest = sorted(networks, key=len, reverse=True)
    labels = list(dict.fromkeys(label for present in fullest for label in present))
    origin = {label: present[label][0] for present in networks for label in present}
    return sorted(labels, key=lambda label: list(ORIGINS).index(origin[label]))


def _compared(
    results: dict[str, NDArray[np.float64]], origins: list[str], labels: list[str]
) -> dict[str, NDArray[np.float64]]:
    """Losses to the dense network [group, network, 4], differences [group, length, network, 5], steepest parts."""
    from ..analysis import max_t
    from ..analysis.advantage import mean_interval, paired_gap
    from ..analysis.collapse import accuracy_at, steepest

    accuracy = results["accuracy"]
    count, kinds, seeds = accuracy.shape
    curve = [place for place, origin in enumerate(origins) if origin == "extracted"]
    scratch = [place for place, origin in enumerate(origins) if origin.startswith("scratch")]
    loss = np.full((count, kinds, 4), np.nan)
    gaps = np.full((count, len(LENGTHS), kinds, 5), np.nan)
    joint = np.full((count, 2), np.nan)
    steep = np.full((count, 8), np.nan)
    for i in range(count):
        dense = accuracy[i, labels.index(DENSE)] if DENSE in labels else np.full(seeds, np.nan)
        for place in curve:
            if labels[place] != DENSE:
                both = np.isfinite(accuracy[i, place] + dense)
                loss[i, place] = numbers(paired_gap(accuracy[i, place, both], dense[both]))
        at_length = np.full((len(LENGTHS), kinds, seeds), np.nan)
        for j, length in enumerate(LENGTHS):
            for seed in range(seeds):
                points = results[length][i, :, seed]
                at_length[j, scratch, seed] = accuracy_at(points[curve], accuracy[i, curve, seed], points[scratch])
        pairs = [(j, place) for j in range(len(LENGTHS)) for place in scratch]
        if pairs:
            differences = np.stack([at_length[pair] - accuracy[i, pair[1]] for pair in pairs])
            together = max_t(differences)
            joint[i] = (together.n > 1).sum(), 1 / together.flips
            for (j, place), values, p in zip(pairs, differences, together.adjusted, strict=True):
                gaps[i, j, place] = *numbers(mean_interval(finite(values))), p
        lengths = means(results["napl"][i])
        order = sorted((place for place in curve if np.isfinite(lengths[place])), key=lambda place: -lengths[place])
        part = steepest(results["napl"][i, order], accuracy[i, order])
        if part is not None:
            longer, shorter = order[part.longer], order[part.shorter]
            above = lengths[order[0]] - lengths[longer]
            before = mean(accuracy[i, order[0]] - accuracy[i, longer]) / above if above > 0 else np.nan
            steep[i] = lengths[longer], lengths[shorter], *numbers(part.slope), len(order) - 1, before
    return {"loss": loss, "difference": gaps, "joint": joint, "steepest": steep}


def _loss_text(one: xr.Dataset) -> list[str]:
    """Down to which length the dense accuracy is kept, and from which on it is lost."""
    from ..analysis.collapse import kept_and_lost, standing

    chosen = one.isel(network=np.flatnonzero((one["origin"].values == "extracted") & np.isfinite(one["loss_n"].values)))
    lengths = means(chosen["napl"].values)
    order = [place for place in np.argsort(-lengths) if np.isfinite(lengths[place])]
    if not order:
        return ["there is no dense network beside the extracted ones, so a loss cannot be judged."]
    losses = [stored(chosen.isel(network=place), "loss") for place in order]
    kept, lost = kept_and_lost([standing(loss, margin=float(one["margin"])) for loss in losses])
    dense = one.sel(network=DENSE)
    head = f"the dense network reaches {float(dense['accuracy_mean']):.1f} % at NAPL {measured(dense['napl'].values)}"

    def at(place: int) -> str:
        return f"NAPL {lengths[order[place]]:.3g} ({losses[place].mean:+.1f} points, {bounds(losses[place])})"

    margin = f"{float(one['margin']):g} point"
    words = [
        f"already at {at(0)} it cannot be said to be kept to within {margin}"
        if kept is None
        else f"its accuracy is kept or exceeded, to within {margin}, down to {at(kept)}"
        + (", the shortest here" if kept == len(order) - 1 else "")
    ]
    if lost is not None:
        words.append(f"from {at(lost)} on more than {margin} is lost")
    elif kept != len(order) - 1:
        words.append(f"a loss of more than {margin} is not shown at the shortest, {at(-1)}")
    return [f"{head}; {'; '.join(words)}."]


def _steepest_text(one: xr.Dataset) -> list[str]:
    parts = one["steepest_parts"]
    if not np.isfinite(float(parts)) or int(parts) < 2:
        return []
    values = {name: float(one[f"steepest_{name}"]) for name in ("from", "to", "mean", "low", "high", "n", "before")}
    interval = (
        f"95 % interval {values['low']:.1f} to {values['high']:.1f}, n = {int(values['n'])}"
        if values["n"] > 1
        else "one seed, no interval"
    )
    above = f", against {values['before']:.1f} on average above it" if np.isfinite(values["before"]) else ""
    return [
        f"exploratory, picked from {int(parts)} parts: the curve is steepest from NAPL {values['from']:.3g} to "
        f"{values['to']:.3g}, {values['mean']:.1f} points per unit of path length ({interval}){above}."
    ]


def _scratch_text(one: xr.Dataset) -> list[str]:
    """Counts of comparisons by outcome, for each kind of network from scratch and each length."""
    lines = []
    for origin in ("scratch", "scratch-wide"):
        chosen = one.isel(network=np.flatnonzero(one["origin"].values == origin))
        chosen = chosen.isel(network=np.flatnonzero(np.isfinite(chosen["accuracy_mean"].values)))
        if not chosen.sizes["network"]:
            continue
        for length, text in LENGTHS.items():
            outcomes: dict[str, list[str]] = {}
            adjusted = []
            for network in chosen["network"].values:
                entry = chosen.sel(network=network, length=length)
                found = outcome(stored(entry, "difference"), higher="extracted higher", lower="extracted lower")
                depth = str(network).rsplit(" ", 1)[1]
                outcomes.setdefault("outside of the extracted curve" if found == "no pair" else found, []).append(depth)
                if float(entry["difference_adjusted_p"]) < 0.05:
                    adjusted.append(f"depth {depth}")
            words = [f"{found} at depth {', '.join(depths)}" for found, depths in sorted(outcomes.items())]
            together = adjustment(adjusted, float(one["comparisons"]), float(one["least_p"]))
            lines.append(
                f"exploratory, extracted against {ORIGINS[origin]} at equal {text}, paired by seed: {'; '.join(words)} "
                f"({together})."
            )
    return lines or ["no network from scratch in this sweep, so nothing is compared at equal path length."]


def _key(value: Any) -> float:
    """The value of a group of rows; pandas gives it alone or as a tuple of one."""
    return float(value[0] if isinstance(value, tuple) else value)
