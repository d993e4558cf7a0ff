"""Plots: arrays in, artists out, readable at half a page's width."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from ntkdyn import plots
from ntkdyn.errors import ShapeError


@pytest.fixture
def ax() -> matplotlib.axes.Axes:
    return plots.new_figure().subplots()


def test_several_runs_are_thin_and_their_mean_is_thick(ax: matplotlib.axes.Axes) -> None:
    line = plots.draw_lines([0, 1, 2], [[0, 1, 2], [2, 3, np.nan]], ax=ax, label="drift")
    assert len(ax.lines) == 3
    np.testing.assert_allclose(line.get_ydata(), [1, 2, 2])
    assert all(thin.get_linewidth() < line.get_linewidth() for thin in ax.lines[:2])
    assert list(ax.get_legend_handles_labels()[1]) == ["drift"]


def test_one_curve_is_drawn_once(ax: matplotlib.axes.Axes) -> None:
    plots.draw_lines([0, 1], [3, 4], ax=ax)
    assert len(ax.lines) == 1


def test_lengths_must_agree() -> None:
    with pytest.raises(ShapeError, match="draw_lines"):
        plots.draw_lines([0, 1], [[1, 2, 3]])


def test_series_differ_by_more_than_color(ax: matplotlib.axes.Axes) -> None:
    lines = [plots.draw_lines([0, 1], [0, index], ax=ax, index=index) for index in range(6)]
    for attribute in ("get_color", "get_marker", "_dash_pattern"):
        values = [getattr(line, attribute) for line in lines]
        values = [str(value() if callable(value) else value) for value in values]
        assert len(set(values)) == 6, attribute


def test_every_function_makes_a_figure_of_its_own() -> None:
    artists = [
        plots.draw_lines([0, 1], [0, 1]),
        plots.draw_intervals([0, 1], [1, 2], [0, np.nan], [2, np.nan]),
        plots.draw_reference(1.0, low=0.5, high=1.5),
        plots.draw_points([0], [1]),
        plots.draw_rows(["a", "b"], [1, 2], [0, 1], [2, 3]),
        plots.draw_crosses([1, 2], [0, np.nan], [2, np.nan], [1, 2], [0, -np.inf], [2, np.inf]),
        plots.draw_matrix([0, 1], np.eye(2), label="CKA (1)"),
        plots.draw_raster([0, 1], np.zeros((3, 2)), label="slope (1)", frozen=np.eye(3, 2) > 0, boundaries=[1]),
    ]
    assert all(artist.axes.figure is not None for artist in artists)


def test_rows_read_from_top_to_bottom(ax: matplotlib.axes.Axes) -> None:
    plots.draw_rows(["first", "last"], [1, 2], [0, 1], [2, 3], ax=ax)
    labels = {text.get_text(): text.get_position()[1] for text in ax.get_yticklabels()}
    assert labels["first"] > labels["last"]


def test_series_share_a_row_at_places_of_their_own(ax: matplotlib.axes.Axes) -> None:
    first, second = (
        plots.draw_rows(["a"], [1], [0], [2], ax=ax, index=index, of=2, place=index - 5) for index in (5, 6)
    )
    heights = [float(line.get_ydata()[0]) for line in (first, second)]
    assert heights == [0.125, -0.125]
    assert first.get_color() != second.get_color()


def test_panels_are_half_a_page_wide_and_the_legend_is_shared() -> None:
    figure = plots.new_figure()
    with plots.style():
        axes = plots.panels(figure, 2)
        for ax in axes:
            plots.draw_lines([0, 1], [0, 1], ax=ax, label="the same")
        plots.finish(figure)
    assert figure.get_size_inches()[0] == plots.WIDTH
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["the same"]


def test_style_is_given_back() -> None:
    before = dict(matplotlib.rcParams)
    with plots.style():
        assert matplotlib.rcParams["font.size"] == 7
    assert dict(matplotlib.rcParams) == before


def test_the_same_figure_gives_the_same_bytes() -> None:
    def render() -> tuple[bytes, bytes]:
        figure = plots.new_figure()
        with plots.style():
            ax = plots.panels(figure, 1)[0]
            plots.draw_lines([0, 1], [0, 1], ax=ax, label="a")
            plots.draw_raster([0, 1], np.zeros((3, 2)), ax=plots.panels(figure, 1)[0], label="slope (1)")
            plots.finish(figure)
        return plots.png(figure), plots.svg(figure)

    first, second = render(), render()
    assert first == second
    assert first[0].startswith(b"\x89PNG")
    assert b"<dc:date>" not in first[1]


def test_figures_stay_out_of_pyplot() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    assert isinstance(plots.new_figure(), Figure)
    assert plt.get_fignums() == before


def test_long_labels_stay_in_the_figure() -> None:
    with plots.style():
        figure = plots.new_figure()
        (ax,) = plots.panels(figure, 1)
        for index in range(3):
            label = f"data_order = {index}, intervention = linearize, start_epoch = 12, task = sum10 (1 run), and more"
            plots.draw_lines([0.0, 1.0], [0.0, index], ax=ax, label=label, index=index)
        plots.finish(figure)
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert 0 <= box.y0 < box.y1 <= ax.get_window_extent().y0


def test_axes_are_logarithmic_with_plain_numbers_and_cut_to_what_is_possible(ax: matplotlib.axes.Axes) -> None:
    plots.draw_lines([0.5, 20.0], [-30.0, 130.0], ax=ax)
    plots.logarithmic(ax, axis="x")
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    assert ax.xaxis.get_major_formatter()(0.5) == "0.5"
    plots.within(ax, 0, 100)
    assert ax.get_ylim() == (0, 100)
    plots.within(ax, -10, 200)
    assert ax.get_ylim() == (0, 100)


def test_fewer_pixels_make_a_smaller_file(ax: matplotlib.axes.Axes) -> None:
    plots.draw_lines([0, 1], [0, 1], ax=ax)
    assert len(plots.png(ax.figure, dpi=60)) < len(plots.png(ax.figure))


def test_a_long_title_is_broken_and_leaves_the_panel_its_width() -> None:
    with plots.style():
        figure = plots.new_figure()
        ax = figure.subplots()
        plots.title(ax, "task: fashion-mnist, " + ", ".join(f"setting_{index} = {index}" for index in range(9)))
        figure.draw_without_rendering()
        right = ax.get_tightbbox().x1
    lines = ax.get_title(loc="left").split("\n")
    assert len(lines) >= 3
    assert all(line.endswith(",") for line in lines[:-1])
    assert right <= figure.bbox.x1
    assert ax.get_position().width > 0.7
