"""Look-up tables."""

from __future__ import annotations

from collections.abc import Mapping

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
