"""Products of per-sample gradients: J₁ J₂ᵀ for one parameter, by the cheaper of two routes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers in one intermediate of the route over positions; 16 MiB in float32.
_BLOCK = 2**22


@dataclass(frozen=True)
class Rows:
    """Per-sample gradients as they are, [K, N, P] for K outputs."""

    values: Tensor


@dataclass(frozen=True)
class Factors:
    """Per-sample gradients  J[k, n] = Σ_t left[k, n, t] ⊗ right[n, t]; see rules.Outer for integer right.

    Args:
        left: [K, N, T, d_out].
        right: [N, T, d_in], or int64 [N, T].
        classes: number of classes of an integer right, else 0.
    """

    left: Tensor
    right: Tensor
    classes: int

    @property
    def width(self) -> int:
        """Numbers of one per-sample gradient."""
        return int(self.left.shape[-1] * (self.classes or self.right.shape[-1]))

    def rows(self) -> Rows:
        """The same, multiplied out."""
        outputs, samples, positions, width = self.left.shape
        if not self.classes:
            return Rows(torch.matmul(self.left.transpose(2, 3), self.right).flatten(2))
        rows = self.left.new_zeros(outputs, samples, self.classes, width)
        index = self.right.view(1, samples, positions, 1).expand_as(self.left)
        return Rows(rows.scatter_add_(2, index, self.left).flatten(2))


Jacobian = Rows | Factors


def product(first: Jacobian, second: Jacobian, full: bool) -> Tensor:
    """Σ_p J₁[k, n, p] J₂[l, m, p]: for k = l as [K, N1, N2], or for all pairs (full) as [K, N1, K, N2].

    `second` may be `first` itself; the route over positions is taken where it needs fewer operations.
    """
    if isinstance(first, Factors) and isinstance(second, Factors) and _positions_are_cheaper(first, second, full):
        return _over_positions(first, second, full)
    rows = first.rows() if isinstance(first, Factors) else first
    if second is first:
        return _of_rows(rows.values, rows.values, full)
    rows_2 = second.rows() if isinstance(second, Factors) else second
    return _of_rows(rows.values, rows_2.values, full)


def _of_rows(first: Tensor, second: Tensor, full: bool) -> Tensor:
    if not full:
        return torch.matmul(first, second.transpose(1, 2))
    pairs = first.flatten(0, 1) @ second.flatten(0, 1).T
    return pairs.view(*first.shape[:2], *second.shape[:2])


def _positions_are_cheaper(first: Factors, second: Factors, full: bool) -> bool:
    outputs, samples, positions, width = first.left.shape
    samples_2, positions_2 = second.right.shape[:2]
    pairs = outputs**2 if full else outputs
    features = 1 if first.classes else first.right.shape[-1]
    by_positions = samples * positions * samples_2 * positions_2 * (features + pairs * (width + 2))
    making_rows = outputs * (samples * positions + samples_2 * positions_2) * first.width
    return bool(by_positions <= making_rows + pairs * samples * samples_2 * first.width)


def _over_positions(first: Factors, second: Factors, full: bool) -> Tensor:
    outputs, samples, positions, width = first.left.shape
    samples_2, positions_2 = second.right.shape[:2]
    left_2 = second.left.reshape(outputs, samples_2 * positions_2, width)
    one = outputs**2 if full else outputs
    step = max(1, _BLOCK // (one * positions * samples_2 * positions_2))
    if positions == positions_2 == 1:
        step = samples  # the intermediate is as large as the result
    blocks: list[Tensor] = []
    for start in range(0, samples, step):
        left = first.left[:, start : start + step].reshape(outputs, -1, width)
        features = _feature_products(first, second, slice(start, start + step))
        if full:
            products = (left.flatten(0, 1) @ left_2.flatten(0, 1).T).view(
                outputs, -1, positions, outputs, samples_2, positions_2
            )
            products *= features[:, :, None]
        else:
            products = torch.matmul(left, left_2.transpose(1, 2)).view(outputs, -1, positions, samples_2, positions_2)
            products *= features
        # Squeezed where there is nothing to sum, because a sum copies.
        blocks.append(products.squeeze(-1).squeeze(2) if positions == positions_2 == 1 else products.sum((2, -1)))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def _feature_products(first: Factors, second: Factors, block: slice) -> Tensor:
    """Inner products of the right factors, [block of N1, T1, N2, T2]."""
    right, right_2 = first.right[block], second.right
    if first.classes:
        return (right[:, :, None, None] == right_2).to(first.left.dtype)
    products = right.reshape(-1, right.shape[-1]) @ right_2.reshape(-1, right_2.shape[-1]).T
    return products.view(*right.shape[:2], *right_2.shape[:2])
