"""How the slopes of the gates move, and which gates are open."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .. import plots
from .curves import Panel, draw_curves, time_label
from .gate_patterns import hamming_distances, recorded_gates
from .recorded import Datasets, by_series, path_of, spread, time_axis, variable

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from ..results import Run

MOST_SNAPSHOTS = 25
"""Snapshots of the raster at most, evenly chosen from the recorded ones."""

FIELDS = ("slope", "frozen", "on_rate")


class Gates:
    """Slope trajectories of the gates and a raster of all units."""

    name = "gates"
    title = "Gates"
    reading = (
        "Curves: effective slopes where they move, 0 being ReLU and 1 linear, and the share of on/off signs that "
        "differ from the first and from the last snapshot; raster: one row a unit, one column a snapshot (at equal "
        "distance, whatever the time between them), lines between the gates, the first run of each setting, its slopes "
        "where they move, else the share of samples on which a unit is open; frozen units are linear for good."
    )
    scope = "run"
    with_arms = True

    def unavailable(self, source: Run, /) -> str | None:
        """Need recorded slopes."""
        return (
            None
            if recorded_gates(source)[1]
            else "no gates are recorded; gate the network and record with the probe gates"
        )

    def measure(self, source: Run, /) -> xr.Dataset:
        """Return mean, least and greatest slope and frozen share [step], and rasters [unit, snapshot]."""
        import xarray as xr

        probe_set, gates = recorded_gates(source)
        group = path_of("gates", probe_set, "")
        columns: dict[str, list[NDArray[np.float64]]] = {field: [] for field in FIELDS}
        for gate in gates:
            slope = np.asarray(source[path_of(group, gate, "slope")], dtype=np.float64)
            rate = path_of(group, gate, "on_rate")
            rates = np.asarray(source[rate], dtype=np.float64) if rate in source else np.full_like(slope, np.nan)
            columns["on_rate"].append(rates)
            # One slope may serve a whole layer: it then counts for every channel.
            repeats = rates.shape[1] // slope.shape[1]
            frozen = np.asarray(source[path_of(group, gate, "frozen")], dtype=np.float64)
            columns["slope"].append(np.repeat(slope, repeats, axis=1))
            columns["frozen"].append(np.repeat(frozen, repeats, axis=1))
        names = np.repeat(gates, [part.shape[1] for part in columns["slope"]])
        whole = {field: np.concatenate(parts, axis=1) for field, parts in columns.items()}
        chosen = np.unique(
            np.linspace(0, len(whole["slope"]) - 1, min(MOST_SNAPSHOTS, len(whole["slope"]))).round().astype(int)
        )
        raster = {field: values[chosen].T for field, values in whole.items()}
        times = time_axis(source, group)
        distances = hamming_distances(source, group, gates)
        curves = {
            "hamming_to_start": (distances[:, 0], "mean share of on/off signs that differ from the first snapshot"),
            "hamming_to_end": (distances[:, -1], "mean share of on/off signs that differ from the last snapshot"),
            "slope_mean": (whole["slope"].mean(1), "mean effective slope"),
            "slope_least": (whole["slope"].min(1), "least effective slope"),
            "slope_greatest": (whole["slope"].max(1), "greatest effective slope"),
            "frozen_share": (whole["frozen"].mean(1), "share of frozen units"),
        }
        return xr.Dataset(
            {name: variable("step", values, "1", text) for name, (values, text) in curves.items()}
            | {
                "slope": variable(("unit", "snapshot"), raster["slope"].astype("f4"), "1", "effective slope"),
                "frozen": variable(("unit", "snapshot"), raster["frozen"].astype("i1"), "1", "1 where frozen"),
                "on_rate": variable(
                    ("unit", "snapshot"), raster["on_rate"].astype("f4"), "1", "share of samples on which it is open"
                ),
            },
            coords=times
            | {
                "gate": ("unit", names),
                "unit": ("unit", np.arange(len(names))),
                "snapshot": ("snapshot", times["step"][1][chosen]),
                "epoch_of_snapshot": ("snapshot", times["epoch"][1][chosen]),
            },
        )

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say how many units froze and where the slopes of the others are."""
        lines = []
        for series, members in by_series(datasets).items():
            prefix = f"{series}: " if series else ""
            if np.isfinite(members[0]["hamming_to_start"].values[-1]):
                lines.append(
                    f"{prefix}from the first to the last snapshot "
                    f"{spread([100 * one['hamming_to_start'].values[-1] for one in members])} % of the on/off signs of "
                    "units that are not frozen change."
                )
            units = members[0].sizes["unit"]
            if not any(_moves(one) for one in members):
                lines.append(
                    f"{prefix}no slope moved: all {units} units keep slope {members[0]['slope'].values[0, 0]:g}."
                )
                continue
            left = []
            for one in members:
                last, frozen = one["slope"].values[:, -1], one["frozen"].values[:, -1].astype(bool)
                left.append(float(np.abs(1 - last[~frozen]).mean()) if (~frozen).any() else np.nan)
            lines.append(
                f"{prefix}at the end {spread([100 * one['frozen_share'].values[-1] for one in members])} % of {units} "
                f"units are frozen at slope 1; the mean |1 - slope| of the others is {spread(left)}."
            )
        return lines

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw slope curves and one raster a series."""
        series = by_series(datasets)
        slopes = {"slope_mean": "mean slope", "slope_least": "least slope", "slope_greatest": "greatest slope"}
        if len(series) > 1:
            slopes = {"slope_mean": "mean slope"}
        signs = {"hamming_to_start": "signs, to start", "hamming_to_end": "signs, to end"}
        curves = []
        if any(_moves(one) for one in datasets.values()):
            curves.append(Panel(slopes, "effective slope (1)"))
        if any(np.isfinite(one["hamming_to_start"].values).any() for one in datasets.values()):
            curves.append(Panel(signs, "Hamming distance (1)"))
        axes = plots.panels(figure, len(curves) + len(series), height=1.8)
        for ax, panel in zip(axes, curves, strict=False):
            draw_curves(figure, datasets, [panel], axes=[ax])
            ax.set_xlabel(time_label(next(iter(datasets.values()))))
        for ax, (name, members) in zip(axes[len(curves) :], series.items(), strict=True):
            shown = members[0]
            moving = _moves(shown)
            gate = shown["gate"].values
            times = shown["epoch_of_snapshot"].values
            times = times if np.isfinite(times).all() else shown["snapshot"].values
            plots.draw_raster(
                times,
                shown["slope" if moving else "on_rate"].values,
                ax=ax,
                label="effective slope (1)" if moving else "open share (1)",
                frozen=shown["frozen"].values.astype(bool),
                boundaries=[row for row in range(1, len(gate)) if gate[row] != gate[row - 1]],
            )
            ax.set_ylabel("unit (number)")
            ax.set_xlabel(time_label(shown).replace("training time", "snapshot at"))
            plots.title(ax, name)
        plots.finish(figure)


def _moves(dataset: xr.Dataset) -> bool:
    slopes = dataset["slope"].values
    return bool(np.ptp(slopes) > 0) or bool(dataset["frozen"].values.any())
