"""RunReader: a recording as arrays, from a live folder, a packed one, or a run.h5 alone.

Readers take no locks: published files never change, so they list the folder and open what is there. A file that is
packed away between listing and opening makes them list again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np

from ..errors import DamagedRecording, MissingRecording, ReplacedFile, UnknownName, UntrustedFile
from ..probe import Field
from . import files
from .bands import checked_bands, is_read_in_bands
from .manifest import read_manifest, resumed_after
from .metadata import dump_json
from .segment import Array, Declaration, Identity, get_array, get_axis, get_declarations, get_recording, opened
from .verify import MAX_BYTES, MAX_RATIO, is_own, refuse_replaced, validate

_ATTEMPTS = 30
_REPLACEMENTS = 3
_Result = TypeVar("_Result")


@dataclass
class Source:
    """One file of a recording: what it declares, which steps it holds, which static arrays.

    Attributes:
        branch: steps after which the run was resumed, up to the resumption that this file belongs to; () at first.
        facts: what else stands in its JSON: manifest of a run.h5; level, costs and elapsed of a segment.
        identity: what must be found where the file is opened again; None where it is trusted.
    """

    path: Path
    declarations: Mapping[str, Declaration]
    axes: Mapping[str, tuple[Array, Array]]
    statics: frozenset[str]
    branch: tuple[int, ...]
    facts: Mapping[str, Any]
    identity: Identity | None = None

    @staticmethod
    def open(path: Path, accept: Callable[[Path, Identity], None] | None = None) -> Source:
        """Read what a file declares; with ``accept`` it is called before that, and raises to refuse the file."""
        found: list[Identity] = []

        def note(identity: Identity) -> None:
            if accept is not None:
                accept(path, identity)
                found.append(identity)

        with opened(path, note) as file:
            recording = get_recording(file, path)
            declarations = get_declarations(recording)
            axes = {group: get_axis(file, path, entry) for group, entry in declarations.items() if entry.stepped}
            statics = frozenset(
                entry.path(field)
                for entry in declarations.values()
                for field in entry.fields.values()
                if entry.is_static(field) and entry.path(field) in file
            )
            return Source(path, declarations, axes, statics, recording["branch"], recording, *found)

    def opened(self) -> AbstractContextManager[h5py.File]:
        """Open the file again.  Raises: ReplacedFile: there is another in its place.  As ``segment.opened``."""
        return opened(self.path, self._refuse_other)

    def _refuse_other(self, identity: Identity) -> None:
        if self.identity not in (None, identity):
            raise ReplacedFile(f"{self.path} was replaced or changed while it was read; open the recording again")

    def rows_behind(self, branches: tuple[int, ...]) -> float:
        """Last step of this file that later resumptions leave valid, infinity where there are none."""
        return min(branches[len(self.branch) :], default=math.inf)


@dataclass(frozen=True)
class Place:
    """Where one step of a group lies."""

    step: int
    epoch: float
    source: int
    row: int


def files_of(path: Path) -> list[Path]:
    """Files of a recording, a packed one first.

    Raises: MissingRecording, DamagedRecording: there is none.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise MissingRecording(f"{path}: found nothing, expected the folder of a run or a run.h5; check the path")
    if not path.is_dir():
        raise DamagedRecording(f"{path} is neither a folder nor a file; give the folder of a run or a run.h5")
    packed = path / "run.h5"
    segments = sorted(
        entry for entry in (path / "segments").glob("*.h5") if not entry.name.startswith((".", files.TEMPORARY))
    )
    if not (path / "run.json").exists() and not packed.exists():
        content = "an empty folder" if next(path.iterdir(), None) is None else "a folder without run.json"
        raise DamagedRecording(
            f"{path} is no run: found {content}, expected run.json; give the folder of a run or a run.h5"
        )
    return [*([packed] if packed.exists() else []), *segments]


