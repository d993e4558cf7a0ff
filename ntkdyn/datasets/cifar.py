"""Batches of CIFAR-10 and CIFAR-100, in the binary and in the python layout."""

from __future__ import annotations

import numpy as np

from ..errors import DamagedData
from .idx import Array, check_labels
from .pickled import read_pickled

_CHANNELS, _SIDE = 3, 32
_PIXELS = _CHANNELS * _SIDE * _SIDE


def parse_binary(content: bytes, *, labels: int, classes: int, where: str) -> tuple[Array, Array]:
    """Return images [N, 3, 32, 32] and labels [N], both uint8, of records: label bytes, then 3072 pixels by channel.

    Args: labels: label bytes a record, of which the last counts (CIFAR-100: coarse, fine).
    Raises: DamagedData: no whole number of records, or a label that is no class.
    """
    record = labels + _PIXELS
    if not content or len(content) % record:
        raise DamagedData(
            f"{where}: found {len(content)} bytes, expected a multiple of {record} bytes, one record an image; "
            "the file is truncated or of another layout"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    targets = records[:, labels - 1]
    check_labels(targets, classes=classes, where=where)
    return records[:, labels:].reshape(-1, _CHANNELS, _SIDE, _SIDE), targets


def parse_python(content: bytes, *, key: str, classes: int, where: str) -> tuple[Array, Array]:
    """Return images [N, 3, 32, 32] uint8 and labels [N] of a pickled dictionary with "data" and labels under ``key``.

    The pickle is read by ``read_pickled``, which runs nothing.

    Raises: DamagedData: other content than an array [N, 3072] and N labels, or as ``read_pickled``.
    """
    batch = read_pickled(content, where=where)
    data, labels = (batch.get("data"), batch.get(key)) if isinstance(batch, dict) else (None, None)
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != _PIXELS:
        found = f"an array {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DamagedData(f"{where}: found {found} as data, expected an array [images, {_PIXELS}]")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DamagedData(f"{where}: found {type(labels).__name__} as {key}, expected a list of integers")
    if len(labels) != len(data):
        raise DamagedData(f"{where}: found {len(data)} images and {len(labels)} {key}, expected as many")
    targets = np.array(labels, np.int64)
    check_labels(targets, classes=classes, where=where)
    return data.reshape(-1, _CHANNELS, _SIDE, _SIDE), targets
