"""A tile of the kernel under construction: products of per-sample gradients are added to it in place.

Only panels on and above the diagonal are computed where both sides are the same; the rest is mirrored at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from .products import by_openblas, symmetric_product, times_transposed
from .ranges import ranges

Combine = Literal["trace", "each", "full"]
# Rows of a panel: fewer waste less above the diagonal, more are multiplied faster.
_LEAST_ROWS = 96
_PANELS = 8
# Rows of a square on the diagonal that is half a product.
_SQUARE = 1024
# Rows, and numbers, of the intermediate of one Hadamard product: 4 MiB in float32 stay in the cache, and where neither
# side is long both factors do (a matrix of 102 x 10240 takes a third longer than one of 512 x 2048).
_HEIGHT = 512
_BLOCK = 2**20


class Accumulator:
    """Kernel of two ranges of samples along K directions.

    Args:
        combine: "trace" sums over directions, "each" keeps them, "full" keeps all pairs.
        target: view to add to: [N1, N2]; [K, N1, N2]; or for "full" [N1, K, N2, K].
        symmetric: both ranges are the same.
        by_direction: the target of "full" lies in memory as [K, N1, K, N2], not as [N1, K, N2, K].
    """

    def __init__(self, combine: Combine, target: Tensor, *, symmetric: bool, by_direction: bool = False) -> None:
        self.combine = combine
        self.target = target
        self.symmetric = symmetric
        self.samples = int(target.shape[1 if combine == "each" else 0])
        self._samples_2 = int(target.shape[1 if combine == "trace" else 2])
        self._by_direction = by_direction and combine == "full"
        self._matrix = target
        self._scratch = target.new_empty(0)
        if combine == "full" and not by_direction:
            # Rows of samples and directions are evenly spaced, in a tile of a larger kernel as well.
            size, count, size_2 = target.shape[:3]
            spacing = (target.stride(1), 1)
            self._matrix = target.as_strided((size * count, size_2 * count), spacing, target.storage_offset())

    def _product(self, first: Tensor, second: Tensor, *, half: bool = False) -> Tensor:
        """first @ secondᵀ in memory that the next product takes again: fresh pages cost as much as the product.

        Args:
            half: second is first, and nothing below the diagonal is wanted.
        """
        wanted = len(first) * len(second)
        if self._scratch.numel() < wanted:
            self._scratch = first.new_empty(wanted)
        out = self._scratch[:wanted].view(len(first), len(second))
        return symmetric_product(first, out) if half else times_transposed(first, second, out)

    def _add_product(self, target: Tensor, first: Tensor, second: Tensor, *, half: bool) -> None:
        if not half:
            target.addmm_(first, second.T)
        elif target.is_contiguous():
            symmetric_product(first, target, add=True)
        else:
            target += self._product(first, second, half=True)

    def _cells(self, repeats: int = 1) -> Iterator[tuple[slice, slice, bool]]:
        """Ranges of samples of both sides that together cover what is needed of the tile, ``repeats`` rows a sample.

        Where the third is True both ranges are the same, and what lies below the diagonal is not needed.
        """
        if not (self.symmetric and by_openblas(self.target)):
            for panel, columns in self._panels():
                yield panel, columns, False
            return
        for panel in ranges(slice(0, self.samples), max(1, _SQUARE // repeats)):
            yield panel, panel, True
            if panel.stop < self.samples:
                yield panel, slice(panel.stop, self.samples), False

    def _panels(self) -> Iterator[tuple[slice, slice]]:
        """The same cover by whole products: of a panel with itself and what is to the right of it."""
        if not self.symmetric:
            yield slice(0, self.samples), slice(0, self._samples_2)
            return
        repeats = int(self.target.shape[1]) if self.combine == "full" else 1
        height = max(-(-self.samples // _PANELS), min(-(-_LEAST_ROWS // repeats), -(-self.samples // 2)))
        for panel in ranges(slice(0, self.samples), height):
            yield panel, slice(panel.start, self.samples)

    def add_rows(self, first: Tensor, second: Tensor) -> None:
        """Add Σ_p J₁[n, k, p] J₂[m, l, p] from [N1, K, P] and [N2, K, P]."""
        if self._by_direction:
            self._add_by_direction(first, second, None)
            return
        count = first.shape[1]
        for rows, others, half in self._cells(count if self.combine == "full" else 1):
            if self.combine == "trace":
                target = self.target[rows, others]
                self._add_product(target, first[rows].flatten(1), second[others].flatten(1), half=half)
            elif self.combine == "each":
                for k, target in enumerate(self.target):
                    self._add_product(target[rows, others], first[rows, k], second[others, k], half=half)
            else:
                part = self._matrix[rows.start * count : rows.stop * count, others.start * count : others.stop * count]
                self._add_product(part, first[rows].flatten(0, 1), second[others].flatten(0, 1), half=half)

    def add_identity(self, features: Tensor, channels: int) -> None:
        """Add F[n, t, m, t'] to outputs (t, c) and (t', c) for each of C channels: the last layer, without backward."""
        if self.combine == "trace":
            self.target.add_(features.diagonal(dim1=1, dim2=3).sum(-1), alpha=channels)
        elif self.combine == "each":
            own = features.diagonal(dim1=1, dim2=3).permute(2, 0, 1)
            torch.unflatten(self.target, 0, (-1, channels)).add_(own.unsqueeze(1))
        else:
            split = torch.unflatten(torch.unflatten(self.target, 3, (-1, channels)), 1, (-1, channels))
            split.diagonal(dim1=2, dim2=5).add_(features.unsqueeze(-1))

    def add_hadamard(self, first: Tensor, second: Tensor, features: Tensor) -> None:
        """Add F[n, m] · (g₁[n, k] · g₂[m, l]) from [N1, K, d], [N2, K, d] and F [N1, N2]."""
        if self._by_direction:
            self._add_by_direction(first, second, features)
            return
        full, trace = self.combine == "full", self.combine == "trace"
        count = first.shape[1] if full else 1
        for panel, columns, half in self._cells(count):
            for rows, others in [(panel, columns)] if half else _blocks(panel, columns, count):
                part = features[rows, others]
                if trace:
                    product = self._product(first[rows].flatten(1), second[others].flatten(1), half=half)
                    self.target[rows, others].addcmul_(product, part)
                elif full:
                    product = self._product(first[rows].flatten(0, 1), second[others].flatten(0, 1), half=half)
                    product = product.view(-1, count, others.stop - others.start, count)
                    self.target[rows, :, others].addcmul_(product, part[:, None, :, None])
                else:
                    for k, target in enumerate(self.target):
                        product = self._product(first[rows, k], second[others, k], half=half)
                        target[rows, others].addcmul_(product, part)

    def _add_by_direction(self, first: Tensor, second: Tensor, features: Tensor | None) -> None:
        # Here pairs of directions lie outside, and symmetry halves these pairs, not those of samples.
        first, second = first.transpose(0, 1).contiguous(), second.transpose(0, 1).contiguous()
        count, size = second.shape[:2]
        target = self.target.permute(1, 0, 3, 2)  # [K, N1, K, N2]
        if self.symmetric:
            for own, rows in zip(self._own_directions(), first, strict=True):
                if features is None:
                    own.add_rows(rows.unsqueeze(1), rows.unsqueeze(1))
                else:
                    own.add_hadamard(rows.unsqueeze(1), rows.unsqueeze(1), features)
        for rows, others in _blocks(slice(0, self.samples), slice(0, size)):
            height, length = rows.stop - rows.start, others.stop - others.start
            together = max(1, _BLOCK // (height * length))
            for k in range(count):
                for directions in ranges(slice(k + 1 if self.symmetric else 0, count), together):
                    product = self._product(first[k, rows], second[directions, others].flatten(0, 1))
                    product = product.view(height, -1, length)
                    if features is None:
                        target[k, rows, directions, others] += product
                    else:
                        target[k, rows, directions, others].addcmul_(product, features[rows, None, others])

    def _own_directions(self) -> Iterator[Accumulator]:
        """Of each direction with itself, the only pairs that are symmetric in the samples."""
        for k in range(self.target.shape[1]):
            yield Accumulator("trace", self.target[:, k, :, k], symmetric=True)

    def add_shared_hadamard(self, directions: Tensor, gradient: Tensor, features: Tensor) -> None:
        """Add F[n, m] Σ_c u[k, c] u[l, c] g[n, c] g[m, c] to a symmetric target by direction.

        From directions u [K, d], g [N, d] and F [N, N]. Every pair of directions is symmetric in the samples.
        """
        target = self.target.permute(1, 0, 3, 2)  # [K, N1, K, N2]
        height = max(_LEAST_ROWS, -(-self.samples // _PANELS))
        for k, direction in enumerate(directions):
            for other in range(k, len(directions)):
                weighted = gradient * (direction * directions[other])
                block = target[k, :, other]
                for rows in ranges(slice(0, self.samples), height):
                    product = self._product(weighted[rows], gradient[rows.start :]).mul_(features[rows, rows.start :])
                    block[rows, rows.start :] += product
                    block[rows.stop :, rows] += product[:, rows.stop - rows.start :].T

    def add_channels(self, first: Tensor, second: Tensor, directions: Tensor, directions_2: Tensor) -> None:
        """Add Σ_c u₁[k, c] u₂[l, c] (r₁[n, c] · r₂[m, c]) to "full" from r [N1, d, p], [N2, d, p] and u [K, d]."""
        count = len(directions)
        weights = (directions.unsqueeze(1) * directions_2).flatten(0, 1)
        for panel, others in self._panels():
            for rows in _parts(panel, (others.stop - others.start) * first.shape[1]):
                grams = torch.bmm(first[rows].transpose(0, 1), second[others].permute(1, 2, 0))
                sums = self._product(weights, grams.flatten(1).T).view(count, count, *grams.shape[1:])
                self.target[rows, :, others] += sums.permute(2, 0, 3, 1)

    def add_positions(self, first: Tensor, second: Tensor, features: Callable[[slice, slice], Tensor]) -> None:
        """Add Σ_st F[n, s, m, t] (g₁[n, k, s] · g₂[m, l, t]) from [N1, K, S, d] and [N2, K, T, d].

        ``features(rows, others)`` gives F for ranges of samples of both sides.
        """
        count, length, length_2 = first.shape[1], first.shape[2], second.shape[2]
        trace, each, full = (self.combine == name for name in ("trace", "each", "full"))
        # Directions are summed within one product, or lie beside the positions.
        left = (first.transpose(1, 2).flatten(2) if trace else first).contiguous()
        left_2 = (second.transpose(1, 2).flatten(2) if trace else second).contiguous()
        repeats = length * count if full else length
        for panel, others, half in self._cells(repeats):
            size = others.stop - others.start
            for rows in [panel] if half else _parts(panel, size * repeats * repeats, least=1):
                kernel = features(rows, others)
                for k, target in enumerate(self.target if each else [self.target]):
                    one, other = (left[rows, k], left_2[others, k]) if each else (left[rows], left_2[others])
                    product = self._product(one.flatten(0, -2), other.flatten(0, -2), half=half)
                    if half:
                        _mirror_within_samples(product, repeats)
                    if full:
                        pairs = product.view(-1, count, length, size, count, length_2)
                        target[rows, :, others] += pairs.mul_(kernel[:, None, :, :, None]).sum((2, 5))
                    else:
                        target[rows, others] += product.view(kernel.shape).mul_(kernel).sum((1, 3))

    def add_at(self, samples: Tensor, samples_2: Tensor, first: Tensor, second: Tensor) -> None:
        """Add g₁[i, k] · g₂[i, l] from [I, K, d] at the pairs of samples of each i."""
        if self.combine == "trace":
            self.target.index_put_((samples, samples_2), (first * second).sum((1, 2)), accumulate=True)
        elif self.combine == "each":
            each = self.target.permute(1, 2, 0)
            each.index_put_((samples, samples_2), (first * second).sum(2), accumulate=True)
        else:
            pairs = self.target.permute(0, 2, 1, 3)
            pairs.index_put_((samples, samples_2), first @ second.mT, accumulate=True)

    def finish(self) -> None:
        """Fill what symmetry gives."""
        if not self.symmetric:
            return
        if self._by_direction:
            for own in self._own_directions():
                own.finish()
            target = self.target.permute(1, 3, 0, 2)  # [K, K, N1, N2]
            for k in range(target.shape[0]):
                for other in range(k):
                    for rows in _parts(slice(0, self.samples), self.samples):
                        # torch transposes fast between contiguous matrices only.
                        transposed = target[other, k, rows].contiguous().T.contiguous()
                        target[k, other, :, rows] = transposed
            return
        for matrix in self.target if self.combine == "each" else [self._matrix]:
            _mirror(matrix)


def _mirror(matrix: Tensor) -> None:
    """Fill below the diagonal what is above it."""
    for rows in ranges(slice(0, len(matrix)), _HEIGHT):
        square = matrix[rows, rows]
        square.copy_(square.triu() + square.triu(1).T)
        matrix[rows.stop :, rows] = matrix[rows, rows.stop :].T


def _mirror_within_samples(matrix: Tensor, repeats: int) -> None:
    """Fill below the diagonal, in a matrix with ``repeats`` rows a sample, what a sample has with itself."""
    size = len(matrix) // repeats
    own = matrix.view(size, repeats, size, repeats).diagonal(dim1=0, dim2=2).movedim(2, 0)
    own.copy_(own.triu() + own.triu(1).mT)


def _blocks(panel: slice, columns: slice, count: int = 1) -> Iterator[tuple[slice, slice]]:
    """Ranges of samples of both sides, ``count`` rows or columns each, whose product fits the cache."""
    height = min(max(1, _HEIGHT // count), panel.stop - panel.start)
    width = max(1, _BLOCK // (height * count**2))
    for rows in ranges(panel, height):
        for others in ranges(columns, width):
            yield rows, others


def _parts(panel: slice, width: int, least: int = 16) -> Iterator[slice]:
    """Ranges of a panel whose products with ``width`` numbers a row fit the cache."""
    return ranges(panel, max(least, _BLOCK // max(1, width)))
