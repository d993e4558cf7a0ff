"""What a file of a recording looks like inside: declared arrays, one CRC32 per array and step, JSON beside them.

A segment and a packed run.h5 have one structure, so one piece of code reads both::

    /                       attributes: format, recording (JSON: declarations, in run.h5 also the manifest), crc32
    /<group>/step [S]       applied optimizer steps; /<group>/epoch [S] beside it, NaN where unknown
    /<group>/<field>        [S, ...], or [...] where static; attribute crc32 [S] or [1]; in segments a symmetric
                            kernel is stored as its upper triangles [S, ..., n (n + 1) / 2], attribute packed

The CRC32 of a row covers its path, dims, shape, dtype, step and bytes; packing carries it over and checks it again.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import h5py
import numpy as np

from ..errors import DamagedRecording, NewerRecording, NtkdynError
from ..probe import Field
from . import files, hdf5, triangle
from .metadata import dump_json, load_json

_VERSION = 1
FORMAT = f"ntkdyn recording {_VERSION}"
TEXT = "str"
STEP = Field(name="step", dtype="<i8", unit="1", long_name="applied optimizer steps")
EPOCH = Field(name="epoch", dtype="<f8", unit="epoch", long_name="epochs of training")
_PACKED, _UPPER_TRIANGLE = "packed", "upper triangle"

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Declaration:
    """The arrays of one group; ``stepped`` groups have a step axis, others hold static arrays only."""

    group: str
    fields: Mapping[str, Field]
    attributes: Mapping[str, Any]
    stepped: bool = True

    def is_static(self, field: Field) -> bool:
        return field.static or not self.stepped

    def path(self, field: Field) -> str:
        return f"{self.group}/{field.name}"

    def to_json(self) -> dict[str, Any]:
        return {
            "stepped": self.stepped,
            "attributes": dict(self.attributes),
            "fields": [
                {
                    "name": field.name,
                    "dims": field.dims,
                    "shape": field.shape,
                    "dtype": field.dtype,
                    "unit": field.unit,
                    "long_name": field.long_name,
                    "coordinates": {dim: list(values) for dim, values in field.coordinates.items()},
                    "attributes": dict(field.attributes),
                    "static": field.static,
                }
                for field in self.fields.values()
            ],
        }

    @staticmethod
    def from_json(group: str, entry: Mapping[str, Any]) -> Declaration:
        fields = {}
        for given in entry["fields"]:
            values = {**given, "dims": tuple(given["dims"]), "shape": tuple(int(size) for size in given["shape"])}
            fields[values["name"]] = Field(**values)
        return Declaration(group, fields, dict(entry["attributes"]), bool(entry["stepped"]))


def canonical(array: Array) -> bytes | memoryview:
    """Bytes of an array that do not depend on memory layout or file."""
    if array.dtype.kind in "UO":
        return json.dumps(array.tolist(), ensure_ascii=False).encode()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""


def row_crc(path: str, field: Field, step: int | None, row: Array) -> int:
    """CRC32 over path, dims, shape, dtype, step (None where static) and bytes of one row."""
    return zlib.crc32(canonical(row), header_crc(path, field, step))


def header_crc(path: str, field: Field, step: int | None) -> int:
    """CRC32 of what stands before the bytes of a row."""
    return zlib.crc32(json.dumps([path, field.dims, field.shape, field.dtype, step], ensure_ascii=False).encode())


def stored_dtype(dtype: str) -> Any:
    """HDF5 type of a declared one: text is variable-length UTF-8, truth values are int8 (netCDF4 has no bool)."""
    if dtype == TEXT:
        return h5py.string_dtype()
    return np.dtype("i1") if np.dtype(dtype).kind == "b" else np.dtype(dtype)


def put_recording(file: h5py.File, recording: Mapping[str, Any]) -> None:
    """Write the root attributes that make a file part of a recording."""
    text = dump_json(recording)
    hdf5.set_attribute(file, "format", FORMAT)
    hdf5.set_attribute(file, "recording", text)
    hdf5.set_attribute(file, "crc32", np.array(zlib.crc32(text.encode()), np.uint32))


def create_array(
    file: h5py.File, declaration: Declaration, field: Field, count: int | None, *, packed: bool
) -> h5py.Dataset:
    """Make room for the rows of an array, ``count`` of them, or None for a static one.

    Args: packed: as upper triangles, see ``triangle``.
    """
    shape = triangle.packed_shape(field.shape) if packed else field.shape
    whole = shape if count is None else (count, *shape)
    dataset = hdf5.create_dataset(file, declaration.path(field), whole, stored_dtype(field.dtype))
    if packed:
        hdf5.set_attribute(dataset, _PACKED, _UPPER_TRIANGLE)
    return dataset


def put_rows(dataset: h5py.Dataset, field: Field, selection: Any, data: Array) -> None:
    """Write rows, or with ``...`` a static array, as the file stores them."""
    if data.size == 0:
        return
    if is_packed(dataset):
        data = triangle.pack(data)
    if selection is ...:
        put_whole(dataset, field, data)
    else:
        dataset[selection] = data.astype(object if field.dtype == TEXT else dataset.dtype, copy=False)


def put_whole(dataset: h5py.Dataset, field: Field, data: Array) -> None:
    """Write an array of the dataset's own shape, as the file stores it."""
    if data.size:
        kind = object if field.dtype == TEXT else stored_dtype(field.dtype)
        hdf5.write_dataset(dataset, data.astype(kind, copy=False))


