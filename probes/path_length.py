"""Probe ``path-length``: average path length and its distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils._pytree import tree_map

from ..errors import ConfigurationError
from ..gates import gates
from ..paths import PathLengths, path_lengths
from ..probe import Field, Snapshot


class PathLength:
    """Mean, normalized and weighted path length, and the distribution of lengths; unit: active units per path.

    Fields: ``mean``, ``normalized``, ``weighted`` (scalars), ``distribution`` [longest + 1]; definitions in
    ``ntkdyn.path_lengths``. The longest length is that of the graph and so the same at every step.
    """

    name = "path-length"
    uses_inputs = False

    def fields(self, snapshot: Snapshot, /) -> Sequence[Field]:
        """Declare three numbers and the distribution.

        Raises: ConfigurationError: the network has no gates.  TraceError: its graph cannot be traced.
        """
        if not gates(snapshot.model):
            raise ConfigurationError(
                "the network has no Gate; expected at least one; call ntkdyn.gate_network(model) before training, or "
                "leave the probe path-length out"
            )
        size = len(_lengths(snapshot).distribution)
        unit = "units per path"
        return [
            Field(name="mean", dtype="f8", unit=unit, long_name="average path length"),
            Field(name="normalized", dtype="f8", unit=unit, long_name="normalized average path length"),
            Field(name="weighted", dtype="f8", unit=unit, long_name="normalized path length weighted by |1 - slope|"),
            Field(name="distribution", dims=("length",), shape=(size,), dtype="f8", long_name="share of paths"),
        ]

    def measure(self, snapshot: Snapshot, /) -> Mapping[str, Any]:
        """Return the path lengths at this step."""
        lengths = _lengths(snapshot)
        return {
            "mean": lengths.mean,
            "normalized": lengths.normalized,
            "weighted": lengths.weighted,
            "distribution": lengths.distribution,
        }


def _lengths(snapshot: Snapshot) -> PathLengths:
    # Only the shape of the inputs matters, and one sample is the quickest.
    return path_lengths(snapshot.model, tree_map(lambda leaf: leaf[:1], snapshot.inputs))
