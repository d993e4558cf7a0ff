"""The eigenvalues of the tangent kernel over training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

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
    from matplotlib.figure import Figure

    from ..results import Run

LEADING = 10
"""Number of leading eigenvalues that are kept."""

SHOWN = (1, 2, 5, 10)
"""Ranks of the eigenvalues that are drawn."""


class Spectrum:
    """Leading eigenvalues, effective rank and participation ratio of the tangent kernel."""

    name = "spectrum"
    title = "Spectrum of the kernel"
    reading = (
        "Upper panel: leading eigenvalues, whose growth is the growth of the kernel; lower panel: number of directions "
        "that matter, counted by entropy (effective rank) and by squares (participation ratio)."
    )
    scope = "run"

    def unavailable(self, source: Run, /) -> str | None:
        """Need kernels."""
        return None if kernel_sets(source) else KERNEL_NEED

    def measure(self, source: Run, /) -> xr.Dataset:
        """Return eigenvalues [set, step, rank] and both ranks [set, step]."""
        import xarray as xr

        from ..analysis import effective_rank, eigenvalues, participation_ratio

        def one(probe_set: str) -> xr.Dataset:
            spectra = eigenvalues(trace_kernels(source, probe_set))
            count = min(LEADING, spectra.shape[1])
            measures = {
                "eigenvalue": variable(("step", "rank"), spectra[:, :count], "output²/parameter²", "eigenvalue"),
                "effective_rank": variable("step", [effective_rank(v) for v in spectra], "1", "entropy effective rank"),
                "participation_ratio": variable(
                    "step", [participation_ratio(v) for v in spectra], "1", "participation ratio"
                ),
            }
            coords = time_axis(source, path_of("ntk", probe_set, "")) | {"rank": ("rank", np.arange(1, count + 1))}
            return xr.Dataset(measures, coords=coords)

        return by_set(kernel_sets(source), one)

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say how the largest eigenvalue and the effective rank change."""
        lines = []
        for prefix, members in each_set(datasets):
            growth = [one["eigenvalue"].values[-1, 0] / one["eigenvalue"].values[0, 0] for one in members]
            lines.append(
                f"{prefix}the largest eigenvalue changes by a factor {spread(growth)}; the effective rank goes from "
                f"{spread([one['effective_rank'].values[0] for one in members])} to "
                f"{spread([one['effective_rank'].values[-1] for one in members])}."
            )
        return lines

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw some eigenvalues and both ranks a probe set."""
        ranks = [rank for rank in SHOWN if rank <= min(one.sizes["rank"] for one in datasets.values())]
        if len(by_series(datasets)) > 1:
            ranks = ranks[:1]
        flat = {
            label: one.assign({f"eigenvalue_{rank}": one["eigenvalue"].sel(rank=rank, drop=True) for rank in ranks})
            for label, one in datasets.items()
        }
        eigenvalues = Panel(
            {f"eigenvalue_{rank}": f"eigenvalue {rank}" for rank in ranks},
            "eigenvalue of K\n(output²/parameter²)",
            logarithmic=True,
        )
        counts = Panel(
            {"effective_rank": "effective rank", "participation_ratio": "participation ratio"}, "directions (count)"
        )
        draw_curves(figure, flat, [eigenvalues, counts])
