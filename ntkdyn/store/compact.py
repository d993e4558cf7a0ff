"""Compaction: every 32 segments of one size become one of the next, so that a run stays a few files while it grows.

A merged segment is published like any other, after it has been read again and its CRCs compared; only then are its
inputs removed. What an interruption leaves twice, readers take once and ``repair`` removes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import DamagedRecording
from ..probe import Field
from . import files, hdf5, triangle
from .bands import in_pieces
from .reader import Source
from .segment import (
    EPOCH,
    STEP,
    Array,
    Declaration,
    create_array,
    get_array,
    get_declarations,
    get_recording,
    is_packed,
    opened,
    put_recording,
    put_rows,
    row_crc,
)
from .verify import check_sums

# 10,000 snapshots are at most 31 files of each of three sizes, and are copied twice in all.
FAN = 32

Sums = dict[str, Array]


def merge(
    sources: Sequence[Source], target: Path, *, level: int, keep: Callable[[int, int], bool] = lambda source, step: True
) -> None:
    """Publish the rows of several files of one branch as one segment, by rising step; the files stay.

    Args: keep: (index of the source, step) -> whether the row is wanted. Where none is, nothing is written.
    Raises: DamagedRecording: a source differs from its CRCs.  StorageError.
    """
    declarations: dict[str, Declaration] = {}
    rows: dict[str, list[tuple[int, float, int, int]]] = {}
    for number, source in enumerate(sources):
        for group, entry in source.declarations.items():
            known = declarations.get(group)
            fields = {**known.fields, **entry.fields} if known is not None else entry.fields
            declarations[group] = Declaration(group, fields, entry.attributes, entry.stepped)
        for group, (steps, epochs) in source.axes.items():
            taken = {step for step, *_ in rows.get(group, ())}
            for row, (step, epoch) in enumerate(zip(steps.tolist(), epochs.tolist(), strict=True)):
                if step not in taken and keep(number, step):
                    rows.setdefault(group, []).append((step, epoch, number, row))
    if not any(rows.values()) and not any(source.statics for source in sources):
        return
    facts = {
        "declarations": {group: entry.to_json() for group, entry in declarations.items()},
        "branch": list(sources[0].branch),
        "level": level,
        **costs_of(sources),
    }
    with files.publishing(target) as output:
        with ExitStack() as stack:
            file = stack.enter_context(h5py.File(output, "w", libver=hdf5.LIBRARY_VERSION))
            origins = [stack.enter_context(source.opened()) for source in sources]
            put_recording(file, facts)
            sums: Sums = {}
            for entry in declarations.values():
                _Merging(file, origins, sources, entry, sorted(rows.get(entry.group, ())), output.check, sums).run()
        output.sync()
        compare_sums(output.path, sums)


def costs_of(sources: Sequence[Source]) -> dict[str, Any]:
    """What several files of a run cost: snapshots, seconds and bytes by group, and the seconds that the run took."""
    costs: dict[str, list[float]] = {}
    elapsed: dict[tuple[int, ...], float] = {}
    for source in sources:
        for group, numbers in source.facts["costs"].items():
            before = costs.setdefault(group, [0, 0.0, 0])
            costs[group] = [a + b for a, b in zip(before, numbers, strict=True)]
        # Each branch has a clock of its own.
        last = source.facts["elapsed"]
        elapsed[source.branch] = max(elapsed.get(source.branch, 0.0), last)
    return {"costs": costs, "elapsed": sum(elapsed.values())}


class _Merging:
    """One group on its way from several files into one."""

    def __init__(
        self,
        file: h5py.File,
        origins: Sequence[h5py.File],
        sources: Sequence[Source],
        entry: Declaration,
        rows: Sequence[tuple[int, float, int, int]],
        check: Callable[[], None],
        sums: Sums,
    ) -> None:
        self.file, self.origins, self.sources = file, origins, sources
        self.entry, self.rows, self.check, self.sums = entry, rows, check, sums

    def run(self) -> None:
        entry = self.entry
        if entry.stepped:
            steps = [step for step, *_ in self.rows]
            axes = ((STEP, np.array(steps, "<i8")), (EPOCH, np.array([epoch for _, epoch, *_ in self.rows], "<f8")))
            for field, values in axes:
                path = entry.path(field)
                dataset = create_array(self.file, entry, field, len(steps), packed=False)
                put_rows(dataset, field, ..., values)
                self._note(dataset, [row_crc(path, field, s, value) for s, value in zip(steps, values, strict=True)])
        for field in entry.fields.values():
            if entry.is_static(field):
                self._copy_static(field)
            else:
                self._copy_rows(field)

    def _note(self, dataset: h5py.Dataset, crc: Sequence[int] | Array) -> None:
        self.sums[dataset.name.strip("/")] = values = np.asarray(crc, dtype=np.uint32)
        hdf5.set_attribute(dataset, "crc32", values)
        self.check()

    def _copy_static(self, field: Field) -> None:
        path = self.entry.path(field)
        for origin, source in zip(self.origins, self.sources, strict=True):
            if path in source.statics:
                data = get_array(origin, source.path, self.entry, field, None)
                dataset = create_array(self.file, self.entry, field, None, packed=False)
                put_rows(dataset, field, ..., data)
                self._note(dataset, np.atleast_1d(origin[path].attrs["crc32"]))
                return

    def _copy_rows(self, field: Field) -> None:
        path, count = self.entry.path(field), len(self.rows)
        used = sorted({number for *_, number, _ in self.rows})
        packed = triangle.can_be_packed(field) and all(is_packed(self.origins[number][path]) for number in used)
        dataset = create_array(self.file, self.entry, field, count, packed=packed)
        crc = np.zeros(count, dtype=np.uint32)
        for number in used:
            source, origin = self.sources[number], self.origins[number]
            here = [(index, row) for index, (_, _, owner, row) in enumerate(self.rows) if owner == number]
            steps = source.axes[self.entry.group][0].tolist()
            stored = np.atleast_1d(origin[path].attrs["crc32"])
            for selection, data in in_pieces(origin, source.path, self.entry, field, steps, here):
                put_rows(dataset, field, selection, data)
                self.check()
            crc[[index for index, _ in here]] = stored[[row for _, row in here]]
        self._note(dataset, crc)


def compare_sums(path: Path, sums: Mapping[str, Array]) -> None:
    """Read a file again and compare it with the CRCs that its sources had.

    Raises: DamagedRecording: it differs; the sources stay.
    """
    with opened(path) as file:
        check_sums(file, path, get_declarations(get_recording(file, path)))
        for name, expected in sums.items():
            if not np.array_equal(np.atleast_1d(file[name].attrs["crc32"]), expected):
                raise DamagedRecording(
                    f"{path} is damaged at {name!r}: its CRCs differ from the segments'; the segments stay"
                )
