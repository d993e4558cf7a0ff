"""Model of the arms of a sweep: what goes with their final accuracy beyond start epoch and seed.

    acc[k, m, s] = β_k + u_s + Σ_j b_j x_j[k, m, s] + ε        k start epoch, m intervention, s seed

The start epoch belongs to the design: two independent functions of it correlate at .71 on average. Its effect β_k and
that of the seed u_s are therefore in the model, and only what is left can speak for a regressor. The gap late - early
is a contrast of arms that share one late arm a seed; it is never regressed.

A coefficient is no proof of a mechanism: an intervention that moves drift may move accuracy along another way. That is
what families of interventions (`mediation`) are for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ShapeError, UndefinedMeasure

FloatArray = NDArray[np.float64]

# Less than this share of a regressor's spread left beyond start, seed and the other regressors is rounding.
_COLLINEAR = 1e-8

# Statistics closer than this, relatively, are the same number computed along two ways.
_TIE = 1e-9


@dataclass(frozen=True)
class Coefficient:
    """One b of a model.

    Attributes:
        name: the regressor.
        value: b, accuracy points per unit of the regressor; NaN where it does not vary beyond start and seed.
        low, high: interval over seeds (cluster bootstrap), NaN for fewer than three seeds.
        p: two-sided randomization p, NaN where nothing can be permuted.
        adjusted: p with the greatest |t| of all coefficients of all models as reference.
        spread: standard deviation of the regressor beyond start and seed; b times it, in accuracy points, can be
            compared between regressors.
    """

    name: str
    value: float
    low: float
    high: float
    p: float
    adjusted: float
    spread: float


@dataclass(frozen=True)
class ArmModel:
    """A fitted model.

    Attributes:
        coefficients: by regressor.
        arms, starts, seeds: counts of what was fitted.
        left_out: arms without accuracy (diverged) or without a regressor.
        permuted: "within start and seed", or "seeds" where each start and seed has one arm.
    """

    coefficients: Mapping[str, Coefficient]
    arms: int
    starts: int
    seeds: int
    left_out: int
    permuted: str


def arm_models(
    start: ArrayLike,
    seed: ArrayLike,
    accuracy: ArrayLike,
    regressors: Mapping[str, ArrayLike],
    models: Mapping[str, Sequence[str]],
    *,
    confidence: float = 0.95,
    resamples: int = 1999,
    permutations: int = 1999,
) -> dict[str, ArmModel]:
    """Fit several models to the same arms by least squares with effects of start epoch and seed.

    All models see the same arms: those that have the accuracy and every regressor of any model. Interval of b:
    bootstrap-t over whole seeds, (b* - b)/se* with cluster-robust standard errors, as the arms of a seed hang
    together; with ten seeds, one of which dominates a regressor, it covers about 91 % in place of 95. Randomization
    test, which keeps its level there: under the null hypothesis that nothing but the other regressors tells the arms of
    one start and seed apart, the accuracies (less the other regressors' part: Freedman-Lane; exact without any) may
    be permuted within each start and seed; where there is one arm a start and seed, whole seeds are permuted
    instead. The statistic is the t of b with effects of start and seed, or of each pair of them where there are
    several arms. p = (1 + permutations with |t| at least the observed) / (1 + permutations).

    Args:
        start, seed, accuracy: [n] of each arm, accuracy in percent; NaN (diverged, missing) leaves an arm out.
        regressors: name -> [n].
        models: label -> names of its regressors.
        confidence: of the intervals.  resamples, permutations: numbers of draws, from a fixed generator.
    Raises: ShapeError: lengths differ.  UndefinedMeasure: a model has no regressor or an unknown one.
    Source: Cameron, Gelbach and Miller 2008 (bootstrap-t over clusters); Freedman and Lane 1983; Winkler et al. 2014.
    """
    where = "arm_models"
    used = list(dict.fromkeys(name for names in models.values() for name in names))
    unknown = [name for name in used if name not in regressors]
    if unknown or not all(models.values()):
        wrong = f"{unknown[0]!r}" if unknown else "no regressor"
        raise UndefinedMeasure(f"{where}: found {wrong} in a model, expected some of {', '.join(regressors)}")
    columns = [np.asarray(column, dtype=np.float64) for column in (start, seed, accuracy, *map(regressors.get, used))]
    if any(column.ndim != 1 or len(column) != len(columns[0]) for column in columns):
        raise ShapeError(f"{where}: found shapes {[column.shape for column in columns]}, expected [n] for all of them")
    kept = np.isfinite(np.stack(columns)).all(axis=0)
    starts, seeds, values = (column[kept] for column in columns[:3])
    arms = _Arms(starts, seeds, values)
    found = dict(zip(used, (column[kept] for column in columns[3:]), strict=True))
    shuffled = arms.permutations(permutations)
    fitted: dict[str, dict[str, tuple[float, float, float, float]]] = {}
    statistics: dict[tuple[str, str], FloatArray] = {}
    for label, names in models.items():
        matrix = np.stack([found[name] for name in names], axis=1)
        fitted[label] = dict(zip(names, arms.fit(matrix, confidence=confidence, resamples=resamples), strict=True))
        for name, null in zip(names, arms.randomize(matrix, shuffled), strict=True):
            statistics[label, name] = null
    judged = [null for null in statistics.values() if np.isfinite(null[0])]
    greatest = np.max(judged, axis=0) if judged else np.zeros(1)
    models_found = {}
    for label, names in models.items():
        coefficients = {
            name: Coefficient(
                name,
                *fitted[label][name][:3],
                _p(statistics[label, name], statistics[label, name][0]),
                _p(greatest, statistics[label, name][0]),
                fitted[label][name][3],
            )
            for name in names
        }
        models_found[label] = ArmModel(
            coefficients, len(values), arms.starts, arms.seeds, int((~kept).sum()), arms.permuted
        )
    return models_found


def _p(null: FloatArray, observed: float) -> float:
    """Share of statistics, the observed one first among them, that reach it: the +1 is in both counts."""
    return float(np.mean(null >= observed * (1 - _TIE))) if np.isfinite(observed) else math.nan


def beyond_start_and_seed(start: ArrayLike, seed: ArrayLike, values: ArrayLike) -> FloatArray:
    """Values [n] less their least-squares effects of start epoch and seed, as the model of the arms sees them.

    Raises: ShapeError: lengths differ.  UndefinedMeasure: a value is not finite.
    """
    columns = [np.asarray(column, dtype=np.float64) for column in (start, seed, values)]
    if any(column.ndim != 1 or len(column) != len(columns[0]) for column in columns):
        raise ShapeError(f"beyond_start_and_seed: found shapes {[c.shape for c in columns]}, expected three times [n]")
    if not np.isfinite(np.stack(columns)).all():
        raise UndefinedMeasure("beyond_start_and_seed: found NaN or infinity, expected finite values; leave those out")
    return _Arms(*columns).beyond(columns[2][:, None])[:, 0]


class _Arms:
    """Arms without gaps, as positions of start, seed and cell."""

    def __init__(self, starts: FloatArray, seeds: FloatArray, accuracy: FloatArray) -> None:
        self._start = np.unique(starts, return_inverse=True)[1].reshape(-1)
        self._seed = np.unique(seeds, return_inverse=True)[1].reshape(-1)
        self.starts, self.seeds = (int(part.max(initial=-1)) + 1 for part in (self._start, self._seed))
        self._cell = self._start * max(self.seeds, 1) + self._seed
        self._accuracy = accuracy
        several = len(accuracy) > 0 and np.bincount(self._cell).max() > 1
        self.permuted = "within start and seed" if several else "seeds"
        # Orthonormal basis of the effects of start and seed, [n, starts + seeds - 1].
        dummies = [self._start[:, None] == np.arange(self.starts), self._seed[:, None] == np.arange(1, self.seeds)]
        self._basis = np.linalg.qr(np.hstack(dummies).astype(np.float64))[0]

    def fit(self, matrix: FloatArray, *, confidence: float, resamples: int) -> list[tuple[float, float, float, float]]:
        """Return b, low, high and the spread beyond start and seed of each column of [n, R]."""
        count = matrix.shape[1]
        undefined = [(math.nan, math.nan, math.nan, math.nan)] * count
        scales = self._scales(matrix)
        if scales is None:
            return undefined
        matrix = matrix / scales
        # Start effects as columns and seed effects taken off, so that a seed is one summand of the normal equations.
        effects = (self._start[:, None] == np.arange(1, self.starts)).astype(np.float64)
        design = self._within_seed(np.hstack([effects, matrix]))
        target = self._within_seed(self._accuracy[:, None])[:, 0]
        squares, products = self._sums(design, target)
        whole = np.ones((1, self.seeds))
        value, error = (part[0] for part in _solve(whole, squares, products, count))
        low = high = np.full(count, math.nan)
        if self.seeds > 2:
            # A fixed generator: the same recording gives the same number every time.
            weights = np.random.default_rng(0).multinomial(
                self.seeds, np.full(self.seeds, 1 / self.seeds), size=resamples
            )
            weights = weights[(weights > 0).sum(axis=1) > 1].astype(np.float64)
            drawn, errors = _solve(weights, squares, products, count)
            pivots = (drawn - value) / np.where(errors > 0, errors, np.inf)
            tails = np.quantile(pivots, [0.5 + confidence / 2, 0.5 - confidence / 2], axis=0)
            low, high = value - tails[0] * error, value - tails[1] * error
        columns = zip(value / scales, low / scales, high / scales, scales, strict=True)
        return [(float(b), float(least), float(greatest), float(scale)) for b, least, greatest, scale in columns]

    def randomize(self, matrix: FloatArray, shuffled: NDArray[np.int64]) -> list[FloatArray]:
        """Return |t| of each column [1 + permutations], the observed one first; NaN where nothing can be permuted."""
        undefined = [np.full(len(shuffled), math.nan)] * matrix.shape[1]
        scales = self._scales(matrix)
        if scales is None or len(shuffled) < 2:
            return undefined
        matrix = self._nuisance_free(matrix / scales)
        target = self._nuisance_free(self._accuracy[:, None])[:, 0]
        lengths = np.linalg.norm(matrix, axis=0)
        if (lengths <= _COLLINEAR * math.sqrt(len(target))).any():
            return undefined
        found = []
        for j in range(matrix.shape[1]):
            others = np.linalg.qr(np.delete(matrix, j, axis=1))[0]
            along = matrix[:, j] - others @ (others.T @ matrix[:, j])
            length = float(np.linalg.norm(along))
            freedom = len(target) - self._nuisance - matrix.shape[1]
            if length <= _COLLINEAR * lengths[j] or freedom < 1:
                return undefined
            left = target - others @ (others.T @ target)
            drawn = np.where(shuffled >= 0, left[shuffled], 0.0)
            if self.permuted == "seeds":
                drawn = self._nuisance_free(drawn.T).T
            drawn = drawn - (drawn @ others) @ others.T
            slopes = drawn @ (along / length)
            rest = np.maximum((drawn**2).sum(axis=1) - slopes**2, 0.0)
            with np.errstate(divide="ignore", invalid="ignore"):
                found.append(np.nan_to_num(np.abs(slopes) / np.sqrt(rest / freedom), nan=0.0))
        return found

    def permutations(self, count: int) -> NDArray[np.int64]:
        """Return rows that take the place of each row [1 + count, n], the identity first, -1 where there is none."""
        rows = np.arange(len(self._accuracy))
        generator = np.random.default_rng(0)
        if self.permuted == "seeds":
            if self.seeds < 2:
                return rows[None]
            table = np.full((self.starts, self.seeds), -1)
            table[self._start, self._seed] = rows
            orders = generator.permuted(np.tile(np.arange(self.seeds), (count, 1)), axis=1)
            return np.vstack([rows, table[self._start, orders[:, self._seed]]])
        by_cell = np.argsort(self._cell, kind="stable")
        # Cell numbers plus random fractions, sorted, are the cells' rows in random order, cell by cell.
        keys = self._cell[by_cell] + generator.random((count, len(rows)))
        drawn = np.empty((count, len(rows)), dtype=np.int64)
        drawn[:, by_cell] = by_cell[np.argsort(keys, axis=1)]
        return np.vstack([rows, drawn])

    @property
    def _nuisance(self) -> int:
        """Fitted means: of cells where they have several arms, else of starts and seeds."""
        if self.permuted == "seeds":
            return self.starts + self.seeds - 1
        return len(np.unique(self._cell))

    def _nuisance_free(self, columns: FloatArray) -> FloatArray:
        """Columns [n, R] less the means that the randomization keeps."""
        if self.permuted != "seeds":
            return _centered(columns, self._cell)
        return self.beyond(columns)

    def beyond(self, columns: FloatArray) -> FloatArray:
        """Columns [n, R] less effects of start and seed."""
        return np.asarray(columns - self._basis @ (self._basis.T @ columns))

    def _scales(self, matrix: FloatArray) -> FloatArray | None:
        """Standard deviation of each column beyond start and seed, None where a column has none or follows others."""
        if self.seeds < 2 or len(matrix) < self.starts + self.seeds - 1 + matrix.shape[1]:
            return None
        spread = self.beyond(matrix)
        scales = spread.std(axis=0)
        whole = np.abs(matrix).max(axis=0)
        if (scales <= _COLLINEAR * np.where(whole > 0, whole, 1.0)).any():
            return None
        if np.linalg.svd(spread / scales / math.sqrt(len(matrix)), compute_uv=False)[-1] <= _COLLINEAR:
            return None
        return np.asarray(scales)

    def _within_seed(self, columns: FloatArray) -> FloatArray:
        return _centered(columns, self._seed)

    def _sums(self, design: FloatArray, target: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Normal equations of each seed, X'X [seeds, P, P] and X'y [seeds, P]."""
        squares = np.zeros((self.seeds, design.shape[1], design.shape[1]))
        products = np.zeros((self.seeds, design.shape[1]))
        for seed in range(self.seeds):
            own = design[self._seed == seed]
            squares[seed], products[seed] = own.T @ own, own.T @ target[self._seed == seed]
        return squares, products


def _centered(columns: FloatArray, groups: NDArray[np.int64]) -> FloatArray:
    """Columns [n, R] less their means within groups."""
    counts = np.bincount(groups).astype(np.float64)
    means = np.stack([np.bincount(groups, weights=column) for column in columns.T], axis=1)
    return np.asarray(columns - (means / np.maximum(counts, 1)[:, None])[groups])


def _solve(weights: FloatArray, squares: FloatArray, products: FloatArray, count: int) -> tuple[FloatArray, FloatArray]:
    """Last ``count`` coefficients and cluster-robust errors [B, count] of seeds drawn ``weights`` [B, seeds] times."""
    inverse = np.linalg.pinv(np.einsum("bs,spq->bpq", weights, squares), hermitian=True)
    values = np.einsum("bpq,bq->bp", inverse, weights @ products)
    scores = products[None] - np.einsum("spq,bq->bsp", squares, values)
    projected = np.einsum("bpq,bsq->bsp", inverse[:, -count:], scores)
    errors = np.sqrt(np.einsum("bs,bsp->bp", weights, projected**2))
    return values[:, -count:], errors
