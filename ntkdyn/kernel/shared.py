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
from .sides import Use, ranges

# Fewer directions are not worth the look.
_LEAST_DIRECTIONS = 4
# Samples that are looked at before all are.
_FEW = 2
# Numbers in one intermediate: 4 MiB in float32 stay in the cache.
_BLOCK = 2**20
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

    def times(self, weights: Tensor) -> Shared:
        """The gradient multiplied channel by channel, weights [d_out]."""
        return replace(self, gradient=self.gradient * weights)


def shared_gradient(use: Use, role: str, size: int) -> Shared | None:
    """Look at the gradients themselves; None where they are not shared to within the rounding of their numbers.

    Not on CUDA, where a look would make the host wait.
    """
    form = use.form(role)
    if use.count < _LEAST_DIRECTIONS or not form.positions or not form.products or use.on_cuda:
        return None
    found = _Search(use.count, form)
    if size > _FEW and not _Search(use.count, form).takes(use, role, slice(0, _FEW)):
        return None
    length = max(1, _BLOCK // (form.positions * max(form.d_in, use.count * form.d_out)))
    for samples in ranges(slice(0, size), length):
        if not found.takes(use, role, samples):
            return None
    return Shared(use, found.directions, torch.cat(found.gradients))


class _Search:
    """Directions of the channels so far, relative to that direction in which each channel's gradient was largest."""

    def __init__(self, count: int, form: Form) -> None:
        self._count, self._channels = count, form.d_out
        self.directions = torch.empty(0)
        self.gradients: list[Tensor] = []
        self._largest = torch.zeros(form.d_out, dtype=torch.int64)
        self._known = torch.zeros(form.d_out, dtype=torch.bool)

    def takes(self, use: Use, role: str, samples: slice) -> bool:
        """Whether the gradients of these samples are multiples of those of the samples before."""
        left = cast(Factors, use.contribution(role, samples)).left
        if not self.directions.numel():
            self.directions = left.new_zeros(self._count, self._channels)
        if not self._known.all():
            self._learn(left)
        size, _, positions, channels = left.shape
        chosen = self._largest.expand(size, 1, positions, channels)
        gradient = left.gather(1, chosen)
        self.gradients.append(gradient.squeeze(1))
        allowed = _ROUNDINGS * torch.finfo(left.dtype).eps
        product = gradient * self.directions.unsqueeze(1)
        return bool((product.sub_(left).abs_() <= left.abs().mul_(allowed)).all())

    def _learn(self, left: Tensor) -> None:
        """Directions of channels that were zero so far."""
        sizes = left.abs().amax((0, 2))
        largest, place = sizes.max(0)
        new = (~self._known & (largest > 0)).nonzero().squeeze(1)
        if not len(new):
            return
        own = left[..., new].gather(1, place[new].expand(len(left), 1, left.shape[2], len(new))).squeeze(1)
        where = own.abs().flatten(0, 1).argmax(0)
        every = left[where // left.shape[2], :, where % left.shape[2], new]  # [channels, K]
        self.directions[:, new] = (every / own.flatten(0, 1)[where, torch.arange(len(new))].unsqueeze(1)).T
        self._largest[new], self._known[new] = place[new], True
