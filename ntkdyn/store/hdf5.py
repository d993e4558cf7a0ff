"""The HDF5 calls of a commit, below h5py's comfortable ones, which take three times as long.

A commit makes a file of a few arrays and attributes, so that its time is that of these calls.
"""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5o, h5p, h5s, h5t

_LINKS = h5p.create(h5p.LINK_CREATE)
_LINKS.set_create_intermediate_group(True)
_LINKS.set_char_encoding(h5t.CSET_UTF8)
# No time stamps, so that the same content is the same bytes.
_LAYOUT = h5p.create(h5p.DATASET_CREATE)
_LAYOUT.set_obj_track_times(False)
_TEXT = h5t.py_create(h5py.string_dtype(), logical=True)


def create_dataset(file: h5py.File, path: str, shape: tuple[int, ...], dtype: Any) -> h5py.Dataset:
    """Make room for a contiguous array at a path such as "ntk/test/kernel"; missing groups are made."""
    space = h5s.create_simple(shape) if shape else h5s.create(h5s.SCALAR)
    kind = h5t.py_create(np.dtype(dtype), logical=True)
    dataset = h5d.create(file.id, None, kind, space, _LAYOUT)
    h5o.link(dataset, file.id, path.encode(), _LINKS)
    return h5py.Dataset(dataset)


def write_dataset(dataset: h5py.Dataset, values: np.ndarray[Any, Any]) -> None:
    """Write a whole array of the dataset's own shape."""
    dataset.id.write(h5s.ALL, h5s.ALL, np.ascontiguousarray(values).reshape(dataset.shape))


def set_attribute(item: h5py.File | h5py.Dataset, name: str, value: str | np.ndarray[Any, Any]) -> None:
    """Give an object an attribute that it does not have yet."""
    if isinstance(value, str):
        attribute = h5a.create(item.id, name.encode(), _TEXT, h5s.create(h5s.SCALAR))
        attribute.write(np.array(value, dtype=object))
        return
    space = h5s.create_simple(value.shape) if value.shape else h5s.create(h5s.SCALAR)
    h5a.create(item.id, name.encode(), h5t.py_create(value.dtype), space).write(value)
