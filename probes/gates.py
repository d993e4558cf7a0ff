"""Probe ``gates``: slopes, frozen channels and the on/off pattern of every gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import ConfigurationError
from ..gates import gates
from ..probe import Field, Snapshot


class GateTrajectory:
    """Effective slopes, frozen channels, on/off pattern and on-rate of every gate on each probe set.

    Fields of each gate, C channels: ``slope`` and ``frozen`` [C] ([1] where one slope serves the layer), 1 and true
    where a channel is linear for good; ``pattern`` uint8 [N, ceil(units / 8)], one bit a unit and sample, set where
    the preactivation is positive, packed from the highest bit on along channels, then space; ``on_rate`` [C], share
    of set bits over samples and space. At exactly 0 a unit is off, as the derivative there is the slope.

    ``numpy.unpackbits(pattern, axis=-1, count=units, bitorder="big")`` gives the bits back.
    """

    name = "gates"

    def fields(self, snapshot: Snapshot, /) -> Sequence[Field]:
        """Declare four arrays a gate.

        Raises: ConfigurationError: the network has no gates.
        """
        found = gates(snapshot.model)
        if not found:
            raise ConfigurationError(
                "the network has no Gate; expected at least one; call ntkdyn.gate_network(model) before training, or "
                "leave the probe gates out"
            )
        declared = []
        for name, inputs in snapshot.preactivations.items():
            slopes, channels, units = len(found[name].slope), inputs.shape[1], inputs[0].numel()
            facts = {"units": units, "bitorder": "big", "order": "channel, then space"}
            # A dimension has one size within a group: slopes that serve a layer need a name beside "channel".
            slope_dim = "channel" if slopes == channels else "slope_index"
            declared += [
                Field(name=f"{name}/slope", dims=(slope_dim,), shape=(slopes,), long_name="effective slope"),
                Field(
                    name=f"{name}/frozen", dims=(slope_dim,), shape=(slopes,), dtype="u1", long_name="linear for good"
                ),
                Field(
                    name=f"{name}/pattern",
                    dims=("sample", "byte"),
                    shape=(len(inputs), (units + 7) // 8),
                    dtype="u1",
                    long_name="units that are on, bit-packed",
                    attributes=facts,
                ),
                Field(name=f"{name}/on_rate", dims=("channel",), shape=(channels,), long_name="share of samples on"),
            ]
        return declared

    def measure(self, snapshot: Snapshot, /) -> Mapping[str, Any]:
        """Return the state of every gate at this step."""
        found = gates(snapshot.model)
        measured: dict[str, Any] = {}
        for name, inputs in snapshot.preactivations.items():
            on = inputs > 0
            measured[f"{name}/slope"] = found[name].effective_slope.detach()
            measured[f"{name}/frozen"] = found[name].frozen.byte()
            measured[f"{name}/pattern"] = _packed(on)
            measured[f"{name}/on_rate"] = on.transpose(0, 1).flatten(1).double().mean(1)
        return measured


def _packed(on: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.packbits(on.flatten(1).cpu().numpy(), axis=1, bitorder="big")
