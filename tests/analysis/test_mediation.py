"""Mediation: ratios against their definition, and what is concluded from sweeps in which the truth is known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy import stats

from ntkdyn.analysis import mediation
from ntkdyn.errors import ShapeError

Changes = dict[str, tuple[np.ndarray, np.ndarray]]

LEVELS = {
    "rate_before": [-0.2, -0.1, 0.05],
    "scale_before": [-0.15, 0.1],
    "labels_before": [0.2, -0.08],
    "train_before": [-0.25],
    "anchor_before": [-0.1, -0.2],
}
"""How far each intervention moves the drift."""


def _families(
    generator: np.random.Generator,
    *,
    ratio: float = 0.0,
    direct: Mapping[str, float] = {},
    dense: Mapping[str, float] = {},
    unmoved: Sequence[str] = (),
    seeds: int = 10,
    starts: int = 3,
    noise: float = 2.0,
) -> Changes:
    """Changes against one shared arm without intervention a start and seed.

    Accuracy follows the drift by ``ratio``, an intervention's size by ``direct``, dense accuracy by 1.
    """
    shape = (starts, seeds)
    accuracy, drift, progress = (generator.normal(0, scale, shape) for scale in (noise, 0.03, 1.0))
    found = {}
    for family, levels in LEVELS.items():
        cells = []
        for level in levels:
            moved = 0.0 if family in unmoved else level * (1 + 0.2 * np.arange(starts)[:, None])
            angle = moved + generator.normal(0, 0.02, seeds) + generator.normal(0, 0.03, shape) - drift
            ahead = dense.get(family, 0.0) + generator.normal(0, 1.0, shape) - progress
            change = ratio * angle + direct.get(family, 0.0) * level + (ahead if dense else 0.0)
            cells.append((change + generator.normal(0, noise, shape) - accuracy, angle))
        found[family] = tuple(np.concatenate(parts) for parts in zip(*cells, strict=True))
    return found


def _concluded(count: int, seed: int, **settings: float) -> list[mediation.Mediation]:
    generator = np.random.default_rng(seed)
    return [mediation.judge_mediation(_families(generator, **settings)) for _ in range(count)]


def _share(values: Sequence[bool]) -> float:
    return float(np.mean(values))


# 200 simulations have a standard error of 1.5 % at a level of 5 %.
def test_no_mediation_is_not_called_mediation() -> None:
    found = _concluded(200, 0)
    assert not any(one.consistent for one in found)
    assert _share([not one.pooled.low <= 0 <= one.pooled.high for one in found]) <= 0.07
    assert any("the interval of the pooled ratio over families includes 0" in one.reasons[0] for one in found)


def test_accuracy_that_follows_dense_accuracy_is_not_called_mediation_by_drift() -> None:
    dense = {"rate_before": -3.0, "scale_before": 2.0, "labels_before": -8.0, "train_before": -2.0}
    found = _concluded(200, 1, dense=dense)
    assert _share([one.consistent for one in found]) <= 0.05
    assert all(one.judged for one in found)


def test_true_mediation_is_found_and_its_ratio_recovered() -> None:
    found = _concluded(200, 2, ratio=40.0)
    assert _share([one.consistent for one in found]) > 0.88
    assert np.mean([one.pooled.value for one in found]) == pytest.approx(40.0, abs=0.5)
    assert _share([one.pooled.low <= 40.0 <= one.pooled.high for one in found]) >= 0.93
    assert _share([one.agreement.p <= 0.05 for one in found]) <= 0.095
    inside = [family.ratio.low <= 40.0 <= family.ratio.high for one in found for family in one.families.values()]
    assert _share(inside) == pytest.approx(0.95, abs=0.025)
    assert all(one.reasons[0].startswith("consistent with mediation") for one in found if one.consistent)


def test_families_that_disagree_are_not_called_mediation() -> None:
    found = _concluded(100, 3, ratio=40.0, direct={"labels_before": -60.0})
    assert not any(one.consistent for one in found)
    assert all("the families disagree" in " ".join(one.reasons) for one in found)


def test_accuracy_that_moves_without_drift_is_an_objection() -> None:
    found = _concluded(50, 4, ratio=40.0, unmoved=["labels_before"], direct={"labels_before": 50.0})
    assert _share([one.consistent for one in found]) <= 0.05
    one = found[0]
    assert "labels_before moved the accuracy without moving the drift" in " ".join(one.reasons)
    assert one.families["labels_before"].note.startswith("drift not moved (F = ")
    assert math.isnan(one.families["labels_before"].ratio.value)
    still = _concluded(100, 5, ratio=40.0, unmoved=["labels_before"])
    assert _share([one.consistent for one in still]) > 0.8


def test_without_power_agreement_cannot_be_judged() -> None:
    found = [one for one in _concluded(20, 6, ratio=40.0, noise=25.0) if one.agreement.p > 0.05]
    assert found
    assert not any(one.consistent for one in found)
    assert "cannot be judged: Q would find a scatter of half the pooled ratio with power" in " ".join(found[0].reasons)


def test_fewer_than_ten_seeds_cannot_be_judged() -> None:
    one = mediation.judge_mediation(_families(np.random.default_rng(7), ratio=40.0, seeds=9))
    assert (one.consistent, one.judged, one.pooled, one.agreement) == (False, False, None, None)
    assert one.reasons == ("mediation cannot be judged: 9 seeds, at least 10 are needed",)
    assert one.families["rate_before"].ratio.value == pytest.approx(40.0, rel=0.3)


def test_one_family_cannot_agree() -> None:
    families = _families(np.random.default_rng(8), ratio=40.0)
    one = mediation.judge_mediation({"rate_before": families["rate_before"]})
    assert "only rate_before moved the drift, two families at least" in one.reasons[0]
    none = mediation.judge_mediation(_families(np.random.default_rng(9), unmoved=list(LEVELS)))
    assert "no family moved the drift" in none.reasons[0]
    assert mediation.judge_mediation({}).reasons == ("mediation cannot be judged: 0 seeds, at least 10 are needed",)


def test_missing_arms_are_left_out_and_counted() -> None:
    families = _families(np.random.default_rng(10), ratio=40.0, seeds=12)
    families["rate_before"][0][0, :2] = math.nan
    families["scale_before"][0][:, 3] = math.nan
    one = mediation.judge_mediation(families)
    assert one.families["rate_before"].left_out == 2
    assert (one.families["scale_before"].left_out, one.families["scale_before"].ratio.n) == (6, 11)
    assert one.consistent
    families["scale_before"][0][:, :4] = math.nan
    few = mediation.judge_mediation(families)
    assert few.reasons == ("mediation cannot be judged: 8 seeds have all families, at least 10 are needed",)


def test_opposite_interventions_add_up() -> None:
    generator = np.random.default_rng(11)
    drift = np.array([[-0.2], [0.2]]) + generator.normal(0, 0.01, (2, 10))
    found = mediation.family_ratio(30 * drift + generator.normal(0, 0.5, (2, 10)), drift)
    assert found.ratio.value == pytest.approx(30.0, rel=0.1)
    assert found.moved
    assert found.influence.mean() == pytest.approx(0.0, abs=1e-12)


def test_scatter_within_seeds_does_not_pull_the_ratio() -> None:
    # Noise that moves drift and accuracy of an arm together, against the effect of the interventions.
    generator = np.random.default_rng(12)
    values = []
    for _ in range(200):
        noise = generator.normal(0, 0.05, (3, 10))
        drift = np.array([[0.1], [0.15], [0.2]]) + noise
        values.append(mediation.family_ratio(20 * (drift - noise) - 40 * noise, drift).ratio.value)
    assert np.median(values) == pytest.approx(20.0, abs=0.7)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_fieller_holds_the_ratios_that_a_t_test_does_not_reject(size: float) -> None:
    generator = np.random.default_rng(13)
    b = size * generator.normal(2.0, 0.8, 9)
    a = 3 * b + size * generator.normal(0, 2.0, 9)
    found = mediation.fieller([*a, math.nan], [*b, 1.0])
    assert found.n == 9
    assert found.value == pytest.approx(a.mean() / b.mean())
    for end in (found.low, found.high):
        assert stats.ttest_1samp(a - end * b, 0).pvalue == pytest.approx(0.05, abs=1e-9)
    for ratio in np.linspace(-20, 20, 401):
        kept = stats.ttest_1samp(a - ratio * b, 0).pvalue >= 0.05
        assert kept == (found.low <= ratio <= found.high)


def test_fieller_has_no_ends_where_the_denominator_may_be_zero() -> None:
    found = mediation.fieller([1.0, 2.0, 3.0], [0.1, -0.2, 0.15])
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert mediation.fieller([1.0], [2.0]).value == 0.5
    assert math.isnan(mediation.fieller([], []).value)


def test_fieller_covers_where_the_denominator_is_small() -> None:
    generator = np.random.default_rng(14)
    inside = 0
    for _ in range(1000):
        b = generator.normal(1.0, 1.2, 10)
        found = mediation.fieller(5 * b + generator.normal(0, 1.0, 10), b)
        inside += found.low <= 5.0 <= found.high
    assert inside / 1000 > 0.935


def test_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"fieller: found shapes \(1,\) and \(2,\)"):
        mediation.fieller([1.0], [1.0, 2.0])
    with pytest.raises(ShapeError, match=r"family_ratio: found shapes \(2,\) and \(2,\), expected twice"):
        mediation.family_ratio([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ShapeError, match=r"judge_mediation: found \[2, 3\] seeds"):
        mediation.judge_mediation({"a": (np.ones((1, 2)),) * 2, "b": (np.ones((1, 3)),) * 2})
