"""Ratios of what is left of networks: intervals on logarithms, what they allow to say, where active units lie."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from ntkdyn.analysis.ratios import invariance, paired_ratio, share_between, spread_factor
from ntkdyn.errors import ShapeError, UndefinedMeasure


def test_ratio_against_a_t_test_on_logarithms() -> None:
    generator = np.random.default_rng(0)
    a, b = np.exp(generator.normal(1.0, 0.3, 7)), np.exp(generator.normal(0.2, 0.3, 7))
    found = paired_ratio(a, b, comparisons=4)
    logs = [math.log(x) - math.log(y) for x, y in zip(a, b, strict=True)]
    test = stats.ttest_1samp(logs, 0.0)
    for level, ends in ((0.95, (found.low, found.high)), (0.9875, (found.adjusted_low, found.adjusted_high))):
        interval = test.confidence_interval(level)
        np.testing.assert_allclose(ends, np.exp([interval.low, interval.high]), rtol=1e-10)
    assert found.mean == pytest.approx(math.prod(x / y for x, y in zip(a, b, strict=True)) ** (1 / 7))
    turned = paired_ratio(b, a, comparisons=4)
    assert (turned.mean, turned.low) == pytest.approx((1 / found.mean, 1 / found.high))


def test_what_is_not_positive_is_counted_and_what_is_missing_is_not() -> None:
    found = paired_ratio([2.0, 4.0, 0.0, np.nan], [1.0, 2.0, 3.0, 4.0])
    assert (found.mean, found.n, found.left_out) == (pytest.approx(2.0), 2, 1)
    nothing = paired_ratio([0.0], [0.0])
    assert math.isnan(nothing.mean)
    assert invariance(nothing) == "cannot be judged"


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ([1.0, 1.02, 0.98, 1.01], "supported"),
        ([2.0, 2.05, 1.95, 2.02], "contradicted"),
        ([0.5, 0.51, 0.49, 0.5], "contradicted"),
        ([1.2, 1.3, 1.25, 1.28], "cannot be judged"),
        ([0.5, 3.0, 0.4, 2.0], "cannot be judged"),
        ([1.0], "cannot be judged"),
        ([1.0, 1.0, 1.0, 0.0], "cannot be judged"),
    ],
)
def test_same_needs_the_whole_interval_inside_the_margin(first: list[float], expected: str) -> None:
    assert invariance(paired_ratio(first, np.ones(len(first)))) == expected


def test_contradiction_is_adjusted_for_the_number_of_comparisons() -> None:
    first = [1.35, 1.45, 1.6, 1.4]
    assert invariance(paired_ratio(first, np.ones(4))) == "contradicted"
    assert invariance(paired_ratio(first, np.ones(4), comparisons=20)) == "cannot be judged"


def test_spread_between_seeds_is_pooled_over_settings() -> None:
    rows = [[1.0, 2.0, 4.0], [10.0, 10.0, np.nan], [0.0, 3.0, np.nan]]
    expected = math.exp(math.sqrt(2 * math.log(2) ** 2 / 3))
    assert spread_factor(rows) == pytest.approx(expected)
    assert spread_factor([[5.0, 5.0]]) == 1
    assert math.isnan(spread_factor([[5.0]]))


@pytest.mark.parametrize("layers", range(1, 8))
def test_middle_share_against_fractions(layers: int) -> None:
    counts = np.random.default_rng(layers).integers(0, 9, layers) + 1
    low, high = Fraction(1, 3), Fraction(2, 3)
    inside = Fraction(0)
    for place, count in enumerate(counts.tolist()):
        first, last = Fraction(place, layers), Fraction(place + 1, layers)
        inside += count * max(Fraction(0), min(last, high) - max(first, low)) * layers
    assert float(share_between(counts, 1 / 3, 2 / 3)) == pytest.approx(float(inside / int(counts.sum())))
    assert float(share_between(np.ones(layers), 1 / 3, 2 / 3)) == pytest.approx(1 / 3)


def test_middle_share_of_nothing_is_undefined() -> None:
    found = share_between([[0, 0, 0], [0, 4, 0]], 1 / 3, 2 / 3)
    assert np.isnan(found[0])
    assert found[1] == pytest.approx(1)


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match=r"found shapes \(1,\) and \(2,\), expected twice \[n\]"):
        paired_ratio([1.0], [1.0, 2.0])
    with pytest.raises(UndefinedMeasure, match="found 0 comparisons, expected at least 1"):
        paired_ratio([1.0], [1.0], comparisons=0)
    with pytest.raises(UndefinedMeasure, match=r"found margin 1\.0, expected a factor above 1"):
        invariance(paired_ratio([1.0], [1.0]), margin=1.0)
    with pytest.raises(ShapeError, match=r"found values of shape \(1,\), expected \[K, n\]"):
        spread_factor([1.0])
    with pytest.raises(ShapeError, match=r"found active of shape \(2, 0\), expected \[..., L\]"):
        share_between(np.ones((2, 0)), 0, 1)
    with pytest.raises(UndefinedMeasure, match=r"found depths 0\.7 and 0\.3, expected 0 <= low < high <= 1"):
        share_between([1.0], 0.7, 0.3)
