"""RunWriter: a recording in the making. One closed file per commit, visible all at once, never changed again."""

from __future__ import annotations

import math
import re
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import ConfigurationError, ProbeError, RecordingExists, ShapeError, StorageError
from ..probe import Field
from . import files
from .declare import declared
from .segment import FORMAT, TEXT, Array, Block, Declaration, build_image, dump_json
from .verify import remember

# What a full disk may pile up in memory before snapshots are given up.
PENDING_BYTES = 256 * 2**20
_SECRET = re.compile(r"(token|secret|password|key$)", re.IGNORECASE)
_SECRET_IN_COMMAND = re.compile(r"([^\s=]*(?:token|secret|password|key)[^\s=]*[=\s]+)(\S+)", re.IGNORECASE)
_MASK = "***"


def _masked(value: Any, *, secret: bool = False) -> Any:
    if isinstance(value, Mapping):
        return {key: _masked(entry, secret=secret or bool(_SECRET.search(str(key)))) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_masked(entry, secret=secret) for entry in value]
    return _MASK if secret and isinstance(value, str) and value else value


def _without_secrets(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Mask texts under secret-looking keys of ``config`` and secret-looking settings of ``command``."""
    safe = dict(entries)
    if "config" in safe:
        safe["config"] = _masked(safe["config"])
    if isinstance(safe.get("command"), str):
        safe["command"] = _SECRET_IN_COMMAND.sub(rf"\g<1>{_MASK}", safe["command"])
    return safe


class RunWriter:
    """Writes one run into a folder of its own.

    Args:
        path: folder that does not exist or is empty.
        manifest: entries of run.json; values are JSON, NaN is stored as the string "NaN".

    Raises: RecordingExists: the folder holds something; nothing was touched.  ConfigurationError: the folder's name.
        StorageError: the folder cannot be made.
    """

    def __init__(self, path: str | Path, manifest: Mapping[str, Any]) -> None:
        self.path = Path(path)
        files.check_name(self.path.absolute().name, "run")
        if self.path.is_dir():
            found = next(self.path.iterdir(), None)
        else:
            found = self.path if self.path.exists() or self.path.is_symlink() else None
        if found is not None:
            raise RecordingExists(
                f"{self.path} holds {found.name!r} already; nothing was touched; choose another folder"
            )
        self.manifest: dict[str, Any] = {
            "format": FORMAT,
            "ntkdyn": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "status": "running",
            "results": {},
            **_without_secrets(manifest),
        }
        text = dump_json(self.manifest, indent=1)
        files.make_folder(self.path)
        try:
            files.claim(self.path / "run.json", text.encode())
        except FileExistsError as error:
            raise RecordingExists(
                f"{self.path} was taken by another run just now; nothing was touched; choose another folder"
            ) from error
        files.make_folder(self.path / "segments")
        self._declarations: dict[str, Declaration] = {}
        self._written: dict[str, set[int]] = {}
        self._statics_done: set[str] = set()
        self._names: set[str] = set()
        self._pending: deque[tuple[str, bytes, list[Block]]] = deque()
        self._manifest_pending = False
        self._warned = False
        self._closed = False

    def declare(self, group: str, fields: Sequence[Field], *, attributes: Mapping[str, Any] | None = None) -> None:
        """Declare what will be recorded under a group such as "ntk/test", before its first commit.

        Raises: ConfigurationError, ShapeError: a name, dtype, shape or coordinate that a recording does not take.
        """
        declaration = declared(self._declarations, group, fields, attributes or {}, stepped=True)
        dump_json(declaration.to_json())
        self._declarations[group] = declaration
        self._written[group] = set()

    def write_arrays(
        self,
        group: str,
        arrays: Mapping[str, Any],
        *,
        dims: Mapping[str, tuple[str, ...]],
        attributes: Mapping[str, Any] | None = None,
    ) -> bool:
        """Write arrays that belong to no step, such as a probe set, as one segment.

        Raises: ConfigurationError, ShapeError: as ``declare``.
        """
        if group.startswith("probe_sets/"):
            files.check_name(group.removeprefix("probe_sets/"), "probe set")
        given = {name: np.asarray(array) for name, array in arrays.items()}
        fields = []
        for name, array in given.items():
            if name not in dims:
                raise ConfigurationError(f"array '{group}/{name}': found no dims, expected one name per axis")
            dtype = TEXT if array.dtype.kind in "UO" else array.dtype.str
            fields.append(Field(name=name, dims=tuple(dims[name]), shape=array.shape, dtype=dtype, static=True))
        declaration = declared(self._declarations, group, fields, attributes or {}, stepped=False)
        statics = {name: _fitting(declaration, declaration.fields[name], array) for name, array in given.items()}
        part = Declaration(group, {name: declaration.fields[name] for name in given}, declaration.attributes, False)
        block = Block(part, (), (), {}, statics)
        image = build_image([block])
        self._declarations[group] = declaration
        return self._publish(self._name("static-0"), image, [block])

    def commit(self, step: int, epoch: float | None, records: Mapping[str, Mapping[str, Any]]) -> bool:
        """Write what the groups due at this step recorded, as one segment.

        Static fields are taken at the group's first commit and not asked for again.

        Returns: True when it is committed; False, with one warning, when the disk refuses: the snapshot stays in memory
            and is tried again at the next commit and at close.
        Raises: ProbeError: an unknown or missing field, a second record of one step.  ShapeError.
        """
        number = math.nan if epoch is None else float(epoch)
        blocks = [self._block(group, int(step), number, arrays) for group, arrays in records.items()]
        if not blocks:
            return self._flush()
        name = self._name(f"seg-0-{int(step):012d}-{int(step):012d}")
        image = build_image(blocks)
        for block in blocks:
            self._written[block.declaration.group].add(int(step))
            self._statics_done.add(block.declaration.group)
        return self._publish(name, image, blocks)

    def update(self, **entries: Any) -> None:
        """Merge entries into run.json, atomically; a refusing disk is warned of and tried again."""
        merged = {**self.manifest, **_without_secrets(entries)}
        dump_json(merged)
        self.manifest = merged
        self._manifest_pending = True
        self._flush()

    def close(self, *, pack: bool = True, **entries: Any) -> None:
        """Write what is left, set the status ("finished" unless given) and pack runs of up to 1 GiB; idempotent.

        After a close that could not bring everything to the disk, a second one tries again.
        """
        if self._closed:
            return
        self.update(**{"status": "finished", **entries})
        if self._pending or self._manifest_pending:
            warnings.warn(
                f"{self.path}: {len(self._pending)} snapshots are in memory only; free disk space and close again",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self._closed = True
        if pack:
            # Imported late: writing needs nothing of it, and it stands on the reader.
            from .pack import pack_when_small

            pack_when_small(self.path)

    def _block(self, group: str, step: int, epoch: float, arrays: Mapping[str, Any]) -> Block:
        if self._closed:
            raise ProbeError(f"{self.path}: found a commit of step {step} after close; record before closing")
        if group not in self._declarations or not self._declarations[group].stepped:
            raise ProbeError(f"group {group!r}: found a record, expected a declaration first; call declare")
        if step < 0 or step in self._written[group]:
            raise ProbeError(f"group {group!r}: found step {step} recorded already or negative; record each step once")
        declaration = self._declarations[group]
        unknown = sorted(set(arrays) - set(declaration.fields))
        if unknown:
            raise ProbeError(f"group {group!r}: found the undeclared field {unknown[0]!r}; return it from fields()")
        rows, statics = {}, {}
        for name, field in declaration.fields.items():
            if field.static and group in self._statics_done:
                continue
            if name not in arrays:
                raise ProbeError(f"field '{group}/{name}' at step {step}: found nothing, expected {list(field.shape)}")
            array = _fitting(declaration, field, arrays[name])
            if field.static:
                statics[name] = array
            else:
                rows[name] = array[np.newaxis]
        return Block(declaration, [step], [epoch], rows, statics)

    def _name(self, stem: str) -> str:
        name, count = f"{stem}.h5", 1
        while name in self._names:
            name, count = f"{stem}-{count}.h5", count + 1
        self._names.add(name)
        return name

    def _publish(self, name: str, image: bytes, blocks: list[Block]) -> bool:
        self._pending.append((name, image, blocks))
        done = self._flush()
        if len(self._pending) > 1 and sum(len(data) for _, data, _ in self._pending) > PENDING_BYTES:
            self._pending.pop()
            for block in blocks:
                group = block.declaration.group
                self._written.get(group, set()).difference_update(block.steps)
                if block.statics:
                    self._statics_done.discard(group)
            warnings.warn(
                f"{self.path}: {name} was given up, {PENDING_BYTES} bytes wait in memory already; free disk space",
                RuntimeWarning,
                stacklevel=3,
            )
        return done

    def _flush(self) -> bool:
        try:
            while self._pending:
                name, image, _ = self._pending[0]
                target = self.path / "segments" / name
                files.publish(target, image)
                remember(target)
                self._pending.popleft()
            if self._manifest_pending:
                files.publish(self.path / "run.json", dump_json(self.manifest, indent=1).encode())
                self._manifest_pending = False
        except StorageError as error:
            if not self._warned:
                warnings.warn(
                    f"{error}; training goes on, what is new waits in memory and is tried again at the next commit",
                    RuntimeWarning,
                    stacklevel=4,
                )
            self._warned = True
            return False
        self._warned = False
        return True


def _fitting(declaration: Declaration, field: Field, value: Any) -> Array:
    """The array in its declared dtype and memory order.

    Raises: ShapeError, ProbeError: names the field, found, expected.
    """
    where = f"field {declaration.path(field)!r}"
    array = np.asarray(value)
    if array.shape != field.shape:
        raise ShapeError(f"{where}: found shape {list(array.shape)}, expected {list(field.shape)} as declared")
    if field.dtype == TEXT:
        if not all(isinstance(entry, str) and "\0" not in entry for entry in array.reshape(-1).tolist()):
            raise ProbeError(f"{where}: found other values, expected text without NUL")
        return array.astype(str)
    if not np.can_cast(array.dtype, field.dtype, "same_kind"):
        raise ProbeError(
            f"{where}: found dtype {array.dtype}, expected {field.dtype} as declared; declare what is returned"
        )
    return np.ascontiguousarray(array.astype(field.dtype)).reshape(field.shape)
