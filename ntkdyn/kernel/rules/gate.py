"""Slopes of the negative side: Gate and PReLU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...gates import Gate
from . import Contribution, Site, layer_rule


def _per_slope(tensor: Tensor, axis: int, slopes: int) -> Tensor:
    """Sum [K, B, ...] over all but outputs, samples and channels, an axis of [B, ...]; over these too if they share."""
    if slopes == 1:
        return tensor.flatten(2).sum(2, keepdim=True)
    channels = tensor.movedim(axis + 1 if axis >= 0 else axis, 2)
    return channels.reshape(*channels.shape[:3], -1).sum(3)


@layer_rule(Gate, roles="slope", applies=lambda arguments: arguments["input"].dim() > 1)
def gate(site: Site) -> Mapping[str, Contribution]:
    """y = relu(x) + a min(x, 0):  da = Σ g min(x, 0), nothing where the slope is frozen."""
    module = site.arguments["module"]

    def slope(gradient: Tensor) -> Tensor:
        rows = _per_slope(gradient * site.input.clamp_max(0), module.dim, module.slope.numel())
        return rows.masked_fill(module.frozen, 0.0)

    return {"slope": slope}


@layer_rule(torch.prelu, arguments="input weight", roles="weight", applies=lambda a: a["input"].dim() > 1)
def prelu(site: Site) -> Mapping[str, Contribution]:
    """y = max(x, 0) + w min(x, 0):  dw = Σ g min(x, 0)."""
    slopes = site.arguments["weight"].numel()
    return {"weight": lambda gradient: _per_slope(gradient * site.input.clamp_max(0), 1, slopes)}
