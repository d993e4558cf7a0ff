"""How far the tangent kernel is from where it started and from where it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .. import plots
from .curves import Panel, draw_curves
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
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..results import Run, Sweep

LEVELS = {"level_children": "two children of the start", "level_seeds": "two seeds"}


class KernelDistance:
    """Kernel distance to the start and to the end of training, centered and not."""

    name = "kernel-distance"
    title = "Kernel distance to start and end"
    reading = (
        "S = 0 means the same kernel up to scale; the centered distance is the primary one, because the uncentered one "
        "mostly sees the constant direction, whose share of the squared kernel norm is shown below; gray lines are "
        "reference levels: two children of one early snapshot (noise of the gradients) and two seeds."
    )
    scope = "run"

    def unavailable(self, source: Run, /) -> str | None:
        """Need recorded kernels."""
        return None if kernel_sets(source) else KERNEL_NEED

    def measure(self, source: Run, /) -> xr.Dataset:
        """Return S to the first and last snapshot [set, step], centered and not, and the constant share."""
        import xarray as xr

        from ..analysis import constant_share, kernel_distance, kernel_distance_centered

        def one(probe_set: str) -> xr.Dataset:
            kernels = trace_kernels(source, probe_set)
            measures = {}
            for place, end, word in (("start", 0, "first"), ("end", -1, "last")):
                measures[f"to_{place}"] = variable(
                    "step",
                    kernel_distance_centered(kernels, kernels[end]),
                    "1",
                    f"centered kernel distance to the {word} snapshot",
                )
                measures[f"to_{place}_uncentered"] = variable(
                    "step",
                    kernel_distance(kernels, kernels[end]),
                    "1",
                    f"uncentered kernel distance to the {word} snapshot",
                )
            measures["constant_share"] = variable(
                "step", constant_share(kernels), "1", "share of the constant direction in the squared kernel norm"
            )
            return xr.Dataset(measures, coords=time_axis(source, path_of("ntk", probe_set, "")))

        return by_set(kernel_sets(source), one)

    def in_sweep(self, sweep: Sweep, task: str, datasets: Datasets, /) -> dict[str, xr.Dataset]:
        """Return the trunks' datasets with the reference levels of the sweep beside them."""
        from .reference_levels import levels

        found = levels(sweep, task)
        return {
            label: dataset.assign({name: found[name] for name in LEVELS if name in found})
            for label, dataset in datasets.items()
        }

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say how far the kernel moved, and how the levels compare."""
        lines = []
        for prefix, members in each_set(datasets):
            text = (
                f"{prefix}from the first to the last snapshot the kernel moved by S = "
                f"{spread([one['to_start'].values[-1] for one in members])} centered and "
                f"{spread([one['to_start_uncentered'].values[-1] for one in members])} uncentered; "
                f"the constant direction holds {spread([one['constant_share'].values[0] for one in members])} "
                f"of the squared kernel norm at the start and "
                f"{spread([one['constant_share'].values[-1] for one in members])} at the end."
            )
            levels = [
                f"{words} differ by {float(members[0][name]):.3g}"
                for name, words in LEVELS.items()
                if name in members[0] and np.isfinite(float(members[0][name]))
            ]
            lines.append(text + (f" Reference, centered at the end: {'; '.join(levels)}." if levels else ""))
        return lines

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw both distances a probe set, and the share of the constant direction."""
        variables = {"to_start": "to start, centered", "to_end": "to end, centered"}
        if len(by_series(datasets)) == 1:
            variables |= {"to_start_uncentered": "to start, uncentered", "to_end_uncentered": "to end, uncentered"}
        distance = Panel(variables, "kernel distance S (1)")
        share = Panel({"constant_share": "constant direction's share"}, "share of |K|² (1)", height=0.95)
        axes = draw_curves(figure, datasets, [distance, share], levels=_draw_levels)
        for ax in axes[1::2]:
            ax.set_ylim(0, 1.05)
            ax.set_title("", loc="left")


def _draw_levels(ax: Axes, panel: Panel, dataset: xr.Dataset) -> None:
    if "to_end" not in panel.variables:
        return
    for dash, (name, words) in enumerate(LEVELS.items(), start=2):
        if name in dataset and np.isfinite(float(dataset[name])):
            plots.draw_reference(float(dataset[name]), ax=ax, label=f"{words}, at end", dash=dash)
