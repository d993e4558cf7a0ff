"""How far the kernel of an arm and of its trunk moved: the drifts that may go with the final accuracy.

All are centered kernel distances S, dimensionless. The trunk's belong to (start epoch, seed, intervention) alone and
are shared by all arms that leave it there; the branch's are the arm's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import UndefinedMeasure
from . import arms
from .recorded import kernel_sets, path_of, trace_kernels

if TYPE_CHECKING:
    from ..results import Run, Sweep

DRIFTS = {
    "before": "the trunk's drift before the switch S(K_0, K_t0)",
    "remaining": "the trunk's remaining drift S(K_t0, K_T)",
    "own": "the branch's own drift S(K_t0, K_T)",
    "ramp": "the branch's drift during the ramp S(K_t0, K_t0+R)",
    "after": "the branch's drift after the ramp S(K_t0+R, K_T)",
    "apart": "the branch's distance to the trunk's end",
}


def drifts_of(sweep: Sweep, branches: Iterable[tuple[str, float]]) -> list[dict[str, dict[str, float]]]:
    """Return for each arm (run, start epoch) probe set -> drift -> value; what was not recorded is missing.

    Each trunk is read once, however many arms leave it.
    """
    read: dict[tuple[str, str], NDArray[np.float64]] = {}
    found = []
    for name, start in branches:
        trunk_name = arms.trunk_run(sweep, name)
        trunk = sweep.runs.get(trunk_name or "")
        by_set: dict[str, dict[str, float]] = {}
        if trunk is not None:
            for probe_set in kernel_sets(trunk):
                key = (str(trunk_name), probe_set)
                if key not in read:
                    read[key] = trace_kernels(trunk, probe_set)
                by_set[probe_set] = _drifts(sweep.runs[name], trunk, read[key], probe_set, start)
        found.append(by_set)
    return found


def snapshot_at(run: Run, group: str, epoch: float) -> int:
    """Return the index of the recorded snapshot nearest to an epoch, the first one where epochs are not known."""
    epochs = np.asarray(run.epochs(group), dtype=np.float64)
    return int(np.argmin(np.abs(epochs - epoch))) if np.isfinite(epochs).all() else 0


def _drifts(arm: Run, trunk: Run, trunk_kernels: NDArray[np.float64], probe_set: str, start: float) -> dict[str, float]:
    """Drifts of one arm on one probe set; those of the branch only where it recorded kernels."""
    group = path_of("ntk", probe_set, "")
    at_start = snapshot_at(trunk, group, start)
    found = {
        "before": _distance(trunk_kernels[0], trunk_kernels[at_start]),
        "remaining": _distance(trunk_kernels[at_start], trunk_kernels[-1]),
    }
    if probe_set not in kernel_sets(arm):
        return found
    kernels = trace_kernels(arm, probe_set)
    if len(kernels) < 2:
        return found
    found["own"] = _distance(kernels[0], kernels[-1])
    found["apart"] = _distance(kernels[-1], trunk_kernels[-1])
    if len(kernels) > 2:
        ramped = start + float(arm.config.get("ramp_epochs", np.nan))
        middle = snapshot_at(arm, group, ramped) if np.isfinite(ramped) else 1
        found["ramp"] = _distance(kernels[0], kernels[middle])
        found["after"] = _distance(kernels[middle], kernels[-1])
    return found


def _distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Centered distance, NaN where a kernel has none: a run that diverged, a network that is dead."""
    from ..analysis import kernel_distance_centered

    try:
        return float(kernel_distance_centered(first, second))
    except UndefinedMeasure:
        return float("nan")
