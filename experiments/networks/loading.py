"""The user's own network, with gates."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ...conversion import gate_network
from ...gates import gates
from ...model_file import build_own_network


def load_network(text: str, example: Tensor, outputs: int, *, granularity: Literal["channel", "layer"]) -> nn.Module:
    """Build a user's network with ``file.py:function``, called as function(inputs=example batch, outputs=classes).

    A network without a Gate has its ReLUs replaced by Gates.

    Raises: UnknownName, ConfigurationError: as ``ntkdyn.model_file.build_own_network``.
        ConversionError: a ReLU cannot be gated.
    """
    network = build_own_network(text, example, outputs)
    return network if gates(network) else gate_network(network, example, granularity=granularity)
