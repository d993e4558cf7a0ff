"""The HDF5 calls of a commit, below h5py's comfortable ones, which take three times as long.

A commit makes a file of a few arrays and attributes, so that its time is that of these calls.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5f, h5o, h5p, h5s, h5t

_LINKS = h5p.create(h5p.LINK_CREATE)
_LINKS.set_create_intermediate_group(True)
_LINKS.set_char_encoding(h5t.CSET_UTF8)
# No time stamps, so that the same content is the same bytes.
_LAYOUT = h5p.create(h5p.DATASET_CREATE)
_LAYOUT.set_obj_track_times(False)
_TEXT = h5t.py_create(h5py.string_dtype(), logical=True)
_SCALAR = h5s.create(h5s.SCALAR)
# Metadata of this version has checksums of its own and attributes beyond 64 KiB; readable since HDF5 1.10.
LIBRARY_VERSION = ("v110", "v110")
# Bytes by which a file in memory grows.
_GROWTH = 256 * 2**10
_IN_MEMORY = h5p.create(h5p.FILE_ACCESS)
_IN_MEMORY.set_fapl_core(_GROWTH, False)
_IN_MEMORY.set_libver_bounds(h5f.LIBVER_V110, h5f.LIBVER_V110)
_IN_MEMORY.set_fclose_degree(h5f.CLOSE_STRONG)
_NEW_FILE = h5p.create(h5p.FILE_CREATE)
_numbers = itertools.count()


@contextmanager
def in_memory() -> Iterator[h5py.File]:
    """A new file without a place on the disk; ``image`` gives its bytes while it is open."""
    # HDF5 knows files by their names, those in memory too, and opens none twice; what lies on the disk under such a
    # name it would read first, so that it must be one under which nothing can lie.
    name = os.path.join(os.devnull, str(next(_numbers)))
    with h5py.File(h5f.create(name.encode(), h5f.ACC_TRUNC, _NEW_FILE, _IN_MEMORY)) as file:
        yield file


def image(file: h5py.File) -> bytes:
    """Bytes of an open file, as they would be on the disk."""
    h5f.flush(file.id)
    content: bytes = file.id.get_file_image()
    return content


def create_dataset(file: h5py.File, path: str, shape: tuple[int, ...], dtype: Any) -> h5py.Dataset:
    """Make room for a contiguous array at a path such as "ntk/test/kernel"; missing groups are made."""
    dataset = h5d.create(file.id, None, _kind(np.dtype(dtype)), _space(shape), _LAYOUT)
    h5o.link(dataset, file.id, path.encode(), _LINKS)
    return h5py.Dataset(dataset)


def write_dataset(dataset: h5py.Dataset, values: np.ndarray[Any, Any]) -> None:
    """Write a whole array of the dataset's own shape."""
    dataset.id.write(h5s.ALL, h5s.ALL, np.ascontiguousarray(values).reshape(dataset.shape))


def set_attribute(item: h5py.Group | h5py.Dataset, name: str, value: str | np.ndarray[Any, Any]) -> None:
    """Give an object an attribute that it does not have yet."""
    if isinstance(value, str):
        h5a.create(item.id, name.encode(), _TEXT, _SCALAR).write(np.array(value, dtype=object))
        return
    kind = _kind(value.dtype)
    h5a.create(item.id, name.encode(), kind, _space(value.shape)).write(value, kind)


# A segment has a handful of types and shapes, and making one takes as long as writing a small array.
@cache
def _kind(dtype: np.dtype[Any]) -> h5t.TypeID:
    # Objects are texts; the types that h5py makes of them look alike to the cache.
    return _TEXT if dtype.kind == "O" else h5t.py_create(dtype, logical=True)


def _space(shape: tuple[int, ...]) -> h5s.SpaceID:
    return h5s.create_simple(shape) if shape else _SCALAR
