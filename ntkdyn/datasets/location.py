"""Where the files of a data set lie."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import MissingData
from .manifest import SUFFIXES, DataFile, KnownDataset, Layout


def data_directory(data_dir: str | Path | None = None) -> Path:
    """Return the folder of data sets: ``data_dir``, else that of NTKDYN_DATA, else ``data``."""
    return Path(data_dir or os.environ.get("NTKDYN_DATA") or "data")


@dataclass(frozen=True)
class Located:
    """The files of one layout of a data set that lie in one folder; nothing was read yet."""

    known: KnownDataset
    layout: Layout
    directory: Path
    folder: str
    found: Mapping[str, Path]

    @property
    def missing(self) -> tuple[DataFile, ...]:
        """The files that are not there."""
        return tuple(file for file in self.layout.files if file.name not in self.found)

    @property
    def needed(self) -> tuple[DataFile, ...]:
        """The missing files without which nothing can be loaded; of several training batches one is enough."""
        batches = [file for file in self.layout.files if _is_training_batch(file)]
        spare = any(file.name in self.found for file in batches)
        return tuple(file for file in self.missing if not (spare and _is_training_batch(file)))

    @property
    def partial(self) -> str | None:
        """What part of the data set is there, in words, where it is not the whole."""
        batches = [file for file in self.layout.files if _is_training_batch(file)]
        there = sum(file.name in self.found for file in batches)
        return f"{there} of {len(batches)} training batches" if there < len(batches) else None

    def files(self, part: str) -> list[tuple[DataFile, Path]]:
        """The files of a part that are there, with their paths, in the order of the manifest."""
        return [
            (file, self.found[file.name]) for file in self.layout.files if file.part == part and file.name in self.found
        ]


def locate(known: KnownDataset, data_dir: str | Path | None = None) -> Located | None:
    """Find a data set: of its layouts and their folders the first that can be loaded and has the fewest gaps.

    Returns: None where no file of it is there.
    Raises: MissingData: the folder of data sets, which was named, does not exist.
    """
    directory = data_directory(data_dir)
    if not directory.is_dir():
        if data_dir or os.environ.get("NTKDYN_DATA"):
            raise MissingData(f"data directory {directory}: found no such folder, expected the folder of data sets")
        return None
    candidates = []
    for layout in known.layouts:
        for folder in layout.folders:
            found = _found(directory / folder, layout)
            if found:
                candidates.append(Located(known, layout, directory, folder, found))
    return min(candidates, key=lambda one: (bool(one.needed), len(one.missing)), default=None)


def loadable(known: KnownDataset, data_dir: str | Path | None = None) -> Located:
    """Find a data set that can be loaded.

    Raises: MissingData: it is not there, or lacks files; says which to put where, and where they come from.
    """
    located = locate(known, data_dir)
    if located is None:
        raise MissingData(
            f"data set {known.name}: not found in {data_directory(data_dir)}; {where_to_put(known)}; "
            "or name another folder by data_dir or NTKDYN_DATA"
        )
    if located.needed:
        raise MissingData(
            f"data set {known.name}: found {', '.join(sorted(path.name for path in located.found.values()))} in "
            f"{located.directory / located.folder}, missing {names_of(located.needed)}; put them there (each may be "
            f".gz or .xz), from {known.origin}"
        )
    return located


def where_to_put(known: KnownDataset) -> str:
    """Return which files of a data set belong into which folder of the data directory, in words."""
    ways = [f"{names_of(layout.files)} into {layout.folders[0]}/" for layout in known.layouts]
    archives = [layout.archive for layout in known.layouts if layout.archive]
    unpack = f" (unpack {' or '.join(archives)})" if archives else ""
    return f"put {', or '.join(ways)}, each as it is or as .gz or .xz, from {known.origin}{unpack}"


def names_of(files: Sequence[DataFile]) -> str:
    """Return the names of files with commas."""
    return ", ".join(file.name for file in files)


def _is_training_batch(file: DataFile) -> bool:
    return file.part == "train" and file.holds == "batch"


def _found(folder: Path, layout: Layout) -> dict[str, Path]:
    found = {}
    for file in layout.files:
        for suffix in SUFFIXES:
            path = folder / (file.name + suffix)
            if os.path.lexists(path):
                found[file.name] = path
                break
    return found
