"""Probe ``units``: how many units are still nonlinear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils._pytree import tree_map

from ..errors import ConfigurationError
from ..gates import nonlinear_units
from ..probe import Field, Snapshot


class NonlinearUnits:
    """Active and weighted units of every gate; what is nonlinear but no gate is listed in the attributes.

    Fields, L gates: ``active`` [L] units that are not frozen, ``total`` [L] (once), ``weighted`` [L] sum of |1 - slope|
    over the active ones. Attributes ``always_active`` (GELU, tanh, an un-gated ReLU ...) and ``uncounted``
    (max-pooling, softmax) list the rest as "name (kind)".
    """

    name = "units"
    uses_inputs = False

    def fields(self, snapshot: Snapshot, /) -> Sequence[Field]:
        """Declare the counts by gate.

        Raises: ConfigurationError: the network has no gates.
        """
        # On one sample, because functional activations show only when the network runs.
        counts = nonlinear_units(snapshot.model, tree_map(lambda leaf: leaf[:1], snapshot.inputs))
        if not counts.total:
            raise ConfigurationError(
                "the network has no Gate; expected at least one (always active: "
                f"{_listed(counts.always_active) or 'nothing'}); call ntkdyn.gate_network(model) before training, or "
                "leave the probe units out"
            )
        names = list(counts.total)
        axis: dict[str, Any] = {"dims": ("gate",), "shape": (len(names),), "coordinates": {"gate": names}}
        # On all fields, so that they stand at the group too.
        axis["attributes"] = {
            "always_active": _listed(counts.always_active),
            "uncounted": _listed(counts.uncounted),
        }
        return [
            Field(name="active", dtype="i8", unit="units", long_name="active units", **axis),
            Field(name="total", dtype="i8", unit="units", long_name="units", static=True, **axis),
            Field(name="weighted", dtype="f8", unit="units", long_name="units weighted by |1 - slope|", **axis),
        ]

    def measure(self, snapshot: Snapshot, /) -> Mapping[str, Any]:
        """Return the counts at this step."""
        counts = nonlinear_units(snapshot.model)
        return {
            "active": list(counts.active.values()),
            "total": list(counts.total.values()),
            "weighted": list(counts.weighted.values()),
        }


def _listed(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
