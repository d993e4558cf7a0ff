"""Probe ``path-length``: average path length and its distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map

from ..errors import ConfigurationError
from ..gates import gates
from ..paths import PathGraph, PathLengths, trace_paths
from ..probe import Field, Snapshot


class PathLength:
    """Mean, normalized and weighted path length, and the distribution of lengths; unit: active units per path.

    Fields: ``mean``, ``normalized``, ``weighted`` (scalars), ``distribution`` [longest + 1]; definitions in
    ``ntkdyn.path_lengths``. The longest length is that of the graph and so the same at every step. The graph is traced
    at the first snapshot and again when the modules change: forward must take the same way at every step.
    """

    name = "path-length"
    uses_inputs = False

    def __init__(self) -> None:
        self._structure: list[tuple[str, type[nn.Module], str]] = []
        self._graph: PathGraph | None = None

    def fields(self, snapshot: Snapshot, /) -> Sequence[Field]:
        """Declare three numbers and the distribution.

        Raises: ConfigurationError: the network has no gates.  TraceError: its graph cannot be traced.
        """
        if not gates(snapshot.model):
            raise ConfigurationError(
                "the network has no Gate; expected at least one; call ntkdyn.gate_network(model) before training, or "
                "leave the probe path-length out"
            )
        size = len(self._lengths(snapshot).distribution)
        unit = "units per path"
        return [
            Field(name="mean", dtype="f8", unit=unit, long_name="average path length"),
            Field(name="normalized", dtype="f8", unit=unit, long_name="normalized average path length"),
            Field(name="weighted", dtype="f8", unit=unit, long_name="normalized path length weighted by |1 - slope|"),
            Field(name="distribution", dims=("length",), shape=(size,), dtype="f8", long_name="share of paths"),
        ]

    def measure(self, snapshot: Snapshot, /) -> Mapping[str, Any]:
        """Return the path lengths at this step."""
        lengths = self._lengths(snapshot)
        return {
            "mean": lengths.mean,
            "normalized": lengths.normalized,
            "weighted": lengths.weighted,
            "distribution": lengths.distribution,
        }

    def _lengths(self, snapshot: Snapshot) -> PathLengths:
        # Tracing takes 10 to 30 times as long as reading the gates (19 ms to 0.6 ms for six layers), so once is enough
        # while the modules stay what they are. Compared by value: the model of every snapshot is a new clone, and one
        # probe may serve two recorders.
        model = snapshot.model
        named = model.named_modules(remove_duplicate=False)
        structure = [(name, type(module), module.extra_repr()) for name, module in named]
        if self._graph is None or structure != self._structure:
            # Only the shape of the inputs matters, and one sample is the quickest.
            self._graph = trace_paths(model, tree_map(lambda leaf: leaf[:1], snapshot.inputs))
            self._structure = structure
        return self._graph.lengths(model)
