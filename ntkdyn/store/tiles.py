"""A kernel larger than memory on its way to the disk: one closed file for each tile.

::

    DIR/kernel.json                    what the kernel is of, its shape, its tiles
    DIR/tiles/<row>-<column>.h5        one tile, in the format of a recording's segments, published all at once

Of a symmetric kernel only the tiles on and above the diagonal are stored. A tile is committed when ``write`` returns.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import (
    ConfigurationError,
    DamagedRecording,
    MissingRecording,
    RecordingExists,
    ShapeError,
    StorageError,
)
from ..probe import Field
from . import files, hdf5
from .metadata import dump_json, load_json
from .segment import (
    Array,
    Declaration,
    get_declarations,
    get_recording,
    opened,
    put_recording,
    row_crc,
)
from .verify import MAX_BYTES, remember

FORMAT = "ntkdyn kernel tiles 1"
MANIFEST = "kernel.json"
_MANIFEST_BYTES = 2**20
# Files in one folder.
_MOST_TILES = 10**6
# What a killed process left half written is removed by the next one that is this much later.
_STALE_SECONDS = 3600.0
_DIMS = (("sample", "sample_2"), ("output", "sample", "sample_2"), ("sample", "sample_2", "output", "output_2"))
# What makes two kernels the same one, in the words of the message that refuses another.
_IDENTITY = {
    "network": "network (layers, weights or buffers)",
    "inputs": "inputs x1",
    "inputs_2": "inputs x2",
    "settings": "settings",
    "dims": "layout",
    "shape": "shape",
    "dtype": "precision",
    "tile": "tile size",
    "symmetric": "symmetry",
}

Tile = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """How a kernel is cut: tile (row, column) holds samples [row·tile, (row+1)·tile) × [column·tile, …).

    Attributes:
        identity: of the kernel, stored in each tile, so that one of another kernel is noticed.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    tile: int
    symmetric: bool
    identity: str

    @staticmethod
    def of(kernel: Mapping[str, Any]) -> Grid:
        """The grid of a manifest.

        Raises: ConfigurationError: an entry is missing or impossible.
        """
        try:
            dims, shape = tuple(kernel["dims"]), tuple(kernel["shape"])
            dtype, tile, symmetric = kernel["dtype"], kernel["tile"], kernel["symmetric"]
            identity = hashlib.sha256(dump_json([kernel[key] for key in _IDENTITY]).encode()).hexdigest()
        except (KeyError, TypeError) as error:
            raise ConfigurationError(
                f"kernel: found no usable {error}, expected dims, shape, dtype, tile, symmetric and what it is of"
            ) from error
        sound = (
            dims in _DIMS
            and len(shape) == len(dims)
            and all(type(size) is int and 0 < size < 2**40 for size in (*shape, tile))
            and dtype in ("<f4", "<f8")
            and type(symmetric) is bool
        )
        grid = Grid(dims, shape, str(dtype), tile, symmetric, identity)
        sound = sound and len(grid) <= _MOST_TILES
        if not sound or (symmetric and len(set(grid.sizes)) > 1) or (len(dims) == 4 and shape[2] != shape[3]):
            raise ConfigurationError(
                f"kernel: found {dtype} {dims} of shape {shape} in tiles of {tile}, expected 'f4' or 'f8' in one of "
                f"the layouts {_DIMS}, square where it is symmetric, in at most {_MOST_TILES} tiles"
            )
        return grid

    @property
    def axes(self) -> tuple[int, int]:
        """Positions of the two sample axes."""
        return self.dims.index("sample"), self.dims.index("sample_2")

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of samples (N1, N2)."""
        first, second = self.axes
        return self.shape[first], self.shape[second]

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of rows and columns of tiles."""
        return -(-self.sizes[0] // self.tile), -(-self.sizes[1] // self.tile)

    def __len__(self) -> int:
        rows, columns = self.counts
        return rows * (rows + 1) // 2 if self.symmetric else rows * columns

    def __contains__(self, tile: Tile) -> bool:
        (row, column), (rows, columns) = tile, self.counts
        return 0 <= row < rows and (row if self.symmetric else 0) <= column < columns

    def __iter__(self) -> Iterator[Tile]:
        rows, columns = self.counts
        for row in range(rows):
            for column in range(row if self.symmetric else 0, columns):
                yield row, column

    def samples(self, block: int, axis: int) -> slice:
        """Samples of one row (axis 0) or column (axis 1) of tiles."""
        return slice(block * self.tile, min((block + 1) * self.tile, self.sizes[axis]))

    def tile_shape(self, tile: Tile) -> tuple[int, ...]:
        """Shape of the array in a tile."""
        shape = list(self.shape)
        for axis, (position, block) in enumerate(zip(self.axes, tile, strict=True)):
            samples = self.samples(block, axis)
            shape[position] = samples.stop - samples.start
        return tuple(shape)

    def tile_bytes(self, tile: Tile) -> int:
        """Bytes of the array in a tile."""
        return math.prod(self.tile_shape(tile)) * np.dtype(self.dtype).itemsize

    def name(self, tile: Tile) -> str:
        """Name of a tile's file."""
        return f"{tile[0]:06d}-{tile[1]:06d}.h5"

    def declaration(self, tile: Tile) -> Declaration:
        """What a tile's file must declare."""
        field = Field(name="kernel", dims=self.dims, shape=self.tile_shape(tile), dtype=self.dtype, static=True)
        attributes = {"kernel": self.identity, "tile": list(tile)}
        return Declaration("tile", {field.name: field}, attributes, stepped=False)

    def mirrored(self, block: Array) -> Array:
        """The block on the other side of the diagonal: Θ(x', x)_c'c = Θ(x, x')_cc'."""
        first, second = self.axes
        block = block.swapaxes(first, second)
        return block.swapaxes(2, 3) if len(self.dims) == 4 else block


class TileWriter:
    """Takes the tiles of one kernel into a folder; a sink of ``sharded_ntk``, several processes may share the folder.

    Args: path: a folder that does not exist, is empty, or holds the same kernel already, whose tiles are kept.
    Raises: ConfigurationError: the folder's name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        files.check_name(self.path.absolute().name, "kernel")
        self._grid: Grid | None = None

    def begin(self, kernel: Mapping[str, Any]) -> Mapping[str, Any]:
        """Write kernel.json, or compare with the one that is there, which is returned.

        Raises: RecordingExists: the folder holds something else; nothing was touched.  ConfigurationError: a tile of
            more than 2 GiB.  StorageError: the disk refuses, or has no room for what is missing.
        """
        grid = Grid.of(kernel)
        largest = grid.tile_bytes((0, 0))
        if largest > MAX_BYTES:
            raise ConfigurationError(
                f"{self.path}: found tiles of {largest} bytes, expected at most {MAX_BYTES}; choose a tile below "
                f"{grid.tile}"
            )
        target = self.path / MANIFEST
        if not target.exists():
            self._refuse_foreign_content()
            files.make_folder(self.path / "tiles")
            # Where another process was first, what it wrote is compared below.
            with suppress(FileExistsError):
                files.claim(target, dump_json({"format": FORMAT, **kernel}, indent=1).encode())
        known = read_manifest(self.path)
        for key, name in _IDENTITY.items():
            if dump_json(known.get(key)) != dump_json(kernel[key]):
                raise RecordingExists(
                    f"{self.path} holds a kernel of another {name}: found {short(known.get(key))}, expected "
                    f"{short(kernel[key])}; nothing was touched; choose another folder, or go on with the earlier one"
                )
        files.make_folder(self.path / "tiles")
        self._grid = grid
        self._remove_stale()
        self._refuse_full_disk(grid)
        return known

    def has(self, tile: Tile) -> bool:
        """Whether a tile is committed; one whose file is cut off is not, with a warning."""
        grid = self._started(tile)
        path = self.path / "tiles" / grid.name(tile)
        try:
            with opened(path) as file:
                check_declared(file, path, grid, tile)
        except FileNotFoundError:
            return False
        except DamagedRecording as error:
            warnings.warn(f"{error}; this tile is computed again", RuntimeWarning, stacklevel=2)
            return False
        return True

    def write(self, tile: Tile, array: Array) -> None:
        """Publish a tile; when this returns, it is committed.

        Raises: ShapeError: another shape or precision than the kernel's.  StorageError: the disk refuses; tiles before
            are safe.
        """
        grid = self._started(tile)
        shape = grid.tile_shape(tile)
        if array.shape != shape or array.dtype != np.dtype(grid.dtype):
            raise ShapeError(
                f"{self.path}: tile {tile} is {array.dtype} {list(array.shape)}, expected {grid.dtype} {list(shape)}"
            )
        declaration = grid.declaration(tile)
        field = declaration.fields["kernel"]
        path, data = declaration.path(field), np.ascontiguousarray(array)
        target = self.path / "tiles" / grid.name(tile)
        # Streamed, not built in memory: a tile may be a large part of what a process has.
        with files.publishing(target) as output, h5py.File(output, "w", libver=hdf5.LIBRARY_VERSION) as file:
            put_recording(file, {"declarations": {declaration.group: declaration.to_json()}})
            dataset = file.create_dataset(path, data=data)
            dataset.attrs["crc32"] = np.array([row_crc(path, field, None, data)], dtype=np.uint32)
        remember(target)

    def _started(self, tile: Tile) -> Grid:
        if self._grid is None:
            raise ConfigurationError(f"{self.path}: found a tile before any kernel; call begin first")
        if tile not in self._grid:
            raise ConfigurationError(
                f"{self.path}: found the tile {tile}, expected one of {self._grid.counts[0]} rows and "
                f"{self._grid.counts[1]} columns{' on or above the diagonal' if self._grid.symmetric else ''}"
            )
        return self._grid

    def _refuse_foreign_content(self) -> None:
        if self.path.is_dir():
            # Another process may be making the same folder just now.
            known = {MANIFEST, "tiles"}
            found = next(
                (e for e in self.path.iterdir() if e.name not in known and not e.name.startswith(files.TEMPORARY)), None
            )
        else:
            found = self.path if self.path.exists() or self.path.is_symlink() else None
        if found is not None:
            raise RecordingExists(
                f"{self.path} holds {found.name!r} and no kernel; nothing was touched; choose another folder"
            )

    def _remove_stale(self) -> None:
        for entry in (self.path / "tiles").glob(f"{files.TEMPORARY}*"):
            with suppress(FileNotFoundError):
                if time.time() - entry.stat().st_mtime > _STALE_SECONDS:
                    files.unlink(entry)

    def _refuse_full_disk(self, grid: Grid) -> None:
        present = present_tiles(self.path)
        needed = sum(grid.tile_bytes(tile) for tile in grid if grid.name(tile) not in present)
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise StorageError(
                f"{self.path}: found {free} bytes free, expected {needed} for the tiles that are missing; free space, "
                "or choose another disk"
            )


def read_manifest(path: Path) -> dict[str, Any]:
    """Return kernel.json of a folder.

    Raises: MissingRecording: there is none.  DamagedRecording: it is no JSON mapping, of another format, or too long.
    """
    target = path / MANIFEST
    try:
        size = target.stat().st_size
        text = files.read(target) if size <= _MANIFEST_BYTES else b""
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingRecording(
            f"{path}: found no {MANIFEST}, expected a folder that sharded_ntk filled; check the path"
        ) from error
    try:
        manifest = load_json(text)
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedRecording(f"{target} is damaged or foreign: expected format {FORMAT!r}; restore it from a copy")
    return manifest


def present_tiles(path: Path) -> set[str]:
    """Names of the tiles' files."""
    return {entry.name for entry in (path / "tiles").glob("[0-9]*-[0-9]*.h5")}


def check_declared(file: h5py.File, path: Path, grid: Grid, tile: Tile) -> None:
    """Raise DamagedRecording where a file is not that tile of that kernel; its bytes are not read."""
    expected = grid.declaration(tile)
    name = expected.path(expected.fields["kernel"])
    found = get_declarations(get_recording(file, path)).get(expected.group)
    attributes = found.attributes if found is not None else {}
    if (
        found is None
        or dump_json(found.to_json()) != dump_json(expected.to_json())
        or not isinstance(file.get(name, getlink=True), h5py.HardLink)
        or file[name].shape != grid.tile_shape(tile)
    ):
        raise DamagedRecording(
            f"{path} is damaged: found the tile {attributes.get('tile')} of the kernel "
            f"{short(attributes.get('kernel'))}, expected {list(tile)} of {short(grid.identity)} and its shape; "
            "restore it from a copy"
        )


def short(value: Any) -> str:
    text = value[:12] if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
