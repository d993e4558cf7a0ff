"""Cochran's Q and pooling: published examples, formulas written out, and simulated estimates that share errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ntkdyn.analysis import agreement
from ntkdyn.errors import ShapeError, UndefinedMeasure

BCG = np.array(
    [
        (4, 119, 11, 128), (6, 300, 29, 274), (3, 228, 11, 209), (62, 13536, 248, 12619), (33, 5036, 47, 5761),
        (180, 1361, 372, 1079), (8, 2537, 10, 619), (505, 87886, 499, 87892), (29, 7470, 45, 7232),
        (17, 1699, 65, 1600), (186, 50448, 141, 27197), (5, 2493, 3, 2338), (27, 16886, 29, 17825),
    ],
    dtype=float,
)  # fmt: skip
"""Thirteen trials of the BCG vaccine (Colditz et al. 1994): ill and well, vaccinated and not."""


def _log_risk_ratios() -> tuple[np.ndarray, np.ndarray]:
    a, b, c, d = BCG.T
    return np.log(a / (a + b) / (c / (c + d))), 1 / a - 1 / (a + b) + 1 / c - 1 / (c + d)


def test_published_example() -> None:
    # Q(12) = 152.233 and tau^2 = .318 (Paule and Mandel) are what every package prints for these trials.
    found = agreement.cochran_q(*_log_risk_ratios(), scatter=0.1)
    assert found.q == pytest.approx(152.2330, abs=5e-5)
    assert found.degrees == 12
    assert found.p == pytest.approx(stats.chi2.sf(152.2330, 12), rel=1e-4)
    pooled = agreement.pool(*_log_risk_ratios())
    assert pooled.scatter**2 == pytest.approx(0.3181, abs=5e-5)
    assert pooled.value == pytest.approx(-0.715, abs=5e-4)
    assert (pooled.low, pooled.high) == (pytest.approx(-1.109, abs=1e-3), pytest.approx(-0.321, abs=1e-3))


def test_q_is_the_weighted_sum_of_squares() -> None:
    values, variances = np.array([1.0, 3.0, 2.5, -0.5]), np.array([0.5, 2.0, 1.0, 0.25])
    weights = 1 / variances
    mean = (weights * values).sum() / weights.sum()
    found = agreement.cochran_q(values, variances, scatter=0.7)
    assert found.q == pytest.approx((weights * (values - mean) ** 2).sum())
    shift = 0.7**2 * (weights.sum() - (weights**2).sum() / weights.sum())
    assert found.power == pytest.approx(stats.ncx2.sf(stats.chi2.isf(0.05, 3), 3, shift))
    assert agreement.cochran_q(values, variances, scatter=0.0).power == 0.05


def test_estimated_covariance_makes_it_hotellings_t2() -> None:
    samples = np.random.default_rng(0).normal(size=(12, 4)) @ np.random.default_rng(1).normal(size=(4, 4))
    found = agreement.cochran_q(samples.mean(0), np.cov(samples.T) / 12, scatter=1.0, samples=12)
    contrasts = samples[:, 1:] - samples[:, :1]
    mean, covariance = contrasts.mean(0), np.cov(contrasts.T)
    squared = 12 * mean @ np.linalg.solve(covariance, mean)
    assert found.q == pytest.approx(squared)
    assert found.p == pytest.approx(stats.f.sf(squared * (12 - 3) / (3 * 11), 3, 9))


def test_level_and_power_with_shared_errors_and_few_samples() -> None:
    # Five estimates with a common error, as families that share an arm; 1200 simulations: standard error .6 to 1.4 %.
    generator = np.random.default_rng(2)
    rejected, found, stated = 0, 0, []
    deviations = np.array([1.0, -1.0, 1.0, -1.0, 0.0])
    deviations *= 1.2 / math.sqrt((deviations**2).mean())
    for _ in range(1200):
        samples = 2 * generator.normal(size=(14, 1)) + generator.normal(size=(14, 5))
        covariance = np.cov(samples.T) / 14
        same = agreement.cochran_q(samples.mean(0), covariance, scatter=1.2, samples=14)
        other = agreement.cochran_q(samples.mean(0) + deviations, covariance, scatter=1.2, samples=14)
        rejected += same.p <= 0.05
        found += other.p <= 0.05
        stated.append(same.power)
    assert rejected / 1200 == pytest.approx(0.05, abs=0.018)
    assert np.mean(stated) == pytest.approx(found / 1200, abs=0.06)


def test_pooled_interval_covers_with_and_without_scatter() -> None:
    generator = np.random.default_rng(3)
    covariance = 0.5 * np.ones((5, 5)) + np.diag([0.2, 0.3, 0.5, 0.8, 1.0])
    for scatter in (0.0, 1.0):
        inside = 0
        for _ in range(1000):
            values = generator.multivariate_normal(np.full(5, 3.0), covariance) + scatter * generator.normal(size=5)
            pooled = agreement.pool(values, covariance)
            inside += pooled.low <= 3.0 <= pooled.high
        assert inside / 1000 > 0.93


def test_equal_estimates_keep_their_sampling_error() -> None:
    pooled = agreement.pool([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
    half = stats.t.ppf(0.975, 2) / math.sqrt(3)
    assert (pooled.value, pooled.scatter) == (2.0, 0.0)
    assert (pooled.low, pooled.high) == (pytest.approx(2 - half), pytest.approx(2 + half))
    together = agreement.pool([2.0, 2.0, 2.0], np.full((3, 3), 0.9) + 0.1 * np.eye(3))
    assert together.high - together.low > pooled.high - pooled.low


def test_one_estimate_cannot_agree() -> None:
    found = agreement.cochran_q([1.0], [2.0], scatter=1.0)
    assert math.isnan(found.p)
    assert math.isnan(agreement.pool([1.0], [2.0]).low)
    assert math.isnan(agreement.cochran_q([1.0, 2.0, 3.0], [1.0] * 3, scatter=1.0, samples=4).p)


def test_what_has_no_value_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"found estimates of shape \(2,\) and a covariance of shape \(3,\)"):
        agreement.pool([1.0, 2.0], [1.0, 1.0, 1.0])
    with pytest.raises(UndefinedMeasure, match="found NaN or infinity, expected finite estimates"):
        agreement.pool([1.0, math.nan], [1.0, 1.0])
    with pytest.raises(UndefinedMeasure, match="not positive definite, expected more samples"):
        agreement.cochran_q([1.0, 2.0], np.ones((2, 2)), scatter=1.0)
    with pytest.raises(UndefinedMeasure, match="found scatter -1"):
        agreement.cochran_q([1.0, 2.0], [1.0, 1.0], scatter=-1.0)
