"""Curves over training time: the drawing that most run studies share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .. import plots
from .recorded import Datasets, by_series

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    """One panel per probe set: ``variables`` name -> legend text, y ``label`` with unit, ``height`` in inches."""

    variables: Mapping[str, str]
    label: str
    logarithmic: bool = False
    height: float = 1.75
    from_zero: bool = False


def draw_curves(
    figure: Figure,
    datasets: Datasets,
    wanted: Sequence[Panel],
    *,
    columns: int = 2,
    levels: Callable[[Axes, Panel, xr.Dataset], None] | None = None,
    axes: Sequence[Axes] | None = None,
) -> list[Axes]:
    """Draw each panel once per probe set, seeds thin and their mean thick; return the axes from top to bottom.

    One series: a color a variable. Several: a color a series, a line style a variable. ``levels`` may add reference
    lines to each panel from the first dataset at that probe set. With ``axes`` the caller lays out and finishes.
    """
    series = by_series(datasets)
    first = next(iter(datasets.values()))
    places = [(panel, probe_set) for probe_set in _sets(first) for panel in wanted]
    drawn = plots.stacked(figure, [panel.height for panel, _ in places]) if axes is None else list(axes)
    for ax, (panel, probe_set) in zip(drawn, places, strict=True):
        for number, (name, members) in enumerate(series.items()):
            for place, (variable, text) in enumerate(panel.variables.items()):
                x, values = _stack(members, variable, probe_set)
                label = text if len(series) == 1 else ", ".join(part for part in (name, text) if part)
                index = place if len(series) == 1 else number
                plots.draw_lines(x, values, ax=ax, label=label, index=index, dash=place)
        if levels is not None:
            levels(ax, panel, first.sel(set=probe_set) if "set" in first.dims else first)
        if probe_set:
            plots.title(ax, f"probe set: {probe_set}")
        if panel.logarithmic:
            plots.logarithmic(ax)
        if panel.from_zero:
            ax.set_ylim(bottom=0)
        ax.set_ylabel(panel.label)
    if axes is None:
        drawn[-1].set_xlabel(time_label(first))
        plots.finish(figure, columns=columns)
    return drawn


def time_of(dataset: xr.Dataset) -> NDArray[np.float64]:
    """Return the abscissa of a dataset: epochs where all are known, else steps."""
    epochs = np.asarray(dataset["epoch"].values, dtype=np.float64)
    return epochs if np.isfinite(epochs).all() else np.asarray(dataset["step"].values, dtype=np.float64)


def time_label(dataset: xr.Dataset) -> str:
    """Return the label of that abscissa."""
    known = np.isfinite(np.asarray(dataset["epoch"].values, dtype=np.float64)).all()
    return "training time (epochs)" if known else "training time (optimizer steps)"


def _sets(dataset: xr.Dataset) -> list[str]:
    return [str(probe_set) for probe_set in dataset["set"].values] if "set" in dataset.dims else [""]


def _stack(
    members: Sequence[xr.Dataset], variable: str, probe_set: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values of a variable [runs, S] on the union of the runs' times, NaN where a run has none."""
    chosen = [one[variable].sel(set=probe_set) if "set" in one[variable].dims else one[variable] for one in members]
    times = [time_of(one) for one in members]
    union = np.unique(np.concatenate(times))
    values = np.full((len(members), len(union)), np.nan)
    for row, (time, array) in enumerate(zip(times, chosen, strict=True)):
        values[row, np.searchsorted(union, time)] = array.values
    return union, values
