"""What per-sample gradients are made of: sums of outer products, their sizes, and which of them become rows at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from .interception import Call
from .rules import Outer, Site
from .tracing import Placement

# Features times directions of a product that makes rows.
_LEAST_WIDTH = 96


@dataclass(frozen=True)
class Factors:
    """Per-sample gradients  J[n, k] = Σ_t left[n, k, t] ⊗ right[n, t]; right as in rules.Outer.

    Args:
        left: [N, K, T, d_out].
        right: [N, T, d_in], int64 [N, T] for one-hot rows of width ``classes``, or None for ones.
    """

    left: Tensor
    right: Tensor | None
    classes: int
    transposed: bool

    def rows(self) -> Tensor:
        """The sum multiplied out, [N, K, P]."""
        if self.right is None:
            return self.left.sum(2)
        size, count, positions, width = self.left.shape
        if self.classes:
            rows = self.left.new_zeros(size, count, self.classes, width)
            index = self.right.view(size, 1, positions, 1).expand_as(self.left)
            return rows.scatter_add_(2, index, self.left).flatten(2)
        rows = self.left.new_empty(size, count, width, self.right.shape[-1])
        self.multiply_out(slice(0, width), rows, add=False)
        return (rows.mT if self.transposed else rows).flatten(2)

    def multiply_out(self, columns: slice, target: Tensor, *, add: bool) -> None:
        """Write Σ_t left ⊗ right for a range of d_out into [N, K, columns, d_in], or add it."""
        left, right = self.left[..., columns], cast(Tensor, self.right)
        size, count, positions, width = left.shape
        out = target.view(size, count * width, right.shape[-1])
        flat = left.transpose(2, 3).reshape(size, count * width, positions)
        if add:
            out.baddbmm_(flat, right)
        else:
            torch.bmm(flat, right, out=out)


@dataclass(frozen=True)
class Form:
    """What one sample's gradient of one parameter in one call is made of.

    Attributes:
        positions, d_out, d_in: of the factors; positions is 0 where the rule gives rows; d_in is 1 for a bias.
        classes: as in Factors.
        numbers: of one row of the Jacobian.
        products: multiplications in making one row.
        bias: right is None.
        transposed: the parameter is [d_in, d_out].
    """

    positions: int
    d_out: int
    d_in: int
    classes: int
    numbers: int
    products: int = 0
    bias: bool = False
    transposed: bool = False

    @property
    def kind(self) -> tuple[int, int, int, bool, bool, bool]:
        """The same for two uses of one parameter means that their sums of outer products are one sum."""
        return self.d_out, self.d_in, self.classes, self.bias, self.transposed, self.positions > 0


def by_sample(found: Outer | Tensor, fold: int, dtype: torch.dtype) -> Factors | Tensor:
    """From [K, N · F, ...] to [N, K, ...]."""
    if isinstance(found, Tensor):
        rows = torch.unflatten(found.to(dtype), 1, (-1, fold))
        return (rows.sum(2) if fold > 1 else rows.squeeze(2)).transpose(0, 1)
    left, right = found.left.to(dtype), found.right
    if fold > 1:
        left = left.reshape(len(left), -1, fold * left.shape[2], left.shape[3])
        right = None if right is None else right.reshape(-1, fold * right.shape[1], *right.shape[2:])
    if right is not None and not found.classes:
        right = right.to(dtype)
    return Factors(left.transpose(0, 1), right, found.classes, found.transposed)


def call_forms(call: Call, place: Placement) -> dict[str, Form]:
    """Sizes by role; without positions where every parameter of the call has its rows made at once."""
    found = {role: _form(call, place, role) for role in call.names}
    # With as many positions rows are also the cheapest route, whatever is done with them.
    if all(one.positions > one.d_in if one.products else one.positions == 0 or one.bias for one in found.values()):
        return {role: replace(one, positions=0, bias=False) for role, one in found.items()}
    return found


def directions_together(forms: Mapping[str, Form], count: int) -> int:
    """Directions whose gradients wait for each other, so that the products that make rows run at full rate."""
    widths = [one.d_out for one in forms.values() if one.products]
    return min(count, -(-_LEAST_WIDTH // min(widths))) if widths else 1


def _form(call: Call, place: Placement, role: str) -> Form:
    """Sizes of one sample's gradient, from the rule applied to a gradient of zeros."""
    inputs = place.arrange(call.input)[: place.fold]
    others = [size for axis, size in enumerate(call.shape) if axis != place.axis]
    dtype = inputs.dtype if inputs.is_floating_point() else torch.get_default_dtype()
    gradient = torch.zeros(1, place.fold, *others, device=inputs.device, dtype=dtype)
    site = Site(input=inputs, arguments=call.arguments)
    found = by_sample(call.rule.gradient(site)[role](gradient), place.fold, gradient.dtype)
    if isinstance(found, Tensor):
        return Form(0, 0, 0, 0, int(found.shape[-1]))
    positions, d_out = (int(size) for size in found.left.shape[2:])
    d_in = found.classes or (1 if found.right is None else int(found.right.shape[-1]))
    numbers, bias = d_out * d_in, found.right is None
    products = 0 if bias or found.classes else positions * numbers
    return Form(positions, d_out, d_in, found.classes, numbers, products, bias, found.transposed)
