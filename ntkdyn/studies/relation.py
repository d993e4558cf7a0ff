"""Whether the kernel's drift goes with the accuracy of arms beyond start epoch and seed, and whether it mediates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import plots
from ..analysis.advantage import FEWEST_SEEDS, FEWEST_START_EPOCHS
from . import arms, relation_words
from .comparisons import comparisons
from .recorded import KERNEL_NEED, Datasets, Table, variable
from .relation_arms import REGRESSORS, RelationArms, has_trunk_kernels, relation_arms

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..results import Sweep

FloatArray = NDArray[np.float64]

ROLES = {
    "alone": "the regressor in place of the drift",
    "beside": "the regressor beside the drift",
    "drift": "the drift beside the regressor",
}

PER_UNIT = "percentage points per unit of the regressor"
POINTS = "percentage points"

COEFFICIENT = {
    "value": (PER_UNIT, "coefficient b in the model of the arms"),
    "low": (PER_UNIT, "lower end of its 95 % interval (cluster bootstrap over seeds)"),
    "high": (PER_UNIT, "upper end of its 95 % interval (cluster bootstrap over seeds)"),
    "spread": ("unit of the regressor", "standard deviation of the regressor beyond start and seed"),
    "p": ("1", "randomization p of b"),
    "adjusted": ("1", "p of b adjusted over all coefficients (max-T)"),
}

CHANGE = {
    "drift_change": ("1", "what the intervention changes in the drift, mean over start epochs, paired by seed"),
    "drift_low": ("1", "lower end of its 95 % interval"),
    "drift_high": ("1", "upper end of its 95 % interval"),
    "accuracy_change": (POINTS, "what the intervention changes in the final accuracy, paired by seed"),
    "accuracy_low": (POINTS, "lower end of its 95 % interval"),
    "accuracy_high": (POINTS, "upper end of its 95 % interval"),
    "pairs": ("seeds", "pairs"),
    "adjusted_p": ("1", "p of the accuracy's change adjusted over all exploratory comparisons of the sweep (max-T)"),
}

RATIO = {
    "ratio": (PER_UNIT, "change of accuracy over change of the regressor"),
    "ratio_low": (PER_UNIT, "lower end of its 95 % interval (Fieller over seeds)"),
    "ratio_high": (PER_UNIT, "upper end of its 95 % interval (Fieller over seeds)"),
    "strength": ("1", "F of the regressor's change; below 10 there is no ratio"),
    "missing": ("arms", "changes without accuracy (diverged) or regressor"),
}

MEDIATION = {
    "pooled": (PER_UNIT, "pooled ratio over families"),
    "pooled_low": (PER_UNIT, "lower end of its 95 % interval over families"),
    "pooled_high": (PER_UNIT, "upper end of its 95 % interval over families"),
    "q": ("1", "Cochran's Q of the families' ratios"),
    "q_degrees": ("1", "degrees of freedom of Q"),
    "q_p": ("1", "p of Q"),
    "q_power": ("1", "power of Q where true ratios scatter by half the pooled one"),
    "consistent": ("1", "1 where consistent with mediation by this regressor"),
}

COUNTS = {
    "intervened": ("1", "1 where arms with interventions before the switch are among them"),
    "judged": ("1", "1 where there are enough seeds and start epochs for a relation"),
    "arms": ("arms", "arms in the models"),
    "arms_left_out": ("arms", "arms without accuracy (diverged) or without a regressor"),
    "starts": ("epochs", "start epochs"),
    "seeds": ("seeds", "seeds"),
    "power": ("1", "power of this design for a partial correlation of 0.3"),
}


class Relation:
    """Model of the arms with drift and rivals, ratios of families of interventions, and what follows from them."""

    name = "relation"
    title = "Relation of kernel drift and accuracy"
    reading = (
        "With interventions before the switch, each point is what one of them changes against the arm without, with "
        "95 % intervals over seeds; if the drift mediated, all families would lie on the gray line through 0. Without, "
        "accuracy and drift less the effects of start epoch and seed. Rows: accuracy points that go with one standard "
        "deviation of each quantity beyond start and seed alone, and of the drift beside it, with 95 % intervals."
    )
    scope = "sweep"

    def unavailable(self, source: Sweep, /) -> str | None:
        """Need linearized arms whose trunks have recorded kernels."""
        reason = arms.need(source)
        if reason is not None:
            return reason
        return None if has_trunk_kernels(source) else f"no arm has a trunk with kernels: {KERNEL_NEED}"

    def measure(self, source: Sweep, /) -> xr.Dataset:
        """Return arms, coefficients, changes by intervention, ratios by family and what they allow to say, by task."""
        import xarray as xr

        found = {task: one for task in arms.tasks(source) if (one := relation_arms(source, task)) is not None}
        judged = comparisons(source) if any(one.intervened for one in found.values()) else {}
        parts = [
            _measure_task(one, {label: entry.adjusted for (of, label), entry in judged.items() if of == task})
            for task, one in found.items()
        ]
        joined = xr.concat(
            parts, dim="task", join="outer", coords="minimal", compat="override", combine_attrs="override"
        )
        return joined.assign_coords(task=("task", list(found)))

    def verdict(self, datasets: Datasets, /) -> list[str]:
        """Say the relation of each task, and whether its families are consistent with mediation."""
        return [line for task, one in _tasks(datasets) for line in relation_words.verdict(task, one)]

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say the verdict, then families, rivals, what was left out and what is missing."""
        return [
            line
            for task, one in _tasks(datasets)
            for line in (*relation_words.verdict(task, one), *relation_words.details(task, one))
        ]

    def tables(self, datasets: Datasets, /) -> list[Table]:
        """Give every quantity as regressor and as mediator, and every intervention."""
        return [table for task, one in _tasks(datasets) for table in relation_words.tables(task, one)]

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw what interventions change (or arms beyond start and seed) and the coefficients, two panels a task."""
        drawn = _tasks(datasets)
        shown = {task: [name for name in REGRESSORS if _scaled(one, "alone", name) is not None] for task, one in drawn}
        heights = [(1.9, *((0.13 * len(shown[task]) + 0.5,) if shown[task] else ())) for task, _ in drawn]
        axes = iter(plots.stacked(figure, [height for pair in heights for height in pair], legend=0.5))
        for task, one in drawn:
            ax = next(axes)
            plots.title(ax, f"task: {task}")
            if bool(one["intervened"]):
                _draw_changes(ax, one)
            else:
                _draw_beyond(ax, one)
            if shown[task]:
                _draw_coefficients(next(axes), one, shown[task])
        plots.finish(figure)


def _tasks(datasets: Datasets) -> list[tuple[str, xr.Dataset]]:
    return [(str(task), dataset.sel(task=task)) for dataset in datasets.values() for task in dataset["task"].values]


def _measure_task(found: RelationArms, adjusted: Mapping[str, float]) -> xr.Dataset:
    import xarray as xr

    coefficients, counts = _models(found)
    changes = {change: _change(found, change, adjusted) for group in found.families().values() for change in group}
    ratios, mediation, reasons = _mediation(found)
    beyond = _beyond(found)
    labels = [
        ", ".join(part for part in (f"start {start:g}", change, f"seed {seed}") if part)
        for start, change, seed in zip(found.start, found.change, found.seed, strict=True)
    ]
    table = np.array(list(changes.values()), dtype=np.float64).reshape(len(changes), len(CHANGE))
    drawn = {
        "start_epoch": variable("arm", found.start, "epoch", "start of linearization"),
        "accuracy": variable("arm", found.accuracy, "percent", "final test accuracy"),
        **{name: variable("arm", found.values[name], *REGRESSORS[name]) for name in REGRESSORS},
        "beyond_drift": variable("arm", beyond[0], "1", "drift less effects of start and seed"),
        "beyond_accuracy": variable("arm", beyond[1], POINTS, "accuracy less effects of start and seed"),
    }
    numbers = {
        f"b_{name}": variable(("role", "regressor"), coefficients[..., place], *COEFFICIENT[name])
        for place, name in enumerate(COEFFICIENT)
    }
    numbers |= {name: variable("change", table[:, place], *CHANGE[name]) for place, name in enumerate(CHANGE)}
    numbers |= {
        name: variable(("regressor", "family"), ratios[..., place], *RATIO[name]) for place, name in enumerate(RATIO)
    }
    numbers |= {
        name: variable("regressor", mediation[:, place], *MEDIATION[name]) for place, name in enumerate(MEDIATION)
    }
    numbers |= {name: variable((), counts[name], *COUNTS[name]) for name in COUNTS}
    texts = {
        "reasons": variable("regressor", reasons, "1", "what the families allow to say of mediation by it"),
        "drift": variable((), found.drift, "1", "the drift of the relation"),
        "probe_set": variable((), found.probe_set, "1", "probe set of kernels and gates"),
        "line": variable((), found.label, "1", "settings that the arms share"),
    }
    return xr.Dataset(
        drawn | numbers | texts,
        coords={
            "arm": ("arm", labels),
            "role": ("role", list(ROLES)),
            "regressor": ("regressor", list(REGRESSORS)),
            "change": ("change", np.array(list(changes), dtype=object)),
            "family": ("family", np.array(list(found.families()), dtype=object)),
        },
    )


def _models(found: RelationArms) -> tuple[FloatArray, dict[str, float]]:
    """Coefficients [role, regressor, number], NaN where nothing can be judged, and counts."""
    from ..analysis import arm_models, relation_power

    coefficients = np.full((len(ROLES), len(REGRESSORS), len(COEFFICIENT)), np.nan)
    recorded = found.recorded
    columns = np.stack([found.accuracy, *(found.values[name] for name in recorded)])
    kept = np.asarray(np.isfinite(columns).all(axis=0))
    starts, seeds = len(np.unique(found.start[kept])), len(np.unique(found.seed[kept]))
    several = len({change for change, there in zip(found.change, kept, strict=True) if there})
    judged = found.drift in recorded and seeds >= FEWEST_SEEDS and starts >= FEWEST_START_EPOCHS
    intervened = {start for start, change in zip(found.start, found.change, strict=True) if change}
    power = relation_power(starts=len(intervened) or starts, seeds=max(seeds, 1), arms=max(several, 1))
    counts = {
        "intervened": float(found.intervened),
        "judged": float(judged),
        "arms": float(kept.sum()),
        "arms_left_out": float((~kept).sum()),
        "starts": float(starts),
        "seeds": float(seeds),
        "power": power,
    }
    if not judged:
        return coefficients, counts
    models = {name: [name] for name in recorded}
    models |= {f"beside {name}": [found.drift, name] for name in recorded if name != found.drift}
    fitted = arm_models(found.start, found.seed, found.accuracy, found.values, models)
    for place, name in enumerate(REGRESSORS):
        for role, (label, of) in enumerate(((name, name), (f"beside {name}", name), (f"beside {name}", found.drift))):
            if label in fitted:
                one = fitted[label].coefficients[of]
                coefficients[role, place] = [getattr(one, number) for number in COEFFICIENT]
    return coefficients, counts


def _change(found: RelationArms, change: str, adjusted: Mapping[str, float]) -> tuple[float, ...]:
    """What one intervention changes, in the order of ``CHANGE``."""
    from ..analysis import mean_interval

    numbers: list[float] = []
    pairs = 0
    for values in (found.values[found.drift], found.accuracy):
        # A seed counts where it has all start epochs: means over other epochs would be no fair differences.
        differences = found.changed(change, values).mean(axis=0)
        interval = mean_interval(differences[np.isfinite(differences)])
        numbers += [interval.mean, interval.low, interval.high]
        pairs = interval.n
    return (*numbers, float(pairs), adjusted.get(change, np.nan))


def _mediation(found: RelationArms) -> tuple[FloatArray, FloatArray, list[str]]:
    """Ratios [regressor, family, number], what each regressor would mediate [regressor, number], and the reasons."""
    from ..analysis import judge_mediation

    families = found.families()
    ratios = np.full((len(REGRESSORS), len(families), len(RATIO)), np.nan)
    numbers = np.full((len(REGRESSORS), len(MEDIATION)), np.nan)
    reasons = [""] * len(REGRESSORS)
    for place, name in enumerate(REGRESSORS):
        if name not in found.recorded or not families:
            continue
        changes = {
            family: tuple(
                np.concatenate([found.changed(change, values) for change in group])
                for values in (found.accuracy, found.values[name])
            )
            for family, group in families.items()
        }
        pairs = {family: (pair[0], pair[1]) for family, pair in changes.items()}
        judged = judge_mediation(pairs, mediator=relation_words.SHORT[name])
        for column, family in enumerate(families):
            one = judged.families[family]
            ratios[place, column] = (*(one.ratio.value, one.ratio.low, one.ratio.high), one.strength, one.left_out)
        reasons[place] = "; ".join(judged.reasons)
        numbers[place, -1] = float(judged.consistent)
        if judged.pooled is not None and judged.agreement is not None:
            pooled, agreement = judged.pooled, judged.agreement
            numbers[place, :-1] = (
                *(pooled.value, pooled.low, pooled.high),
                *(agreement.q, agreement.degrees, agreement.p, agreement.power),
            )
    return ratios, numbers, reasons


def _beyond(found: RelationArms) -> FloatArray:
    """Drift and accuracy less effects of start and seed [2, arm], NaN where one is missing."""
    from ..analysis import beyond_start_and_seed

    pair = np.stack([found.values[found.drift], found.accuracy])
    kept = np.isfinite(pair).all(axis=0)
    left = np.full(pair.shape, np.nan)
    if kept.any():
        for place, values in enumerate(pair):
            left[place, kept] = beyond_start_and_seed(found.start[kept], found.seed[kept], values[kept])
    return left


def _scaled(one: xr.Dataset, role: str, regressor: str) -> FloatArray | None:
    """Coefficient and ends of its interval in accuracy points per standard deviation, None where there is none."""
    chosen = one.sel(role=role, regressor=regressor)
    numbers = np.array([float(chosen[f"b_{name}"]) for name in ("value", "low", "high")]) * float(chosen["b_spread"])
    return numbers if np.isfinite(numbers[0]) else None


def _draw_changes(ax: Axes, one: xr.Dataset) -> None:
    drift = str(one["drift"].values)
    ax.axhline(0, color=plots.GRAY, linewidth=0.6)
    ax.axvline(0, color=plots.GRAY, linewidth=0.6)
    pooled = float(one["pooled"].sel(regressor=drift))
    if np.isfinite(pooled):
        ax.axline(
            (0, 0), slope=pooled, color=plots.GRAY, linewidth=1.0, linestyle=plots.DASHES[1], label="pooled ratio"
        )
    changes = one["change"].values.astype(str)
    for index, family in enumerate(one["family"].values.astype(str)):
        here = np.array([change.split(" = ")[0] == family for change in changes])
        columns = [one[name].values[here] for name in list(CHANGE)[:6]]
        if np.isfinite(columns[0] + columns[3]).any():
            plots.draw_crosses(*columns, ax=ax, label=family, index=index)
    ax.set_xlabel(f"change of {relation_words.SHORT[drift]} (1)")
    ax.set_ylabel("change of accuracy (points)")


def _draw_beyond(ax: Axes, one: xr.Dataset) -> None:
    there = np.isfinite(one["beyond_drift"].values)
    for index, start in enumerate(np.unique(one["start_epoch"].values[there])):
        here = one["start_epoch"].values == start
        columns = (one[f"beyond_{name}"].values[here] for name in ("drift", "accuracy"))
        plots.draw_points(*columns, ax=ax, label=f"t0 = epoch {start:g}", index=index)
    ax.set_xlabel(f"{relation_words.SHORT[str(one['drift'].values)]} beyond start and seed (1)")
    ax.set_ylabel("accuracy beyond both (points)")


def _draw_coefficients(ax: Axes, one: xr.Dataset, names: list[str]) -> None:
    ax.axvline(0, color=plots.GRAY, linewidth=0.8)
    # The families above have the first five colors.
    for place, (role, label) in enumerate({"alone": "alone", "drift": "the drift beside it"}.items()):
        rows: list[Any] = [_scaled(one, role, name) for name in names]
        table = np.array([np.full(3, np.nan) if row is None else row for row in rows])
        labels = [relation_words.SHORT[name] for name in names]
        plots.draw_rows(labels, *table.T, ax=ax, label=label, index=place + 5, of=2, place=place)
    ax.set_xlabel("accuracy points per standard deviation (points)")
