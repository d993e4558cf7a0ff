"""Symmetric kernels at half their size: the upper triangle of the last two axes, in segments only.

A row is packed where it equals its transpose bit for bit, so that unpacking gives back the very bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..probe import Field

# Squares that the cache holds while they are mirrored.
_BLOCK = 128

Array = np.ndarray[Any, Any]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


def can_be_packed(field: Field) -> bool:
    """Whether the last two axes of a field are one axis and its second copy, e.g. sample and sample_2."""
    if len(field.dims) < 2 or field.dims[-1] != f"{field.dims[-2]}_2" or np.dtype(field.dtype).kind != "f":
        return False
    return field.shape[-1] == field.shape[-2] > 1


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape [..., n (n + 1) / 2] of packed [..., n, n]."""
    size = shape[-1]
    return (*shape[:-2], size * (size + 1) // 2)


def is_symmetric(rows: Array) -> bool:
    """Whether rows [..., n, n] equal their transposes bit for bit; NaN and signs of zero count as bits."""
    # Imported late: only who writes kernels needs it.
    from scipy.linalg import issymmetric

    bits = rows.view(f"u{rows.dtype.itemsize}")
    return all(issymmetric(square) for square in bits.reshape(-1, *rows.shape[-2:]))


def pack(rows: Array) -> Array:
    """Upper triangles [..., n (n + 1) / 2] of rows [..., n, n], diagonal included, row by row."""
    packed = np.empty(packed_shape(rows.shape), rows.dtype)
    size = rows.shape[-1]
    squares, lines = rows.reshape(-1, size, size), packed.reshape(-1, packed.shape[-1])
    for first, last, upper, part in _bands(size):
        # One matrix at a time: masks of the last axes of several take four times as long.
        for square, line in zip(squares, lines, strict=True):
            line[part] = square[first:last, first:][upper]
    return packed


def unpack(packed: Array, size: int) -> Array:
    """Rows [..., n, n] of upper triangles [..., n (n + 1) / 2]."""
    rows = np.empty((*packed.shape[:-1], size, size), packed.dtype)
    squares, lines = rows.reshape(-1, size, size), packed.reshape(-1, packed.shape[-1])
    for first, last, upper, part in _bands(size):
        lower = ~upper[:, : last - first]
        for square, line in zip(squares, lines, strict=True):
            square[first:last, first:][upper] = line[part]
            corner = square[first:last, first:last]
            np.copyto(corner, corner.T.copy(), where=lower)
            square[last:, first:last] = square[first:last, last:].T
    return rows


def _bands(size: int) -> Iterator[tuple[int, int, Mask, slice]]:
    """Rows of the upper triangle, a band at a time: first, last, mask [last - first, size - first], its packed part."""
    start = 0
    for first in range(0, size, _BLOCK):
        last = min(first + _BLOCK, size)
        upper = ~np.tri(last - first, size - first, -1, dtype=bool)
        count = int(np.count_nonzero(upper))
        yield first, last, upper, slice(start, start + count)
        start += count
