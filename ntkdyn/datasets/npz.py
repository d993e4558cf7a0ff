"""A user's own arrays in an npz file."""

from __future__ import annotations

import hashlib
import math
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigurationError, MissingData, ShapeError
from .split import Dataset, Split
from .verification import FileRecord, own_provenance

Array = np.ndarray[Any, Any]
_NAMES = ("x_train", "y_train", "x_test", "y_test")
_SINGLE = b"\x93NUMPY"  # how a npy file begins
_LIST = ", ".join(_NAMES)
# Arrays of zeros shrink a thousandfold, real data hardly tenfold; below 2 GiB nothing is refused.
_FREE, _RATIO = 2 * 2**30, 200


def load_npz(path: str | Path) -> Split:
    """Load a user's arrays x_train, y_train, x_test, y_test from an npz file; nothing is rescaled.

    Floating and uint8 inputs become float32, other integers int64 (token ids). Labels are integers [N] from 0 on; the
    number of classes is the largest label + 1.

    Raises: MissingData: there is no such file. ConfigurationError: it cannot be read, an array is missing, has the
            wrong type, is not finite or has numbers too large for the type that is loaded, there are more classes
            than samples, or the arrays are far larger than the file.
        ShapeError: sizes do not fit together.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigurationError(
                f"data {path}: found a folder, FIFO or device, expected an npz file of {_LIST}; write them with "
                "numpy.savez"
            )
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.tell()
            stream.seek(0)
            arrays = _arrays(stream, size, path)
    except FileNotFoundError as error:
        raise MissingData(f"data {path}: not found, expected an npz file of {_LIST}") from error
    except (OSError, ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        if isinstance(error, ConfigurationError):
            raise
        reason = " ".join(str(error).split())
        raise ConfigurationError(
            f"data {path}: not readable as npz without pickle ({reason}); use numpy.savez"
        ) from error
    inputs = {part: _inputs(arrays[f"x_{part}"], f"data {path}: x_{part}") for part in ("train", "test")}
    targets = {part: _labels(arrays[f"y_{part}"], f"data {path}: y_{part}") for part in ("train", "test")}
    for part in ("train", "test"):
        if len(inputs[part]) != len(targets[part]):
            raise ShapeError(
                f"data {path}: found {len(inputs[part])} samples in x_{part} and {len(targets[part])} labels in "
                f"y_{part}, expected as many"
            )
    if inputs["train"].shape[1:] != inputs["test"].shape[1:] or inputs["train"].dtype != inputs["test"].dtype:
        raise ShapeError(
            f"data {path}: found samples of shape {list(inputs['train'].shape[1:])} ({inputs['train'].dtype}) in "
            f"x_train and {list(inputs['test'].shape[1:])} ({inputs['test'].dtype}) in x_test, expected the same"
        )
    classes = 1 + max(int(labels.max()) for labels in targets.values())
    samples = sum(map(len, targets.values()))
    if classes > samples:
        raise ConfigurationError(
            f"data {path}: found label {classes - 1} among {samples} samples, expected classes numbered from 0 on"
        )
    return Split(
        Dataset(inputs["train"], targets["train"], classes, f"{path.name} train"),
        Dataset(inputs["test"], targets["test"], classes, f"{path.name} test"),
        own_provenance(path.name, [FileRecord(path.name, size, sha256, None)]),
    )


def _arrays(stream: BinaryIO, size: int, path: Path) -> dict[str, Array]:
    if stream.read(len(_SINGLE)) == _SINGLE:
        raise ConfigurationError(f"data {path}: found a single array, expected an npz file of {_LIST}")
    stream.seek(0)
    with np.load(stream, allow_pickle=False) as file:
        missing = [name for name in _NAMES if name not in file]
        if missing:
            raise ConfigurationError(
                f"data {path}: missing {', '.join(missing)}; found {', '.join(file) or 'nothing'}, expected {_LIST}"
            )
        _check_sizes(file.zip, size, path)
        return {name: file[name] for name in _NAMES}


def _check_sizes(archive: zipfile.ZipFile, size: int, path: Path) -> None:
    """Refuse arrays that would take far more memory than the file has bytes, before they take it."""
    held = set(archive.namelist())
    members = [archive.getinfo(name if name in held else f"{name}.npy") for name in _NAMES]
    total = sum(member.file_size for member in members)
    if total > max(_FREE, _RATIO * size):
        raise ConfigurationError(
            f"data {path}: found arrays of {total} bytes in a file of {size}, expected at most {_RATIO} times its "
            "size; use numpy.savez, which does not compress"
        )
    for name, member in zip(_NAMES, members, strict=True):
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            expected = file.tell() + math.prod(shape) * dtype.itemsize
        if not dtype.hasobject and expected != member.file_size:
            raise ConfigurationError(
                f"data {path}: {name}: found {member.file_size} bytes, expected {expected} by its head of shape "
                f"{list(shape)}; the file is damaged"
            )


def _inputs(array: Array, where: str) -> Tensor:
    if array.ndim < 2 or 0 in array.shape:
        raise ShapeError(f"{where}: found shape {list(array.shape)}, expected [samples, ...] with nothing empty")
    if array.dtype.kind == "f" or array.dtype == np.uint8:
        if not np.isfinite(array).all():
            raise ConfigurationError(f"{where}: found NaN or infinity, expected finite numbers")
        with np.errstate(over="ignore"):
            loaded = np.ascontiguousarray(array, dtype=np.float32)
        if not np.isfinite(loaded).all():
            largest = array.flat[np.abs(array).argmax()]
            raise ConfigurationError(
                f"{where}: found {largest:g}, which float32 cannot hold, expected numbers below 3.4e38; rescale them"
            )
        return torch.from_numpy(loaded)
    if array.dtype.kind in "iu":
        return _whole_numbers(array, where)
    raise ConfigurationError(f"{where}: found type {array.dtype}, expected floating or integer numbers")


def _labels(array: Array, where: str) -> Tensor:
    if array.dtype.kind not in "iu":
        raise ConfigurationError(f"{where}: found type {array.dtype}, expected integer labels")
    if array.ndim != 1 or not len(array):
        raise ShapeError(f"{where}: found shape {list(array.shape)}, expected [samples]")
    labels = _whole_numbers(array, where)
    if labels.min() < 0:
        raise ConfigurationError(f"{where}: found label {labels.min()}, expected labels from 0 on")
    return labels


def _whole_numbers(array: Array, where: str) -> Tensor:
    if array.max() > np.iinfo(np.int64).max:
        raise ConfigurationError(f"{where}: found {array.max()}, which int64 cannot hold, expected numbers below 2^63")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
