"""Whether interventions move accuracy in proportion to what they move in the kernel.

Interventions before the switch, with everything after it identical, make drift a treatment. If drift were what
mediates, every family of interventions (learning rate, output scale, labels, what is trained, an anchored kernel)
would give the same ratio Δaccuracy/Δdrift, and not 0. One family alone says little: it may move accuracy along another
way. All changes are paired by seed against the arm without intervention of the same start epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ..errors import ShapeError, UndefinedMeasure
from .advantage import FEWEST_SEEDS
from .agreement import Agreement, Pooled, cochran_q, pool
from .power import ADEQUATE_POWER

FloatArray = NDArray[np.float64]

SMALLEST_STRENGTH = 10.0
"""F statistic of the denominator below which a ratio is left undefined (Staiger and Stock 1997)."""

SCATTER = 0.5
"""Scatter of true ratios over families, as a share of the pooled one, for which the power of Q is stated."""


@dataclass(frozen=True)
class Ratio:
    """Ratio of two paired means with its Fieller interval.

    Attributes: value: ratio of the means.  low, high: interval; infinite where the denominator is not
    distinguishable from 0, as every ratio is then possible.  n: pairs.
    """

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Family:
    """What the interventions of one family did.

    Attributes:
        ratio: accuracy points per unit of drift; NaN where ``note`` says why there is none.
        strength: F of Δdrift, the square of its t over seeds; negative where seeds contradict one another.
        moved: the drift moved enough for a ratio.
        influence: [S] deviation of each seed's part of the ratio, NaN where a seed is missing.
        cells: interventions times start epochs.
        left_out: changes without accuracy (diverged) or drift.
        note: "" or one sentence.
    """

    ratio: Ratio
    strength: float
    moved: bool
    influence: FloatArray
    cells: int
    left_out: int
    note: str


@dataclass(frozen=True)
class Mediation:
    """The families together.

    Attributes:
        consistent: the pooled interval excludes 0, the families agree and a disagreement would have been seen.
        judged: there was enough to judge.
        families: by name.
        pooled: None for fewer than two families with a ratio, or too few seeds.
        agreement: likewise.
        reasons: plain sentences without full stop, what is not supported and why; or what is.
    """

    consistent: bool
    judged: bool
    families: Mapping[str, Family]
    pooled: Pooled | None
    agreement: Agreement | None
    reasons: tuple[str, ...]


def fieller(numerator: ArrayLike, denominator: ArrayLike, *, confidence: float = 0.95) -> Ratio:
    """Ratio of two paired means with Fieller's interval: all r for which  mean(a - r b)  is not distinguishable from 0.

    (ā - r b̄)² <= t² (s_aa - 2 r s_ab + r² s_bb) / n,  t the quantile of n - 1 degrees of freedom

    Exact for normal pairs whatever the size of b̄; where b̄ itself is not distinguishable from 0 no finite interval has
    the coverage, and the ends are infinite.

    Args: numerator, denominator: a, b [n] of the same seeds; pairs with a NaN are left out.
    Raises: ShapeError: lengths differ.
    Source: Fieller 1954, Journal of the Royal Statistical Society B 16.
    """
    a, b = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ShapeError(f"fieller: found shapes {a.shape} and {b.shape}, expected twice [n]")
    kept = np.isfinite(a + b)
    a, b, n = a[kept], b[kept], int(kept.sum())
    if n == 0 or b.mean() == 0:
        return Ratio(math.nan, -math.inf, math.inf, n)
    value = float(a.mean() / b.mean())
    if n < 2:
        return Ratio(value, -math.inf, math.inf, n)
    # In units of b̄, so that squares of small drifts keep their digits.
    a, b = a / b.mean(), b / b.mean()
    quantile = float(stats.t.ppf(0.5 + confidence / 2, n - 1))
    covariance = np.cov(a, b) * quantile**2 / n
    square, cross, constant = 1 - covariance[1, 1], value - covariance[0, 1], value**2 - covariance[0, 0]
    if square <= 0:
        return Ratio(value, -math.inf, math.inf, n)
    half = math.sqrt(max(cross**2 - square * constant, 0.0))
    return Ratio(value, float((cross - half) / square), float((cross + half) / square), n)


def family_ratio(
    accuracy_changes: ArrayLike, drift_changes: ArrayLike, *, confidence: float = 0.95, mediator: str = "drift"
) -> Family:
    """Ratio Δaccuracy/Δdrift of one family, over all its interventions and start epochs.

    ratio = Σ_c z_c Δacc_c / Σ_c z_c Δdrift_c,  per seed z_c = mean Δdrift_c of the other seeds

    The weights z make interventions that raise and that lower the drift add up, and count most where the drift moves
    most. Leaving the seed itself out keeps its noise from entering twice, which would pull the ratio towards the
    scatter within seeds. Interval: Fieller over seeds. Without a clear Δdrift (F < 10) there is no ratio.

    Args: accuracy_changes: Δacc [C, S] in accuracy points, cells by seeds, NaN where an arm is missing or diverged.
        drift_changes: Δdrift [C, S], any unit.  mediator: what it is called in the note.
    Raises: ShapeError: shapes differ.
    Source: two-stage least squares with leave-one-out first stage (Angrist, Imbens and Krueger 1999).
    """
    accuracy, drift = (np.asarray(values, dtype=np.float64) for values in (accuracy_changes, drift_changes))
    if accuracy.ndim != 2 or accuracy.shape != drift.shape:
        raise ShapeError(
            f"family_ratio: found shapes {accuracy.shape} and {drift.shape}, expected twice [cells, seeds]"
        )
    there = np.isfinite(accuracy + drift)
    accuracy, drift = np.where(there, accuracy, 0.0), np.where(there, drift, 0.0)
    weights = _of_the_others(drift, there)
    a, b = (_sums(weights, values, there) for values in (accuracy, drift))
    strength = _strength(b)
    ratio = fieller(a, b, confidence=confidence)
    moved = strength >= SMALLEST_STRENGTH and math.isfinite(ratio.low)
    note = ""
    if not moved:
        note = f"{mediator} not moved (F = {max(strength, 0.0):.1f}, {SMALLEST_STRENGTH:g} is needed): ratio undefined"
        if ratio.n < 3:
            note = f"{ratio.n} seeds: ratio undefined"
        ratio = Ratio(math.nan, math.nan, math.nan, ratio.n)
    mean = float(np.nanmean(b)) if np.isfinite(b).any() else math.nan
    influence = (a - ratio.value * b) / mean if moved else np.full(len(a), math.nan)
    left_out = int((~there).sum())
    return Family(ratio, strength, moved, influence, len(accuracy), left_out, note)


def judge_mediation(
    families: Mapping[str, tuple[ArrayLike, ArrayLike]], *, confidence: float = 0.95, mediator: str = "drift"
) -> Mediation:
    """Judge whether all families move accuracy in one proportion to drift.

    "Consistent with mediation" needs all of: at least 10 seeds; two families or more with a ratio; an interval over
    families (Hartung-Knapp, at least what sampling gives) that excludes 0; Cochran's Q, with the covariance of
    ratios that share arms, not rejecting at 5 %; power of at least .8 to reject where true ratios scatter by half
    the pooled one; no family without a ratio that moves accuracy by more than its small Δdrift times the pooled ratio
    (5 %). It is never proof: anything that moves in
    proportion to the drift in every family would do as well.

    Args: families: name -> (Δacc [C, S], Δdrift [C, S]), the same seeds everywhere.  mediator: what stands in place of
        drift, for the sentences; rivals are judged by the same rule.
    Raises: ShapeError: shapes do not fit.
    """
    found = {
        name: family_ratio(*changes, confidence=confidence, mediator=mediator) for name, changes in families.items()
    }
    if len({len(family.influence) for family in found.values()}) > 1:
        raise ShapeError(
            f"judge_mediation: found {[len(family.influence) for family in found.values()]} seeds, expected the same "
            f"seeds in every family"
        )
    seeds = max((family.ratio.n for family in found.values()), default=0)
    moved = {name: family for name, family in found.items() if family.moved}

    def unjudged(reason: str) -> Mediation:
        return Mediation(False, False, found, None, None, (f"mediation cannot be judged: {reason}",))

    if seeds < FEWEST_SEEDS:
        return unjudged(f"{seeds} seeds, at least {FEWEST_SEEDS} are needed")
    if len(moved) < 2:
        which = "no family" if not moved else f"only {next(iter(moved))}"
        return unjudged(f"{which} moved the {mediator}, two families at least are needed to agree")
    influence = np.stack([family.influence for family in moved.values()])
    together = np.isfinite(influence).all(axis=0)
    n = int(together.sum())
    if n < max(FEWEST_SEEDS, len(moved) + 2):
        return unjudged(f"{n} seeds have all families, at least {max(FEWEST_SEEDS, len(moved) + 2)} are needed")
    ratios = np.array([family.ratio.value for family in moved.values()])
    covariance = np.cov(influence[:, together]) / n
    try:
        pooled = pool(ratios, covariance, confidence=confidence)
        agreement = cochran_q(ratios, covariance, scatter=SCATTER * abs(pooled.value), samples=n)
    except UndefinedMeasure:
        return unjudged("the ratios of the families do not vary over seeds")
    without = [
        name for name, family in found.items() if not family.moved and _moves_beyond(pooled.value, *families[name])
    ]
    reasons = tuple(_objections(without, pooled, agreement, mediator))
    judged = agreement.power >= ADEQUATE_POWER or agreement.p <= agreement.level or pooled.low <= 0 <= pooled.high
    if not reasons:
        reasons = (
            f"consistent with mediation: {len(moved)} families agree and the interval over them excludes 0; anything "
            f"that moves in proportion to the {mediator} in every family would do as well",
        )
        return Mediation(True, True, found, pooled, agreement, reasons)
    return Mediation(False, judged, found, pooled, agreement, reasons)


def _objections(without: Sequence[str], pooled: Pooled, agreement: Agreement, mediator: str) -> list[str]:
    """What keeps the families from being consistent with mediation; ``without`` moved accuracy and not the mediator."""
    objections = []
    if pooled.low <= 0 <= pooled.high:
        objections.append("not supported: the interval of the pooled ratio over families includes 0")
    if agreement.p <= agreement.level:
        objections.append(
            f"not supported: the families disagree, so the amount of {mediator} alone is not what moves the accuracy"
        )
    elif agreement.power < ADEQUATE_POWER:
        objections.append(
            f"whether the families agree cannot be judged: Q would find a scatter of half the pooled ratio with power "
            f"{agreement.power:.0%} only"
        )
    if without:
        objections.append(f"not supported: {', '.join(without)} moved the accuracy without moving the {mediator}")
    return objections


def _moves_beyond(ratio: float, accuracy_changes: ArrayLike, drift_changes: ArrayLike) -> bool:
    """Whether a family moves the accuracy by more than the ratio times its drift, seeds predicting one another."""
    left = np.asarray(accuracy_changes, dtype=np.float64) - ratio * np.asarray(drift_changes, dtype=np.float64)
    there = np.isfinite(left)
    left = np.where(there, left, 0.0)
    strength = _strength(_sums(_of_the_others(left, there), left, there))
    return math.sqrt(max(strength, 0.0)) > float(stats.t.ppf(0.95, max(int(there.any(axis=0).sum()) - 1, 1)))


def _of_the_others(changes: FloatArray, there: NDArray[np.bool_]) -> FloatArray:
    """Mean change [C, S] of a cell over all other seeds; 0 where there is no other."""
    counts = there.sum(axis=1, keepdims=True) - there
    return np.asarray((changes.sum(axis=1, keepdims=True) - changes) / np.maximum(counts, 1) * (counts > 0))


def _sums(weights: FloatArray, changes: FloatArray, there: NDArray[np.bool_]) -> FloatArray:
    """Weighted sum [S] of a seed's changes; NaN where it has none."""
    return np.where(there.any(axis=0), (weights * changes).sum(axis=0), math.nan)


def _strength(sums: FloatArray) -> float:
    """Signed square of the t statistic of the mean over seeds."""
    kept = sums[np.isfinite(sums)]
    if len(kept) < 3:
        return 0.0
    error = float(kept.std(ddof=1)) / math.sqrt(len(kept))
    mean = float(kept.mean())
    if error == 0:
        return math.copysign(math.inf, mean) if mean else 0.0
    return math.copysign((mean / error) ** 2, mean)
