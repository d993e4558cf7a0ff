"""Linear maps of the last axis, with any leading axes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from . import Contribution, Outer, Site, layer_rule


@layer_rule(
    functional.linear,
    arguments="input weight bias",
    roles="weight bias",
    leading=lambda arguments: arguments["input"].dim() - 1,
    applies=lambda arguments: arguments["input"].dim() > 1 and arguments["weight"].dim() == 2,
)
def linear(site: Site) -> Mapping[str, Contribution]:
    """y = W a + b:  dW = Σ_t g_t ⊗ a_t,  db = Σ_t g_t."""
    samples = site.input.shape[0]
    features = site.input.reshape(samples, -1, site.input.shape[-1])

    def positions(gradient: Tensor) -> Tensor:
        return gradient.reshape(len(gradient), samples, -1, gradient.shape[-1])

    return {"weight": lambda g: Outer(positions(g), features), "bias": lambda g: Outer(positions(g), None)}