def is_packed(dataset: h5py.Dataset) -> bool:
    """Whether an array is stored as upper triangles."""
    return _PACKED in dataset.attrs


# What tells a file from one that has taken its place: device, inode, size, times of content and inode in ns.
Identity = tuple[int, int, int, int, int]


def identity_of(status: os.stat_result) -> Identity:
    """The identity of a file, by the status of the path or, where it is to be read, of its descriptor."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def opened(path: Path, accept: Callable[[Identity], object] | None = None) -> Iterator[h5py.File]:
    """Open a file of a recording for reading; whatever HDF5 finds wrong in it becomes DamagedRecording.

    FileNotFoundError passes, because a live folder changes under its readers.

    Args: accept: called with the identity of what has been opened before any of it is read; raises to refuse it.
    Raises: DamagedRecording.  UntrustedFile: a FIFO or device.
    """
    try:
        with ExitStack() as stack:
            content = stack.enter_context(files.regular_file(path))
            if accept is not None:
                accept(identity_of(os.fstat(content.fileno())))
            # By this descriptor, as the path may name another file by now. It has no HDF5 lock either: files are
            # immutable once published, and locking fails on many network mounts.
            yield stack.enter_context(h5py.File(content, "r"))
    except (FileNotFoundError, NtkdynError):
        raise
    except (
        OSError,
        LookupError,
        ValueError,
        TypeError,
        RuntimeError,
        EOFError,
        AttributeError,
        ArithmeticError,
    ) as error:
        reason = " ".join(str(error).split())
        raise DamagedRecording(
            f"{path} is damaged or no recording: {reason}; expected an HDF5 file written by ntkdyn; "
            "restore it from a copy or remove it from the folder"
        ) from error


def refuse_newer(path: Path, found: Any) -> None:
    """Refuse the format that a file names if it is later than this version's.

    Raises: NewerRecording.
    """
    match = re.fullmatch(r"ntkdyn recording ([0-9]{1,9})", str(found))
    if match and int(match[1]) > _VERSION:
        raise NewerRecording(
            f"{path} was written by a later version of ntkdyn: found format {str(found)!r}, expected {FORMAT!r} or "
            "earlier; nothing was touched; update ntkdyn"
        )


def get_recording(file: h5py.File, path: Path) -> dict[str, Any]:
    """Return the root JSON of a file of a recording, inside ``opened``: branch, costs and elapsed are numbers.

    Raises: NewerRecording.  DamagedRecording: a foreign HDF5 file, another format, or a wrong checksum.
    """
    found = file.attrs.get("format")
    refuse_newer(path, found)
    if found != FORMAT:
        raise DamagedRecording(
            f"{path} is no recording of this version: found format {found!r}, expected {FORMAT!r}; "
            "give a run made by ntkdyn"
        )
    text = str(file.attrs["recording"])
    found_crc, expected = zlib.crc32(text.encode()), int(file.attrs["crc32"])
    if found_crc != expected:
        raise DamagedRecording(
            f"{path} is damaged in its description: found CRC {found_crc:08x}, expected {expected:08x}; "
            "restore it from a copy"
        )
    recording = load_json(text)
    if not isinstance(recording, dict) or not isinstance(recording.get("manifest"), (dict, NoneType)):
        raise DamagedRecording(f"{path} is damaged in its description: found no mapping; restore it from a copy")
    # What a stranger wrote there must be numbers before anybody counts with them.
    recording["branch"] = tuple(int(step) for step in recording.get("branch", ()))
    recording["costs"] = {
        str(group): [int(count), float(seconds), int(size)]
        for group, (count, seconds, size) in dict(recording.get("costs", {})).items()
    }
    recording["elapsed"] = float(recording.get("elapsed", 0.0))
    return recording


def get_declarations(recording: Mapping[str, Any]) -> dict[str, Declaration]:
    """Declarations in the root JSON, by group."""
    return {group: Declaration.from_json(group, entry) for group, entry in recording["declarations"].items()}


def selected(rows: Sequence[int]) -> slice | list[int]:
    """Rising row numbers as a slice where they are neighbors, which HDF5 reads and writes far faster."""
    if rows and rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return list(rows)


def get_array(
    file: h5py.File,
    path: Path,
    declaration: Declaration,
    field: Field,
    steps: Sequence[int] | None,
    rows: Sequence[int] | None = None,
) -> Array:
    """Read one array, [S, ...] or static [...], and compare every row with its CRC.

    Args: steps: steps of the file's group, None for a static array.  rows: indices into them, None for all.
    Raises: DamagedRecording: names the file, the array and the step.
    """
    name = declaration.path(field)
    dataset = file[name]
    packed = steps is not None and is_packed(dataset) and triangle.can_be_packed(field)
    row_shape = triangle.packed_shape(field.shape) if packed else field.shape
    check_shape(dataset, path, name, field, row_shape if steps is None else (len(steps), *row_shape))
    selection = ... if rows is None or steps is None else selected(rows)
    if field.dtype == TEXT:
        data = np.asarray(dataset.asstr()[selection]).astype(str)
    else:
        data = np.asarray(dataset[selection]).astype(field.dtype, copy=False)
    if packed:
        data = triangle.unpack(data, field.shape[-1])
    stored = np.atleast_1d(dataset.attrs["crc32"])
    if steps is None:
        checks: list[tuple[int | None, Array, int]] = [(None, data, int(stored[0]))]
    else:
        chosen = range(len(steps)) if rows is None else rows
        checks = [(int(steps[row]), data[index], int(stored[row])) for index, row in enumerate(chosen)]
    for step, row_data, expected in checks:
        refuse_damaged_row(path, name, step, row_crc(name, field, step, row_data), expected)
    return data


def check_shape(dataset: h5py.Dataset, path: Path, name: str, field: Field, expected: tuple[int, ...]) -> None:
    """Compare shape and type of an array in a file with its declaration.  Raises: DamagedRecording."""
    if dataset.shape != expected or (field.dtype != TEXT and dataset.dtype != stored_dtype(field.dtype)):
        raise DamagedRecording(
            f"{path} is damaged at {name!r}: found {dataset.dtype} {list(dataset.shape)}, "
            f"expected {field.dtype} {list(expected)}; restore it from a copy"
        )


def refuse_damaged_row(path: Path, name: str, step: int | None, found: int, expected: int) -> None:
    """Compare the CRC of a row with the stored one.  Raises: DamagedRecording: they differ."""
    if found != expected:
        where = "" if step is None else f" at step {step}"
        raise DamagedRecording(
            f"{path} is damaged at {name!r}{where}: found CRC {found:08x}, expected {expected:08x}; "
            "restore it from a copy"
        )


def get_axis(file: h5py.File, path: Path, declaration: Declaration) -> tuple[Array, Array]:
    """Steps int64 [S] and epochs float64 [S] of a group in one file, checked."""
    name = declaration.path(STEP)
    steps = np.asarray(file[name][...]).astype("<i8", copy=False)
    if steps.ndim != 1:
        raise DamagedRecording(
            f"{path} is damaged at {name!r}: found {steps.ndim} axes, expected 1; restore it from a copy"
        )
    listed = steps.tolist()
    return get_array(file, path, declaration, STEP, listed), get_array(file, path, declaration, EPOCH, listed)
