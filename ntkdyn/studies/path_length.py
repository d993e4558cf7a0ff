"""How many active units lie on a path through the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .. import plots
from .curves import Panel, draw_curves, time_label
from .recorded import Datasets, by_series, spread, time_axis, variable

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from ..results import Run

MEASURES = {
    "mean": "APL",
    "normalized": "NAPL",
    "weighted": "weighted NAPL",
}
WIDTHS = {
    "effective_width": "active units / NAPL",
    "mean_active_width": "mean of layers with any",
}


class PathLength:
    """Average path length over training and its distribution at start and end."""

    name = "path-length"
    title = "Average path length"
    reading = (
        "Upper panel: active units on an average path: APL over all paths, NAPL with paths drawn by a uniform choice "
        "at each junction, so that a skip connection keeps its weight, and NAPL with units weighted by |1 - slope|; "
        "lower panel: the share of paths of each length."
    )
    scope = "run"
    with_arms = True

    def unavailable(self, source: Run, /) -> str | None:
        """Need recorded path lengths."""
        if "path_length/normalized" in source:
            return None
        return "no path lengths are recorded; gate the network and record with the probe path-length"

    def measure(self, source: Run, /) -> xr.Dataset:
        """Return the path lengths and widths [step], and the distribution of lengths [step, length]."""
        import xarray as xr

        found = {name: text for name, text in MEASURES.items() if f"path_length/{name}" in source}
        measures = {
            name: variable(
                "step",
                np.asarray(source[f"path_length/{name}"], dtype=np.float64).reshape(-1),
                "units per path",
                f"average path length ({text})",
            )
            for name, text in found.items()
        }
        for name, text in WIDTHS.items():
            if f"path_length/{name}" in source:
                widths = np.asarray(source[f"path_length/{name}"], dtype=np.float64).reshape(-1)
                measures[name] = variable("step", widths, "units", f"active width ({text})")
        coords = time_axis(source, "path_length")
        if "path_length/distribution" in source:
            shares = np.asarray(source["path_length/distribution"], dtype=np.float64)
            measures["distribution"] = variable(("step", "length"), shares, "1", "share of paths")
            coords["length"] = variable("length", np.arange(shares.shape[1]), "units per path", "path length")
        return xr.Dataset(measures, coords=coords)

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say the path lengths at start and end."""
        lines = []
        for series, members in by_series(datasets).items():
            words = [
                f"{text} from {spread([one[name].values[0] for one in members])} "
                f"to {spread([one[name].values[-1] for one in members])}"
                for name, text in MEASURES.items()
                if name in members[0]
            ]
            widths = [
                f"{spread([one[name].values[0] for one in members])} to "
                f"{spread([one[name].values[-1] for one in members])} ({text})"
                for name, text in WIDTHS.items()
                if all(name in one for one in members)
            ]
            ending = f"; width of what is active, in units: {', '.join(widths)}" if widths else ""
            lines.append(f"{series + ': ' if series else ''}active units on a path, {'; '.join(words)}{ending}.")
        return lines

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw the path lengths over time and the distribution at start and end."""
        first = next(iter(datasets.values()))
        axes = plots.panels(figure, 2 if "distribution" in first else 1, legend=0.6)
        variables = {name: text for name, text in MEASURES.items() if name in first}
        if len(by_series(datasets)) > 1:
            variables = {name: text for name, text in variables.items() if name in ("normalized", "weighted")}
        draw_curves(
            figure, datasets, [Panel(variables, "path length\n(active units per path)", from_zero=True)], axes=axes[:1]
        )
        axes[0].set_xlabel(time_label(first))
        if "distribution" in first:
            series = by_series(datasets)
            for number, members in enumerate(series.values()):
                # Several series share the upper panel's legend by their colors: only their ends are drawn.
                for place, (row, when) in enumerate(((0, "at the start"), (-1, "at the end"))):
                    if len(series) > 1 and row == 0:
                        continue
                    plots.draw_lines(
                        members[0]["length"].values,
                        [one["distribution"].values[row] for one in members],
                        ax=axes[1],
                        label="" if len(series) > 1 else f"distribution {when}",
                        index=number if len(series) > 1 else 3 + place,
                        dash=0 if len(series) > 1 else place,
                    )
            axes[1].set_xticks(first["length"].values)
            axes[1].set_xlabel("path length (active units per path)")
            axes[1].set_ylabel("share of paths\nat the end (1)" if len(series) > 1 else "share of paths (1)")
        plots.finish(figure, columns=1)
