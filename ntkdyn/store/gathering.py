"""Snapshots that are committed together, where a run that is cut off begins anew and loses nothing by it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from .block import STREAMED_BYTES, Block


class Gathering:
    """Blocks in memory until they are due: some seconds after the first of them, or when they are many bytes.

    Args: seconds: 0: at once.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since = 0.0
        self._groups: dict[str, list[Block]] = {}

    def add(self, blocks: Sequence[Block]) -> bool:
        """Take blocks of one step; whether what has been gathered is due."""
        if not self._groups:
            self._since = time.monotonic()
        for block in blocks:
            self._groups.setdefault(block.declaration.group, []).append(block)
        if not self._seconds or any(block.in_bands for block in blocks):
            return True
        for block in blocks:
            block.own()
        nbytes = sum(block.nbytes for together in self._groups.values() for block in together)
        return time.monotonic() - self._since >= self._seconds or nbytes > STREAMED_BYTES

    def take(self) -> list[Block]:
        """All that has been gathered, one block a group; nothing is left."""
        groups, self._groups = self._groups, {}
        return [together[0] if len(together) == 1 else _joined(together) for together in groups.values()]


def _joined(blocks: Sequence[Block]) -> Block:
    first = blocks[0]
    return Block(
        first.declaration,
        [step for block in blocks for step in block.steps],
        [epoch for block in blocks for epoch in block.epochs],
        {name: np.concatenate([block.rows[name] for block in blocks]) for name in first.rows},
        {name: array for block in blocks for name, array in block.statics.items()},
        sum(block.seconds or 0.0 for block in blocks),
    )
