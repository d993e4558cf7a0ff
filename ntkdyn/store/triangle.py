"""Symmetric kernels at half their size: the upper triangle of the last two axes, in segments only.

A row is packed where it equals its transpose bit for bit, so that unpacking gives back the very bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..probe import Field

# Squares that the cache holds while they are mirrored.
_BLOCK = 64

Array = np.ndarray[Any, Any]


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
    bits = rows.view(f"u{rows.dtype.itemsize}")
    return bool(np.array_equal(bits, bits.swapaxes(-1, -2)))


def pack(rows: Array) -> Array:
    """Upper triangles [..., n (n + 1) / 2] of rows [..., n, n], diagonal included, row by row."""
    packed = np.empty(packed_shape(rows.shape), rows.dtype)
    start = 0
    # Slices: a mask takes four times as long, both ways.
    for index, length in enumerate(range(rows.shape[-1], 0, -1)):
        packed[..., start : start + length] = rows[..., index, index:]
        start += length
    return packed


def unpack(packed: Array, size: int) -> Array:
    """Rows [..., n, n] of upper triangles [..., n (n + 1) / 2]."""
    rows = np.empty((*packed.shape[:-1], size, size), packed.dtype)
    start = 0
    for index, length in enumerate(range(size, 0, -1)):
        rows[..., index, index:] = packed[..., start : start + length]
        start += length
    for first in range(0, size, _BLOCK):
        last = min(first + _BLOCK, size)
        square = rows[..., first:last, first:last]
        square[...] = np.where(np.triu(np.ones(square.shape[-2:], bool)), square, square.swapaxes(-1, -2))
        for left in range(last, size, _BLOCK):
            right = left + _BLOCK
            rows[..., left:right, first:last] = rows[..., first:last, left:right].swapaxes(-1, -2)
    return rows
