"""Drawing: arrays in, artists out; every function takes ``ax=`` and makes a figure of its own without it.

One set-up for all figures: 3.3 inch wide (half a page), fonts of 7 points, the Okabe-Ito colors, and a line style and
a marker beside each color, so that nothing rests on color alone.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, FigureBase
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from .errors import ShapeError

WIDTH = 3.3
"""Width of every figure in inches: half a page."""

# Characters of a line of the legend beside its handles.
_LEGEND_LINE = 56
_TITLE_LINE = 52  # characters that fit over a panel

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette without its yellow, which is too pale for lines on white."""

# One more than colors: the eighth line has the first color with another marker.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (6, 2)), (0, (3, 1, 1, 1, 1, 1)))
GRAY = "#666666"

_SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.4,
    "grid.color": "#dddddd",
    "lines.linewidth": 1.3,
    "lines.markersize": 3.2,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "image.interpolation": "nearest",
    "svg.hashsalt": "ntkdyn",
    "svg.fonttype": "path",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw inside with the settings of this module; the user's own settings come back afterwards."""
    with matplotlib.rc_context(_SETTINGS):  # type: ignore[arg-type]
        yield


def new_figure() -> Figure:
    """Return an empty figure of half a page's width, outside of pyplot's global state."""
    return Figure(figsize=(WIDTH, 2.2), layout="constrained")


def panels(figure: FigureBase, count: int, *, height: float = 1.75, legend: float = 0.35) -> list[Axes]:
    """Return ``count`` axes stacked in ``figure``, whose height is set to fit.

    Args: height: inches a panel.  legend: inches left for a legend below.
    """
    return stacked(figure, [height] * count, legend=legend)


def stacked(figure: FigureBase, heights: Sequence[float], *, legend: float = 0.35) -> list[Axes]:
    """Return axes stacked in ``figure`` with these heights in inches; a subfigure keeps its size."""
    if isinstance(figure, Figure):
        figure.set_size_inches(WIDTH, sum(heights) + legend)
    return list(figure.subplots(len(heights), 1, squeeze=False, height_ratios=list(heights))[:, 0])


def png(figure: Figure, *, dpi: int = 200) -> bytes:
    """Return the figure as PNG, the same bytes for the same figure.

    Args: dpi: pixels an inch.
    """
    return _rendered(figure, "png", {"Software": None}, dpi)


def svg(figure: Figure) -> bytes:
    """Return the figure as SVG without a date, the same bytes for the same figure."""
    return _rendered(figure, "svg", {"Date": None})


