"""How well the tangent kernel is aligned with the targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .curves import Panel, draw_curves
from .recorded import (
    KERNEL_NEED,
    Datasets,
    by_set,
    each_set,
    kernel_sets,
    path_of,
    spread,
    target_columns,
    time_axis,
    trace_kernels,
    variable,
)

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from ..results import Run


class TargetAlignment:
    """Kernel-target alignment <K, YYᵀ>/(|K| |YYᵀ|), plain and centered."""

    name = "target-alignment"
    title = "Kernel-target alignment"
    reading = (
        "1 means that the kernel is the kernel of the targets themselves; in the centered version kernel and targets "
        "lose their mean first, so that the constant direction does not count."
    )
    scope = "run"

    def unavailable(self, source: Run, /) -> str | None:
        """Need kernels and targets of the same probe set."""
        if not kernel_sets(source):
            return KERNEL_NEED
        return None if _sets(source) else "no probe set with kernels has targets; give the sets as (inputs, targets)"

    def measure(self, source: Run, /) -> xr.Dataset:
        """Return the alignment [set, step] with one-hot or real targets, centered and not."""
        import xarray as xr

        from ..analysis import target_alignment

        def one(probe_set: str) -> xr.Dataset:
            targets = target_columns(source.targets(probe_set))
            kernels = trace_kernels(source, probe_set)
            return xr.Dataset(
                {
                    "alignment_centered": variable(
                        "step",
                        target_alignment(kernels, targets, centered=True),
                        "1",
                        "centered kernel-target alignment",
                    ),
                    "alignment": variable("step", target_alignment(kernels, targets), "1", "kernel-target alignment"),
                },
                coords=time_axis(source, path_of("ntk", probe_set, "")),
            )

        return by_set(_sets(source), one)

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say the alignment at start, greatest and end."""
        lines = []
        for prefix, members in each_set(datasets):
            curves = [one["alignment_centered"].values for one in members]
            lines.append(
                f"{prefix}the centered kernel-target alignment goes from {spread([curve[0] for curve in curves])} to "
                f"{spread([curve[-1] for curve in curves])}; its greatest value is "
                f"{spread([np.nanmax(curve) for curve in curves])}."
            )
        return lines

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw both alignments a probe set."""
        panel = Panel({"alignment_centered": "centered", "alignment": "uncentered"}, "kernel-target alignment (1)")
        draw_curves(figure, datasets, [panel])


def _sets(run: Run) -> list[str]:
    return [probe_set for probe_set in kernel_sets(run) if path_of("probe_sets", probe_set, "targets") in run]
