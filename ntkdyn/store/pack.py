"""Packing: all segments of a run in one run.h5 that netCDF4 readers understand.

The file is streamed through a Python file object of ``store/files``, read again, and its CRCs compared with those of
the segments; only then are the segments removed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import DamagedRecording, StorageError
from ..probe import Field
from . import files, hdf5
from .bands import in_pieces
from .compact import compare_sums, costs_of, merge
from .declare import coordinate_array, folder_of
from .lock import Lock
from .metadata import dump_json
from .reader import RunReader, Source
from .repair import SUPERSEDED
from .segment import (
    EPOCH,
    STEP,
    TEXT,
    Declaration,
    get_array,
    put_recording,
    row_crc,
    stored_dtype,
)
from .verify import ANY_SIZE, remember

AUTOMATIC_BYTES = 2**30
_CHUNK = 2**20
# Names that the file format or its readers use themselves.
_RESERVED = {
    "Conventions", "format", "recording", "crc32", "units", "long_name", "dtype", "coordinates", "dimensions",
    "CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "_FillValue", "missing_value", "scale_factor", "add_offset",
    "calendar", "_Unsigned", "_Encoding", "_Netcdf4Dimid", "_NCProperties",
}  # fmt: skip


def pack_when_small(path: Path) -> bool:
    """Pack a run of at most 1 GiB at its end, by its writer; a refusing disk is warned of, the segments stay."""
    size = sum(entry.stat().st_size for entry in (path / "segments").glob("*.h5"))
    if size > AUTOMATIC_BYTES:
        return False
    try:
        pack_locked(RunReader.open(path, max_bytes=ANY_SIZE))
    except (StorageError, DamagedRecording) as error:
        warnings.warn(f"{error}; {path} stays unpacked, its segments are complete", RuntimeWarning, stacklevel=4)
        return False
    return True


def pack(path: str | Path, *, trusted: bool = False) -> Path:
    """Merge all segments of a run that nobody writes into one run.h5 and remove them; return its path.

    Rows that a resumption superseded go into ``DIR/superseded/``.

    Raises: StorageError: the disk refuses; the segments stay.  DamagedRecording: a segment is damaged; all stay.
        LockedRecording: the run is being written.
    """
    lock = Lock(Path(path)) if Path(path).is_dir() else None
    try:
        return pack_locked(RunReader.open(path, trusted=trusted, max_bytes=ANY_SIZE))
    finally:
        if lock is not None:
            lock.release()


def pack_locked(reader: RunReader) -> Path:
    """As ``pack``, by the owner of the lock; the rows that the reader shows."""
    target = reader.path / "run.h5"
    _keep_superseded(reader)
    write_packed(reader, target)
    remember(target)
    for source in reader.sources:
        if source.path != target:
            files.unlink(source.path)
    return target


def write_packed(reader: RunReader, target: Path) -> None:
    """Write all that a reader shows into one file, piece by piece, and compare it with the CRCs; nothing is removed.

    Raises: StorageError.  DamagedRecording: a segment is.  FileNotFoundError: a segment was merged away meanwhile.
    """
    try:
        with files.publishing(target) as output:
            # No cache of chunks: it would hold megabytes of every array, and the disk would refuse only at the end.
            with h5py.File(output, "w", libver=hdf5.LIBRARY_VERSION, rdcc_nbytes=0) as file:
                sums = _Packing(file, reader, output.check).run()
            output.sync()
            compare_sums(output.path, sums)
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError) and cause.filename in {str(source.path) for source in reader.sources}:
            raise cause from None
        raise


def _keep_superseded(reader: RunReader) -> None:
    """Copy the rows that resumptions superseded into one file a branch, before their segments go."""
    by_branch: dict[tuple[int, ...], list[Source]] = {}
    for source in reader.sources:
        last = source.rows_behind(reader.branches)
        if any((steps > last).any() for steps, _ in source.axes.values()):
            by_branch.setdefault(source.branch, []).append(source)
    for branch, sources in by_branch.items():
        folder = reader.path / SUPERSEDED
        files.make_folder(folder)
        last = sources[0].rows_behind(reader.branches)
        stem, number = f"branch-{len(branch)}", 1
        while (target := folder / f"{stem}-{number}.h5").exists():
            number += 1
        merge(sources, target, level=0, keep=partial(_is_later, last))


def _is_later(last: float, source: int, step: int) -> bool:
    return step > last


def _chunks(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Whole steps, about 1 MiB; axes of one huge step are halved."""
    chunk = [max(size, 1) for size in shape]
    row = math.prod(chunk[1:]) * itemsize
    chunk[0] = max(1, min(chunk[0], _CHUNK // max(row, 1)))
    while math.prod(chunk) * itemsize > 16 * _CHUNK:
        longest = int(np.argmax(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return tuple(chunk)


def _put_attributes(item: h5py.Group | h5py.Dataset, attributes: Mapping[str, Any]) -> None:
    """Attributes for other readers; ours takes them from the JSON of the root."""
    for key, value in attributes.items():
        # HDF5 ends a name at its first NUL.
        if not key or key in _RESERVED or "\0" in key:
            continue
        if isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63):
            hdf5.set_attribute(item, key, np.array(int(value) if isinstance(value, bool) else value))
        elif isinstance(value, str):
            # HDF5 takes no halves of surrogate pairs; our own reader has them from the JSON.
            hdf5.set_attribute(item, key, value.replace("\0", "").encode(errors="backslashreplace").decode())
        else:
            hdf5.set_attribute(item, key, dump_json(value))


class _Packing:
    """One run on its way into one file; ``run`` returns the CRC of every row by array path."""

    def __init__(self, file: h5py.File, reader: RunReader, check: Callable[[], None]) -> None:
        self.check = check
        self.file = file
        self.reader = reader
        self.sums: dict[str, np.ndarray[Any, Any]] = {}
        # Looking one up by its path takes longer than writing a row of it.
        self._datasets: dict[str, h5py.Dataset] = {}

    def run(self) -> dict[str, np.ndarray[Any, Any]]:
        reader = self.reader
        declarations = {group: entry.to_json() for group, entry in reader.declarations.items()}
        facts = {"manifest": reader.manifest, "branch": list(reader.branches), **costs_of(reader.sources)}
        put_recording(self.file, {"declarations": declarations, **facts})
        hdf5.set_attribute(self.file, "Conventions", "CF-1.10")
        _put_attributes(self.file, reader.manifest)
        present = set(reader.names())
        for entry in reader.declarations.values():
            group = self.file.require_group(entry.group)
            _put_attributes(group, entry.attributes)
            if entry.stepped:
                self._put_axis(entry)
            for field in entry.fields.values():
                if entry.path(field) in present:
                    self._create(entry, field)
        self._copy(present)
        for name, crc in self.sums.items():
            hdf5.set_attribute(self._datasets[name], "crc32", crc)
        return self.sums

    def _put_axis(self, entry: Declaration) -> None:
        group = self.file[entry.group]
        steps, epochs = self.reader.steps(entry.group), self.reader.epochs(entry.group)
        for field, values in ((STEP, steps), (EPOCH, epochs)):
            path = entry.path(field)
            kind = np.dtype(field.dtype)
            chunks = _chunks(values.shape, kind.itemsize)
            dataset = self.file.create_dataset(path, data=values.astype(kind), maxshape=(None,), chunks=chunks)
            self._datasets[path] = dataset
            self._label(dataset, field)
            rows = zip(steps.tolist(), values.astype(kind), strict=True)
            self.sums[path] = np.array([row_crc(path, field, step, row) for step, row in rows], dtype=np.uint32)
        axis, beside = (self._datasets[entry.path(field)] for field in (STEP, EPOCH))
        axis.make_scale("step")
        beside.dims[0].attach_scale(axis)
        hdf5.set_attribute(group, "coordinates", "epoch")

    def _label(self, dataset: h5py.Dataset, field: Field) -> None:
        hdf5.set_attribute(dataset, "units", field.unit)
        hdf5.set_attribute(dataset, "long_name", field.long_name or field.name.split("/")[-1])
        _put_attributes(dataset, field.attributes)
        if field.dtype != TEXT and np.dtype(field.dtype).kind == "b":
            hdf5.set_attribute(dataset, "dtype", "bool")

    def _create(self, entry: Declaration, field: Field) -> None:
        path, kind = entry.path(field), stored_dtype(field.dtype)
        scales = [self._scale(entry, field, dim) for dim in field.dims]
        # HDF5 wants chunks of at least one entry, so an axis without entries must be free to grow.
        free = tuple(None if size == 0 else size for size in field.shape)
        if entry.is_static(field):
            growing = {"maxshape": free, "chunks": _chunks(field.shape, 8)} if 0 in field.shape else {}
            dataset = self.file.create_dataset(path, shape=field.shape, dtype=kind, **growing)
            self.sums[path] = np.zeros(1, dtype=np.uint32)
        else:
            count = len(self.reader.places(entry.group))
            shape = (count, *field.shape)
            chunks = _chunks(shape, np.dtype(kind).itemsize)
            dataset = self.file.create_dataset(path, shape=shape, dtype=kind, maxshape=(None, *free), chunks=chunks)
            scales = [self._datasets[entry.path(STEP)], *scales]
            self.sums[path] = np.zeros(count, dtype=np.uint32)
        self._datasets[path] = dataset
        self._label(dataset, field)
        for axis, scale in enumerate(scales):
            dataset.dims[axis].attach_scale(scale)

    def _scale(self, entry: Declaration, field: Field, dim: str) -> h5py.Dataset:
        folder = folder_of(entry.path(field))
        path = f"{folder}/{dim}"
        size = field.shape[field.dims.index(dim)]
        if path in self.file:
            return self.file[path]
        values = next(
            (
                other.coordinates[dim]
                for other in entry.fields.values()
                if folder_of(entry.path(other)) == folder and dim in other.coordinates
            ),
            None,
        )
        growing = {"maxshape": (None,), "chunks": (1,)} if size == 0 else {}
        if values is None:
            scale = self.file.create_dataset(path, data=np.zeros(size, dtype="<f4"), **growing)
            # The words by which netCDF4 knows an axis without labels.
            scale.make_scale(f"This is a netCDF dimension but not a netCDF variable. {size:9d}")
        else:
            labels = coordinate_array(values, path)
            text = labels.dtype.kind == "U"
            data = labels.astype(object) if text else labels
            scale = self.file.create_dataset(
                path, data=data, dtype=h5py.string_dtype() if text else labels.dtype, **growing
            )
            scale.make_scale(dim)
        return scale

    def _copy(self, present: set[str]) -> None:
        done: set[str] = set()
        for number, source in enumerate(self.reader.sources):
            with source.opened() as origin:
                for group in source.declarations:
                    entry = self.reader.declarations[group]
                    static = [field for field in entry.fields.values() if entry.is_static(field)]
                    for field in static:
                        path = entry.path(field)
                        if path in source.statics and path in present and path not in done:
                            self._put(path, field, ..., get_array(origin, source.path, entry, field, None))
                            self.sums[path][:] = origin[path].attrs["crc32"]
                            done.add(path)
                    if entry.stepped:
                        self._copy_rows(number, origin, entry)

    def _copy_rows(self, number: int, origin: h5py.File, entry: Declaration) -> None:
        source = self.reader.sources[number]
        steps = source.axes[entry.group][0].tolist()
        here = self.reader.rows_in(entry.group, number)
        for field in entry.fields.values():
            if entry.is_static(field):
                continue
            path = entry.path(field)
            stored = np.atleast_1d(origin[path].attrs["crc32"])
            for selection, data in in_pieces(origin, source.path, entry, field, steps, here):
                self._put(path, field, selection, data)
            self.sums[path][[index for index, _ in here]] = stored[[row for _, row in here]]

    def _put(self, path: str, field: Field, selection: Any, data: np.ndarray[Any, Any]) -> None:
        if data.size:
            kind = stored_dtype(field.dtype)
            self._datasets[path][selection] = data.astype(object) if field.dtype == TEXT else data.astype(kind)
        # A full disk ends the work here, not after everything has been sent to it in vain.
        self.check()
