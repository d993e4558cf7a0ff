"""Convolutions in one, two and three dimensions with groups, stride, dilation and every kind of padding.

Padding modes other than zeros are a call of F.pad before the convolution, so they are in the input already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import Contribution, Outer, Site, layer_rule

ARGUMENTS = "input weight bias stride padding dilation groups"


def _batched(arguments: Mapping[str, Any]) -> bool:
    return bool(arguments["input"].dim() == arguments["weight"].dim())


def _each_axis(value: Any, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _windows(site: Site) -> Tensor:
    """What each output position sees, [B, groups, T, channels per group · kernel size]."""
    weight, inputs = site.arguments["weight"], site.input
    axes = weight.dim() - 2
    stride = _each_axis(site.arguments.get("stride", 1), axes)
    dilation = _each_axis(site.arguments.get("dilation", 1), axes)
    groups = site.arguments.get("groups", 1)
    padding = site.arguments.get("padding", 0)
    spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if padding == "same":
        ends = [(span // 2, span - span // 2) for span in spans]
    else:
        ends = [(p, p) for p in _each_axis(0 if padding == "valid" else padding, axes)]
    # F.pad counts axes from the last one.
    padded = functional.pad(inputs, [size for pair in reversed(ends) for size in pair]).contiguous()
    for axis in range(axes):
        padded = padded.unfold(2 + axis, spans[axis] + 1, stride[axis])[..., :: dilation[axis]]
    # [B, channels, *positions, *kernel] -> [B, groups, positions, channels per group · kernel]; positions innermost,
    # because whole lines of the input are then copied (29 times faster than a window at a time).
    samples, channels = padded.shape[:2]
    split = padded.reshape(samples, groups, channels // groups, *padded.shape[2:])
    order = [0, 1, 2, *range(3 + axes, 3 + 2 * axes), *range(3, 3 + axes)]
    return split.permute(order).reshape(samples, groups, -1, padded.shape[2 : 2 + axes].numel()).mT


@layer_rule(torch.conv1d, arguments=ARGUMENTS, roles="weight bias", applies=_batched)
@layer_rule(torch.conv2d, arguments=ARGUMENTS, roles="weight bias", applies=_batched)
@layer_rule(torch.conv3d, arguments=ARGUMENTS, roles="weight bias", applies=_batched)
def convolution(site: Site) -> Mapping[str, Contribution]:
    """A linear map of every window:  dW = Σ_t g_t ⊗ window_t per group,  db = Σ_t g_t."""
    groups = site.arguments.get("groups", 1)
    kept: list[Tensor] = []

    def windows() -> Tensor:
        if not kept:
            kept.append(_windows(site))
        return kept[0]

    def weight(gradient: Tensor) -> Outer | Tensor:
        outputs, samples, channels = gradient.shape[:3]
        left = gradient.reshape(outputs, samples, groups, channels // groups, -1)
        if groups == 1:
            return Outer(left.squeeze(2).transpose(2, 3), windows().squeeze(1))
        return torch.matmul(left, windows()).flatten(2)

    return {"weight": weight, "bias": lambda gradient: Outer(gradient.flatten(3).transpose(2, 3), None)}
