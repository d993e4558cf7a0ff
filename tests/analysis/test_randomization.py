"""Sign flips: counted by hand, compared with scipy's permutation test, and their error rates over simulations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from ntkdyn.analysis import randomization
from ntkdyn.errors import ShapeError, UndefinedMeasure

DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
"""Darwin's fifteen pairs of maize plants, on which Fisher (1935, section 21) tried the test: p = 1726 / 32768."""


def test_darwins_maize() -> None:
    totals = np.array([0])
    for value in DARWIN:
        totals = np.concatenate([totals + value, totals - value])
    assert (np.abs(totals) >= sum(DARWIN)).sum() == 1726
    found = randomization.sign_flip_test(DARWIN)
    assert (found.n, found.flips, found.exact) == (15, randomization.RANDOM_FLIPS, False)
    assert found.p == pytest.approx(1726 / 32768, abs=0.011)


@pytest.mark.parametrize("seeds", [2, 5, 9, 13])
def test_all_flips_agree_with_scipy(seeds: int) -> None:
    values = np.random.default_rng(seeds).normal(0.7, 1.0, seeds)
    expected = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    found = randomization.sign_flip_test([*values, np.nan])
    assert found.p == pytest.approx(expected.pvalue, abs=1e-12)
    assert (found.n, found.flips, found.exact) == (seeds, 2 ** (seeds - 1), True)


def test_no_values_one_value_and_equal_values() -> None:
    assert np.isnan(randomization.sign_flip_test([]).p)
    assert np.isnan(randomization.sign_flip_test([3.0]).p)
    assert randomization.sign_flip_test([0.0, 0.0, 0.0]).p == 1.0
    assert randomization.sign_flip_test([2.0] * 6).p == 1 / 32


def _adjusted_by_loops(values: np.ndarray) -> list[float]:
    """Adjusted p values of complete differences, every flip by itself."""
    observed = [abs(stats.ttest_1samp(row, 0).statistic) for row in values]
    counts = [0] * len(values)
    signs = list(itertools.product((1, -1), repeat=values.shape[1]))
    for flip in signs:
        greatest = max(abs(stats.ttest_1samp(row * flip, 0).statistic) for row in values)
        counts = [count + (greatest >= one - 1e-9) for count, one in zip(counts, observed, strict=True)]
    return [count / len(signs) for count in counts]


def test_adjusted_values_are_those_of_every_flip() -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(size=(4, 6)) + generator.normal(size=6) + np.array([[2.0], [0.5], [0.0], [-1.0]])
    found = randomization.max_t(values)
    assert found.adjusted == pytest.approx(_adjusted_by_loops(values))
    assert found.p == pytest.approx([randomization.sign_flip_test(row).p for row in values])
    assert (found.adjusted >= found.p).all()
    assert found.mean == pytest.approx(values.mean(1))


def test_interval_excludes_zero_where_the_adjusted_test_rejects() -> None:
    generator = np.random.default_rng(2)
    for _ in range(20):
        values = generator.normal(generator.normal(size=(5, 1)), 1.0, (5, 9))
        found = randomization.max_t(values)
        assert (((found.low > 0) | (found.high < 0)) == (found.adjusted <= 0.05)).all()
        shifted = randomization.max_t(np.vstack([values[:1] - found.low[0] - 1e-6, values[1:]]))
        assert shifted.adjusted[0] > 0.05
        shifted = randomization.max_t(np.vstack([values[:1] - found.low[0] + 1e-6, values[1:]]))
        assert shifted.adjusted[0] <= 0.05


def test_five_seeds_allow_no_rejection_and_no_finite_interval() -> None:
    found = randomization.max_t([[5.0, 5.1, 4.9, 5.2, 5.0]])
    assert found.adjusted[0] == 1 / 16
    assert (found.low[0], found.high[0]) == (-np.inf, np.inf)


def test_missing_pairs_are_left_out() -> None:
    values = np.random.default_rng(3).normal(1.0, 1.0, (3, 8))
    values[1, :5] = np.nan
    values[2, 1:] = np.nan
    found = randomization.max_t(values)
    assert found.n.tolist() == [8, 3, 1]
    assert found.p[1] == randomization.sign_flip_test(values[1]).p
    assert np.isnan([found.mean[2], found.adjusted[2], found.low[2]]).all()
    nothing = randomization.max_t(np.full((2, 4), np.nan))
    assert np.isnan(nothing.adjusted).all()


def test_equal_differences_have_an_interval_of_no_width() -> None:
    found = randomization.max_t([[1.0] * 7, [0.0] * 7])
    assert (found.low[0], found.high[0], found.adjusted[1]) == (1.0, 1.0, 1.0)


def test_errors_over_all_comparisons_stay_below_the_level_and_intervals_cover_together() -> None:
    # Two true differences and four null ones that share a seed effect; 150 simulations: standard error 1.8 %.
    generator = np.random.default_rng(4)
    truth = np.array([[2.0], [5.0], [0.0], [0.0], [0.0], [0.0]])
    wrong, covered = 0, 0
    for _ in range(150):
        found = randomization.max_t(truth + generator.normal(size=(6, 9)) + generator.normal(size=9))
        wrong += (found.adjusted[2:] <= 0.05).any()
        covered += ((found.low <= truth[:, 0]) & (truth[:, 0] <= found.high)).all()
    assert wrong / 150 <= 0.09
    assert covered / 150 >= 0.91


def test_shapes_and_levels_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"sign_flip_test: found differences of shape \(1, 2\), expected \[n\]"):
        randomization.sign_flip_test([[1, 2]])
    with pytest.raises(ShapeError, match=r"max_t: found differences of shape \(2,\), expected \[comparisons, seeds\]"):
        randomization.max_t([1, 2])
    with pytest.raises(UndefinedMeasure, match="max_t: found level 0"):
        randomization.max_t([[1, 2]], level=0)
