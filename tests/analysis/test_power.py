"""Power and smallest effects: textbook numbers, an integral that shares no formula, and simulated tests."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from ntkdyn.analysis import power
from ntkdyn.errors import UndefinedMeasure


@pytest.mark.parametrize(("effect", "pairs"), [(0.8, 15), (0.5, 34), (0.2, 199)])
def test_smallest_samples_of_the_textbook(effect: float, pairs: int) -> None:
    # Cohen's large, medium and small effect: the numbers of pairs that every table of the paired t test gives for .8.
    assert power.paired_power(effect, seeds=pairs, deviation=1.0) >= 0.8
    assert power.paired_power(effect, seeds=pairs - 1, deviation=1.0) < 0.8


@pytest.mark.parametrize("seeds", [2, 3, 5, 10, 40])
@pytest.mark.parametrize("effect", [0.3, 1.0, 2.5])
def test_power_is_the_integral_over_the_estimated_deviation(seeds: int, effect: float) -> None:
    freedom, bound = seeds - 1, stats.t.ppf(0.975, seeds - 1)

    def rejected(deviation: float) -> float:
        # The mean is normal and independent of the estimated deviation, whose density this is.
        density = 2 * freedom * deviation * stats.chi2.pdf(freedom * deviation**2, freedom)
        shift = effect * math.sqrt(seeds)
        tails = stats.norm.sf(bound * deviation - shift) + stats.norm.cdf(-bound * deviation - shift)
        return float(density * tails)

    expected = integrate.quad(rejected, 0, np.inf, limit=400)[0]
    assert power.paired_power(3 * effect, seeds=seeds, deviation=3.0) == pytest.approx(expected, abs=1e-6)
    assert power.paired_power(-3 * effect, seeds=seeds, deviation=3.0) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seeds", [2, 3, 10, 100])
def test_the_smallest_effect_has_the_stated_power(seeds: int) -> None:
    effect = power.minimum_detectable_effect(seeds, 2.5)
    assert power.paired_power(effect, seeds=seeds, deviation=2.5) == pytest.approx(0.8, abs=1e-8)
    assert effect == pytest.approx(2.5 * power.minimum_detectable_effect(seeds, 1.0))


def test_the_smallest_effect_is_found_as_often_as_stated() -> None:
    generator = np.random.default_rng(0)
    effect = power.minimum_detectable_effect(6, 3.0)
    found = stats.ttest_1samp(generator.normal(effect, 3.0, (2000, 6)), 0, axis=1).pvalue < 0.05
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)


def test_no_effect_is_found_at_the_level_and_one_seed_finds_nothing() -> None:
    assert power.paired_power(0.0, seeds=5, deviation=1.0) == 0.05
    assert power.paired_power(1e6, seeds=5, deviation=1.0) == 1.0
    assert power.paired_power(9.0, seeds=1, deviation=1.0) == 0.0
    assert power.minimum_detectable_effect(1, 1.0) == math.inf


def test_power_of_the_notes() -> None:
    # Measured by simulation with four start epochs: 44 % with 10 seeds, 76 % with 20.
    assert power.within_power(starts=4, seeds=10) == pytest.approx(0.44, abs=0.01)
    assert power.within_power(starts=4, seeds=20) == pytest.approx(0.76, abs=0.01)
    assert power.within_power(starts=1, seeds=2) == 0.0


def test_power_of_a_partial_correlation_is_what_simulated_tests_find() -> None:
    generator = np.random.default_rng(1)
    found = []
    for _ in range(1000):
        x = generator.normal(size=(3, 12))
        y = 0.3 * x + math.sqrt(1 - 0.09) * generator.normal(size=(3, 12))
        a, b = (part - part.mean(1, keepdims=True) for part in (x, y))
        r = (a * b).sum() / math.sqrt((a**2).sum() * (b**2).sum())
        found.append(abs(r) * math.sqrt((33 - 1) / (1 - r**2)) > stats.t.ppf(0.975, 32))
    assert power.within_power(starts=3, seeds=12) == pytest.approx(np.mean(found), abs=0.04)


def test_interventions_multiply_what_can_be_compared() -> None:
    alone = power.relation_power(starts=5, seeds=10)
    assert alone == power.correlation_power(4 * 9)
    assert power.relation_power(starts=1, seeds=10, arms=8) == power.correlation_power(10 * 7) > alone
    assert power.relation_power(starts=1, seeds=10) == 0.0


def test_impossible_values_are_refused() -> None:
    with pytest.raises(UndefinedMeasure, match="found deviation 0"):
        power.minimum_detectable_effect(5, 0.0)
    with pytest.raises(UndefinedMeasure, match=r"found power 0.05, expected a number between the level 0.05 and 1"):
        power.minimum_detectable_effect(5, 1.0, power=0.05)
    with pytest.raises(UndefinedMeasure, match="found level 1"):
        power.paired_power(1.0, seeds=5, deviation=1.0, level=1.0)
    with pytest.raises(UndefinedMeasure, match=r"found correlation 1.0, expected one inside \(-1, 1\)"):
        power.correlation_power(9, correlation=1.0)
