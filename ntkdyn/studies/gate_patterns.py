"""On/off patterns of gates as recorded, and how many signs differ between snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .recorded import path_of

if TYPE_CHECKING:
    from ..results import Run


def recorded_gates(run: Run, probe_set: str | None = None) -> tuple[str, list[str]]:
    """Return the probe set, by default the first with gates, and the names of its gates in recorded order."""
    if "gates" not in {group.split("/")[0] for group in run.groups()}:
        return "", []
    for candidate in run.sets("gates") if probe_set is None else [probe_set]:
        start = path_of("gates", candidate, "") + "/"
        found = [
            name[len(start) : -len("/slope")]
            for name in run.names()
            if name.startswith(start) and name.endswith("/slope")
        ]
        if found:
            return candidate, found
    return "", []


def hamming_distances(
    run: Run, group: str, gates: Sequence[str], snapshots: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """Return the share [S, S] of on/off signs that differ, over all gates and without frozen units.

    Args: group: "gates/<set>".  snapshots: read these only, by their indices; None: all.
    Returns: NaN where no pattern is recorded, or nothing is left that is not frozen.
    """
    from ..analysis import gate_hamming, unpack_pattern

    def recorded(name: str) -> NDArray[np.generic]:
        return np.asarray(run[name] if snapshots is None else run.lazy(name)[list(snapshots)])

    count = len(run.steps(group)) if snapshots is None else len(snapshots)
    total, weight = np.zeros((count, count)), np.zeros((count, count))
    for gate in gates:
        name = path_of(group, gate, "pattern")
        if name not in run:
            return np.full((count, count), np.nan)
        units = int(run.field(name).attributes["units"])
        frozen = recorded(path_of(group, gate, "frozen")).astype(bool)
        # The mask per gate: a whole frozen gate has no signs and drops out.
        live = (~frozen).sum(1) * (units / frozen.shape[1])
        weights = np.minimum(live[:, None], live[None, :])
        distance = gate_hamming(unpack_pattern(recorded(name), units), frozen)
        total = total + np.where(weights > 0, np.nan_to_num(distance) * weights, 0.0)
        weight = weight + weights
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), np.nan)
