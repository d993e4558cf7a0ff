"""Sentences and tables of the study relation, made of one task's numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..analysis.advantage import FEWEST_SEEDS, FEWEST_START_EPOCHS
from ..analysis.power import ADEQUATE_POWER
from .comparisons import p_words
from .drifts import DRIFTS
from .recorded import Table
from .relation_arms import REGRESSORS

if TYPE_CHECKING:
    import xarray as xr

LEVEL = 0.05
"""Level of Q."""

SHORT = {
    "before": "drift before t0",
    "remaining": "remaining drift",
    "own": "branch drift",
    "ramp": "drift in ramp",
    "after": "drift after ramp",
    "apart": "distance to trunk",
    "dense_accuracy": "dense accuracy",
    "alignment": "target alignment",
    "kernel_ridge_error": "kernel-ridge error",
    "gate_hamming": "gate Hamming",
    "weight_norm": "weight norm",
    "rate_sum": "Σ learning rate",
}
"""Names that fit beside a figure."""

INTERVENE = (
    "no arm has an intervention before the switch, so drift is no treatment; sweep over rate_before, scale_before, "
    "labels_before, train_before or anchor_before at a fixed start_epoch"
)


def verdict(task: str, one: xr.Dataset) -> list[str]:
    """Return the sentence on the relation, and with interventions the one on mediation."""
    lines = [_relation(task, one)]
    drift = str(one["drift"].values)
    reasons = str(one["reasons"].sel(regressor=drift).values)
    if bool(one["intervened"]) and reasons:
        lines.append(f"{task}, {DRIFTS[drift]}: {reasons}{_pooled(one, drift)}.")
    return lines


def details(task: str, one: xr.Dataset) -> list[str]:
    """Return what stands behind the verdict: families, rivals, arms left out, what is missing."""
    lines = []
    drift = str(one["drift"].values)
    if bool(one["judged"]):
        permuted = "permuted within start and seed" if bool(one["intervened"]) else "permuted by whole seeds"
        lines.append(
            f"{task}: p values are from accuracies {permuted}, adjusted over all coefficients of the table; the power "
            f"of this design for a partial correlation of 0.3 is {float(one['power']):.0%}."
        )
    if not bool(one["intervened"]):
        lines.append(f"{task}: {INTERVENE}.")
    elif bool(one["judged"]):
        lines.append(f"{task}, accuracy points per unit of drift: {'; '.join(_families(one, drift))}.")
        lines.append(f"{task}: {_rivals(one, drift)}.")
    left_out = int(one["arms_left_out"])
    if left_out:
        lines.append(f"{task}: {left_out} arms diverged or lack a quantity; they are in no model and no ratio.")
    return lines


def tables(task: str, one: xr.Dataset) -> list[Table]:
    """Return regressors, mediators and interventions as tables; those without numbers are left out."""
    drift = str(one["drift"].values)
    found = [
        Table(
            f"{task}: accuracy points per standard deviation beyond start and seed, 95 % interval, adjusted p",
            ("quantity", "alone", "beside the drift", "the drift beside it"),
            tuple(
                (REGRESSORS[name][1], *(_coefficient(one, role, name) for role in ("alone", "beside", "drift")))
                for name in REGRESSORS
                if np.isfinite(float(one["b_value"].sel(role="alone", regressor=name)))
            ),
        ),
        Table(
            f"{task}: ratio of what interventions change in accuracy and in the quantity, points per unit",
            ("quantity", "pooled over families", "Q", "p of Q", "power of Q", "consistent with mediation"),
            tuple(_mediator(one, name) for name in REGRESSORS if str(one["reasons"].sel(regressor=name).values))
            if np.isfinite(one["pooled"].values).any()
            else (),
        ),
        Table(
            f"{task}: what interventions before the switch change, 95 % interval, mean over start epochs",
            ("intervention", SHORT[drift] + " (1)", "accuracy (points)", "adjusted p", "seeds"),
            tuple(
                _change(one.sel(change=change))
                for change in one["change"].values
                if np.isfinite(float(one["accuracy_change"].sel(change=change)))
            ),
        ),
    ]
    return [table for table in found if table.rows]


def _relation(task: str, one: xr.Dataset) -> str:
    seeds, starts = int(one["seeds"]), int(one["starts"])
    drift = str(one["drift"].values)
    if not bool(one["judged"]):
        return (
            f"{task}: the relation of drift and gap cannot be judged: {seeds} seeds and {starts} start epochs, at "
            f"least {FEWEST_SEEDS} and {FEWEST_START_EPOCHS} are needed; the gap itself is reported with its paired "
            "interval."
        )
    head = (
        f"{task} ({one['line'].values!s}, probe set {one['probe_set'].values!s}, {int(one['arms'])} arms, {seeds} "
        f"seeds, {starts} start epochs)"
    )
    beside = one.sel(regressor="dense_accuracy")
    if not np.isfinite(float(beside["b_value"].sel(role="drift"))):
        alone = one.sel(regressor=drift, role="alone")
        if not np.isfinite(float(alone["b_value"])):
            return f"{head}: {DRIFTS[drift]} does not vary beyond start epoch and seed; there is no relation to judge."
        return f"{head}, beyond start epoch and seed: {DRIFTS[drift]} b = {_full(alone)} points per unit."
    return (
        f"{head}, beyond start epoch and seed: {DRIFTS[drift]} b = {_full(beside.sel(role='drift'))} points per unit "
        f"beside the dense accuracy, which has c = {_full(beside.sel(role='beside'))} points per point."
    )


def _full(entry: xr.Dataset) -> str:
    value, low, high, p, adjusted = (float(entry[f"b_{name}"]) for name in ("value", "low", "high", "p", "adjusted"))
    words = f"{value:+.3g} (95 % interval {low:.3g} to {high:.3g}, {p_words(p)}, adjusted {p_words(adjusted)})"
    return words if np.isfinite(p) else f"{value:+.3g} (95 % interval {low:.3g} to {high:.3g}, nothing to permute)"


def _pooled(one: xr.Dataset, name: str) -> str:
    entry = one.sel(regressor=name)
    if not np.isfinite(float(entry["pooled"])):
        return ""
    return (
        f" (pooled ratio {_range(entry, 'pooled', 'pooled_low', 'pooled_high')} points per unit; Q = "
        f"{float(entry['q']):.1f} with {int(entry['q_degrees'])} degrees of freedom, {p_words(float(entry['q_p']))}, "
        f"power {float(entry['q_power']):.0%} where true ratios scatter by half the pooled one)"
    )


def _families(one: xr.Dataset, drift: str) -> list[str]:
    found = []
    for family in one["family"].values:
        entry = one.sel(regressor=drift, family=family)
        missing = int(np.nan_to_num(float(entry["missing"])))
        words = f", {missing} changes missing or diverged" if missing else ""
        if np.isfinite(float(entry["ratio"])):
            found.append(f"{family} {_range(entry, 'ratio', 'ratio_low', 'ratio_high')}{words}")
        elif np.isfinite(float(entry["strength"])):
            strength = max(float(entry["strength"]), 0.0)
            found.append(f"{family} drift not moved (F = {strength:.1f}), ratio undefined{words}")
    return found


def _rivals(one: xr.Dataset, drift: str) -> str:
    others = [name for name in REGRESSORS if name != drift and float(one["consistent"].sel(regressor=name)) == 1]
    tried = int(np.isfinite(one["consistent"].values).sum())
    rule = f"by the same rule, applied to each of {tried} quantities and not adjusted for their number,"
    if not others:
        return f"{rule} no other quantity of the table is consistent with mediation"
    names = ", ".join(REGRESSORS[name][1] for name in others)
    if float(one["consistent"].sel(regressor=drift)) == 1:
        return f"{rule} also consistent with mediation, so not told apart from the drift here: {names}"
    return f"{rule} consistent with mediation: {names}"


def _coefficient(one: xr.Dataset, role: str, name: str) -> str:
    entry = one.sel(role=role, regressor=name)
    value, low, high, spread = (float(entry[f"b_{part}"]) for part in ("value", "low", "high", "spread"))
    if not np.isfinite(value):
        return ""
    adjusted = float(entry["b_adjusted"])
    words = p_words(adjusted) if np.isfinite(adjusted) else "nothing to permute"
    return f"{value * spread:+.2f} ({low * spread:.2f} to {high * spread:.2f}), {words}"


def _mediator(one: xr.Dataset, name: str) -> tuple[str, ...]:
    entry = one.sel(regressor=name)
    head = REGRESSORS[name][1]
    if not np.isfinite(float(entry["pooled"])):
        # Up to the comma: "cannot be judged: no family moved the weight norm".
        reason = str(entry["reasons"].values).removeprefix("mediation ").split(",")[0]
        return (head, "", "", "", "", reason)
    return (
        *(head, _range(entry, "pooled", "pooled_low", "pooled_high"), f"{float(entry['q']):.1f}"),
        *(p_words(float(entry["q_p"])).removeprefix("p = "), f"{float(entry['q_power']):.0%}", _consistent(entry)),
    )


def _consistent(entry: xr.Dataset) -> str:
    if float(entry["consistent"]) == 1:
        return "yes"
    if float(entry["pooled_low"]) <= 0 <= float(entry["pooled_high"]):
        return "no: the interval includes 0"
    if float(entry["q_p"]) <= LEVEL:
        return "no: the families disagree"
    if float(entry["q_power"]) < ADEQUATE_POWER:
        return "agreement cannot be judged"
    return "no: accuracy moves without it"


def _change(entry: xr.Dataset) -> tuple[str, ...]:
    adjusted = float(entry["adjusted_p"])
    return (
        str(entry["change"].values),
        _range(entry, "drift_change", "drift_low", "drift_high"),
        _range(entry, "accuracy_change", "accuracy_low", "accuracy_high"),
        p_words(adjusted).removeprefix("p = ") if np.isfinite(adjusted) else "",
        f"{int(entry['pairs'])}",
    )


def _range(entry: xr.Dataset, value: str, low: str, high: str) -> str:
    """A number with its interval, the number alone where it has none."""
    number, below, above = (float(entry[name]) for name in (value, low, high))
    if not np.isfinite([below, above]).all():
        return f"{number:+.3g}"
    return f"{number:+.3g} ({below:.3g} to {above:.3g})"
