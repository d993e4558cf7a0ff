"""Turn the ReLUs of a network into gates."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from .errors import ConversionError
from .gates import Gate, Granularity


def gate_network(
    model: nn.Module, example: object = None, *, granularity: Granularity = "channel", inplace: bool = False
) -> nn.Module:
    """Replace every ReLU, LeakyReLU and PReLU module that follows a layer with known channels by a Gate."""
    gated = model if inplace else copy.deepcopy(model)
    channels: int | None = None
    for name, module in list(gated.named_modules()):
        if isinstance(module, nn.Linear):
            channels = module.out_features
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            channels = module.out_channels
        elif isinstance(module, nn.ReLU | nn.LeakyReLU | nn.PReLU):
            if channels is None:
                raise ConversionError(f"activation {name!r}: channels unknown; call gate_network with example=")
            slope: float | Tensor = 0.0
            if isinstance(module, nn.LeakyReLU):
                slope = module.negative_slope
            elif isinstance(module, nn.PReLU):
                slope = module.weight
            parent, _, child = name.rpartition(".")
            setattr(gated.get_submodule(parent), child, Gate(channels, slope, granularity=granularity))
    return gated
