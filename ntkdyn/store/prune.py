"""Pruning: fewer snapshots of a run, on the user's demand; the only place where recorded numbers are deleted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import DamagedRecording
from .lock import Lock
from .pack import pack_locked
from .reader import RunReader
from .repair import recording_files, repair_locked
from .verify import ANY_SIZE


@dataclass(frozen=True)
class Pruned:
    """What is left: snapshots by group as (kept, before), and the size of all files."""

    snapshots: Mapping[str, tuple[int, int]]
    bytes_before: int
    bytes_after: int


def prune(path: str | Path, *, every: int) -> Pruned:
    """Keep every N-th snapshot of each group, and the first and the last, in one run.h5.

    The new file is complete, read again and compared before the old ones go. Superseded rows stay where they are.

    Raises: LockedRecording: the run is being written.  MissingRecording, DamagedRecording: there is no folder of a
        run, or a file of it is damaged; nothing is changed then.  StorageError.
    """
    folder = Path(path)
    if folder.is_file():
        raise DamagedRecording(f"{folder} is a file, expected the folder of a run; give the folder in which it lies")
    RunReader.open(folder, max_bytes=ANY_SIZE)
    lock = Lock(folder)
    try:
        repair_locked(folder)
        reader = RunReader.open(folder, max_bytes=ANY_SIZE)
        before = {group: len(reader.places(group)) for group in reader.groups()}
        size = _size(folder)
        reader.thin(lambda index, count: index % every == 0 or index == count - 1)
        pack_locked(reader)
        kept = {group: (len(reader.places(group)), before[group]) for group in before}
        return Pruned(kept, size, _size(folder))
    finally:
        lock.release()


def _size(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in recording_files(folder))
