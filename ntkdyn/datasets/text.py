"""Sentences in two languages that pair line by line: Multi30k, and a user's own files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DamagedData, MissingData, UnknownName
from .compression import decompress, read_stored
from .location import loadable
from .manifest import SUFFIXES, KnownDataset, known_datasets, nearest
from .verification import FileRecord, known_provenance, own_provenance, read_verified

_OWN_AT_MOST = 2**30  # bytes of one own file without compression; more is not a corpus for one machine's memory

# The two files of each part, source and target: content and what is recorded of it.
_Parts = dict[str, list[tuple[bytes, FileRecord]]]


@dataclass(frozen=True)
class SentencePairs:
    """Sentences and their translations; item i of one belongs to item i of the other."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[str, str]:
        return self.sources[index], self.targets[index]


@dataclass(frozen=True)
class ParallelText:
    """A parallel corpus; ``languages`` names source and target, ``provenance`` is as that of a Split."""

    train: SentencePairs
    validation: SentencePairs
    test: SentencePairs
    languages: tuple[str, str]
    provenance: Mapping[str, Any] = field(default_factory=dict)


def parallel_text(
    name: str | Path, *, data_dir: str | Path | None = None, languages: tuple[str, str] = ("en", "de")
) -> ParallelText:
    """Load sentence pairs by the name of a data set ("multi30k"), or from a folder of one's own.

    A folder holds train.LANGUAGE, val.LANGUAGE and test.LANGUAGE for both languages, UTF-8, one sentence a line, each
    as it is or as .gz or .xz. Where data sets are looked for: see ``named_data``.

    Args: languages: source and target.
    Raises: UnknownName: no such data set, folder or language. ConfigurationError: a data set of images.
        MissingData: files are not there. DamagedData: a file is not the one that its checksum names, is no UTF-8, has
        an empty line, or the two languages do not have as many lines.
    """
    known = known_datasets()
    text = str(name)
    if isinstance(name, str) and text in known:
        if known[text].kind != "text":
            raise ConfigurationError(f"data set {text}: found {known[text].kind}, expected text; use named_data")
        parts, source = _known_files(known[text], languages, data_dir)
    elif text and Path(name).is_dir():
        parts, source = _own_files(Path(name), languages)
    else:
        raise UnknownName(f"text {text!r} is neither a folder nor a known data set; {nearest(text, known)}")
    train, validation, test = (_paired(parts[part], f"text {text}") for part in ("train", "validation", "test"))
    return ParallelText(train, validation, test, languages, source)


def pair_lines(sources: bytes, targets: bytes, *, names: tuple[str, str], where: str) -> SentencePairs:
    """Return the sentences of two files of UTF-8 lines as pairs.

    Raises: DamagedData: no UTF-8, an empty line, or not as many lines in both.
    """
    first, second = (
        _lines(content, f"{where}: {name}") for content, name in zip((sources, targets), names, strict=True)
    )
    if len(first) != len(second):
        raise DamagedData(
            f"{where}: found {len(first)} lines in {names[0]} and {len(second)} in {names[1]}, expected as many: "
            "line i of one is the translation of line i of the other"
        )
    return SentencePairs(first, second)


def _lines(content: bytes, where: str) -> tuple[str, ...]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DamagedData(
            f"{where}: found byte {content[error.start]:#04x} in line {line}, expected UTF-8; convert the file"
        ) from error
    # Not splitlines, which also splits at characters that stand within sentences, as U+2028.
    lines = tuple(line.removesuffix("\r") for line in text.removesuffix("\n").split("\n"))
    empty = next((number for number, line in enumerate(lines, 1) if not line.strip()), None)
    if empty is not None:
        raise DamagedData(f"{where}: found line {empty} empty, expected a sentence; leave that pair out of both files")
    return lines


def _paired(files: list[tuple[bytes, FileRecord]], where: str) -> SentencePairs:
    (sources, first), (targets, second) = files
    return pair_lines(sources, targets, names=(Path(first.file).name, Path(second.file).name), where=where)


def _known_files(
    known: KnownDataset, languages: tuple[str, str], data_dir: str | Path | None
) -> tuple[_Parts, dict[str, Any]]:
    located = loadable(known, data_dir)
    spoken = sorted({file.holds for file in located.layout.files})
    for language in languages:
        if language not in spoken:
            raise UnknownName(f"data set {known.name}: found no language {language!r}, expected {', '.join(spoken)}")
    parts: _Parts = {}
    for part in ("train", "validation", "test"):
        files = {file.holds: (file, path) for file, path in located.files(part)}
        parts[part] = [
            read_verified(known, file, path, name=f"{located.folder}/{path.name}")
            for file, path in (files[language] for language in languages)
        ]
    return parts, known_provenance(located, [record for files in parts.values() for _, record in files])


def _own_files(folder: Path, languages: tuple[str, str]) -> tuple[_Parts, dict[str, Any]]:
    parts = {
        part: [_own_file(folder, f"{stem}.{language}") for language in languages]
        for part, stem in (("train", "train"), ("validation", "val"), ("test", "test"))
    }
    return parts, own_provenance(folder.name, [record for files in parts.values() for _, record in files])


def _own_file(folder: Path, name: str) -> tuple[bytes, FileRecord]:
    path = next((path for path in (folder / (name + suffix) for suffix in SUFFIXES) if path.exists()), None)
    if path is None:
        raise MissingData(f"text {folder}: found no {name}, expected {name}, {name}.gz or {name}.xz")
    where, remedy = f"text {path}", "copy it again"
    stored = read_stored(path, at_most=_OWN_AT_MOST, where=where, remedy=remedy)
    content = decompress(stored, path, at_most=_OWN_AT_MOST, where=where, remedy=remedy)
    return content, FileRecord(path.name, len(stored), hashlib.sha256(stored).hexdigest(), None)
