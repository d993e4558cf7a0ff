"""Blocks: rows of a group on their way into a segment, and the segment that they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..probe import Field
from . import files, hdf5, triangle
from .bands import BandedRow
from .segment import EPOCH, STEP, Array, Declaration, create_array, header_crc, put_recording, put_whole, row_crc

# Larger segments are written piece by piece, so that they are not in memory twice.
STREAMED_BYTES = 64 * 2**20

# What stands beside the declarations of a segment; asked for at the end, as making bands takes its time.
Facts = Callable[[], Mapping[str, Any]]


@dataclass
class Block:
    """Rows of one group on their way into a file: ``rows`` [S, ...] by field name, ``statics`` [...].

    ``seconds`` are those that measuring them took, without bands that are made when they are written; None for what
    belongs to no snapshot.
    """

    declaration: Declaration
    steps: Sequence[int]
    epochs: Sequence[float]
    rows: Mapping[str, Array | BandedRow]
    statics: Mapping[str, Array]
    seconds: float | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays in memory."""
        return sum(array.nbytes for array in (*self.rows.values(), *self.statics.values()))

    @property
    def in_bands(self) -> bool:
        """Whether something of it is larger than memory: it cannot wait for the disk."""
        return any(isinstance(rows, BandedRow) for rows in self.rows.values())

    def own(self) -> None:
        """Copy the arrays, which belong to the caller and may change while they wait."""
        self.rows = {name: rows if isinstance(rows, BandedRow) else rows.copy() for name, rows in self.rows.items()}
        self.statics = {name: array.copy() for name, array in self.statics.items()}

    def costs(self) -> list[float]:
        """Snapshots, seconds and bytes, once it is written."""
        making = sum(rows.seconds for rows in self.rows.values() if isinstance(rows, BandedRow))
        return [len(self.steps), (self.seconds or 0.0) + making, self.nbytes]


def fill(file: h5py.File, blocks: Sequence[Block], facts: Facts, check: Callable[[], None]) -> None:
    """Write blocks, each of another group, into an empty file; ``check`` is called after each array."""
    for block in blocks:
        declaration = block.declaration
        arrays: list[tuple[Field, Array | BandedRow]] = []
        if declaration.stepped:
            arrays += [(STEP, np.asarray(block.steps, dtype="<i8")), (EPOCH, np.asarray(block.epochs, dtype="<f8"))]
        arrays += [(declaration.fields[name], rows) for name, rows in block.rows.items()]
        for field, rows in arrays:
            path = declaration.path(field)
            if isinstance(rows, BandedRow):
                dataset = create_array(file, declaration, field, 1, packed=False)
                crc = [rows.put(dataset, header_crc(path, field, block.steps[0]), check)]
            else:
                packed = triangle.can_be_packed(field) and triangle.is_symmetric(rows)
                dataset = create_array(file, declaration, field, len(rows), packed=packed)
                put_whole(dataset, field, triangle.pack(rows) if packed else rows)
                crc = [row_crc(path, field, step, row) for step, row in zip(block.steps, rows, strict=True)]
            hdf5.set_attribute(dataset, "crc32", np.asarray(crc, dtype=np.uint32))
            check()
        for name, array in block.statics.items():
            field = declaration.fields[name]
            dataset = create_array(file, declaration, field, None, packed=False)
            put_whole(dataset, field, array)
            crc = [row_crc(declaration.path(field), field, None, array)]
            hdf5.set_attribute(dataset, "crc32", np.array(crc, dtype=np.uint32))
            check()
    declarations = {block.declaration.group: block.declaration.to_json() for block in blocks}
    costs = {block.declaration.group: block.costs() for block in blocks if block.seconds is not None}
    # At the end, when it is known what the bands have taken.
    put_recording(file, {"declarations": declarations, **facts(), "costs": costs})


def publish_segment(path: Path, blocks: Sequence[Block], facts: Facts) -> None:
    """Write a segment, committed when this returns.

    A small one is built in memory and written at once, a large one is streamed.

    Raises: StorageError.  What bands of a block raise while they are made.
    """
    if sum(block.nbytes for block in blocks) <= STREAMED_BYTES and not any(block.in_bands for block in blocks):
        with hdf5.in_memory() as file:
            fill(file, blocks, facts, lambda: None)
            content = hdf5.image(file)
        files.publish(path, content)
        return
    with files.publishing(path) as output, h5py.File(output, "w", libver=hdf5.LIBRARY_VERSION) as file:
        fill(file, blocks, facts, output.check)
