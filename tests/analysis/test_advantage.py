"""Statistics of the nonlinear advantage: known answers, coverage, and what must not be concluded."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ntkdyn.analysis import advantage
from ntkdyn.errors import ShapeError, UndefinedMeasure


def test_paired_gap_is_the_textbook_interval() -> None:
    late, early = np.array([45.0, 47.0, 46.0, 44.0]), np.array([30.0, 31.0, 33.0, 28.0])
    gap = advantage.paired_gap(late, early)
    expected = stats.ttest_rel(late, early).confidence_interval(0.95)
    assert gap.mean == pytest.approx(15.0)
    assert (gap.low, gap.high) == pytest.approx((expected.low, expected.high))
    assert (gap.n, gap.diverged, gap.sign) == (4, 0, 1)
    assert advantage.paired_gap(early, late).sign == -1
    assert advantage.paired_gap([1.0, -1.0], [0.0, 0.0]).sign == 0


def test_divergence_is_counted_and_never_enters_a_gap() -> None:
    gap = advantage.paired_gap([45.0, math.nan, 47.0], [30.0, 31.0, 32.0])
    assert (gap.mean, gap.n, gap.diverged) == (15.0, 2, 1)
    assert "1 pairs diverged" in advantage.verdict(gap, advantage.equivalence([45.0, 47.0], [30.0, 32.0]))
    nothing = advantage.paired_gap([math.nan], [30.0])
    assert math.isnan(nothing.mean)
    assert "all 1 pairs diverged" in advantage.verdict(nothing, advantage.equivalence([math.nan], [30.0]))


def test_one_pair_gives_no_interval() -> None:
    gap = advantage.paired_gap([45.0], [30.0])
    assert math.isnan(gap.low)
    assert gap.sign == 0
    assert "nothing can be judged" in advantage.verdict(gap, advantage.equivalence([45.0], [30.0]))
    assert advantage.verdict(advantage.paired_gap([], []), advantage.equivalence([], [])) == "no pair of runs"


def test_equivalence_agrees_with_the_90_percent_interval_inside_the_margin() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        late, early = generator.normal(0.3, 0.6, 6), np.zeros(6)
        interval = advantage.paired_gap(late, early, confidence=0.9)
        found = advantage.equivalence(late, early, margin=1.0)
        assert found.equivalent == (interval.low > -1 and interval.high < 1)


def test_equivalence_without_spread() -> None:
    assert advantage.equivalence([1.5, 1.5], [1.0, 1.0]).equivalent
    assert not advantage.equivalence([2.5, 2.5], [1.0, 1.0]).equivalent
    with pytest.raises(UndefinedMeasure, match="margin 0"):
        advantage.equivalence([1.0], [1.0], margin=0)


def test_interaction() -> None:
    found = advantage.interaction([46.0, 47.0], [30.0, 31.0], [27.0, 28.0], [29.0, 28.0])
    assert found.mean == pytest.approx(17.0)


@pytest.mark.parametrize(
    ("late", "early", "expected"),
    [
        ([45, 46, 47], [30, 31, 33], "ends higher by 14.7 points"),
        ([30, 31, 33], [45, 46, 47], "ends lower by 14.7 points"),
        ([96.1, 96.0, 96.2, 96.1], [96.0, 96.1, 96.1, 96.2], "no gap beyond 1 points"),
        ([40, 30, 35], [30, 38, 36], "not distinguishable"),
    ],
)
def test_verdict(late: list[float], early: list[float], expected: str) -> None:
    assert expected in advantage.verdict(advantage.paired_gap(late, early), advantage.equivalence(late, early))


def test_not_distinguishable_is_not_no_gap() -> None:
    late, early = [40.0, 30.0, 35.0], [30.0, 38.0, 36.0]
    sentence = advantage.verdict(advantage.paired_gap(late, early), advantage.equivalence(late, early))
    assert "no proof of equality" in sentence
    assert "no gap" not in sentence


def test_paired_interval_covers() -> None:
    # Seeds shift both arms alike; 2000 simulations have a standard error of half a percent.
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(2000):
        shared = generator.normal(0, 5, 5)
        gap = advantage.paired_gap(shared + 3 + generator.normal(0, 1, 5), shared + generator.normal(0, 1, 5))
        inside += gap.low <= 3 <= gap.high
    assert 0.93 < inside / 2000 < 0.97


def test_equivalence_keeps_its_level_at_the_margin() -> None:
    generator = np.random.default_rng(2)
    zero = np.zeros(5)
    found = [advantage.equivalence(generator.normal(1.0, 0.4, 5), zero).equivalent for _ in range(2000)]
    assert np.mean(found) < 0.065


def _confounded(seeds: int, generator: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Drift and accuracy both follow the start epoch and nothing else ties them."""
    start, seed = (part.ravel() for part in np.meshgrid([0, 2, 4, 8, 12], np.arange(seeds), indexing="ij"))
    drift = 0.12 * np.exp(-start / 4) + generator.normal(0, 0.004, len(start))
    accuracy = 30 + 1.4 * start + generator.normal(0, 1.5, len(start))
    return start, seed, drift, accuracy


