"""How similar the tangent kernels of any two snapshots are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .. import plots
from .curves import time_of
from .recorded import (
    KERNEL_NEED,
    Datasets,
    by_series,
    by_set,
    each_set,
    kernel_sets,
    path_of,
    spread,
    time_axis,
    trace_kernels,
    variable,
)

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from ..results import Run

MOST_SNAPSHOTS = 25
"""Snapshots in the matrix at most: evenly chosen from the recorded ones, first and last always among them."""

ESTIMATORS = ("unbiased", "biased")


class CKA:
    """Centered kernel alignment between snapshots, unbiased and biased."""

    name = "cka"
    title = "CKA between snapshots"
    reading = (
        "Each pixel compares the kernels of two snapshots, 1 meaning the same up to scale; a light block on the "
        "diagonal is a stretch of training in which the kernel stays; snapshots lie at equal distance, whatever the "
        "time between them; shown is the unbiased estimate, averaged over runs."
    )
    scope = "run"

    def unavailable(self, source: Run, /) -> str | None:
        """Need kernels of at least two snapshots."""
        sets = kernel_sets(source)
        if not sets:
            return KERNEL_NEED
        if len(source.steps(path_of("ntk", sets[0], ""))) < 2:
            return "one snapshot only; a comparison needs two"
        return None

    def measure(self, source: Run, /) -> xr.Dataset:
        """Return both estimates [set, step, step_2] on at most 25 evenly chosen snapshots."""
        import xarray as xr

        from ..analysis import cka, distance_matrix

        def one(probe_set: str) -> xr.Dataset:
            kernels = trace_kernels(source, probe_set)
            chosen = np.unique(np.linspace(0, len(kernels) - 1, min(MOST_SNAPSHOTS, len(kernels))).round().astype(int))
            times = time_axis(source, path_of("ntk", probe_set, ""))
            steps, epochs = times["step"][1][chosen], times["epoch"][1][chosen]
            kernels = kernels[chosen]
            axes = ("step", "step_2")
            unbiased = [cka(kernels, kernel, estimator="unbiased") for kernel in kernels]
            return xr.Dataset(
                {
                    "cka_unbiased": variable(axes, unbiased, "1", "unbiased CKA between snapshots"),
                    # The biased estimate is one minus the centered distance.
                    "cka_biased": variable(axes, 1 - distance_matrix(kernels), "1", "biased CKA between snapshots"),
                },
                coords={
                    "step": ("step", steps),
                    "epoch": ("step", epochs),
                    "step_2": ("step_2", steps),
                    "epoch_2": ("step_2", epochs),
                },
            )

        return by_set(kernel_sets(source), one)

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say the similarity of start and end and when the kernel is 0.95 similar to its end."""
        lines = []
        for prefix, members in each_set(datasets):
            near = [_first_near(one) for one in members]
            unit = "epoch" if np.isfinite(members[0]["epoch"].values).all() else "step"
            ends = {name: spread([one[f"cka_{name}"].values[0, -1] for one in members]) for name in ESTIMATORS}
            lines.append(
                f"{prefix}first and last kernel have CKA {ends['unbiased']} (unbiased; biased {ends['biased']}); from "
                f"{unit} {spread(near)} on it stays at 0.95 or more with the last one."
            )
        return lines

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw the mean unbiased matrix, one panel a series and probe set."""
        series = by_series(datasets)
        first = next(iter(datasets.values()))
        sets = [str(probe_set) for probe_set in first["set"].values]
        axes = plots.panels(figure, len(series) * len(sets), height=2.7, legend=0.0)
        places = [(name, members, probe_set) for name, members in series.items() for probe_set in sets]
        for ax, (name, members, probe_set) in zip(axes, places, strict=True):
            shown = [one.sel(set=probe_set) for one in members]
            same = [one for one in shown if one["step"].equals(shown[0]["step"])]
            mean = np.mean([one["cka_unbiased"].values for one in same], axis=0)
            low = min(0.0, float(np.nanmin(mean))) if np.isfinite(mean).any() else 0.0
            plots.draw_matrix(time_of(shown[0]), mean, ax=ax, label="unbiased CKA (1)", low=low)
            unit = "epochs" if np.isfinite(shown[0]["epoch"].values).all() else "optimizer steps"
            ax.set_xlabel(f"snapshot at ({unit})")
            ax.set_ylabel(f"snapshot at ({unit})")
            plots.title(ax, ", ".join(part for part in (name, f"probe set: {probe_set}" if probe_set else "") if part))


def _first_near(dataset: xr.Dataset, level: float = 0.95) -> float:
    """Time from which the similarity with the last snapshot stays at the level or above."""
    below = np.flatnonzero(~(dataset["cka_unbiased"].values[:, -1] >= level))
    times = time_of(dataset)
    return float(times[min(below[-1] + 1, len(times) - 1)]) if len(below) else float(times[0])
