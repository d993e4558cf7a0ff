"""What a design can find before anything runs: power of paired comparisons and of correlations.

Seeds are the unit of every comparison, so their number sets the power, not the number of runs.
"""

from __future__ import annotations

import math

from scipy import optimize, stats

from ..errors import UndefinedMeasure

POWER_CORRELATION = 0.3
"""Correlation for which the power of a relation is stated."""

ADEQUATE_POWER = 0.8
"""Power from which on a test that finds nothing may be read as finding nothing."""


def paired_power(effect: float, *, seeds: int, deviation: float, level: float = 0.05) -> float:
    """Power of the two-sided paired t test:  P(|T| > t_(n-1, 1 - level/2)),  T noncentral t with  δ = effect √n / σ.

    Args:
        effect: true mean difference, in any unit.
        seeds: n, pairs.
        deviation: standard deviation σ of the differences over seeds, same unit, > 0.
        level: of the test.
    Returns: float in [0, 1]; 0 for fewer than two seeds, which allow no test.
    Raises: UndefinedMeasure: deviation or level out of range.
    Source: Cohen 1988, Statistical Power Analysis, chapter 2.

    >>> round(paired_power(0.5, seeds=34, deviation=1.0), 3)
    0.808
    """
    _check(deviation, level, where="paired_power")
    if seeds < 2:
        return 0.0
    return _power(abs(effect) * math.sqrt(seeds) / deviation, seeds, level)


def minimum_detectable_effect(
    seeds: int, deviation: float, *, power: float = ADEQUATE_POWER, level: float = 0.05
) -> float:
    """Smallest mean difference that a two-sided paired t test finds with the stated power.

    The effect at which `paired_power` equals ``power``; it grows in proportion to the deviation, so that deviation 1
    gives it in standard deviations of the differences.

    Args:
        seeds: n, pairs.
        deviation: standard deviation of the differences over seeds, > 0.
        power: wanted chance to find the effect, between ``level`` and 1.
        level: of the test.
    Returns: effect in the unit of the deviation; infinity for fewer than two seeds, which allow no test.
    Raises: UndefinedMeasure: an argument out of range.
    Source: Cohen 1988, Statistical Power Analysis, chapter 2.

    >>> round(minimum_detectable_effect(10, 4.0), 2)
    3.98
    """
    where = "minimum_detectable_effect"
    _check(deviation, level, where=where)
    if not level < power < 1:
        raise UndefinedMeasure(f"{where}: found power {power}, expected a number between the level {level} and 1")
    if seeds < 2:
        return math.inf
    upper = 1.0
    while _power(upper, seeds, level) < power:
        upper *= 2
    shift = float(optimize.brentq(lambda value: _power(value, seeds, level) - power, 0.0, upper, xtol=1e-10))
    return shift * deviation / math.sqrt(seeds)


def correlation_power(degrees: int, *, correlation: float = POWER_CORRELATION, level: float = 0.05) -> float:
    """Power of the two-sided test of a partial correlation by Fisher's z, whose standard error is 1/√(degrees - 2).

    Args: degrees: values less fitted means, so n - 1 for a plain correlation.  correlation: the true one.
    Returns: float in [0, 1]; 0 where no degrees are left.
    Raises: UndefinedMeasure: correlation not inside (-1, 1), or level out of range.
    Source: Fisher 1924, Metron 3: a partial correlation behaves as a plain one of fewer values.
    """
    _check(1.0, level, where="correlation_power")
    if not -1 < correlation < 1:
        raise UndefinedMeasure(f"correlation_power: found correlation {correlation}, expected one inside (-1, 1)")
    if degrees <= 2:
        return 0.0
    shift = math.atanh(correlation) * math.sqrt(degrees - 2)
    bound = float(stats.norm.ppf(1 - level / 2))
    return float(stats.norm.sf(bound - shift) + stats.norm.cdf(-bound - shift))


def within_power(*, starts: int, seeds: int, correlation: float = POWER_CORRELATION) -> float:
    """Power to find a correlation within start epochs, whose means leave starts·(seeds - 1) degrees of freedom.

    Four starts and a correlation of .3: .44 with 10 seeds, .76 with 20.
    """
    return correlation_power(starts * (seeds - 1), correlation=correlation)


def relation_power(*, starts: int, seeds: int, arms: int = 1, correlation: float = POWER_CORRELATION) -> float:
    """Power to find a partial correlation of drift with accuracy in a planned sweep.

    One arm a start and seed: effects of start and seed leave (starts - 1)·(seeds - 1) degrees of freedom. Several,
    which interventions make: the comparison within start and seed leaves starts·seeds·(arms - 1).

    Args: starts: start epochs with interventions, or all where there are none.  seeds.  arms: arms a start and seed,
        the one without intervention included.  correlation: the true one.
    Returns: float in [0, 1].
    """
    degrees = (starts - 1) * (seeds - 1) if arms < 2 else starts * seeds * (arms - 1)
    return correlation_power(degrees, correlation=correlation)


def _power(shift: float, seeds: int, level: float) -> float:
    """Power of the two-sided t test at noncentrality ``shift``."""
    if shift == 0:
        return level  # scipy's noncentral F gives a negative number there
    # |T| > t is F > t^2: scipy's noncentral t gives NaN far out in its lower tail, its noncentral F does not.
    return float(stats.ncf.sf(stats.f.isf(level, 1, seeds - 1), 1, seeds - 1, shift**2))


def _check(deviation: float, level: float, *, where: str) -> None:
    if not (0 < deviation < math.inf):
        raise UndefinedMeasure(f"{where}: found deviation {deviation}, expected a positive number")
    if not 0 < level < 1:
        raise UndefinedMeasure(f"{where}: found level {level}, expected a number inside (0, 1)")
