"""Normalizations with a scale and a shift: batch (by running statistics), instance, layer, group, root-mean-square."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import Contribution, Site, layer_rule


def _per_channel(tensor: Tensor) -> Tensor:
    # [K, B, channels, ...] -> [K, B, channels]
    return tensor.reshape(*tensor.shape[:3], -1).sum(3)


def _by_running_statistics(arguments: Mapping[str, Any]) -> bool:
    return not arguments.get("training", False) and arguments["running_mean"] is not None


@layer_rule(
    functional.batch_norm,
    arguments="input running_mean running_var weight bias training momentum eps",
    roles="weight bias",
    applies=_by_running_statistics,
)
def batch_norm(site: Site) -> Mapping[str, Contribution]:
    """y = w x̂ + b with constant statistics:  dw = Σ_space g x̂,  db = Σ_space g."""
    mean, variance = site.arguments["running_mean"], site.arguments["running_var"]
    epsilon = site.arguments.get("eps", 1e-5)

    @cache
    def normalized() -> Tensor:
        return functional.batch_norm(site.input, mean, variance, None, None, False, 0.0, epsilon)

    def weight(gradient: Tensor) -> Tensor:
        return _per_channel(gradient * normalized())

    return {"weight": weight, "bias": _per_channel}


def _leading(arguments: Mapping[str, Any]) -> int:
    return int(arguments["input"].dim()) - len(arguments["normalized_shape"])


def _over_positions(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    # [K, B, ..., *shape] -> [K, B, P]
    return tensor.reshape(*tensor.shape[:2], -1, torch.Size(shape).numel()).sum(2)


@layer_rule(
    functional.layer_norm,
    arguments="input normalized_shape weight bias eps",
    roles="weight bias",
    leading=_leading,
    applies=lambda arguments: _leading(arguments) > 0,
)
def layer_norm(site: Site) -> Mapping[str, Contribution]:
    """y = w x̂ + b:  dw = Σ_t g_t x̂_t,  db = Σ_t g_t."""
    shape = tuple(site.arguments["normalized_shape"])
    epsilon = site.arguments.get("eps", 1e-5)

    @cache
    def normalized() -> Tensor:
        return functional.layer_norm(site.input, shape, None, None, epsilon)

    def weight(gradient: Tensor) -> Tensor:
        return _over_positions(gradient * normalized(), shape)

    return {"weight": weight, "bias": lambda gradient: _over_positions(gradient, shape)}


@layer_rule(
    functional.rms_norm,
    arguments="input normalized_shape weight eps",
    roles="weight",
    leading=_leading,
    applies=lambda arguments: _leading(arguments) > 0,
)
def rms_norm(site: Site) -> Mapping[str, Contribution]:
    """y = w x̂:  dw = Σ_t g_t x̂_t."""
    shape = tuple(site.arguments["normalized_shape"])
    epsilon = site.arguments.get("eps")

    @cache
    def normalized() -> Tensor:
        return functional.rms_norm(site.input, shape, None, epsilon)

    def weight(gradient: Tensor) -> Tensor:
        return _over_positions(gradient * normalized(), shape)

    return {"weight": weight}


@layer_rule(functional.group_norm, arguments="input num_groups weight bias eps", roles="weight bias")
def group_norm(site: Site) -> Mapping[str, Contribution]:
    """y = w x̂ + b:  dw = Σ_space g x̂,  db = Σ_space g."""
    groups, epsilon = site.arguments["num_groups"], site.arguments.get("eps", 1e-5)

    @cache
    def normalized() -> Tensor:
        return functional.group_norm(site.input, groups, None, None, epsilon)

    def weight(gradient: Tensor) -> Tensor:
        return _per_channel(gradient * normalized())

    return {"weight": weight, "bias": _per_channel}


@layer_rule(
    functional.instance_norm,
    arguments="input running_mean running_var weight bias use_input_stats momentum eps",
    roles="weight bias",
    applies=lambda arguments: arguments.get("use_input_stats", True) and arguments["input"].dim() > 2,
)
def instance_norm(site: Site) -> Mapping[str, Contribution]:
    """y = w x̂ + b with the statistics of each sample's channel:  dw = Σ_space g x̂,  db = Σ_space g."""
    epsilon = site.arguments.get("eps", 1e-5)

    def weight(gradient: Tensor) -> Tensor:
        return _per_channel(gradient * functional.instance_norm(site.input, eps=epsilon))

    return {"weight": weight, "bias": _per_channel}
