"""Verify says what is wrong with a run; repair brings it into order without deleting anything that is not elsewhere.

Temporaries of killed writers go. Damaged files move into ``DIR/quarantine``. Segments of which every row is also in
run.h5 or in a merged segment go, as they would have gone had compaction or packing not been interrupted. A run.json
that cannot be read is made again from what the other files hold; one that can, but differs from its checksum, is
accepted as it stands and named, because only people know whether they have edited it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import DamagedRecording, EditedManifest, MissingRecording, NewerRecording, NtkdynError, StorageError
from . import files
from .lock import NAME as LOCK
from .lock import Lock, owner_of, refuse_locked
from .manifest import differences, encode_manifest, read_manifest, resumed_after
from .reader import Source
from .segment import FORMAT, Array, Declaration
from .verify import ANY_SIZE, MAX_RATIO, examine, refuse_replaced

QUARANTINE = "quarantine"
SUPERSEDED = "superseded"
_FOLDERS = ("", "segments", SUPERSEDED)


@dataclass(frozen=True)
class Finding:
    """What is wrong with one file of a run, and whether repair mends it without loss."""

    path: Path
    problem: str
    harmless: bool


def recording_files(folder: Path) -> list[Path]:
    """run.h5, segments and superseded rows of a run; the file itself where a run.h5 alone is given."""
    if folder.is_file():
        return [folder]
    inside = [entry for name in ("segments", SUPERSEDED) for entry in sorted((folder / name).glob("*.h5"))]
    packed = folder / "run.h5"
    return [*([packed] if packed.exists() else []), *(e for e in inside if not e.name.startswith(files.TEMPORARY))]


def temporaries(folder: Path) -> list[Path]:
    """What killed writers left half written."""
    places = [folder / name for name in _FOLDERS] + [folder / "checkpoints"]
    places += [entry for entry in (folder / "checkpoints").glob("*") if entry.is_dir()]
    return [entry for place in places for entry in sorted(place.glob(f"{files.TEMPORARY}*"))]


def verify(path: str | Path) -> list[Finding]:
    """Check every byte of a run: structure and CRCs of all files, the manifest, leftovers. Nothing is changed.

    ``path`` is the folder of a run, or a run.h5 alone. A live run may be verified; what its writer removes meanwhile is
    no finding.

    Raises: MissingRecording, DamagedRecording: there is no run.  NewerRecording: it is of a later version.
        StorageError: run.json cannot be read.
    """
    folder = Path(path) if Path(path).is_file() else _folder(path)
    findings = [
        Finding(entry, str(problem), harmless=False)
        for entry, problem in _examined(folder).items()
        # What is listed and missing was removed meanwhile, or is a link to nowhere.
        if problem is not None and (not isinstance(problem, MissingRecording) or entry.is_symlink())
    ]
    if folder.is_file():
        return findings
    manifest: Mapping[str, object] | None = {}
    try:
        manifest = read_manifest(folder)
        resumed_after(manifest)
    except FileNotFoundError:
        there = (folder / "run.h5").exists()
        findings.append(Finding(folder / "run.json", f"{folder / 'run.json'} is missing", harmless=there))
    except DamagedRecording as error:
        manifest = None
        findings.append(Finding(folder / "run.json", str(error), harmless=False))
    owner = owner_of(folder)
    try:
        refuse_locked(folder)
    except NtkdynError:
        return findings
    if owner is not None:
        findings.append(Finding(folder / LOCK, f"{folder / LOCK}: its owner has ended", harmless=True))
    findings += [Finding(one, f"{one}: its writer was killed", harmless=True) for one in temporaries(folder)]
    if manifest is None:
        # What is redundant depends on where the run was resumed.
        return findings
    damaged = {finding.path for finding in findings}
    sound = [entry for entry in recording_files(folder) if entry not in damaged]
    findings += [
        Finding(one, f"{one}: all its rows are in another file too", harmless=True) for one in _redundant(folder, sound)
    ]
    return findings


def repair(path: str | Path, *, unlock: bool = False) -> tuple[str, ...]:
    """Bring a run into order that was cut off; returns what was done, one line each.

    Args: unlock: take the lock of an owner that cannot be seen from here and is known to have ended.
    Raises: LockedRecording: somebody writes there.  MissingRecording, DamagedRecording: there is no run.
        NewerRecording: it is of a later version; nothing was touched.  StorageError.
    """
    folder = _folder(path)
    lock = Lock(folder, force=unlock)
    try:
        done = list(repair_locked(folder))
        manifest = read_manifest(folder)
        if manifest.get("status") == "running":
            files.publish(folder / "run.json", encode_manifest({**manifest, "status": "interrupted"}))
            done.append(f"{folder / 'run.json'}: status is interrupted now, its writer has ended")
    finally:
        lock.release()
    return tuple(done)


def repair_locked(folder: Path) -> tuple[str, ...]:
    """As ``repair``, by the owner of the lock.

    Raises: NewerRecording: before anything is touched.
    """
    done = []
    problems = _examined(folder)
    for entry in temporaries(folder):
        files.unlink(entry)
        done.append(f"{entry.relative_to(folder)}: removed, a writer was killed while it wrote")
    for entry, problem in problems.items():
        if problem is not None:
            target = _quarantine(folder, entry)
            done.append(f"{entry.relative_to(folder)}: moved to {target.relative_to(folder)}, {problem}")
    try:
        resumed_after(read_manifest(folder))
    except FileNotFoundError:
        done.append(_manifest_again(folder, "was missing"))
    except DamagedRecording as error:
        done.append(_mended_manifest(folder, error))
    for entry in _redundant(folder, recording_files(folder)):
        files.unlink(entry)
        done.append(f"{entry.relative_to(folder)}: removed, all its rows are in another file too")
    return tuple(done)


def _examined(folder: Path) -> dict[Path, NtkdynError | None]:
    """The problem of each file of a run, None for sound ones.

    Raises: NewerRecording, StorageError: a file is of a later version or cannot be read, which is no damage.
    """
    if folder.is_dir():
        with suppress(FileNotFoundError, DamagedRecording):
            read_manifest(folder)
    problems = examine(recording_files(folder), max_bytes=ANY_SIZE)
    for problem in problems.values():
        if isinstance(problem, (NewerRecording, StorageError)):
            raise problem
    return problems


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.exists():
        raise MissingRecording(f"{folder}: found nothing, expected the folder of a run; check the path")
    if not folder.is_dir() or not ((folder / "run.json").exists() or recording_files(folder)):
        raise DamagedRecording(f"{folder} is no run: found neither run.json nor segments; give the folder of a run")
    return folder


def _quarantine(folder: Path, entry: Path) -> Path:
    files.make_folder(folder / QUARANTINE)
    target = folder / QUARANTINE / entry.name
    number = 1
    while target.exists():
        target = target.with_name(f"{entry.name}.{number}")
        number += 1
    with files.storage_errors("move", entry):
        files.replace(entry, target)
        files.sync_folder(target.parent)
        files.sync_folder(entry.parent)
    return target


def _mended_manifest(folder: Path, problem: DamagedRecording) -> str:
    """Publish a run.json that can be read in place of a damaged one."""
    if isinstance(problem, EditedManifest):
        manifest = read_manifest(folder, edited=True)
        try:
            resumed_after(manifest)
        except DamagedRecording:
            pass
        else:
            files.publish(folder / "run.json", encode_manifest(manifest))
            return f"run.json: accepted as it stands, not as ntkdyn wrote it; {_against_packed(folder, manifest)}"
    _quarantine(folder, folder / "run.json")
    return _manifest_again(folder, f"was moved to {QUARANTINE}, {problem}")


def _against_packed(folder: Path, manifest: Mapping[str, Any]) -> str:
    """In words how a manifest differs from that in run.h5."""
    packed = folder / "run.h5"
    kept = _source(packed).facts.get("manifest") if packed.exists() else None
    if not isinstance(kept, Mapping):
        return "no other file holds its entries"
    found = differences(kept, manifest, dict.fromkeys([*kept, *manifest]))
    return f"against run.h5 {found}" if found else "run.h5 has the same entries"


def _manifest_again(folder: Path, what: str) -> str:
    """Publish a run.json made from run.h5, or from what the segments say of their branch."""
    branch: tuple[int, ...] = ()
    manifest: dict[str, object] = {"format": FORMAT, "status": "interrupted", "results": {}}
    origin = "without configuration and results, which nothing else holds"
    for entry in recording_files(folder):
        source = _source(entry)
        if len(source.branch) > len(branch):
            branch = source.branch
        if source.facts.get("manifest"):
            manifest = dict(source.facts["manifest"])
            origin = "from run.h5"
    try:
        known = resumed_after(manifest)
    except DamagedRecording:
        known = []
        del manifest["branches"]
    if len(branch) > len(known):
        manifest["branches"] = [{"after": step} for step in branch]
    files.publish(folder / "run.json", encode_manifest(manifest))
    return f"run.json: {what}; made again {origin}"


def _source(path: Path) -> Source:
    return Source.open(path, partial(refuse_replaced, max_bytes=ANY_SIZE, max_ratio=MAX_RATIO))


def _redundant(folder: Path, paths: list[Path]) -> list[Path]:
    """Segments of which every row and static array is in run.h5, among the superseded rows, or in a larger segment."""
    sources = [_source(path) for path in paths]
    manifest = read_manifest(folder) if (folder / "run.json").exists() else {}
    branches = max((tuple(resumed_after(manifest)), *(source.branch for source in sources)), key=len)
    kept: set[Hashable] = set()
    redundant = []
    # What other files are measured by comes first; of two equal segments the one with the smaller name stays.
    order = sorted(sources, key=lambda one: (one.path.parent.name == "segments", -_count(one), one.path.name))
    for source in order:
        rows = set(_rows(source, branches))
        if source.path.parent.name == "segments" and rows <= kept:
            redundant.append(source.path)
        else:
            kept |= rows
    return redundant


def _count(source: Source) -> int:
    return sum(len(steps) for steps, _ in source.axes.values())


def _rows(source: Source, branches: tuple[int, ...]) -> Iterator[Hashable]:
    """What a file holds, by content: rows of the same step, branch and CRCs are the same."""
    last = source.rows_behind(branches)
    with source.opened() as file:
        for entry in source.declarations.values():
            crcs = {field.name: _crcs(file, entry, field.name) for field in entry.fields.values()}
            steps = source.axes[entry.group][0].tolist() if entry.stepped else []
            stepped = [field.name for field in entry.fields.values() if not entry.is_static(field)]
            for row, step in enumerate(steps):
                branch = "visible" if step <= last else source.branch
                yield entry.group, branch, step, tuple(int(crcs[name][row]) for name in stepped)
            for field in entry.fields.values():
                if entry.is_static(field) and entry.path(field) in source.statics:
                    yield entry.path(field), int(crcs[field.name][0])


def _crcs(file: h5py.File, entry: Declaration, name: str) -> Array:
    path = f"{entry.group}/{name}"
    return np.atleast_1d(file[path].attrs["crc32"]) if path in file else np.zeros(0)
