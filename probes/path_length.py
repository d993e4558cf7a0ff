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

    Fields: ``mean``, ``normalized``, ``weighted``, ``effective_width``, ``mean_active_width`` (scalars; the widths are
    NaN where nothing is active), ``distribution`` [longest + 1]; definitions in ``ntkdyn.path_lengths``. Attributes
    ``always_active`` (un-gated units on paths) and ``uncounted`` (max-pooling, softmax, LayerNorm, attention) list the
    rest as "name (kind)". The longest length is that of the graph and so the same at every step. The graph is traced
    at the first snapshot and again when the modules change: forward must take the same way at every step.
    """

    name = "path-length"
    uses_inputs = False

    def __init__(self) -> None:
        self._structure: list[tuple[str, type[nn.Module], str]] = []
        self._graph: PathGraph | None = None

    def fields(self, snapshot: Snapshot, /) -> Sequence[Field]:
        """Declare the lengths, the widths and the distribution.

        Raises: ConfigurationError: the network has no gates.  TraceError: its graph cannot be traced.
        """
        if not gates(snapshot.model):
            raise ConfigurationError(
                "the network has no Gate; expected at least one; call ntkdyn.gate_network(model) before training, or "
                "leave the probe path-length out"
            )
        lengths = self._lengths(snapshot)
        size, unit = len(lengths.distribution), "units per path"
        # On all fields, so that they stand at the group too.
        listed = {"always_active": _listed(lengths.always_active), "uncounted": _listed(lengths.uncounted)}
        numbers = {
            "mean": (unit, "average path length"),
            "normalized": (unit, "normalized average path length"),
            "weighted": (unit, "normalized path length weighted by |1 - slope|"),
            "effective_width": ("units", "active units / normalized path length"),
            "mean_active_width": ("units", "mean active units of the layers that have any"),
        }
        return [
            *(
                # A network without active units has no width: NaN there.
                Field(
                    name=name, dtype="f8", unit=unit, long_name=text,
                    attributes=listed | ({"allow_nan": True} if "width" in name else {}),
                )
                for name, (unit, text) in numbers.items()
            ),
            Field(
                name="distribution", dims=("length",), shape=(size,), dtype="f8", long_name="share of paths",
                attributes=listed,
            ),
        ]  # fmt: skip

    def measure(self, snapshot: Snapshot, /) -> Mapping[str, Any]:
        """Return the path lengths at this step."""
        lengths = self._lengths(snapshot)
        return {
            "mean": lengths.mean,
            "normalized": lengths.normalized,
            "weighted": lengths.weighted,
            "effective_width": lengths.effective_width,
            "mean_active_width": lengths.mean_active_width,
            "distribution": lengths.distribution,
        }

    def _lengths(self, snapshot: Snapshot) -> PathLengths[float]:
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


def _listed(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
