"""Fully connected networks."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from ...gates import Gate, Granularity
from .convolution import initialize
from .registry import Wanted, network


class GatedMLP(nn.Sequential):
    """Fully connected network with a Gate after each of ``depth`` hidden layers: linear1, gate1, …, readout.

    Weights are normal with variance 2 / inputs of the layer, biases 0; no normalization. Inputs [N, ...] are
    flattened.

    Source: He et al. 2015 (arXiv 1502.01852) for the initialization.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        width: int = 64,
        depth: int = 6,
        granularity: Granularity = "channel",
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["flatten"] = nn.Flatten()
        size = inputs
        for number in range(1, depth + 1):
            layers[f"linear{number}"] = nn.Linear(size, width)
            layers[f"gate{number}"] = Gate(width, granularity=granularity)
            size = width
        layers["readout"] = nn.Linear(size, outputs)
        super().__init__(layers)
        initialize(self)


@network("mlp", width=64, depth=6)
def mlp(wanted: Wanted) -> nn.Module:
    """Fully connected network; width: units of a hidden layer, depth: hidden layers."""
    return GatedMLP(
        wanted.features(), wanted.outputs, width=wanted.width, depth=wanted.depth, granularity=wanted.granularity
    )