class RunReader:
    """The arrays and the manifest of one recording, as they were when it was opened."""

    def __init__(self, path: Path, *, trusted: bool, max_bytes: int, max_ratio: float) -> None:
        self.path = path
        self._trusted = trusted
        self._max_bytes = max_bytes
        self._max_ratio = max_ratio
        self.manifest: Mapping[str, Any] = {}
        self.sources: list[Source] = []
        self.branches: tuple[int, ...] = ()
        self.declarations: dict[str, Declaration] = {}
        self._places: dict[str, list[Place]] = {}
        self._rows: dict[tuple[str, int], list[tuple[int, int]]] = {}
        self.again(self._load)

    @classmethod
    def open(
        cls, path: str | Path, *, trusted: bool = False, max_bytes: int = MAX_BYTES, max_ratio: float = MAX_RATIO
    ) -> RunReader:
        """Open a live folder, a packed folder or a run.h5.

        Files that this process has not written are validated first, in a limited process, unless ``trusted``.

        Args: max_bytes: limit of one array.  max_ratio: limit of its size over its stored size.
        Raises: MissingRecording, DamagedRecording, UntrustedFile.
        """
        return cls(Path(path), trusted=trusted, max_bytes=max_bytes, max_ratio=max_ratio)

    def again(self, action: Callable[[], _Result]) -> _Result:
        """Run an action, again from a new listing where a file has been packed away or replaced meanwhile."""
        for attempt in range(_ATTEMPTS - 1):
            try:
                if attempt and action != self._load:
                    self._find_again()
                return action()
            except ReplacedFile:
                # As packing and pruning do with run.h5; the new file is checked before it is read.
                if attempt >= _REPLACEMENTS:
                    raise
            except FileNotFoundError:
                # Where the recording itself is gone, listing says so in words. Packing removes segments one by one
                # for a while, so the next listing may again name one that is about to go.
                files_of(self.path)
                time.sleep(0.005 * attempt)
        return action()

    def _find_again(self) -> None:
        """Show the same snapshots, from the files in which they are now."""
        shown, declared, sources = self._places, self.declarations, self.sources
        self._load()
        self.declarations = declared
        steps = {group: {place.step for place in ordered} for group, ordered in shown.items()}
        now = {group: [one for one in self._places.get(group, ()) if one.step in steps[group]] for group in shown}
        self._show(now)
        if any(len(now[group]) < len(shown[group]) for group in shown):
            self.sources = sources
            self._show(shown)
            raise ReplacedFile(
                f"{self.path} was continued from an earlier step, or pruned, while it was read; open it again"
            )

    def _load(self) -> None:
        paths = files_of(self.path)
        accept = None
        if not self._trusted:
            validate(paths, max_bytes=self._max_bytes, max_ratio=self._max_ratio)
            accept = partial(refuse_replaced, max_bytes=self._max_bytes, max_ratio=self._max_ratio)
        sources = [Source.open(path, accept) for path in paths]
        if self.path.is_dir() and (self.path / "run.json").exists():
            manifest: Mapping[str, Any] = read_manifest(self.path)
        else:
            manifest = (sources[0].facts.get("manifest") if sources else None) or {}
        branches = max((tuple(resumed_after(manifest)), *(source.branch for source in sources)), key=len)
        declarations: dict[str, Declaration] = {}
        places: dict[str, dict[int, Place]] = {}
        for number, source in enumerate(sources):
            last = source.rows_behind(branches)
            for group, found in source.declarations.items():
                declarations[group] = _merged(declarations.get(group), found, source.path)
            for group, (steps, epochs) in source.axes.items():
                taken = places.setdefault(group, {})
                for row, (step, epoch) in enumerate(zip(steps.tolist(), epochs.tolist(), strict=True)):
                    # A step twice: packing or compaction was interrupted before it removed what it had copied.
                    if step <= last:
                        taken.setdefault(step, Place(step, epoch, number, row))
        self.manifest = manifest
        self.sources = sources
        self.branches = branches
        self.declarations = {group: declarations[group] for group in sorted(declarations)}
        self._show({group: [taken[step] for step in sorted(taken)] for group, taken in sorted(places.items())})

    def _show(self, places: dict[str, list[Place]]) -> None:
        self._places = places
        self._rows = {}
        for group, ordered in places.items():
            for index, place in enumerate(ordered):
                self._rows.setdefault((group, place.source), []).append((index, place.row))

    def thin(self, keep: Callable[[int, int], bool]) -> None:
        """Show fewer snapshots of each group: keep(index, number of snapshots)."""
        self._show(
            {
                group: [place for index, place in enumerate(ordered) if keep(index, len(ordered))]
                for group, ordered in self._places.items()
            }
        )

    def groups(self) -> list[str]:
        """Groups with a step axis, sorted: "ntk/test", "units", …"""
        return list(self._places)

    def places(self, group: str) -> list[Place]:
        """Where each step of a group lies, by rising step.

        Raises: UnknownName: no such group with steps.
        """
        if group not in self._places:
            raise UnknownName(
                f"{self.path}: found no group {group!r} with steps; there are: {', '.join(self._places) or 'none'}"
            )
        return self._places[group]

    def rows_in(self, group: str, source: int) -> list[tuple[int, int]]:
        """What one file holds of a group: (index among all its steps, row in the file), by rising step."""
        return self._rows.get((group, source), [])

    def steps(self, group: str) -> Array:
        """Recorded steps of a group, int64 [S].  Raises: UnknownName."""
        return np.array([place.step for place in self.places(group)], dtype=np.int64)

    def epochs(self, group: str) -> Array:
        """Epochs of a group, float64 [S], NaN where unknown.  Raises: UnknownName."""
        return np.array([place.epoch for place in self.places(group)], dtype=np.float64)

    def attributes(self, group: str) -> dict[str, Any]:
        """Attributes of a group as declared.  Raises: UnknownName."""
        if group not in self.declarations:
            raise UnknownName(
                f"{self.path}: found no group {group!r}; there are: {', '.join(self.declarations) or 'none'}"
            )
        return dict(self.declarations[group].attributes)

    def names(self) -> list[str]:
        """Path of every array that has been recorded, e.g. "ntk/test/kernel"."""
        statics = frozenset().union(*(source.statics for source in self.sources))
        return [
            entry.path(field)
            for entry in self.declarations.values()
            for field in entry.fields.values()
            if not entry.is_static(field) or entry.path(field) in statics
        ]

    def owner(self, name: str) -> tuple[Declaration, Field]:
        """The declared group of an array, and its field there.

        Raises: UnknownName.
        """
        parts = name.split("/")
        for depth in range(len(parts) - 1, 0, -1):
            entry = self.declarations.get("/".join(parts[:depth]))
            field = entry.fields.get("/".join(parts[depth:])) if entry is not None else None
            if entry is not None and field is not None:
                return entry, field
        raise UnknownName(f"{self.path}: found no array {name!r}; there are: {', '.join(self.names()) or 'none'}")

    def field(self, name: str) -> Field:
        """Dims, dtype, unit, coordinates and attributes of an array.  Raises: UnknownName."""
        return self.owner(name)[1]

    def read(self, name: str) -> Array:
        """One array, [S, ...] by rising step, or static [...].

        Raises: UnknownName.  DamagedRecording: a CRC differs.  UntrustedFile: larger than max_bytes.
        """
        return self.read_many([name])[name]

    def read_row(self, name: str, index: int) -> Array:
        """One snapshot of an array, [...], by its index among the steps of its group; a static array as it is.

        Raises: UnknownName.  DamagedRecording: its CRC differs.  IndexError: there is no such snapshot.
        """
        entry, field = self.owner(name)
        return self.read(name) if entry.is_static(field) else np.asarray(self.read_rows(name, [index])[0])

    def read_rows(self, name: str, indices: Sequence[int]) -> Array:
        """Some snapshots of an array, [k, ...], by their indices among the steps of its group, in that order.

        Only their bytes are read, and their CRCs compared.

        Raises: UnknownName: no such array with steps.  DamagedRecording.  IndexError: there is no such snapshot.
        """
        return self.again(lambda: self._read_rows(name, indices))

    def _read_rows(self, name: str, indices: Sequence[int]) -> Array:
        entry, field = self.owner(name)
        places = self.places(entry.group)
        wanted = [places[index] for index in indices]
        by_source: dict[int, list[int]] = {}
        for position, place in enumerate(wanted):
            by_source.setdefault(place.source, []).append(position)
        found = np.empty((len(wanted), *field.shape), np.dtype(object if field.dtype == "str" else field.dtype))
        for number, positions in by_source.items():
            source = self.sources[number]
            steps = source.axes[entry.group][0].tolist()
            # HDF5 takes rising rows only, each once.
            rows = sorted({wanted[position].row for position in positions})
            with source.opened() as file:
                data = get_array(file, source.path, entry, field, steps, rows)
            at = {row: index for index, row in enumerate(rows)}
            found[positions] = data[[at[wanted[position].row] for position in positions]]
        return found.astype(str) if field.dtype == "str" else found

    def read_part(self, name: str, index: int, first: int | slice, *others: int | slice) -> Array:
        """Part of one snapshot, [...][first, *others]; a large one is read in bands, its CRC compared all the same.

        Raises: as ``read_rows``.
        """
        return self.again(lambda: self._read_part(name, index, first, others))

    def _read_part(self, name: str, index: int, first: int | slice, others: tuple[int | slice, ...]) -> Array:
        entry, field = self.owner(name)
        place = self.places(entry.group)[index]
        source = self.sources[place.source]
        steps = source.axes[entry.group][0].tolist()
        # Tried on an array without memory, so that a wrong index is not taken for a damaged file.
        empty = np.broadcast_to(np.zeros((), np.dtype(object if field.dtype == "str" else field.dtype)), field.shape)
        found = np.empty(empty[(first, *others)].shape, empty.dtype)
        wanted = np.atleast_1d(np.arange(field.shape[0])[first])
        with source.opened() as file:
            if is_read_in_bands(file[name], field):
                lines = found[np.newaxis] if isinstance(first, int) else found
                for here, band in checked_bands(file, source.path, entry, field, steps, place.row):
                    for position in np.flatnonzero((wanted >= here.start) & (wanted < here.stop)).tolist():
                        lines[position] = band[(int(wanted[position]) - here.start, *others)]
                return found
            row = get_array(file, source.path, entry, field, steps, [place.row])[0]
        return np.asarray(row[(first, *others)])

    def read_many(self, names: Sequence[str]) -> dict[str, Array]:
        """Several arrays; each file is opened once."""
        return self.again(lambda: self._read_many(names))

    def _read_many(self, names: Sequence[str]) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        wanted: list[tuple[str, Declaration, Field]] = []
        for name in names:
            entry, field = self.owner(name)
            wanted.append((name, entry, field))
            if not entry.is_static(field):
                shape = (len(self._places[entry.group]), *field.shape)
                dtype = np.dtype(object if field.dtype == "str" else field.dtype)
                self._check_size(name, math.prod(shape) * dtype.itemsize)
                arrays[name] = np.empty(shape, dtype)
        for number, source in enumerate(self.sources):
            present = [(name, entry, field) for name, entry, field in wanted if entry.group in source.declarations]
            if not present:
                continue
            with source.opened() as file:
                for name, entry, field in present:
                    if entry.is_static(field):
                        if name in source.statics and name not in arrays:
                            arrays[name] = get_array(file, source.path, entry, field, None)
                        continue
                    here = self.rows_in(entry.group, number)
                    if here:
                        steps = source.axes[entry.group][0].tolist()
                        rows = [row for _, row in here]
                        arrays[name][[index for index, _ in here]] = get_array(
                            file, source.path, entry, field, steps, rows
                        )
        for name, _, field in wanted:
            if name not in arrays:
                raise UnknownName(f"{self.path}: array {name!r} is declared, but has not been recorded yet")
            if field.dtype == "str":
                arrays[name] = arrays[name].astype(str)
        return arrays

    def _check_size(self, name: str, size: int) -> None:
        if (
            size > self._max_bytes
            and not self._trusted
            and not all(source.identity is not None and is_own(source.identity) for source in self.sources)
        ):
            raise UntrustedFile(
                f"{self.path} at {name!r}: found {size} bytes in all steps, expected at most {self._max_bytes}; "
                f"open with max_bytes={size} if you know the file"
            )


def _merged(before: Declaration | None, found: Declaration, path: Path) -> Declaration:
    if before is None:
        return found
    fields = {**before.fields, **found.fields}
    if before.stepped != found.stepped or any(
        _as_text(before.fields[name]) != _as_text(found.fields[name]) for name in before.fields if name in found.fields
    ):
        raise DamagedRecording(
            f"{path} declares group {found.group!r} differently from the files before it; move it out of the folder"
        )
    return Declaration(found.group, fields, {**before.attributes, **found.attributes}, found.stepped)


def _as_text(field: Field) -> str:
    # NaN among coordinates or attributes differs from itself; its JSON does not.
    return dump_json(Declaration("", {field.name: field}, {}).to_json())
