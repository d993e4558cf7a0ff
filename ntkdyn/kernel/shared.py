"""Layers whose gradients in all directions are multiples of one another: the products then need one direction only.

So are those of the last hidden layer of most networks, where elementwise functions and means lie between it and the
last layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from .factors import Factors, Form
from .ranges import ranges
from .sides import Use

# Fewer directions are not worth the look.
_LEAST_DIRECTIONS = 4
# Samples that are looked at before all are.
_FEW = 2
# Numbers in one intermediate: several of 1 MiB in float32 stay in the cache.
_BLOCK = 2**18
# Roundings of the operations between the layer and the outputs.
_ROUNDINGS = 8


@dataclass(frozen=True)
class Shared:
    """Output gradients  g[n, k, t, c] = directions[k, c] · gradient[n, t, c]; a source of rows in one direction.

    Args:
        directions: [K, d_out].
        gradient: [N, T, d_out].
    """

    use: Use
    directions: Tensor
    gradient: Tensor

    @property
    def count(self) -> int:
        """Number of directions of the rows."""
        return 1

    def form(self, role: str) -> Form:
        """Sizes of what ``contribution`` gives."""
        return self.use.form(role)

    def contribution(self, role: str, samples: slice) -> Factors:
        """Factors of the gradient that is shared."""
        found = cast(Factors, self.use.contribution(role, samples))
        return replace(found, left=self.gradient[samples].unsqueeze(1))

    def new_rows(self, *shape: int) -> Tensor:
        """Uninitialized memory for rows of the Jacobian."""
        return self.use.new_rows(*shape)


def summed(first: Shared, second: Shared) -> tuple[Shared, Shared]:
    """Both sides with Σ_k u₁[k] u₂[k] in their gradients, whose products are then those of all directions together."""
    weights = (first.directions * second.directions).sum(0)
    if second is first:
        one = replace(first, gradient=first.gradient * weights.sqrt())
        return one, one
    return replace(first, gradient=first.gradient * weights), second


def shared_gradient(use: Use, role: str, size: int) -> Shared | None:
    """Look at the gradients themselves; None where they are not shared to within the rounding of their numbers."""
    form = use.form(role)
    if use.count < _LEAST_DIRECTIONS or not form.positions or not form.products:
        return None
    found = _Search(use.count, form)
    length = max(1, _BLOCK // (form.positions * max(form.d_in, use.count * form.d_out)))
    few = min(_FEW, size)
    for samples in (slice(0, few), *ranges(slice(few, size), length)):
        if not found.takes(use, role, samples):
            return None
    return Shared(use, found.directions, torch.cat(found.gradients))


class _Search:
    """Directions of the channels seen so far, relative to the direction in which a channel's gradient was largest.

    Those of a channel that was zero in all samples are zero, and so must its gradient be.
    """

    def __init__(self, count: int, form: Form) -> None:
        self._count, self._channels = count, form.d_out
        self.directions = torch.empty(0)
        self.gradients: list[Tensor] = []
        self._largest = torch.zeros(form.d_out, dtype=torch.int64)
        self._unknown = torch.arange(form.d_out)

    def takes(self, use: Use, role: str, samples: slice) -> bool:
        """Whether the gradients of these samples are multiples of those of the samples before."""
        left = cast(Factors, use.contribution(role, samples)).left
        if not self.directions.numel():
            self.directions = left.new_zeros(self._count, self._channels)
        if len(self._unknown):
            self._learn(left)
        gradient = left.gather(1, self._largest.expand(len(left), 1, *left.shape[2:]))
        self.gradients.append(gradient.squeeze(1))
        allowed = _ROUNDINGS * torch.finfo(left.dtype).eps
        product = gradient * self.directions.unsqueeze(1)
        return bool((product.sub_(left).abs_() <= left.abs().mul_(allowed)).all())

    def _learn(self, left: Tensor) -> None:
        """Find the directions of channels that were zero so far."""
        whole = len(self._unknown) == self._channels
        own = (left if whole else left[..., self._unknown]).transpose(1, 2).flatten(0, 1)  # [n · T, K, unknown]
        sizes, row = own.abs().max(0)  # [K, unknown]
        largest, direction = sizes.max(0)
        seen = (largest > 0).nonzero().squeeze(1)
        direction = direction[seen]
        every = own[row[direction, seen], :, seen]  # [seen, K], where the largest entry is
        new = self._unknown[seen]
        self.directions[:, new] = (every / every.gather(1, direction.unsqueeze(1))).T
        self._largest[new] = direction
        self._unknown = self._unknown[largest == 0]
