"""What may go with the final accuracy in place of the kernel's drift, read at the switch of each arm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UndefinedMeasure
from .drifts import snapshot_at
from .gate_patterns import hamming_distances, recorded_gates
from .recorded import kernel_sets, path_of, target_columns, trace_kernels

if TYPE_CHECKING:
    from ..results import Run

RATES = "learning_rate"

RIVALS = {
    "dense_accuracy": ("percent", "dense accuracy at t0"),
    "alignment": ("1", "centered target alignment of K_t0"),
    "kernel_ridge_error": ("1", "leave-one-out kernel-ridge error of K_t0"),
    "gate_hamming": ("1", "gate Hamming distance from the start to t0"),
    "weight_norm": ("1", "weight norm at t0"),
    "rate_sum": ("1", "sum of learning rates up to t0"),
}
"""Rival -> unit and name."""


def rivals_of(
    arm: Run, trunk: Run | None, settings: Mapping[str, Any], probe_set: str, start: float
) -> dict[str, float]:
    """Return the rivals of an arm; what was not recorded is missing.

    Args:
        trunk: the run that it branched from, None where it has none.
        settings: its row of the sweep's table, accuracies in percent.
        probe_set: the set of its kernels and gates.
        start: epoch of the switch.
    """
    found = {
        name: float(settings[column])
        for name, column in (("dense_accuracy", "dense_accuracy"), ("weight_norm", "dense_weight_norm"))
        if column in settings and settings[column] is not None
    }
    if trunk is not None:
        found |= _hamming(trunk, probe_set, start)
    found |= _kernel_rivals(arm, trunk, probe_set, start)
    for run in (arm, trunk):
        if run is not None and f"{RATES}/sum" in run and "rate_sum" not in found:
            found["rate_sum"] = float(np.asarray(run[f"{RATES}/sum"])[snapshot_at(run, RATES, start)])
    return {name: value for name, value in found.items() if np.isfinite(value)}


def _kernel_rivals(arm: Run, trunk: Run | None, probe_set: str, start: float) -> dict[str, float]:
    """Rivals of the kernel at the switch: the arm's first, or the trunk's at that epoch."""
    from ..analysis import kernel_ridge_error, target_alignment

    run = arm if probe_set in kernel_sets(arm) else trunk
    # The arm's own targets: before the switch the trunk may have learned other labels.
    targets = path_of("probe_sets", probe_set, "targets")
    if run is None or probe_set not in kernel_sets(run) or targets not in arm:
        return {}
    place = snapshot_at(run, path_of("ntk", probe_set, ""), start)
    kernel = trace_kernels(run, probe_set, [place])[0]
    wanted = target_columns(np.asarray(arm.targets(probe_set)))
    found = {}
    for name, measure in (
        ("alignment", lambda: target_alignment(kernel, wanted, centered=True)),
        ("kernel_ridge_error", lambda: kernel_ridge_error(kernel, wanted)),
    ):
        try:
            found[name] = float(measure())
        except UndefinedMeasure:  # a dead network's kernel is zero
            continue
    return found


def _hamming(trunk: Run, probe_set: str, start: float) -> dict[str, float]:
    found_set, gates = recorded_gates(trunk, probe_set)
    if not gates:
        return {}
    group = path_of("gates", found_set, "")
    place = snapshot_at(trunk, group, start)
    if place == 0:
        return {"gate_hamming": 0.0}
    return {"gate_hamming": float(hamming_distances(trunk, group, gates, [0, place])[0, 1])}
