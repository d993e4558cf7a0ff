"""The model of the arms: least squares with dummies, error rates, coverage, and what must not be called a relation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ntkdyn.analysis import arm_models, beyond_start_and_seed
from ntkdyn.errors import ShapeError, UndefinedMeasure

Arms = tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]


def _arms(
    generator: np.random.Generator,
    *,
    seeds: int = 10,
    starts: int = 5,
    interventions: int = 5,
    drift: float = 0.0,
    dense: float = 0.0,
) -> Arms:
    """Arms whose accuracy has effects of start, seed and cell, and of drift and dense accuracy as given.

    Interventions move both drift and dense accuracy, so that one stands for the other where it is alone.
    """
    k, m, s = (part.ravel() for part in np.meshgrid(*map(np.arange, (starts, interventions, seeds)), indexing="ij"))
    moved = np.linspace(-0.1, 0.1, interventions)[m] if interventions > 1 else 0.0
    of_seed, of_cell = generator.normal(0, 3, seeds), generator.normal(0, 2, (starts, seeds))
    angle = 0.4 + 0.05 * k + moved + 0.01 * of_seed[s] + generator.normal(0, 0.03, len(k))
    progress = 50 + 3 * k + 15 * (angle - 0.4) + generator.normal(0, 2, len(k))
    accuracy = 30 + 4 * k + of_seed[s] + of_cell[k, s] + drift * angle + dense * progress
    return k, s, accuracy + generator.normal(0, 2, len(k)), {"drift": angle, "dense": progress}


def _by_dummies(arms: Arms, names: list[str]) -> np.ndarray:
    k, s, accuracy, columns = arms
    design = [*(k == start for start in np.unique(k)), *(s == seed for seed in np.unique(s)[1:])]
    design += [columns[name] for name in names]
    return np.linalg.lstsq(np.stack(design, axis=1).astype(float), accuracy, rcond=None)[0][-len(names) :]


@pytest.mark.parametrize("interventions", [1, 4])
def test_coefficients_are_those_of_least_squares_with_dummies(interventions: int) -> None:
    k, s, accuracy, columns = _arms(np.random.default_rng(0), interventions=interventions, drift=20.0, dense=0.3)
    # Missing arms make it unbalanced.
    accuracy[[0, 7, 20]] = math.nan
    columns["dense"][[3, 7]] = math.nan
    kept = np.isfinite(accuracy + columns["dense"])
    found = arm_models(k, s, accuracy, columns, {"both": ["drift", "dense"]}, resamples=99, permutations=99)["both"]
    expected = _by_dummies(
        (k[kept], s[kept], accuracy[kept], {n: c[kept] for n, c in columns.items()}), ["drift", "dense"]
    )
    assert [found.coefficients[name].value for name in ("drift", "dense")] == pytest.approx(expected)
    assert (found.arms, found.left_out, found.starts, found.seeds) == (kept.sum(), 4, 5, 10)
    assert found.permuted == ("seeds" if interventions == 1 else "within start and seed")
    for coefficient in found.coefficients.values():
        assert coefficient.low < coefficient.value < coefficient.high


def test_coefficients_in_standard_deviations_do_not_depend_on_the_unit() -> None:
    k, s, accuracy, columns = _arms(np.random.default_rng(1), drift=20.0)
    columns["percent"] = 100 * columns["drift"] + 7
    found = arm_models(k, s, accuracy, columns, {"a": ["drift"], "b": ["percent"]}, resamples=99, permutations=99)
    one, other = found["a"].coefficients["drift"], found["b"].coefficients["percent"]
    assert one.value == pytest.approx(100 * other.value)
    assert one.value * one.spread == pytest.approx(other.value * other.spread)
    assert (one.low, one.high, one.p) == pytest.approx((100 * other.low, 100 * other.high, other.p))


def test_what_is_left_beyond_start_and_seed_is_what_least_squares_leaves() -> None:
    k, s, accuracy, columns = _arms(np.random.default_rng(12), interventions=3)
    design = np.stack([*(k == one for one in range(5)), *(s == one for one in range(1, 10))], axis=1).astype(float)
    expected = accuracy - design @ np.linalg.lstsq(design, accuracy, rcond=None)[0]
    assert beyond_start_and_seed(k, s, accuracy) == pytest.approx(expected)
    left = beyond_start_and_seed(k, s, columns["drift"])
    found = arm_models(k, s, accuracy, columns, {"a": ["drift"]}, permutations=9, resamples=9)["a"]
    assert found.coefficients["drift"].spread == pytest.approx(left.std())
    with pytest.raises(ShapeError, match="beyond_start_and_seed: found shapes"):
        beyond_start_and_seed([0], [0, 1], [1.0])
    with pytest.raises(UndefinedMeasure, match="found NaN or infinity"):
        beyond_start_and_seed([0], [0], [math.nan])


def test_permutation_value_within_cells_is_that_of_every_permutation() -> None:
    # Two seeds, one start, three arms: 36 permutations, counted by loops.
    k, s = np.zeros(6), np.repeat([0, 1], 3)
    drift = np.array([0.1, 0.2, 0.4, 0.2, 0.3, 0.5])
    accuracy = np.array([1.0, 3.0, 4.0, 2.0, 7.0, 8.0])

    def centered(values: np.ndarray) -> np.ndarray:
        return (values.reshape(2, 3) - values.reshape(2, 3).mean(1, keepdims=True)).ravel()

    orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    products = [
        abs(centered(drift) @ centered(accuracy[[*first, *(3 + np.array(second))]]))
        for first in orders
        for second in orders
    ]
    expected = np.mean(np.array(products) >= products[0] - 1e-12)
    found = arm_models(k, s, accuracy, {"drift": drift}, {"a": ["drift"]}, permutations=4000, resamples=9)["a"]
    assert found.coefficients["drift"].p == pytest.approx(expected, abs=0.02)
    assert math.isnan(found.coefficients["drift"].low)  # two seeds have no interval


def _rejections(count: int, seed: int, names: list[str], **settings: float) -> float:
    generator = np.random.default_rng(seed)
    rejected = 0
    for _ in range(count):
        found = arm_models(*_arms(generator, **settings), {"a": names}, permutations=199, resamples=9)["a"]
        rejected += found.coefficients["drift"].p <= 0.05
    return rejected / count


# 200 simulations have a standard error of 1.5 %, 60 of 3 %.
def test_randomization_keeps_its_level_where_the_start_epoch_alone_drives_accuracy() -> None:
    assert _rejections(200, 0, ["drift"]) <= 0.095


def test_dense_accuracy_behind_the_drift_is_seen_only_beside_it() -> None:
    # Drift is moved, accuracy follows dense accuracy: alone, drift stands for it; beside it, nothing is left.
    assert _rejections(60, 1, ["drift"], dense=0.5) > 0.8
    assert _rejections(200, 2, ["drift", "dense"], dense=0.5) <= 0.095


def test_a_true_effect_beside_the_dense_accuracy_is_found() -> None:
    assert _rejections(60, 3, ["drift", "dense"], dense=0.5, drift=20.0) > 0.9


def test_two_functions_of_the_start_epoch_are_no_relation() -> None:
    # They correlate at .71 on average; with effects of start and seed nothing is left to correlate.
    generator = np.random.default_rng(4)
    pooled, rejected = [], 0
    for _ in range(200):
        k, s = (part.ravel() for part in np.meshgrid(np.arange(5), np.arange(10), indexing="ij"))
        first, second = (np.sort(generator.normal(size=5))[k] for _ in range(2))
        drift, accuracy = (part + 0.2 * generator.normal(size=50) for part in (first, second))
        pooled.append(stats.spearmanr(drift, accuracy).statistic)
        found = arm_models(k, s, accuracy, {"drift": drift}, {"a": ["drift"]}, permutations=199, resamples=9)
        rejected += found["a"].coefficients["drift"].p <= 0.05
    assert np.mean(pooled) > 0.7
    assert rejected / 200 <= 0.095


@pytest.mark.parametrize("interventions", [1, 5])
def test_intervals_over_seeds_cover(interventions: int) -> None:
    generator = np.random.default_rng(5)
    covered = np.zeros(2)
    for _ in range(120):
        arms = _arms(generator, interventions=interventions, drift=20.0, dense=0.5)
        found = arm_models(*arms, {"a": ["drift", "dense"]}, permutations=1, resamples=399)["a"].coefficients
        covered += [found[name].low <= true <= found[name].high for name, true in (("drift", 20.0), ("dense", 0.5))]
    assert (covered / 120 > 0.88).all()


@pytest.mark.slow
@pytest.mark.parametrize("interventions", [1, 5])
def test_level_and_coverage_in_full(interventions: int) -> None:
    assert _rejections(2000, 6, ["drift"], interventions=interventions) == pytest.approx(0.05, abs=0.015)
    assert _rejections(2000, 7, ["drift", "dense"], dense=0.5, interventions=interventions) == pytest.approx(
        0.05, abs=0.02
    )


def test_adjusted_values_count_all_models() -> None:
    k, s, accuracy, columns = _arms(np.random.default_rng(8), drift=8.0)
    generator = np.random.default_rng(9)
    columns |= {f"noise {number}": generator.normal(size=len(k)) for number in range(8)}
    models = {name: [name] for name in columns}
    found = arm_models(k, s, accuracy, columns, models, resamples=9, permutations=999)
    for name in columns:
        one = found[name].coefficients[name]
        # Never below the value alone, never above Bonferroni's.
        assert one.p <= one.adjusted <= 9 * one.p
    alone = arm_models(k, s, accuracy, columns, {"drift": ["drift"]}, resamples=9, permutations=999)
    assert alone["drift"].coefficients["drift"].adjusted == alone["drift"].coefficients["drift"].p


def test_what_does_not_vary_beyond_start_and_seed_has_no_coefficient() -> None:
    k, s, accuracy, columns = _arms(np.random.default_rng(10), interventions=1)
    columns |= {"start": 0.3 * k, "twice": 2 * columns["drift"], "constant": np.full(len(k), 4.0)}
    models = {"start": ["start"], "twice": ["drift", "twice"], "constant": ["constant"], "drift": ["drift"]}
    found = arm_models(k, s, accuracy, columns, models, resamples=99, permutations=99)
    for label in ("start", "twice", "constant"):
        for one in found[label].coefficients.values():
            assert np.isnan([one.value, one.low, one.p, one.adjusted, one.spread]).all()
    assert np.isfinite(found["drift"].coefficients["drift"].p)


def test_too_little_is_no_error() -> None:
    nothing = arm_models([0.0], [0], [math.nan], {"drift": [1.0]}, {"a": ["drift"]})["a"]
    assert (nothing.arms, nothing.left_out) == (0, 1)
    assert math.isnan(nothing.coefficients["drift"].p)
    one_seed = arm_models([0, 1, 2], [0, 0, 0], [1.0, 2.0, 4.0], {"drift": [1.0, 3.0, 2.0]}, {"a": ["drift"]})["a"]
    assert math.isnan(one_seed.coefficients["drift"].value)


def test_repeatable_to_the_last_digit() -> None:
    arms = _arms(np.random.default_rng(11))
    first, again = (arm_models(*arms, {"a": ["drift", "dense"]}, resamples=99, permutations=99) for _ in range(2))
    assert first == again


def test_shapes_and_names_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"arm_models: found shapes .*, expected \[n\] for all of them"):
        arm_models([0, 1], [0, 1], [1.0, 2.0], {"drift": [1.0]}, {"a": ["drift"]})
    with pytest.raises(UndefinedMeasure, match="found 'angle' in a model, expected some of drift"):
        arm_models([0], [0], [1.0], {"drift": [1.0]}, {"a": ["angle"]})
    with pytest.raises(UndefinedMeasure, match="found no regressor in a model, expected some of drift"):
        arm_models([0], [0], [1.0], {"drift": [1.0]}, {"a": []})
