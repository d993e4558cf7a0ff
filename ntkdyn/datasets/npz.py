"""A user's own arrays in an npz file."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigurationError, ShapeError
from .split import Dataset, Split


def load_npz(path: str | Path) -> Split:
    """Load a user's arrays x_train, y_train, x_test, y_test from an npz file; nothing is rescaled.

    Floating and uint8 inputs become float32, other integers int64 (token ids). Labels are integers [N] from 0 on; the
    number of classes is the largest label + 1.

    Raises: ConfigurationError: the file cannot be read, an array is missing, is not finite or has the wrong type.
        ShapeError: sizes do not fit together.
    """
    path = Path(path)
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ConfigurationError(f"data {path}: found a single array, expected an npz file of {', '.join(names)}")
        with file:
            missing = [name for name in names if name not in file]
            if missing:
                raise ConfigurationError(
                    f"data {path}: missing {', '.join(missing)}; found {', '.join(file) or 'nothing'}, "
                    f"expected {', '.join(names)}"
                )
            arrays = {name: file[name] for name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
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
    return Split(
        Dataset(inputs["train"], targets["train"], classes, f"{path.name} train"),
        Dataset(inputs["test"], targets["test"], classes, f"{path.name} test"),
    )


def _inputs(array: np.ndarray[Any, Any], where: str) -> Tensor:
    if array.ndim < 2 or 0 in array.shape:
        raise ShapeError(f"{where}: found shape {list(array.shape)}, expected [samples, ...] with nothing empty")
    if array.dtype.kind == "f" or array.dtype == np.uint8:
        if not np.isfinite(array).all():
            raise ConfigurationError(f"{where}: found NaN or infinity, expected finite numbers")
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if array.dtype.kind in "iu":
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
    raise ConfigurationError(f"{where}: found type {array.dtype}, expected floating or integer numbers")


def _labels(array: np.ndarray[Any, Any], where: str) -> Tensor:
    if array.dtype.kind not in "iu":
        raise ConfigurationError(f"{where}: found type {array.dtype}, expected integer labels")
    if array.ndim != 1 or not len(array):
        raise ShapeError(f"{where}: found shape {list(array.shape)}, expected [samples]")
    if array.min() < 0:
        raise ConfigurationError(f"{where}: found label {array.min()}, expected labels from 0 on")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
