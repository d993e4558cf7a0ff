"""Consecutive ranges of samples, rows or columns."""

from __future__ import annotations

from collections.abc import Iterator


def ranges(whole: slice, length: int) -> Iterator[slice]:
    """Consecutive ranges of at most ``length``."""
    for start in range(whole.start, whole.stop, length):
        yield slice(start, min(start + length, whole.stop))
