"""RunWriter: a recording in the making. One closed file per commit, visible all at once, never changed again."""

from __future__ import annotations

import math
import os
import platform
import secrets
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import (
    ConfigurationError,
    DamagedRecording,
    EditedManifest,
    MissingRecording,
    ProbeError,
    RecordingExists,
)
from ..probe import Bands, Field
from . import files
from .bands import BandedRow
from .block import Block
from .declare import declared, fitting, refuse_other_fields
from .gathering import Gathering
from .lock import NAME as LOCK
from .lock import Lock, refuse_locked
from .manifest import encode_manifest, read_manifest, refuse_differences, without_secrets
from .metadata import dump_json
from .outbox import Outbox
from .reader import RunReader
from .segment import FORMAT, TEXT, Array, Declaration
from .verify import ANY_SIZE


class RunWriter:
    """Writes one run into a folder of its own, which it alone may write into.

    Args:
        path: folder that does not exist or is empty; with ``after`` that of a run.
        manifest: entries of run.json; values are JSON, NaN is stored as the string "NaN".
        after: continue the run that lies there behind this step, on a new branch: later steps are superseded, nothing
            is deleted. What an interruption left half done is repaired first, ``repaired`` says what.
        same: entries of the manifest that must be those of the run that is continued.
        commit_every: seconds for which snapshots are gathered in memory and then committed together; 0: each at once.

    Raises: RecordingExists: the folder holds something; nothing was touched.  LockedRecording: another process writes
        into it.  ConfigurationError: the folder's name, or another configuration than the run's.  MissingRecording,
        DamagedRecording: there is no run to continue.  StorageError: the folder cannot be made.
    """

    def __init__(
        self,
        path: str | Path,
        manifest: Mapping[str, Any],
        *,
        after: int | None = None,
        same: Sequence[str] = (),
        commit_every: float = 0.0,
    ) -> None:
        self.path = Path(path)
        self.repaired: tuple[str, ...] = ()
        self._declarations: dict[str, Declaration] = {}
        self._written: dict[str, set[int]] = {}
        self._statics_done: set[str] = set()
        self._statics_left: dict[str, dict[str, Array]] = {}
        self._branch: list[int] = []
        self._outbox = Outbox(self.path)
        self._gathering = Gathering(commit_every)
        self._closed = False
        self._process = os.getpid()
        self._opened = time.monotonic()
        # A new run is opened when its first snapshot has been measured.
        self._clock_is_late = after is None
        files.check_name(self.path.absolute().name, "run")
        fresh = {
            "format": FORMAT,
            "ntkdyn": __version__,
            "run": secrets.token_hex(8),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": platform.node(),
            "status": "running",
            "results": {},
            **without_secrets(manifest),
        }
        encode_manifest(fresh)
        if after is None:
            self._lock = self._claim(fresh)
            self.manifest: dict[str, Any] = fresh
        else:
            self._lock, self.manifest = self._continue(fresh, after, same)
        # Without close the lock goes with the writer, so that a notebook can begin again.
        self._release = weakref.finalize(self, self._lock.release)

    def _claim(self, manifest: Mapping[str, Any]) -> Lock:
        refuse_occupied(self.path)
        files.make_folder(self.path)
        lock = Lock(self.path)
        try:
            refuse_occupied(self.path, locked=True)
            try:
                files.claim(self.path / "run.json", encode_manifest(manifest))
            except FileExistsError as error:
                raise RecordingExists(
                    f"{self.path} was taken by another run just now; nothing was touched; choose another folder"
                ) from error
            files.make_folder(self.path / "segments")
        except BaseException:
            lock.release()
            raise
        return lock

    def _continue(self, fresh: Mapping[str, Any], after: int, same: Sequence[str]) -> tuple[Lock, dict[str, Any]]:
        if not (self.path / "run.json").exists() and not (self.path / "run.h5").exists():
            raise MissingRecording(f"{self.path}: found no run to continue, expected run.json; check the path")
        lock = Lock(self.path)
        try:
            # Imported late: writing a new run needs nothing of it, and it stands on the reader.
            from .repair import repair_locked

            # Before the repair, which changes the folder; a manifest that has to be made again is compared after it.
            try:
                refuse_differences(self.path, read_manifest(self.path), fresh, same)
            except EditedManifest:
                # The repair would accept it, and nobody would have been asked.
                raise
            except (FileNotFoundError, DamagedRecording):
                pass
            self.repaired = repair_locked(self.path)
            reader = RunReader.open(self.path, max_bytes=ANY_SIZE)
            refuse_differences(self.path, reader.manifest, fresh, same)
            self._declarations = dict(reader.declarations)
            self._written = {
                group: {step for step in reader.steps(group).tolist() if step <= after} for group in reader.groups()
            }
            recorded = frozenset().union(*(source.statics for source in reader.sources))
            self._statics_done = {
                group
                for group, entry in self._declarations.items()
                if any(entry.is_static(field) and entry.path(field) in recorded for field in entry.fields.values())
            }
            self._outbox = Outbox(self.path, [entry.name for entry in (self.path / "segments").glob("*.h5")])
            self._branch = [*reader.branches, after]
            self._outbox.settle(reader.sources)
            changed = {
                key: fresh[key]
                for key in ("ntkdyn", "torch", "numpy", "python", "processor", "accelerator")
                if key in fresh
            }
            branch = {"after": after, "created": fresh["created"], "host": fresh["host"], **changed}
            manifest = {
                **fresh,
                **reader.manifest,
                "status": "running",
                "results": {},
                "branches": [*reader.manifest.get("branches", ()), branch],
            }
            files.make_folder(self.path / "segments")
            files.publish(self.path / "run.json", encode_manifest(manifest))
        except BaseException:
            lock.release()
            raise
        return lock, manifest

    def declare(self, group: str, fields: Sequence[Field], *, attributes: Mapping[str, Any] | None = None) -> None:
        """Declare what will be recorded under a group such as "ntk/test", before its first commit.

        Raises: ConfigurationError, ShapeError: a name, dtype, shape or coordinate that a recording does not take.
        """
        known = self._declarations.get(group)
        if known is not None and self._branch and group in self._written:
            refuse_other_fields(self.path, known, fields)
            return
        declaration = declared(self._declarations, group, fields, attributes or {}, stepped=True)
        dump_json(declaration.to_json())
        self._declarations[group] = declaration
        self._written[group] = set()

    def has_arrays(self, group: str) -> bool:
        """Whether the arrays of a group without steps are in the run already."""
        return group in self._declarations and not self._declarations[group].stepped

    def write_arrays(
        self,
        groups: Mapping[str, Mapping[str, Any]],
        *,
        dims: Mapping[str, tuple[str, ...]],
        attributes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> bool:
        """Write arrays that belong to no step, such as the probe sets, as one segment.

        Args: groups: group -> name -> array.  dims: "group/name" -> one name per axis.  attributes: of groups.
        Raises: ConfigurationError, ShapeError: as ``declare``; nothing is written.
        """
        declarations = dict(self._declarations)
        blocks = []
        for group, arrays in groups.items():
            if group.startswith("probe_sets/"):
                files.check_name(group.removeprefix("probe_sets/"), "probe set")
            given = {name: np.asarray(array) for name, array in arrays.items()}
            fields = []
            for name, array in given.items():
                path = f"{group}/{name}"
                if path not in dims:
                    raise ConfigurationError(f"array '{path}': found no dims, expected one name per axis")
                dtype = TEXT if array.dtype.kind in "UO" else array.dtype.str
                fields.append(Field(name=name, dims=tuple(dims[path]), shape=array.shape, dtype=dtype, static=True))
            named = (attributes or {}).get(group, {})
            declaration = declarations[group] = declared(declarations, group, fields, named, stepped=False)
            statics = {name: fitting(declaration, declaration.fields[name], array) for name, array in given.items()}
            part = Declaration(group, {name: declaration.fields[name] for name in given}, declaration.attributes, False)
            blocks.append(Block(part, (), (), {}, statics))
        self._declarations.update(declarations)
        return not blocks or self._outbox.add("static-0", blocks, self._facts, lambda: None)

    def commit(
        self,
        step: int,
        epoch: float | None,
        records: Mapping[str, Mapping[str, Any]],
        *,
        seconds: Mapping[str, float] | None = None,
    ) -> bool:
        """Write what the groups due at this step recorded, as one segment, or gather it for one.

        Static fields are taken at the group's first commit and not asked for again. Bands are made and written one
        after the other.

        Args: seconds: what measuring took, by group; stored beside the sizes.
        Returns: True when it is committed; False while it is gathered and, with one warning, when the disk refuses: the
            snapshot stays in memory and is tried again at the next commit and at close; one with Bands is given up.
        Raises: What bands raise while they are made; nothing of the step is written then.  ProbeError: an unknown or
            missing field, a second record of one step, or a commit in a forked child.  ShapeError.
        """
        self._refuse_child()
        number = math.nan if epoch is None else float(epoch)
        blocks = [self._block(group, int(step), number, arrays) for group, arrays in records.items()]
        if not blocks:
            return self._outbox.flush()
        for block in blocks:
            block.seconds = float((seconds or {}).get(block.declaration.group, 0.0))
            self._written[block.declaration.group].add(int(step))
            self._statics_done.add(block.declaration.group)
        if self._clock_is_late:
            self._opened -= sum(block.seconds or 0.0 for block in blocks)
            self._clock_is_late = False
        if any(block.in_bands for block in blocks):
            # Bands may fail, and nothing else must go with them.
            self.flush()
        return self._gathering.add(blocks) and self.flush()

    def flush(self) -> bool:
        """Commit what has been gathered; whether everything is committed."""
        self._refuse_child()
        blocks = self._gathering.take()
        if not blocks:
            return self._outbox.is_empty
        steps = [step for block in blocks for step in block.steps]
        stem = f"seg-0-{min(steps):012d}-{max(steps):012d}"
        return self._outbox.add(stem, blocks, self._facts, lambda: self._forget(blocks))

    def _forget(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            self._written[block.declaration.group].difference_update(block.steps)
            if block.statics:
                self._statics_done.discard(block.declaration.group)
                # They are given once, and go with the next snapshot.
                self._statics_left[block.declaration.group] = {
                    name: array.copy() for name, array in block.statics.items()
                }

    def update(self, **entries: Any) -> None:
        """Merge entries into run.json, atomically; a refusing disk is warned of and tried again."""
        self._refuse_child()
        merged = {**self.manifest, **without_secrets(entries)}
        content = encode_manifest(merged)
        self.manifest = merged
        self._outbox.set_manifest(content)

    @property
    def closed(self) -> bool:
        """Whether ``close`` has brought everything to the disk."""
        return self._closed

    def close(self, *, pack: bool = True, **entries: Any) -> None:
        """Write what is left, set the status ("finished" unless given) and pack runs of up to 1 GiB; idempotent.

        Steps that the disk did not take are named in one warning. After a close that could not bring everything to the
        disk, a second one tries again. In a forked child nothing is done.
        """
        if self._closed or os.getpid() != self._process:
            return
        self.flush()
        self.update(**{"status": "finished", **entries})
        if not self._outbox.is_empty:
            # A disk that has refused a single call is asked once more before anything is said to be lost.
            self._outbox.flush()
        self._name_missing_steps()
        if not self._outbox.is_empty:
            return
        self._closed = True
        if pack:
            # Imported late: writing needs nothing of it, and it stands on the reader.
            from .pack import pack_when_small

            pack_when_small(self.path)
        self._release()

    def _name_missing_steps(self) -> None:
        waiting = self._outbox.waiting
        # Without those that were recorded again later.
        lost = [step for step in self._outbox.lost if not any(step in steps for steps in self._written.values())]
        self._outbox.lost = []
        if not (waiting or lost) and self._outbox.is_empty:
            return
        missing = sorted({*waiting, *lost})
        what = f"step{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}" if missing else "the end of the run"
        remedy = "free disk space and close again" if waiting or not self._outbox.is_empty else "free disk space"
        warnings.warn(
            f"{self.path}: {what} could not be written; all that was committed before is kept; {remedy}",
            RuntimeWarning,
            stacklevel=3,
        )

    def _facts(self) -> dict[str, Any]:
        elapsed = time.monotonic() - self._opened
        return {"branch": self._branch, "level": 0, "elapsed": round(elapsed, 6)}

    def _refuse_child(self) -> None:
        if os.getpid() != self._process:
            raise ProbeError(
                f"{self.path}: found a commit in process {os.getpid()}, a fork of the writer {self._process}, expected "
                "one writer; record in the process that made the recorder"
            )

    def _block(self, group: str, step: int, epoch: float, arrays: Mapping[str, Any]) -> Block:
        if self._closed:
            raise ProbeError(f"{self.path}: found a commit of step {step} after close; record before closing")
        if group not in self._declarations or not self._declarations[group].stepped:
            raise ProbeError(f"group {group!r}: found a record, expected a declaration first; call declare")
        if step < 0 or step in self._written[group]:
            raise ProbeError(f"group {group!r}: found step {step} recorded already or negative; record each step once")
        declaration = self._declarations[group]
        arrays = {**self._statics_left.get(group, {}), **arrays}
        unknown = sorted(set(arrays) - set(declaration.fields))
        if unknown:
            raise ProbeError(f"group {group!r}: found the undeclared field {unknown[0]!r}; return it from fields()")
        rows: dict[str, Array | BandedRow] = {}
        statics = {}
        for name, field in declaration.fields.items():
            if field.static and group in self._statics_done:
                continue
            if name not in arrays:
                raise ProbeError(f"field '{group}/{name}' at step {step}: found nothing, expected {list(field.shape)}")
            if isinstance(arrays[name], Bands):
                if field.static or not field.shape or field.dtype == TEXT:
                    raise ProbeError(f"field '{group}/{name}': found Bands, expected an array; they are for numbers")
                rows[name] = BandedRow(declaration, field, arrays[name])
                continue
            array = fitting(declaration, field, arrays[name])
            if field.static:
                statics[name] = array
            else:
                rows[name] = array[np.newaxis]
        return Block(declaration, [step], [epoch], rows, statics)


def refuse_occupied(path: Path, *, locked: bool = False) -> None:
    """Refuse a folder for a new run if it holds anything but the lock and leftovers of a run that never began.

    Args: locked: the lock is the caller's.
    Raises: RecordingExists, and LockedRecording where a living process writes there.
    """
    found: Path | None = path
    if not path.is_symlink():
        try:
            # A lock is published by way of a temporary file: those say nothing before the lock has been asked for.
            inside = (entry for entry in path.iterdir() if entry.name != LOCK)
            found = next((entry for entry in inside if not entry.name.startswith(files.TEMPORARY)), None)
        except FileNotFoundError:
            # Asked once: between two questions another process may make the folder.
            found = None
        except NotADirectoryError:
            pass
    if found is not None:
        if path.is_dir() and not locked:
            refuse_locked(path)
        raise RecordingExists(f"{path} holds {found.name!r} already; nothing was touched; choose another folder")
