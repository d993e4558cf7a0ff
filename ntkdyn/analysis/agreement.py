"""Whether several estimates of one quantity agree, and what they say together.

The estimates may be correlated: families of interventions share the arm without intervention. So everything takes a
covariance matrix; with a diagonal one these are the formulas of meta-analysis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from ..errors import ShapeError, UndefinedMeasure

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Outcome of Cochran's Q.

    Attributes:
        q: the statistic, 0 for equal estimates.
        degrees: estimates less one.
        p: chance of a Q at least as large where all estimate the same; NaN where it cannot be computed.
        power: chance to reject at ``level`` where the true values scatter with standard deviation ``scatter``.
        scatter: that standard deviation, in the unit of the estimates.
        level: of the test.
    """

    q: float
    degrees: int
    p: float
    power: float
    scatter: float
    level: float


@dataclass(frozen=True)
class Pooled:
    """Mean of several estimates as a sample of possible ones.

    Attributes: value, low, high: mean and its interval; NaN ends for one estimate.  scatter: estimated standard
    deviation τ of the true values.  weights: of the estimates, sum 1.
    """

    value: float
    low: float
    high: float
    scatter: float
    weights: tuple[float, ...]


def cochran_q(
    estimates: ArrayLike, covariance: ArrayLike, *, scatter: float, samples: int | None = None, level: float = 0.05
) -> Agreement:
    """Cochran's Q for estimates with covariance Σ:  Q = x^T P x,  P = W - W 1 1^T W / 1^T W 1,  W = Σ^-1.

    For independent estimates Q = Σ_i w_i (x_i - Σ w x / Σ w)^2 with w_i = 1 / variance. With a known Σ, Q is
    χ²(M - 1) where all estimate the same, and noncentral χ² with λ = scatter² tr P where the true values scatter.
    A Σ that was estimated as covariance of the mean of n samples makes Q Hotelling's T²: then
    Q (n - M + 1) / ((M - 1)(n - 1)) is F(M - 1, n - M + 1), noncentral with the same λ, in which the inverse of the
    estimated Σ is corrected for being (n - 1) / (n - M - 1) too large on average.

    Args:
        estimates: x [M], any unit.
        covariance: Σ [M, M] of the estimates; [M] are variances.
        scatter: standard deviation of true values for which the power is stated, >= 0.
        samples: n from whose spread Σ was estimated; None: Σ is known.
        level: of the test.
    Returns: Agreement; p and power are NaN for fewer than two estimates and for n <= M + 1, which is too few for Σ.
    Raises: ShapeError: sizes differ.  UndefinedMeasure: a value is not finite, Σ is not positive definite, or scatter
        is negative.
    Source: Cochran 1954, Biometrics 10; Hedges and Pigott 2001 (power); Anderson, Multivariate Statistical Analysis,
        5.3 (T²), 7.7 (mean of an inverse).
    """
    where = "cochran_q"
    values, matrix = _checked(estimates, covariance, where=where)
    if not 0 <= scatter < math.inf:
        raise UndefinedMeasure(f"{where}: found scatter {scatter}, expected a number >= 0")
    count = len(values)
    degrees = count - 1
    if degrees < 1:
        return Agreement(0.0, degrees, math.nan, math.nan, scatter, level)
    weights = np.linalg.inv(matrix)
    sums = weights.sum(axis=0)
    projection = weights - np.outer(sums, sums) / sums.sum()
    q = max(float(values @ projection @ values), 0.0)
    shift = scatter**2 * float(np.trace(projection))
    if samples is None:
        p = float(stats.chi2.sf(q, degrees))
        power = float(stats.ncx2.sf(stats.chi2.isf(level, degrees), degrees, shift)) if shift > 0 else level
        return Agreement(q, degrees, p, power, scatter, level)
    rest = samples - degrees
    if rest < 3:
        return Agreement(q, degrees, math.nan, math.nan, scatter, level)
    shift *= (samples - count - 1) / (samples - 1)
    p = float(stats.f.sf(q * rest / (degrees * (samples - 1)), degrees, rest))
    power = float(stats.ncf.sf(stats.f.isf(level, degrees, rest), degrees, rest, shift)) if shift > 0 else level
    return Agreement(q, degrees, p, power, scatter, level)


def pool(estimates: ArrayLike, covariance: ArrayLike, *, confidence: float = 0.95) -> Pooled:
    """Random-effects mean of estimates with the Hartung-Knapp interval, which counts estimates, not samples.

    μ = Σ w_i x_i / Σ w_i,  w_i = 1 / (v_i + τ²),  v_i = Σ_ii,  τ² by Paule and Mandel: Σ w_i (x_i - μ)² = M - 1
    interval  μ ± t_(M-1) s,  s² = max(Σ w_i (x_i - μ)² / ((M - 1) Σ w_i),  w^T Σ w / (Σ w)²)

    The second term of s² is what sampling alone gives, with the covariances of the estimates: without it estimates
    that agree by chance, or share their errors, would get too narrow an interval.

    Args: estimates: x [M].  covariance: Σ [M, M], or variances [M].  confidence: coverage of the interval.
    Raises: as ``cochran_q``.
    Source: Hartung and Knapp 2001, Statistics in Medicine 20; Paule and Mandel 1982; Röver, Knapp and Friede 2015,
        BMC Medical Research Methodology 15 (the lower bound).
    """
    values, matrix = _checked(estimates, covariance, where="pool")
    count, variances = len(values), np.diag(matrix)

    def spread(square: float) -> tuple[FloatArray, float, float]:
        weights = 1 / (variances + square)
        mean = float(weights @ values / weights.sum())
        return weights, mean, float(weights @ (values - mean) ** 2)

    square = 0.0
    if count > 1 and spread(0.0)[2] > count - 1:
        upper = float(np.ptp(values)) ** 2
        while spread(upper)[2] > count - 1:
            upper *= 2
        square = float(optimize.brentq(lambda tried: spread(tried)[2] - (count - 1), 0.0, upper, xtol=upper * 1e-13))
    weights, mean, squares = spread(square)
    shares = weights / weights.sum()
    if count < 2:
        return Pooled(mean, math.nan, math.nan, 0.0, (1.0,))
    variance = max(squares / (count - 1) / float(weights.sum()), float(shares @ matrix @ shares))
    half = float(stats.t.ppf(0.5 + confidence / 2, count - 1)) * math.sqrt(variance)
    return Pooled(mean, mean - half, mean + half, math.sqrt(square), tuple(float(share) for share in shares))


def _checked(estimates: ArrayLike, covariance: ArrayLike, *, where: str) -> tuple[FloatArray, FloatArray]:
    values, matrix = np.asarray(estimates, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
    if matrix.ndim == 1:
        matrix = np.diag(matrix)
    if values.ndim != 1 or not len(values) or matrix.shape != (len(values), len(values)):
        raise ShapeError(
            f"{where}: found estimates of shape {values.shape} and a covariance of shape {np.shape(covariance)}, "
            f"expected [M] and [M, M] or [M]"
        )
    if not (np.isfinite(values).all() and np.isfinite(matrix).all()):
        raise UndefinedMeasure(f"{where}: found NaN or infinity, expected finite estimates; leave those out")
    # A covariance of fewer samples than estimates has directions without spread: nothing could be judged along them.
    least, greatest = np.linalg.eigvalsh(matrix)[[0, -1]]
    if least <= 1e-12 * abs(greatest):
        raise UndefinedMeasure(f"{where}: found a covariance that is not positive definite, expected more samples")
    return values, matrix
