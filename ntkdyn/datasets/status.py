"""What of the known data sets lies in the data directory, every file compared with its checksum."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import DamagedData, MissingData
from .location import Located, locate, names_of, where_to_put
from .manifest import DataFile, KnownDataset
from .verification import FileRecord, verify

State = Literal["built in", "there", "partial", "missing", "damaged"]


@dataclass(frozen=True)
class Status:
    """State of one data set: where in the data directory it lies, its sound files, what is wrong or missing."""

    known: KnownDataset
    state: State
    folder: str | None = None
    records: tuple[FileRecord, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Size on disk of the files that are there and sound."""
        return sum(record.bytes for record in self.records)


def status_of(known: KnownDataset, data_dir: str | Path | None = None) -> Status:
    """Look for a data set and compare its files with their checksums.

    Raises: MissingData: the data directory, which was named, does not exist.
    """
    if known.built_in:
        return Status(known, "built in")
    located = locate(known, data_dir)
    if located is None:
        return Status(known, "missing", remarks=(where_to_put(known),))
    folder = located.folder
    files = [(file, located.found[file.name]) for file in located.layout.files if file.name in located.found]
    with ThreadPoolExecutor(max_workers=len(files)) as pool:
        outcomes = list(pool.map(lambda one: _outcome(located, *one), files))
    records = tuple(outcome for outcome in outcomes if isinstance(outcome, FileRecord))
    problems = tuple(outcome for outcome in outcomes if isinstance(outcome, str))
    if problems:
        return Status(known, "damaged", folder, records, problems)
    if located.needed:
        return Status(known, "missing", folder, records, (_put(located.needed, located),))
    if located.partial:
        remarks = (located.partial, _put(located.missing, located))
        return Status(known, "partial", folder, records, remarks)
    return Status(known, "there", folder, records)


def _outcome(located: Located, file: DataFile, path: Path) -> FileRecord | str:
    try:
        return verify(located.known, file, path, name=f"{located.folder}/{path.name}")
    except (DamagedData, MissingData) as error:
        return str(error)


def _put(files: Sequence[DataFile], located: Located) -> str:
    return f"not there: {names_of(files)} (each may be .gz or .xz), from {located.known.origin}"
