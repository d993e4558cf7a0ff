"""The data sets that are known by name: origin, license, files and their checksums, from ntkdyn/datasets.toml."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from ..errors import UnknownName

ChecksumKind = Literal["sha256", "sha1", "md5"]
SUFFIXES = ("", ".gz", ".xz")  # how a file may lie on disk, in the order in which it is looked for


@dataclass(frozen=True)
class Stored:
    """A compressed form of a file that is known byte by byte."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class DataFile:
    """One file of a data set. Sizes and checksum are those of its content, without .gz or .xz.

    ``part`` is "train", "validation" or "test"; ``holds`` is "images", "labels", "batch" or a language; ``count`` is
    the number of samples. ``bytes`` is None where only a bound is known, ``at_most``.
    """

    name: str
    part: str
    holds: str
    count: int
    bytes: int | None
    at_most: int
    kind: ChecksumKind
    checksum: str
    compressed: Mapping[str, Stored] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """One way in which the files of a data set lie in a folder; the first folder is the usual one."""

    format: str
    folders: tuple[str, ...]
    files: tuple[DataFile, ...]
    labels: tuple[str, ...] = ()
    archive: str | None = None


@dataclass(frozen=True)
class KnownDataset:
    """A data set of the manifest; one without layouts is built in and needs no files."""

    name: str
    title: str
    kind: Literal["images", "text"]
    origin: str
    license: str
    citation: str
    classes: tuple[str, ...]
    layouts: tuple[Layout, ...]

    @property
    def built_in(self) -> bool:
        """Whether it comes with a package that is installed."""
        return not self.layouts


@cache
def known_datasets() -> Mapping[str, KnownDataset]:
    """Return the data sets of the manifest by name."""
    text = files("ntkdyn").joinpath("datasets.toml").read_text(encoding="utf-8")
    return {name: _dataset(name, entry) for name, entry in tomllib.loads(text).items()}


def known_dataset(name: str) -> KnownDataset:
    """Return a data set by name.

    Raises: UnknownName: the manifest has none of that name; the nearest ones are named.
    """
    known = known_datasets()
    if name not in known:
        raise UnknownName(f"data set {name!r} is unknown; {nearest(name, known)}")
    return known[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return which known names are meant by a wrong one, in words."""
    names = sorted(known)
    # Without dashes and case, so that "CIFAR10" finds "cifar-10" before "cifar-100".
    plain = {candidate: _plain(candidate) for candidate in names}
    close = difflib.get_close_matches(_plain(name), list(plain.values()), n=1, cutoff=0.6)
    meant = [candidate for candidate in names if plain[candidate] in close]
    return f"did you mean {meant[0]}? known: {', '.join(names)}" if meant else f"known: {', '.join(names)}"


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _dataset(name: str, entry: Mapping[str, Any]) -> KnownDataset:
    return KnownDataset(
        name=name,
        title=entry["title"],
        kind=entry["kind"],
        origin=entry["origin"],
        license=entry["license"],
        citation=entry["citation"],
        classes=tuple(entry.get("classes", ())),
        layouts=tuple(_layout(layout) for layout in entry.get("layouts", ())),
    )


def _layout(entry: Mapping[str, Any]) -> Layout:
    return Layout(
        format=entry["format"],
        folders=tuple(entry["folders"]),
        files=tuple(_file(file) for file in entry["files"]),
        labels=tuple(entry.get("labels", ())),
        archive=entry.get("archive"),
    )


def _file(entry: Mapping[str, Any]) -> DataFile:
    kinds: tuple[ChecksumKind, ...] = ("sha256", "sha1", "md5")
    kind = next(kind for kind in kinds if kind in entry)
    size = entry.get("bytes")
    return DataFile(
        name=entry["name"],
        part=entry["part"],
        holds=entry["holds"],
        count=entry["count"],
        bytes=size,
        at_most=entry["at_most"] if size is None else size,
        kind=kind,
        checksum=entry[kind],
        compressed={suffix: Stored(**stored) for suffix, stored in entry.get("compressed", {}).items()},
    )
