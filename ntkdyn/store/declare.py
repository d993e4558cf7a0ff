"""Which groups and fields a recording accepts; refused here, before the first byte is written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigurationError, ProbeError, ShapeError
from ..probe import Field
from .metadata import dump_json
from .segment import TEXT, Array, Declaration

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_HALF_PRECISION_REMEDY = "use 'f4': in half precision a kernel is not positive semi-definite any more"


def _check_path(path: str, what: str) -> None:
    for part in path.split("/"):
        # HDF5 takes '' and '.' for the group itself, and netCDF forbids what a terminal cannot show.
        if part in {"", ".", ".."} or _CONTROL.search(part) or part != part.strip() or len(part.encode()) > 200:
            raise ConfigurationError(
                f"{what} {path!r}: found the part {part!r}, expected 1 to 200 printable bytes other than '.' and '..' "
                "between slashes; rename it"
            )


def _check_dtype(group: str, field: Field) -> str:
    where = f"field '{group}/{field.name}'"
    if field.dtype == TEXT:
        return TEXT
    try:
        dtype = np.dtype(field.dtype)
    except TypeError:
        dtype = np.dtype(object)
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise ConfigurationError(
            f"{where}: found dtype {field.dtype!r}, expected a truth value, integer or float of at most 8 bytes, or "
            f"{TEXT!r}; store real and imaginary parts as two fields"
        )
    is_kernel = field.name.split("/")[-1] == "kernel" or any(f"{dim}_2" in field.dims for dim in field.dims)
    if is_kernel and dtype == np.float16:
        raise ConfigurationError(f"{where}: found dtype 'f2', expected 'f4' or 'f8'; {_HALF_PRECISION_REMEDY}")
    return dtype.newbyteorder("<").str


def _check_field(group: str, field: Field) -> Field:
    where = f"field '{group}/{field.name}'"
    _check_path(field.name, f"group {group!r}: field")
    if len(field.dims) != len(field.shape):
        raise ShapeError(f"{where}: found dims {field.dims} for shape {field.shape}, expected one name per axis")
    if len(set(field.dims)) != len(field.dims):
        raise ConfigurationError(
            f"{where}: found dims {field.dims}, expected different names; call the second axis e.g. 'sample_2'"
        )
    for dim in field.dims:
        _check_path(dim, f"{where}: dimension")
        if "/" in dim or dim in {"step", "epoch"}:
            raise ConfigurationError(
                f"{where}: found dimension {dim!r}, expected no slash and neither 'step' nor 'epoch'"
            )
    for dim, values in field.coordinates.items():
        if dim not in field.dims or len(values) != field.shape[field.dims.index(dim)]:
            raise ShapeError(
                f"{where}: found {len(values)} coordinates for {dim!r}, expected one per entry of an axis of "
                f"{dict(zip(field.dims, field.shape, strict=True))}"
            )
        coordinate_array(values, where)
    coordinates = {dim: np.asarray(values).tolist() for dim, values in field.coordinates.items()}
    shape = tuple(int(size) for size in field.shape)
    return replace(
        field, dtype=_check_dtype(group, field), dims=tuple(field.dims), shape=shape, coordinates=coordinates
    )


def coordinate_array(values: Sequence[Any], where: str) -> Array:
    """Labels along an axis as int64, float64 or text.

    Raises: ConfigurationError: labels of mixed or other types.
    """
    array = np.asarray(list(values))
    if array.dtype.kind in "biu":
        return array.astype("<i8")
    if array.dtype.kind == "f":
        return array.astype("<f8")
    if array.dtype.kind == "U" and all(isinstance(value, str) for value in values):
        return array
    raise ConfigurationError(f"{where}: found coordinates of dtype {array.dtype}, expected numbers or text")


def folder_of(path: str) -> str:
    """The group in which an array and its dimensions live."""
    return path.rpartition("/")[0]


def _is_above(upper: str, lower: str) -> bool:
    return lower.startswith(f"{upper}/")


def _check_together(declarations: Iterable[Declaration]) -> None:
    sizes: dict[tuple[str, str], int] = {}
    labels: dict[tuple[str, str], str] = {}
    arrays: set[str] = set()
    for declaration in declarations:
        for field in declaration.fields.values():
            path = declaration.path(field)
            arrays.add(path)
            for dim, size in zip(field.dims, field.shape, strict=True):
                key = (folder_of(path), dim)
                if sizes.setdefault(key, size) != size:
                    raise ShapeError(
                        f"field {path!r}: found {size} entries along {dim!r}, expected {sizes[key]} as in the other "
                        f"fields of {key[0]!r}; give the dimension another name"
                    )
                if dim not in field.coordinates:
                    continue
                # As JSON, because NaN differs from itself.
                text = dump_json(field.coordinates[dim])
                if labels.setdefault(key, text) != text:
                    raise ConfigurationError(f"field {path!r}: found other coordinates of {dim!r} than in {key[0]!r}")
    folders = {folder_of(path) for path in arrays}
    for path in arrays:
        if path in folders or any(_is_above(path, folder) for folder in folders):
            raise ConfigurationError(f"field {path!r}: found other fields below it; rename one of them")
        if (folder_of(path), path.rpartition("/")[2]) in sizes:
            raise ConfigurationError(
                f"field {path!r}: found a dimension of the same name beside it; rename one of them"
            )
    # A tree of labelled arrays hands dimensions down: one name has one size on every way from the root.
    for (folder, dim), size in sizes.items():
        parts = folder.split("/")
        for depth in range(1, len(parts)):
            upper = "/".join(parts[:depth])
            if sizes.get((upper, dim), size) != size:
                raise ShapeError(
                    f"group {folder!r}: found {size} entries along {dim!r}, expected {sizes[upper, dim]} as in "
                    f"{upper!r} above it; give the dimension another name"
                )


def declared(
    known: Mapping[str, Declaration],
    group: str,
    fields: Sequence[Field],
    attributes: Mapping[str, Any],
    *,
    stepped: bool,
) -> Declaration:
    """Return the checked declaration of a group beside those that are known already.

    Raises: ConfigurationError, ShapeError: names the group or field, what was found, and what is expected.
    """
    _check_path(group, "group")
    before = known.get(group)
    if before is not None and (stepped or before.stepped):
        raise ConfigurationError(f"group {group!r}: found a second declaration, expected one; rename the probe")
    for other in known.values():
        if (stepped or other.stepped) and (_is_above(group, other.group) or _is_above(other.group, group)):
            raise ConfigurationError(
                f"group {group!r}: found {other.group!r} on the same way from the root, expected groups of different "
                "steps side by side; rename one of them"
            )
    checked: dict[str, Field] = dict(before.fields) if before is not None else {}
    for field in fields:
        entry = _check_field(group, field)
        if entry.name in checked:
            raise ConfigurationError(f"field '{group}/{entry.name}': found twice, expected once; rename one of them")
        if stepped and entry.name.split("/")[0] in {"step", "epoch"}:
            raise ConfigurationError(f"field '{group}/{entry.name}': the name is taken by the step axis; rename it")
        checked[entry.name] = entry
    merged = {**(before.attributes if before is not None else {}), **attributes}
    declaration = Declaration(group, checked, merged, stepped)
    _check_together([*(entry for name, entry in known.items() if name != group), declaration])
    return declaration


def refuse_other_fields(path: Path, known: Declaration, fields: Sequence[Field]) -> None:
    """A group that is continued must hold the fields that it had.

    Raises: ConfigurationError: names the field.
    """
    before = known.to_json()["fields"]
    now = declared({}, known.group, fields, {}, stepped=True).to_json()["fields"]
    names = {entry["name"]: entry for entry in now}
    for entry in before:
        other = names.pop(entry["name"], None)
        if dump_json(other) != dump_json(entry):
            found = "missing" if other is None else f"{other['dtype']} {other['shape']}"
            raise ConfigurationError(
                f"{path}: field '{known.group}/{entry['name']}' was recorded as {entry['dtype']} {entry['shape']}, is "
                f"now {found} or labeled otherwise; resume with the same probes and sets, or choose another folder"
            )
    if names:
        raise ConfigurationError(
            f"{path}: field '{known.group}/{next(iter(names))}' is new in a run that is continued; resume with the "
            "same probes and sets, or choose another folder"
        )


def fitting(declaration: Declaration, field: Field, value: Any) -> Array:
    """The array in its declared dtype and memory order, the caller's own where it has them.

    Raises: ShapeError, ProbeError: names the field, found, expected.
    """
    where = f"field {declaration.path(field)!r}"
    array = np.asarray(value)
    if array.shape != field.shape:
        raise ShapeError(f"{where}: found shape {list(array.shape)}, expected {list(field.shape)} as declared")
    if field.dtype == TEXT:
        if not all(isinstance(entry, str) and "\0" not in entry for entry in array.reshape(-1).tolist()):
            raise ProbeError(f"{where}: found other values, expected text without NUL")
        return array.astype(str)
    if not np.can_cast(array.dtype, field.dtype, "same_kind"):
        raise ProbeError(
            f"{where}: found dtype {array.dtype}, expected {field.dtype} as declared; declare what is returned"
        )
    return np.ascontiguousarray(array.astype(field.dtype, copy=False)).reshape(field.shape)
