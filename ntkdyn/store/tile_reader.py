"""TiledKernel: a kernel on disk as an array, for sizes of which memory holds only a few tiles."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigurationError, DamagedRecording, MissingRecording, ReplacedFile, ShapeError
from .segment import Array, get_array, opened
from .tiles import MANIFEST, Grid, Tile, check_declared, present_tiles, read_manifest, short
from .verify import MAX_BYTES, MAX_RATIO, refuse_replaced, validate


class TiledKernel:
    """A kernel on disk as an array; only the tiles that are asked for are read, each checked by its CRC.

    ``kernel[rows, columns]`` takes integers and slices on every axis and fills in the other side of the diagonal;
    ``kernel @ vectors`` reads each tile once; ``kernel.tiles()`` goes through all. A kernel in the making can be read
    as far as it is there. Reading many rows at once is faster than one by one: a row needs a whole row of tiles.

    Attributes:
        shape, dtype, dims: of the whole kernel: [N1, N2], [C, N1, N2] or [N1, N2, C, C].
        manifest: what the kernel is of.
    """

    def __init__(self, path: Path, *, trusted: bool, max_bytes: int, max_ratio: float) -> None:
        self.path = path
        self._trusted = trusted
        self._max_bytes = max_bytes
        self._max_ratio = max_ratio
        self.manifest = read_manifest(path)
        try:
            self._grid = Grid.of(self.manifest)
        except ConfigurationError as error:
            raise DamagedRecording(f"{path / MANIFEST} is damaged: {error}; restore it from a copy") from error
        self.dims, self.shape = self._grid.dims, self._grid.shape
        self.dtype = np.dtype(self._grid.dtype)
        self.ndim = len(self.shape)

    @classmethod
    def open(
        cls, path: str | Path, *, trusted: bool = False, max_bytes: int = MAX_BYTES, max_ratio: float = MAX_RATIO
    ) -> TiledKernel:
        """Open the folder that a TileWriter filled, or is filling.

        Tiles that this process has not written are validated at their first use, in a limited process, unless
        ``trusted``.

        Args: max_bytes: limit of one tile.  max_ratio: limit of its size over its stored size.
        Raises: MissingRecording: no kernel there.  DamagedRecording: kernel.json is damaged.
        """
        return cls(Path(path), trusted=trusted, max_bytes=max_bytes, max_ratio=max_ratio)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape as a matrix: [N1, N2], or [N1·C, N2·C] of a full kernel, sample-major.

        Raises: ShapeError: a kernel for each output is several matrices.
        """
        if len(self.dims) == 3:
            raise ShapeError(
                f"{self.path}: a kernel {list(self.shape)} for each output is no matrix; take one output, kernel[c]"
            )
        outputs = self.shape[2] if len(self.dims) == 4 else 1
        return self._grid.sizes[0] * outputs, self._grid.sizes[1] * outputs

    def missing(self) -> list[tuple[int, int]]:
        """Tiles (row, column) that are not there (yet)."""
        present = present_tiles(self.path)
        return [tile for tile in self._grid if self._grid.name(tile) not in present]

    def tiles(self, *, mirrored: bool = True) -> Iterator[tuple[slice, slice, Array]]:
        """Go through the kernel, one tile in memory: (samples of axis N1, samples of axis N2, array of that block).

        Args: mirrored: of a symmetric kernel, also the blocks below the diagonal; each follows its counterpart.
        Raises: MissingRecording: tiles are missing.  DamagedRecording, UntrustedFile: names the file.
        """
        for row in range(self._grid.counts[0]):
            here = [(row, column) for column in range(row if self._grid.symmetric else 0, self._grid.counts[1])]
            self._require(here)
            for tile in here:
                block = self._load(tile)
                rows, columns = self._grid.samples(tile[0], 0), self._grid.samples(tile[1], 1)
                yield rows, columns, block
                if mirrored and self._grid.symmetric and tile[0] != tile[1]:
                    yield columns, rows, self._grid.mirrored(block)

    def __getitem__(self, key: Any) -> Array:
        """Part of the kernel by integers and slices, as NumPy has them.

        Raises: IndexError.  MissingRecording, DamagedRecording, UntrustedFile: as ``tiles``.
        """
        entries = self._entries(key)
        picks = [range(size)[entry] for size, entry in zip(self.shape, entries, strict=True)]
        whole = [pick if isinstance(pick, range) else range(pick, pick + 1) for pick in picks]
        rows, columns = (_by_block(whole[axis], self._grid.tile) for axis in self._grid.axes)
        uses: dict[Tile, list[Tile]] = {}
        for row in rows:
            for column in columns:
                above = not self._grid.symmetric or row <= column
                uses.setdefault((row, column) if above else (column, row), []).append((row, column))
        self._require(uses)
        result: Array = np.empty([len(pick) for pick in whole], dtype=self.dtype)
        for tile, places in uses.items():
            block = self._load(tile)
            for place in places:
                source: list[slice] = [_as_slice(pick) for pick in whole]
                target = [slice(None)] * self.ndim
                for axis, block_number, parts in zip(self._grid.axes, place, (rows, columns), strict=True):
                    source[axis], target[axis] = parts[block_number]
                result[tuple(target)] = (block if place == tile else self._grid.mirrored(block))[tuple(source)]
        return result[tuple(0 if isinstance(pick, int) else slice(None) for pick in picks)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError(f"{self.path}: a kernel on disk has no array without a copy; leave copy=False out")
        return np.asarray(self[...], dtype=dtype)

    def __matmul__(self, vectors: Any) -> Array:
        """Product of the kernel as a matrix with [M] or [M, k], sample-major; each tile is read once.

        Computed in the wider precision of the two. ``scipy.sparse.linalg.LinearOperator(kernel.matrix_shape,
        matvec=kernel.__matmul__, dtype=kernel.dtype)`` makes it an operator.

        Raises: ShapeError.  MissingRecording, DamagedRecording, UntrustedFile: as ``tiles``.
        """
        height, width = self.matrix_shape
        given = np.asarray(vectors)
        if given.ndim not in (1, 2) or given.shape[0] != width:
            raise ShapeError(f"{self.path}: vectors have shape {list(given.shape)}, expected [{width}] or [{width}, k]")
        outputs = height // self._grid.sizes[0]
        result = np.zeros((height, *given.shape[1:]), dtype=np.result_type(self.dtype, given.dtype))
        for samples, samples_2, block in self.tiles(mirrored=False):
            matrix = as_matrix(block)
            rows, columns = (slice(part.start * outputs, part.stop * outputs) for part in (samples, samples_2))
            result[rows] += matrix @ given[columns]
            if self._grid.symmetric and rows != columns:
                result[columns] += matrix.T @ given[rows]
        return result

    def _entries(self, key: Any) -> list[Any]:
        """One integer or slice for each axis."""
        entries = list(key) if isinstance(key, tuple) else [key]
        dots = [index for index, entry in enumerate(entries) if entry is Ellipsis]
        if len(dots) > 1 or len(entries) - len(dots) > self.ndim:
            raise IndexError(f"{self.path}: found {len(entries)} indices, expected at most {self.ndim} and one '...'")
        position = dots[0] if dots else len(entries)
        missing = [slice(None)] * (self.ndim - len(entries) + len(dots))
        entries[position : position + len(dots)] = missing
        for axis, (entry, size) in enumerate(zip(entries, self.shape, strict=True)):
            if isinstance(entry, slice):
                continue
            try:
                number = operator.index(entry)
            except TypeError as error:
                raise IndexError(
                    f"{self.path}: found the index {short(entry)}, expected integers and slices"
                ) from error
            if isinstance(entry, (bool, np.bool_)) or not -size <= number < size:
                raise IndexError(
                    f"{self.path}: found the index {entry!r} on axis {axis}, expected -{size} to {size - 1}"
                )
            entries[axis] = number
        return entries

    def _require(self, tiles: Collection[Tile]) -> None:
        """All these tiles are there and sound; checked together, because each check starts a process."""
        present = present_tiles(self.path)
        missing = (tile for tile in tiles if self._grid.name(tile) not in present)
        first = list(islice(missing, 3))
        if first:
            count = len(first) + sum(1 for _ in missing)
            names = ", ".join(map(str, first)) + (f" and {count - len(first)} more" if count > len(first) else "")
            raise MissingRecording(
                f"{self.path}: found {len(present)} of {len(self._grid)} tiles, here are missing {names}; call "
                "sharded_ntk again with the same network, inputs, settings and folder: it computes what is missing"
            )
        if not self._trusted:
            paths = [self.path / "tiles" / self._grid.name(tile) for tile in tiles]
            validate(paths, max_bytes=self._max_bytes, max_ratio=self._max_ratio)

    def _load(self, tile: Tile) -> Array:
        path = self.path / "tiles" / self._grid.name(tile)
        declaration = self._grid.declaration(tile)
        accept = None
        if not self._trusted:
            accept = partial(refuse_replaced, path, max_bytes=self._max_bytes, max_ratio=self._max_ratio)
        try:
            with opened(path, accept) as file:
                check_declared(file, path, self._grid, tile)
                return get_array(file, path, declaration, declaration.fields["kernel"], None)
        except ReplacedFile:
            raise
        except DamagedRecording as error:
            raise DamagedRecording(f"{error}; or remove it and call sharded_ntk again") from error


def as_matrix(block: Array) -> Array:
    """A block [n1, n2] as it is, [n1, n2, C, C] as [n1·C, n2·C], sample-major."""
    if block.ndim == 2:
        return block
    first, second, outputs, outputs_2 = block.shape
    return block.transpose(0, 2, 1, 3).reshape(first * outputs, second * outputs_2)


def _by_block(picks: range, tile: int) -> dict[int, tuple[slice, slice]]:
    """Which blocks picked samples lie in: block -> (slice within the block, slice of the result)."""
    parts: dict[int, tuple[slice, slice]] = {}
    start = 0
    while start < len(picks):
        block = picks[start] // tile
        # The picks within the block, in the direction of the step.
        room = (block + 1) * tile - 1 - picks[start] if picks.step > 0 else picks[start] - block * tile
        stop = min(len(picks), start + room // abs(picks.step) + 1)
        inside = picks[start:stop]
        local = range(inside.start - block * tile, inside.stop - block * tile, inside.step)
        parts[block] = (_as_slice(local), slice(start, stop))
        start = stop
    return parts


def _as_slice(picks: range) -> slice:
    if not picks:
        return slice(0, 0)
    return slice(picks.start, None if picks.stop < 0 else picks.stop, picks.step)