def test_start_epoch_alone_makes_a_pooled_correlation_that_cannot_be_judged_within() -> None:
    found = advantage.relation(*_confounded(5, np.random.default_rng(3)))
    assert found.pooled < -0.8
    assert found.start_only > 0.8
    assert math.isnan(found.within)
    assert "cannot be judged: 5 seeds, at least 10" in found.within_note
    assert found.pooled_note == ""


def test_within_start_epochs_the_confound_is_gone_and_a_real_tie_is_found() -> None:
    generator = np.random.default_rng(4)
    alone = [advantage.relation(*_confounded(10, generator)) for _ in range(60)]
    assert abs(np.mean([found.within for found in alone])) < 0.06
    assert np.mean([found.pooled for found in alone]) < -0.8
    start, seed, drift, _ = _confounded(12, generator)
    tied = 30 + 1.4 * start - 2000 * (drift - 0.12 * np.exp(-start / 4)) + generator.normal(0, 1, len(start))
    assert advantage.relation(start, seed, drift, tied).within < -0.8


def test_within_value_is_that_of_ranks_less_their_means() -> None:
    start, seed, drift, accuracy = _confounded(10, np.random.default_rng(7))
    ranks = [
        np.concatenate([stats.rankdata(part[start == k]) - 5.5 for k in np.unique(start)]) for part in (drift, accuracy)
    ]
    expected = np.corrcoef(*ranks)[0, 1]
    assert advantage.relation(start, seed, drift, accuracy).within == pytest.approx(expected)


def test_relation_is_repeatable_and_drops_missing_arms() -> None:
    columns = _confounded(10, np.random.default_rng(5))
    assert advantage.relation(*columns) == advantage.relation(*columns)
    columns[3][:3] = math.nan
    assert advantage.relation(*columns).arms == 47


def test_few_start_epochs_cannot_be_judged() -> None:
    found = advantage.relation([0, 0, 4, 4], [0, 1, 0, 1], [0.2, 0.3, 0.1, 0.1], [1, 2, 3, 4])
    assert found.pooled_note == "no correlation can be judged: 2 start epochs, at least 5 are needed"
    assert math.isnan(found.pooled)


def test_pooled_value_is_spearmans() -> None:
    start, seed, drift, accuracy = _confounded(5, np.random.default_rng(6))
    expected = stats.spearmanr(drift, accuracy).statistic
    assert advantage.relation(start, seed, drift, accuracy).pooled == pytest.approx(expected)


def test_difficulty_is_what_nonlinearity_is_worth() -> None:
    assert advantage.difficulty({"a": 96.0, "b": 86.0}, {"a": 95.0}) == {"a": 1.0}


def test_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(2,\) and \(3,\)"):
        advantage.paired_gap([1, 2], [1, 2, 3])
    with pytest.raises(ShapeError, match="expected four times"):
        advantage.relation([0], [0], [0.1, 0.2], [1])
    with pytest.raises(ShapeError, match="mean_interval"):
        advantage.mean_interval([[1.0]])
