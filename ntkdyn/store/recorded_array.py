"""A recorded array that stays on the disk until snapshots of it are asked for."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import UnknownName
from .reader import RunReader
from .segment import Array


class RecordedArray:
    """One array of a run, [S, ...]; indexing its first axis reads those snapshots only, and compares their CRCs.

    Attributes:
        name: path in the recording.
        dims: "step" and the names of the other axes.
        shape, dtype: of the whole.
        steps: recorded steps, int64 [S].

    Raises: UnknownName: no such array, or one without steps.
    """

    def __init__(self, reader: RunReader, name: str) -> None:
        entry, field = reader.owner(name)
        if entry.is_static(field):
            raise UnknownName(f"{reader.path}: array {name!r} has no steps; read it whole: run[{name!r}]")
        self._reader = reader
        self.name = name
        self.dims = ("step", *field.dims)
        self.steps = reader.steps(entry.group)
        self.shape = (len(self.steps), *field.shape)
        self.dtype = np.dtype(str if field.dtype == "str" else field.dtype)

    @property
    def ndim(self) -> int:
        """Number of axes, that of the steps included."""
        return len(self.shape)

    def at(self, *, step: int) -> Array:
        """The snapshot of a step, [...].  Raises: UnknownName: the step was not recorded."""
        place = int(np.searchsorted(self.steps, step))
        if place == len(self.steps) or self.steps[place] != step:
            around = [int(one) for one in self.steps[max(place - 1, 0) : place + 1]]
            raise UnknownName(
                f"{self._reader.path}: array {self.name!r} was not recorded at step {step}; nearest are {around}"
            )
        return self[place]

    def __getitem__(self, index: Any) -> Array:
        """Index as NumPy does; the first axis takes a number, a slice, or a list of numbers or truth values."""
        first, *others = index if isinstance(index, tuple) else (index,)
        if first is Ellipsis or first is None:
            return np.asarray(np.asarray(self)[index])
        if isinstance(first, slice):
            chosen = range(len(self))[first]
            rows = self._reader.read_rows(self.name, chosen)
            return np.asarray(rows[(slice(None), *others)])
        if isinstance(first, (list, np.ndarray)) and np.ndim(first) == 1:
            listed = np.arange(len(self))[np.asarray(first, dtype=None if len(first) else int)]
            return np.asarray(self._reader.read_rows(self.name, listed.tolist())[(slice(None), *others)])
        place = operator.index(first)
        if others and all(isinstance(one, (int, np.integer, slice)) and not isinstance(one, bool) for one in others):
            basic = [one if isinstance(one, slice) else int(one) for one in others]
            return self._reader.read_part(self.name, place, *basic)
        row = self._reader.read_rows(self.name, [place])[0]
        return np.asarray(row[tuple(others)] if others else row)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = self._reader.read(self.name)
        return whole if dtype is None else whole.astype(dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Array]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        axes = ", ".join(f"{dim}={size}" for dim, size in zip(self.dims, self.shape, strict=True))
        return f"<RecordedArray {self.name} [{axes}] {self.dtype}>"
