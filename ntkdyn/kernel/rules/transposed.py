"""Transposed convolutions in one, two and three dimensions with groups, stride, dilation and output padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import Contribution, Outer, Site, layer_rule

ARGUMENTS = "input weight bias stride padding output_padding groups dilation"


def _batched(arguments: Mapping[str, Any]) -> bool:
    return bool(arguments["input"].dim() == arguments["weight"].dim())


def _each_axis(value: Any, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _windows(site: Site, gradient: Tensor) -> Tensor:
    """What of the output gradient each input position has spread to, [K, B, channels, *kernel, T]."""
    arguments, space = site.arguments, site.input.shape[2:]
    kernel = arguments["weight"].shape[2:]
    axes = len(kernel)
    stride, dilation, padding = (
        _each_axis(arguments.get(name, default), axes)
        for name, default in (("stride", 1), ("dilation", 1), ("padding", 0))
    )
    # F.pad counts axes from the last one.
    windows = functional.pad(gradient, [size for one in reversed(padding) for size in (one, one)])
    for axis in range(axes):
        windows = windows.unfold(3 + axis, dilation[axis] * (kernel[axis] - 1) + 1, stride[axis])
        # Output padding adds positions at the end that no input position spreads to.
        windows = windows.narrow(3 + axis, 0, space[axis])[..., :: dilation[axis]]
    # [K, B, channels, *positions, *kernel]
    order = [0, 1, 2, *range(3 + axes, 3 + 2 * axes), *range(3, 3 + axes)]
    return windows.permute(order).flatten(3 + axes)


@layer_rule(torch.conv_transpose1d, arguments=ARGUMENTS, roles="weight bias", applies=_batched)
@layer_rule(torch.conv_transpose2d, arguments=ARGUMENTS, roles="weight bias", applies=_batched)
@layer_rule(torch.conv_transpose3d, arguments=ARGUMENTS, roles="weight bias", applies=_batched)
def transposed_convolution(site: Site) -> Mapping[str, Contribution]:
    """y_{t·stride + k·dilation} += W_k a_t:  dW_k = Σ_t a_t ⊗ g_{t·stride + k·dilation} per group,  db = Σ g."""
    groups = site.arguments.get("groups", 1)
    features = site.input.reshape(len(site.input), groups, site.input.shape[1] // groups, -1)

    def weight(gradient: Tensor) -> Tensor:
        windows = _windows(site, gradient)
        outputs, samples, channels = windows.shape[:3]
        spread = windows.reshape(outputs, samples, groups, channels // groups * windows.shape[3:-1].numel(), -1)
        # The parameter is [d_in, d_out, *kernel], and an Outer would be [d_out, d_in].
        return torch.matmul(features, spread.mT).flatten(2)

    return {"weight": weight, "bias": lambda gradient: Outer(gradient.flatten(3).transpose(2, 3), None)}
