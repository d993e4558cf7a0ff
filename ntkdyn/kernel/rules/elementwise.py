"""Parameters that are added to every sample, or multiply it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import Contribution, Site, layer_rule


def _aligned(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of the parameter with as many axes as the input."""
    inputs: Tensor = arguments["input"]
    other: Tensor = arguments["other"]
    return (1,) * (inputs.dim() - other.dim()) + tuple(other.shape)


def _leading(arguments: Mapping[str, Any]) -> int:
    shape = _aligned(arguments)
    return next((axis for axis, size in enumerate(shape) if size != 1), len(shape))


def _applies(arguments: Mapping[str, Any]) -> bool:
    inputs, other = arguments["input"], arguments["other"]
    if inputs.dim() < other.dim() or "alpha" in arguments or "out" in arguments:
        return False
    fits = all(own in (1, size) for own, size in zip(_aligned(arguments), inputs.shape, strict=True))
    return fits and _leading(arguments) > 0


def _summed(site: Site, tensor: Tensor) -> Tensor:
    """Sum [K, B, ...] over the axes along which the parameter is repeated: [K, B, P]."""
    # Whichever of the leading axes held the samples is now axis 1, and the others have kept their order.
    repeated = [axis + 1 for axis, size in enumerate(_aligned(site.arguments)) if axis > 0 and size == 1]
    summed = tensor.sum(repeated) if repeated else tensor
    return summed.reshape(*summed.shape[:2], -1)


@layer_rule(
    torch.Tensor.add,
    arguments="input other",
    roles="other",
    leading=_leading,
    applies=_applies,
    commutes=True,
    reads=False,
)
@layer_rule(
    torch.add, arguments="input other", roles="other", leading=_leading, applies=_applies, commutes=True, reads=False
)
def addition(site: Site) -> Mapping[str, Contribution]:
    """y = x + b:  db = Σ g over the axes along which b is repeated."""
    return {"other": lambda gradient: _summed(site, gradient)}


@layer_rule(torch.Tensor.mul, arguments="input other", roles="other", leading=_leading, applies=_applies, commutes=True)
@layer_rule(torch.mul, arguments="input other", roles="other", leading=_leading, applies=_applies, commutes=True)
def multiplication(site: Site) -> Mapping[str, Contribution]:
    """y = x w:  dw = Σ g x over the axes along which w is repeated."""
    return {"other": lambda gradient: _summed(site, gradient * site.input)}