def draw_lines(
    x: ArrayLike,
    values: ArrayLike,
    *,
    ax: Axes | None = None,
    label: str = "",
    index: int = 0,
    dash: int | None = None,
    markers: bool = True,
) -> Line2D:
    """Draw one curve a run thin and their mean thick and labelled.

    Args:
        x: common abscissa [S].
        values: [runs, S] or [S].
        index: number of the color and marker.  dash: number of the line style, ``index`` by default.
    Returns: the thick line.
    Raises: ShapeError: lengths differ.
    """
    ax = _axes(ax)
    abscissa, curves = np.asarray(x, dtype=np.float64), np.atleast_2d(np.asarray(values, dtype=np.float64))
    if curves.ndim != 2 or curves.shape[1] != len(abscissa):
        raise ShapeError(f"draw_lines: found x {abscissa.shape} and values {curves.shape}, expected [S] and [runs, S]")
    color = COLORS[index % len(COLORS)]
    dashes = DASHES[(index if dash is None else dash) % len(DASHES)]
    if len(curves) > 1:
        for curve in curves:
            draw_thin(abscissa, curve, ax=ax, index=index)
    # A mean over the runs that are finite there; all-NaN columns stay NaN without a warning.
    finite = np.isfinite(curves)
    counts = finite.sum(0)
    mean = np.where(counts > 0, np.where(finite, curves, 0).sum(0) / np.maximum(counts, 1), np.nan)
    marker = MARKERS[index % len(MARKERS)] if markers else None
    # At most about ten markers on a curve, else they hide it.
    spacing = max(1, len(abscissa) // 10)
    (line,) = ax.plot(
        abscissa, mean, color=color, linestyle=dashes, marker=marker, markevery=spacing, label=label or None
    )
    return line


def draw_thin(x: ArrayLike, values: ArrayLike, *, ax: Axes | None = None, index: int = 0) -> Line2D:
    """Draw one curve [S] thin and without a label, beside the mean of several."""
    (line,) = _axes(ax).plot(
        np.asarray(x, dtype=np.float64),
        np.asarray(values, dtype=np.float64),
        color=COLORS[index % len(COLORS)],
        linewidth=0.4,
        alpha=0.45,
    )
    return line


def draw_band(x: ArrayLike, low: ArrayLike, high: ArrayLike, *, ax: Axes | None = None, index: int = 0) -> Artist:
    """Draw a pale band between two curves [S], around their mean; NaN leaves a gap."""
    below, above = (np.asarray(edge, dtype=np.float64) for edge in (low, high))
    return _axes(ax).fill_between(
        np.asarray(x, dtype=np.float64), below, above, color=COLORS[index % len(COLORS)], alpha=0.15, linewidth=0
    )


def draw_intervals(
    x: ArrayLike,
    mean: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    *,
    ax: Axes | None = None,
    label: str = "",
    index: int = 0,
    connected: bool = True,
) -> Artist:
    """Draw means [K] with intervals [low, high] as error bars; a NaN interval is left out, its mean is not."""
    ax = _axes(ax)
    center, below, above = (np.asarray(column, dtype=np.float64) for column in (mean, low, high))
    spread = np.nan_to_num(np.stack([center - below, above - center]), nan=0.0)
    drawn = ax.errorbar(
        np.asarray(x, dtype=np.float64),
        center,
        yerr=np.maximum(spread, 0),
        color=COLORS[index % len(COLORS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=DASHES[index % len(DASHES)] if connected else "none",
        capsize=2,
        elinewidth=0.8,
        label=label or None,
    )
    return drawn.lines[0]


def draw_reference(
    level: float,
    *,
    ax: Axes | None = None,
    label: str = "",
    low: float = float("nan"),
    high: float = float("nan"),
    dash: int = 1,
) -> Line2D:
    """Draw a horizontal reference line with its interval as a gray band."""
    ax = _axes(ax)
    if np.isfinite(low) and np.isfinite(high):
        ax.axhspan(low, high, color=GRAY, alpha=0.12, linewidth=0)
    return ax.axhline(level, color=GRAY, linewidth=1.0, linestyle=DASHES[dash % len(DASHES)], label=label or None)


def draw_points(x: ArrayLike, y: ArrayLike, *, ax: Axes | None = None, label: str = "", index: int = 0) -> Artist:
    """Draw unconnected points [n], one marker and color an index."""
    ax = _axes(ax)
    return ax.plot(
        np.asarray(x, dtype=np.float64),
        np.asarray(y, dtype=np.float64),
        linestyle="none",
        marker=MARKERS[index % len(MARKERS)],
        color=COLORS[index % len(COLORS)],
        alpha=0.85,
        label=label or None,
    )[0]


def draw_crosses(
    x: ArrayLike,
    x_low: ArrayLike,
    x_high: ArrayLike,
    y: ArrayLike,
    y_low: ArrayLike,
    y_high: ArrayLike,
    *,
    ax: Axes | None = None,
    label: str = "",
    index: int = 0,
) -> Artist:
    """Draw unconnected points [n] with an interval along both axes; a NaN interval is left out, its point is not."""
    ax = _axes(ax)
    columns = [np.asarray(column, dtype=np.float64) for column in (x, x_low, x_high, y, y_low, y_high)]
    along, across = (
        np.maximum(np.nan_to_num(np.stack([center - low, high - center]), nan=0.0, posinf=0.0), 0)
        for center, low, high in (columns[:3], columns[3:])
    )
    drawn = ax.errorbar(
        columns[0],
        columns[3],
        xerr=along,
        yerr=across,
        color=COLORS[index % len(COLORS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle="none",
        capsize=1.5,
        elinewidth=0.6,
        label=label or None,
    )
    return drawn.lines[0]


def draw_rows(
    names: Sequence[str],
    mean: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    *,
    ax: Axes | None = None,
    label: str = "",
    index: int = 0,
    of: int = 1,
    place: int | None = None,
) -> Artist:
    """Draw one named row an entry, first on top, with its interval.

    Args: index: number of the color and marker.  of: series that share each row side by side.  place: number of this
    one among them, ``index`` by default.
    """
    ax = _axes(ax)
    center, below, above = (np.asarray(column, dtype=np.float64) for column in (mean, low, high))
    rows = len(names) - 1 - np.arange(len(names)) - ((index if place is None else place) - (of - 1) / 2) * 0.5 / of
    spread = np.maximum(np.nan_to_num(np.stack([center - below, above - center]), nan=0.0), 0)
    there = np.isfinite(center)
    drawn = ax.errorbar(
        center[there],
        rows[there],
        xerr=spread[:, there],
        color=COLORS[index % len(COLORS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle="none",
        capsize=1.5,
        elinewidth=0.8,
        label=label or None,
    )
    ax.set_yticks(range(len(names)), list(reversed(list(names))))
    ax.set_ylim(-0.6, len(names) - 0.4)
    return drawn.lines[0]


def draw_matrix(
    times: ArrayLike, values: ArrayLike, *, ax: Axes | None = None, label: str, low: float = 0.0, high: float = 1.0
) -> Artist:
    """Draw a matrix [S, S] between times, with a color bar; axes are snapshots at equal distance, ticks their times.

    Snapshots are dense early in training; on a linear axis that part would not be seen.
    """
    ax = _axes(ax)
    matrix = np.asarray(values, dtype=np.float64)
    image = ax.imshow(matrix, origin="lower", vmin=low, vmax=high, cmap="viridis")
    ax.grid(False)
    _tick_times(ax, times, axis="both")
    _color_bar(ax, image, label)
    return image


def draw_raster(
    times: ArrayLike,
    values: ArrayLike,
    *,
    ax: Axes | None = None,
    label: str,
    frozen: ArrayLike | None = None,
    boundaries: Sequence[int] = (),
    low: float = 0.0,
    high: float = 1.0,
) -> Artist:
    """Draw units × time as an image; frozen entries are hatched black, horizontal lines part the gates.

    Args: values: [units, S].  frozen: bool [units, S].  boundaries: first row of each gate but the first.
    """
    ax = _axes(ax)
    array = np.asarray(values, dtype=np.float64)
    image = ax.imshow(array, aspect="auto", origin="lower", vmin=low, vmax=high, cmap="cividis")
    ax.grid(False)
    if frozen is not None and np.any(frozen):
        mask = np.ma.masked_where(~np.asarray(frozen, dtype=bool), np.ones_like(array))
        ax.imshow(mask, aspect="auto", origin="lower", cmap=ListedColormap([COLORS[1]]), vmin=0, vmax=1)
        ax.plot([], [], linestyle="none", marker="s", color=COLORS[1], label="frozen (linear)")
    for row in boundaries:
        ax.axhline(row - 0.5, color="white", linewidth=0.6)
    _tick_times(ax, times, axis="x")
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    _color_bar(ax, image, label)
    return image


def logarithmic(ax: Axes, *, axis: Literal["x", "y"] = "y") -> None:
    """Make an axis logarithmic after drawing, with plain numbers as labels: 1, 2, 5 where it spans little."""
    (ax.set_xscale if axis == "x" else ax.set_yscale)("log")
    low, high = ax.get_xlim() if axis == "x" else ax.get_ylim()
    line = ax.xaxis if axis == "x" else ax.yaxis
    line.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    line.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    line.set_minor_formatter(NullFormatter())


def within(ax: Axes, low: float, high: float) -> None:
    """Cut the y axis, after drawing, to the values that are possible: intervals of few seeds reach beyond."""
    bottom, top = ax.get_ylim()
    ax.set_ylim(max(bottom, low), min(top, high))


def title(ax: Axes, text: str) -> None:
    """Write what a panel shows above its left end, broken into lines where it is long."""
    # A longer one would be cut off, and the layout would make the panel narrow for it.
    whole = text.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    ax.set_title(textwrap.fill(whole, _TITLE_LINE), loc="left")


def finish(figure: FigureBase, *, columns: int = 2) -> None:
    """Put one legend of all labelled artists, without doubles, below the panels; one column where labels are long."""
    found: dict[str, Any] = {}
    axes: list[Axes] = cast(Any, figure).axes  # the stubs of FigureBase know no axes
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        columns = max(1, min(columns, _LEGEND_LINE // (max(len(label) for label in found) + 2)))
        labels = [textwrap.fill(label, _LEGEND_LINE) for label in found]
        rows = sum(1 + label.count("\n") for label in labels) if columns == 1 else -(-len(labels) // columns)
        if isinstance(figure, Figure):
            width, height = figure.get_size_inches()
            figure.set_size_inches(width, height + 0.14 * max(0, rows - 2))
        figure.legend(list(found.values()), labels, loc="outside lower center", ncols=columns, columnspacing=1.2)


def _axes(ax: Axes | None) -> Axes:
    return ax if ax is not None else new_figure().subplots()


def _rendered(figure: Figure, format: Literal["png", "svg"], metadata: dict[str, Any], dpi: int = 200) -> bytes:
    buffer = io.BytesIO()
    with style():
        engine = figure.get_layout_engine()
        if isinstance(engine, ConstrainedLayoutEngine):
            # The layout costs a third of a drawing: once for all formats, then the axes stay where they are. Twice
            # over, because the labels' sizes depend on the ticks that the first pass makes room for.
            engine.execute(figure)
            engine.execute(figure)
            figure.set_layout_engine("none")
        figure.savefig(buffer, format=format, metadata=metadata, dpi=dpi)
    return buffer.getvalue()


def _tick_times(ax: Axes, times: ArrayLike, *, axis: Literal["x", "both"]) -> None:
    array = np.asarray(times, dtype=np.float64)
    places = np.unique(np.linspace(0, len(array) - 1, min(6, len(array))).round().astype(int))
    labels = [f"{array[place]:g}" if array[place] < 100 else f"{array[place]:.0f}" for place in places]
    ax.set_xticks(places, labels)
    if axis == "both":
        ax.set_yticks(places, labels)


def _color_bar(ax: Axes, image: Any, label: str) -> None:
    figure = ax.figure
    bar = figure.colorbar(image, ax=ax, shrink=0.95, pad=0.02)
    bar.set_label(label)
    bar.outline.set_linewidth(0.4)
