"""Look-up tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import Contribution, Outer, Site, layer_rule


@layer_rule(
    functional.embedding,
    arguments="input weight padding_idx max_norm norm_type scale_grad_by_freq sparse",
    roles="weight",
    leading=lambda arguments: arguments["input"].dim(),
    applies=lambda arguments: arguments["input"].dim() > 0 and not arguments.get("scale_grad_by_freq", False),
)
def embedding(site: Site) -> Mapping[str, Contribution]:
    """y_t = W[token_t]:  dW = Σ_t onehot(token_t) ⊗ g_t; the row padding_idx gets no gradient."""
    tokens = site.input.reshape(site.input.shape[0], -1).long()
    classes, width = site.arguments["weight"].shape
    padding = site.arguments.get("padding_idx")
    padding = padding + classes if padding is not None and padding < 0 else padding

    def weight(gradient: Tensor) -> Outer:
        left = gradient.reshape(len(gradient), tokens.shape[0], -1, width)
        if padding is not None:
            left = left * (tokens != padding).unsqueeze(-1)
        return Outer(left, tokens, classes)

    return {"weight": weight}


def _one_bag_a_sample(arguments: Mapping[str, Any]) -> bool:
    further = ("offsets", "max_norm", "per_sample_weights")
    return (
        arguments["input"].dim() == 2
        and arguments.get("mode", "mean") in ("sum", "mean")
        and not arguments.get("scale_grad_by_freq", False)
        and all(arguments.get(name) is None for name in further)
    )


@layer_rule(
    functional.embedding_bag,
    arguments="input weight offsets max_norm norm_type scale_grad_by_freq mode sparse per_sample_weights "
    "include_last_offset padding_idx",
    roles="weight",
    applies=_one_bag_a_sample,
)
def embedding_bag(site: Site) -> Mapping[str, Contribution]:
    """y = Σ_t W[token_t] or its mean:  dW = Σ_t onehot(token_t) ⊗ g; padding_idx counts in neither."""
    tokens = site.input.long()
    classes = site.arguments["weight"].shape[0]
    padding = site.arguments.get("padding_idx")
    counted = torch.ones_like(tokens) if padding is None else (tokens != padding % classes).long()
    divisors = torch.ones_like(counted[:, :1])
    if site.arguments.get("mode", "mean") == "mean":
        divisors = counted.sum(1, keepdim=True).clamp_min(1)

    def weight(gradient: Tensor) -> Outer:
        # Divided in the precision of the gradient: a quotient of integers would have the default one.
        shares = counted.to(gradient.dtype) / divisors
        return Outer(gradient.unsqueeze(2) * shares.unsqueeze(-1), tokens, classes)

    return {"weight": weight}
