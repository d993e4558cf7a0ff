"""Matrix products whose right factor is a parameter [d_in, d_out]: x @ W, and b + x W as one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import Contribution, Outer, Site, layer_rule


def _leading(arguments: Mapping[str, Any]) -> int:
    return int(arguments["input"].dim()) - 1


def _applies(arguments: Mapping[str, Any]) -> bool:
    if "weight" not in arguments:
        return False
    plain = arguments.keys().isdisjoint({"out", "alpha", "beta"})
    bias = arguments.get("bias")
    return (
        plain
        and arguments["input"].dim() > 1
        and arguments["weight"].dim() == 2
        and (bias is None or bias.shape == arguments["weight"].shape[1:])
    )


@layer_rule(torch.Tensor.matmul, arguments="input weight", roles="weight", leading=_leading, applies=_applies)
@layer_rule(torch.matmul, arguments="input weight", roles="weight", leading=_leading, applies=_applies)
@layer_rule(torch.addmm, arguments="bias input weight", roles="weight bias", applies=_applies)
def product(site: Site) -> Mapping[str, Contribution]:
    """y_t = a_t W + b:  dW = Σ_t a_t ⊗ g_t,  db = Σ_t g_t."""
    samples = site.input.shape[0]
    features = site.input.reshape(samples, -1, site.input.shape[-1])

    def positions(gradient: Tensor) -> Tensor:
        return gradient.reshape(len(gradient), samples, -1, gradient.shape[-1])

    return {
        "weight": lambda gradient: Outer(positions(gradient), features, transposed=True),
        "bias": lambda gradient: Outer(positions(gradient), None),
    }
