"""Accuracy against path length: values at matched lengths, where the dense accuracy is kept, the steepest part."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntkdyn.analysis.advantage import mean_interval
from ntkdyn.analysis.collapse import accuracy_at, kept_and_lost, standing, steepest
from ntkdyn.errors import ShapeError, UndefinedMeasure


def test_between_the_points_and_nowhere_else() -> None:
    found = accuracy_at([6.0, 0.5, 3.0], [90.0, 20.0, 80.0], [6.0, 4.5, 1.0, 0.4, 6.1])
    np.testing.assert_allclose(found, [90.0, 85.0, 32.0, np.nan, np.nan])


def test_equal_lengths_are_averaged_and_diverged_points_left_out() -> None:
    np.testing.assert_allclose(accuracy_at([2, 2, 1, 3], [10, 30, 0, np.nan], [2.0, 1.5]), [20.0, 10.0])
    assert np.isnan(accuracy_at([1.0, 2.0], [np.nan, np.nan], [1.5])).all()


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 900).map(lambda length: length / 100), st.floats(0, 100)),
        min_size=2,
        max_size=8,
        unique_by=lambda point: point[0],
    ),
    st.floats(0, 1),
)
def test_against_the_segment_found_by_hand(points: list[tuple[float, float]], share: float) -> None:
    first, last = points[0][0], points[-1][0]
    # Rounding may carry a share of 1 beyond the end.
    at = min(max(first + share * (last - first), min(first, last)), max(first, last))
    left = max((point for point in points if point[0] <= at), key=lambda point: point[0])
    right = min((point for point in points if point[0] >= at), key=lambda point: point[0])
    width = right[0] - left[0]
    expected = left[1] if width == 0 else left[1] + (right[1] - left[1]) * (at - left[0]) / width
    lengths, accuracies = zip(*points, strict=True)
    assert accuracy_at(lengths, accuracies, [at])[0] == pytest.approx(expected, abs=1e-6)


def test_shapes() -> None:
    with pytest.raises(ShapeError, match=r"found length \(2,\), accuracy \(3,\) and at \(1,\), expected \[P\]"):
        accuracy_at([1, 2], [1, 2, 3], [1])
    with pytest.raises(ShapeError, match=r"found length \(2,\) and accuracy \(2, 1\), expected \[P, S\] twice"):
        steepest([1, 2], [[1], [2]])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, -0.1, 0.0], "kept"),
        ([5.0, 5.1, 4.9], "kept"),
        ([-5.0, -5.1, -4.9], "lost"),
        ([-1.0, -1.1, -0.9], "open"),
        ([-9.0], "open"),
        ([], "open"),
    ],
)
def test_standing_is_by_the_interval(values: list[float], expected: str) -> None:
    assert standing(mean_interval(values), margin=1.0) == expected


def test_a_margin_must_be_positive() -> None:
    with pytest.raises(UndefinedMeasure, match="found margin 0, expected a positive number of accuracy points"):
        standing(mean_interval([1.0, 2.0]), margin=0)


@pytest.mark.parametrize(
    ("standings", "expected"),
    [
        (["kept", "kept", "open", "lost"], (1, 3)),
        (["kept", "lost", "kept", "lost", "lost"], (0, 3)),
        (["open", "kept"], (None, None)),
        (["kept", "kept"], (1, None)),
        (["lost", "lost"], (None, 0)),
        ([], (None, None)),
    ],
)
def test_kept_down_to_and_lost_from(standings: list[str], expected: tuple[int | None, int | None]) -> None:
    assert kept_and_lost(standings) == expected  # type: ignore[arg-type]


def test_the_steepest_part() -> None:
    length = np.array([[6.0, 6.0], [3.0, 3.0], [2.5, 2.0], [0.5, 0.5]])
    accuracy = np.array([[90.0, 92.0], [84.0, 89.0], [60.0, 61.0], [20.0, 25.0]])
    found = steepest(length, accuracy)
    assert found is not None
    assert (found.longer, found.shorter) == (1, 2)
    assert found.slope.mean == pytest.approx((24 / 0.5 + 28 / 1.0) / 2)
    assert found.slope.n == 2
    assert steepest(length[:1], accuracy[:1]) is None
    same = steepest(np.ones((2, 1)), np.array([[2.0], [1.0]]))
    assert same is None
