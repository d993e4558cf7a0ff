"""Files of known data sets, read only if their checksums are those of the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DamagedData
from .compression import decompress, read_stored
from .location import Located
from .manifest import DataFile, KnownDataset


@dataclass(frozen=True)
class FileRecord:
    """What a recording says of a file that was used.

    ``verified`` names the checksum by which it was recognized; None: it is the user's own, there is nothing to compare.
    """

    file: str
    bytes: int
    sha256: str
    verified: str | None

    def as_json(self) -> dict[str, Any]:
        """Return the record as a mapping."""
        return {"file": self.file, "bytes": self.bytes, "sha256": self.sha256, "verified": self.verified}


def known_provenance(located: Located, records: Sequence[FileRecord]) -> dict[str, Any]:
    """Return what a recording says of a data set of the manifest, as plain JSON."""
    return {
        "name": located.known.name,
        "origin": located.known.origin,
        "license": located.known.license,
        "partial": located.partial,
        "files": [record.as_json() for record in records],
    }


def own_provenance(name: str, records: Sequence[FileRecord]) -> dict[str, Any]:
    """Return what a recording says of a user's own data, of which nothing but the content is known."""
    return {
        "name": name,
        "origin": "own data",
        "license": None,
        "partial": None,
        "files": [record.as_json() for record in records],
    }


def read_verified(known: KnownDataset, file: DataFile, path: Path, *, name: str) -> tuple[bytes, FileRecord]:
    """Return the content of a file, without .gz or .xz, and its record; what is hashed is what is returned.

    Args: name: the file's name in the record, relative to the data directory.
    Raises: MissingData: there is no file. DamagedData: it is truncated, of another size, or of another checksum.
    """
    reading = _Reading(known, file, path, name)
    return reading.content(), reading.record()


def verify(known: KnownDataset, file: DataFile, path: Path, *, name: str) -> FileRecord:
    """Return the record of a file; it is decompressed only where its stored form is not one of the manifest.

    Raises: MissingData, DamagedData: as ``read_verified``.
    """
    reading = _Reading(known, file, path, name)
    if not reading.as_stored:
        reading.content()
    return reading.record()


class _Reading:
    """One file's bytes, its stored checksum, and how it was recognized."""

    def __init__(self, known: KnownDataset, file: DataFile, path: Path, name: str) -> None:
        self._file, self._path, self._name = file, path, name
        self._where = f"data set {known.name}: {path}"
        self._remedy = f"replace it by the original from {known.origin}"
        self._stored = read_stored(path, at_most=file.at_most, where=self._where, remedy=self._remedy)
        self._sha256 = hashlib.sha256(self._stored).hexdigest()
        stored = file.compressed.get(path.suffix.removeprefix("."))
        self.as_stored = stored is not None and stored.sha256 == self._sha256

    def content(self) -> bytes:
        """The content, compared with the manifest."""
        file, where, remedy = self._file, self._where, self._remedy
        content = decompress(self._stored, self._path, at_most=file.at_most, where=where, remedy=remedy)
        if self.as_stored:
            return content
        if file.bytes is not None and len(content) != file.bytes:
            raise DamagedData(f"{where}: {_difference(file, content)}; {remedy}")
        found = self._sha256 if content is self._stored and file.kind == "sha256" else _digest(file, content)
        if found != file.checksum:
            raise DamagedData(f"{where}: found content of {file.kind} {found}, expected {file.checksum}; {remedy}")
        return content

    def record(self) -> FileRecord:
        """What is recorded of the file."""
        verified = "sha256 of the file" if self.as_stored else f"{self._file.kind} of the content"
        return FileRecord(self._name, len(self._stored), self._sha256, verified)


def _digest(file: DataFile, content: bytes) -> str:
    # usedforsecurity: systems in FIPS mode refuse md5 and sha1, the only public checksums of some files, otherwise.
    return hashlib.new(file.kind, content, usedforsecurity=False).hexdigest()


def _difference(file: DataFile, content: bytes) -> str:
    lines = content.count(b"\n")
    if file.holds not in ("images", "labels", "batch") and lines != file.count:
        return f"found {lines} lines, expected {file.count}, one a sentence"
    return f"found {len(content)} bytes of content, expected {file.bytes}"
