"""Rows of an array that are too large for memory: written, checked and read in bands of their first axis."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import ProbeError
from ..probe import Bands, Field
from .segment import (
    TEXT,
    Array,
    Declaration,
    canonical,
    check_shape,
    get_array,
    header_crc,
    is_packed,
    refuse_damaged_row,
    selected,
)

# Bytes of a band that is read, which has at least one entry of the first axis.
BAND_BYTES = 64 * 2**20
# Bytes of whole rows that are read at once, at least one.
_PIECE_BYTES = 64 * 2**20
# Arrays beyond this stay on the disk where only the last row is wanted.
_LARGE_BYTES = 2**30


def row_bytes(field: Field) -> int:
    """Bytes of one row in memory; of text those of its references."""
    return math.prod(field.shape) * (8 if field.dtype == TEXT else np.dtype(field.dtype).itemsize)


def is_large(field: Field) -> bool:
    """Whether a row should not be in memory without need."""
    return row_bytes(field) > _LARGE_BYTES


class BandedRow:
    """One row of an array on its way into a file, [1, size, ...], band by band; it can be taken once.

    ``seconds`` are those that making the bands took.
    """

    def __init__(self, declaration: Declaration, field: Field, bands: Bands) -> None:
        self._where = f"field {declaration.path(field)!r}"
        self._field = field
        self._bands = bands
        self.shape = (1, *field.shape)
        self.nbytes = row_bytes(field)
        self.seconds = 0.0

    def put(self, dataset: h5py.Dataset, crc: int, check: Callable[[], None]) -> int:
        """Write the bands and return the row's CRC, which begins with that of its header.

        Raises: ProbeError: bands of another shape or dtype than declared.
        """
        # Closed at once, not by the collector: what the maker of the bands does last must not come while training runs.
        with closing(self._timed()) as bands:
            return self._put(bands, dataset, crc, check)

    def _put(self, bands: Iterator[Any], dataset: h5py.Dataset, crc: int, check: Callable[[], None]) -> int:
        done = 0
        for band in bands:
            array = np.asarray(band)
            size, *inner = self._field.shape
            if array.shape[1:] != tuple(inner) or done + len(array) > size:
                raise ProbeError(
                    f"{self._where}: found a band of shape {list(array.shape)} from row {done}, expected rows of "
                    f"{inner} and {size} in all as declared"
                )
            if not np.can_cast(array.dtype, self._field.dtype, "same_kind"):
                raise ProbeError(f"{self._where}: found dtype {array.dtype}, expected {self._field.dtype} as declared")
            array = np.ascontiguousarray(array.astype(self._field.dtype, copy=False))
            if array.size:
                dataset[0, done : done + len(array)] = array.astype(dataset.dtype, copy=False)
            crc = zlib.crc32(canonical(array), crc)
            done += len(array)
            check()
        if done != self._field.shape[0]:
            raise ProbeError(f"{self._where}: found {done} rows in all bands, expected {self._field.shape[0]}")
        return crc

    def _timed(self) -> Generator[Any, None, None]:
        bands: Any = iter(self._bands)
        with closing(bands) if hasattr(bands, "close") else nullcontext():
            while True:
                started = time.perf_counter()
                try:
                    band = next(bands, None)
                except OSError as error:
                    # Not to be taken for one of the disk that the bands are written to.
                    raise ProbeError(f"{self._where}: {type(error).__name__}: {error}") from error
                self.seconds += time.perf_counter() - started
                if band is None:
                    return
                yield band


def is_read_in_bands(dataset: h5py.Dataset, field: Field) -> bool:
    """Whether rows of an array are taken in bands: large ones that are stored as they are.

    Upper triangles have been in memory when they were written.
    """
    return row_bytes(field) > BAND_BYTES and field.dtype != TEXT and field.shape[0] > 1 and not is_packed(dataset)


def checked_bands(
    file: h5py.File, path: Path, declaration: Declaration, field: Field, steps: Sequence[int], row: int
) -> Iterator[tuple[slice, Array]]:
    """One row, band by band: which of its first axis, and the numbers. Its CRC is compared after the last.

    Raises: DamagedRecording: names the file, the array and the step.
    """
    name = declaration.path(field)
    dataset = file[name]
    check_shape(dataset, path, name, field, (len(steps), *field.shape))
    size = field.shape[0]
    height = max(1, BAND_BYTES // (row_bytes(field) // size))
    crc = header_crc(name, field, steps[row])
    for start in range(0, size, height):
        here = slice(start, min(start + height, size))
        band = np.asarray(dataset[row, here]).astype(field.dtype, copy=False)
        crc = zlib.crc32(canonical(band), crc)
        yield here, band
    refuse_damaged_row(path, name, steps[row], crc, int(np.atleast_1d(dataset.attrs["crc32"])[row]))


def in_pieces(
    file: h5py.File,
    path: Path,
    declaration: Declaration,
    field: Field,
    steps: Sequence[int],
    rows: Sequence[tuple[int, int]],
) -> Iterator[tuple[Any, Array]]:
    """Rows of an array in pieces that memory holds: where they go, and the numbers; every CRC is compared.

    Args: steps: of the file's group.  rows: (index where they go, row in the file), by rising index.
    Raises: DamagedRecording: names the file, the array and the step.
    """
    if is_read_in_bands(file[declaration.path(field)], field):
        for index, row in rows:
            for here, band in checked_bands(file, path, declaration, field, steps, row):
                yield (index, here), band
        return
    count = max(1, _PIECE_BYTES // max(math.prod(field.shape) * 8, 1))
    for start in range(0, len(rows), count):
        indices, chosen = zip(*rows[start : start + count], strict=True)
        yield selected(indices), get_array(file, path, declaration, field, steps, chosen)
