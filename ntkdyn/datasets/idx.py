"""Arrays in IDX format, as MNIST and Fashion-MNIST have them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import DamagedData

Array = np.ndarray[Any, Any]
_UNSIGNED_BYTES = 8


def parse_idx(content: bytes, *, axes: int, where: str) -> Array:
    """Return the array of an IDX file of unsigned bytes: two zeros, type 8, number of axes, sizes (big-endian), data.

    Raises: DamagedData: another magic number, or another size than its head announces.
    """
    head = 4 + 4 * axes
    if len(content) < head:
        raise DamagedData(f"{where}: found {len(content)} bytes, expected a head of {head}; the file is truncated")
    magic = int.from_bytes(content[:4], "big")
    expected = _UNSIGNED_BYTES << 8 | axes
    if magic != expected:
        raise DamagedData(
            f"{where}: found IDX magic number {magic:#010x}, expected {expected:#010x} (unsigned bytes, {axes} axes); "
            "is it another file of the data set?"
        )
    sizes = [int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(axes)]
    if len(content) != head + math.prod(sizes):
        raise DamagedData(
            f"{where}: found {len(content) - head} bytes behind the head, expected "
            f"{' x '.join(map(str, sizes))} = {math.prod(sizes)}; the file is truncated or damaged"
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(sizes)


def parse_images_and_labels(images: bytes, labels: bytes, *, classes: int, where: str) -> tuple[Array, Array]:
    """Return images [N, 1, H, W] and labels [N], both uint8, of two IDX files.

    Raises: DamagedData: not so many labels as images, a label that is no class, or as ``parse_idx``.
    """
    pixels = parse_idx(images, axes=3, where=f"{where} images")
    targets = parse_idx(labels, axes=1, where=f"{where} labels")
    if len(pixels) != len(targets):
        raise DamagedData(f"{where}: found {len(pixels)} images and {len(targets)} labels, expected as many")
    check_labels(targets, classes=classes, where=where)
    return pixels[:, None], targets


def check_labels(labels: Array, *, classes: int, where: str) -> None:
    """Check that labels are classes.

    Raises: DamagedData: a label below 0 or not below ``classes``; the first one is named.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise DamagedData(
            f"{where}: found label {labels[wrong[0]]} of sample {wrong[0]}, expected 0 to {classes - 1}; "
            "the file is damaged or of another data set"
        )
