"""One writer a run: a lock that a dead owner gives up, whatever children it has left behind.

``DIR/LOCK`` says who writes: host, boot, process and its start time. Its owner also holds an flock on it, which ends
with the process, but only together with every forked child that still has the descriptor (a DataLoader's worker);
hence the rule that the lock of a dead process is stale. HDF5's own locks are no help: clusters switch them off.
"""

from __future__ import annotations

import os
import platform
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import LockedRecording, StorageError
from . import files
from .metadata import dump_json, load_json

try:
    import fcntl
except ImportError:  # Windows: the content of the file alone decides
    fcntl = None  # type: ignore[assignment]

NAME = "LOCK"
_PATIENCE = 0.5


def _state_and_start(process: int) -> tuple[str, str | None]:
    """State letter of a process and its start time in ticks since the boot; "", None where the system does not tell."""
    try:
        # After the name of the program, which may hold spaces and brackets.
        fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", None


def _text(path: str) -> str | None:
    try:
        return os.readlink(path) if path.startswith("/proc/self/ns") else Path(path).read_text().strip()
    except OSError:
        return None


def _myself() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        # The same number is another process in another container.
        "processes": _text("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _state_and_start(os.getpid())[1],
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _is_alive(process: int, started: str | None) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's process
        pass
    state, found = _state_and_start(process)
    # A zombie has ended; a number is given to new processes after a while.
    return state not in ("Z", "X") and (found == started or found is None or started is None)


def owner_of(folder: Path) -> dict[str, Any] | None:
    """Who wrote LOCK; None where there is none, an empty mapping where it cannot be understood."""
    try:
        owner = load_json(files.read(folder / NAME, most_bytes=65536))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) and type(owner.get("pid")) is int and owner["pid"] > 0 else {}


def _is_dead(owner: dict[str, Any], path: Path) -> bool | None:
    """Whether the owner that a LOCK names has ended; None where that cannot be seen from here."""
    here = _myself()
    if not owner or owner.get("host") != here["host"]:
        return None
    if owner.get("boot") != here["boot"]:
        return True
    if owner.get("processes") != here["processes"]:
        return None
    if owner["pid"] == os.getpid() and owner.get("started") == here["started"]:
        # Our own, given back on a disk that refused to remove the file.
        return not any(lock._path == path for lock in _held)
    return not _is_alive(owner["pid"], owner.get("started"))


def _named(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process, which left no readable name"
    # Anybody may have written it: one line, of bounded length.
    who, host, since = (ascii(owner.get(name))[:100] for name in ("pid", "host", "since"))
    own = owner["pid"] == os.getpid() and owner.get("started") == _state_and_start(os.getpid())[1]
    return f"process {who} on host {host} since {since}{' (this very process)' if own else ''}"


def refuse_locked(folder: Path) -> None:
    """Refuse a folder into which a living process writes.

    Raises: LockedRecording: names the owner.
    """
    _refuse_living(folder, owner_of(folder))


def _refuse_living(folder: Path, owner: dict[str, Any] | None) -> bool | None:
    """Whether the owner has ended, None where that cannot be seen from here; one that lives is refused."""
    dead = None if owner is None else _is_dead(owner, (folder / NAME).absolute())
    if owner and dead is False:
        raise LockedRecording(
            f"{folder} is being written by {_named(owner)}; nothing was touched; "
            "wait for its end, or choose another folder"
        )
    return dead


class Lock:
    """The right to write into a folder, held until ``release`` or the end of the process.

    Args: force: take the lock of an owner that cannot be seen from here (another host, another container).
    Raises: LockedRecording: somebody else has it, named.  StorageError: LOCK cannot be written.
    """

    def __init__(self, folder: Path, *, force: bool = False) -> None:
        self._path = (folder / NAME).absolute()
        with _one_at_a_time(folder):
            owner = owner_of(folder)
            held = self._is_held()
            dead = _refuse_living(folder, owner)
            if (held and not dead) or (owner and dead is None and not force):
                raise LockedRecording(
                    f"{folder} is or was being written by {_named(owner or {})}, which cannot be seen from here; "
                    f"nothing was touched; once it has ended, run ntkdyn repair --unlock {folder}"
                )
            self._descriptor = self._take()
        self._process = os.getpid()
        _held.add(self)

    def _is_held(self) -> bool:
        if fcntl is None:
            return False
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
        finally:
            os.close(descriptor)
        return False

    def _take(self) -> int:
        """Publish a LOCK of our own in place of a stale one; its descriptor carries the flock."""
        with files.open_temporary(self._path) as (temporary, descriptor):
            if fcntl is not None:
                with suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            files.write(descriptor, dump_json(_myself()).encode(), 0)
            files.fsync(descriptor)
            files.replace(temporary, self._path)
            try:
                files.sync_folder(self._path.parent)
            except BaseException:
                # It is in place, and would name a living owner that has given up.
                with suppress(OSError):
                    files.unlink(self._path)
                raise
        return descriptor

    def release(self) -> None:
        """Give the right back; idempotent, and nothing in a forked child."""
        if self not in _held or os.getpid() != self._process:
            return
        _held.discard(self)
        with suppress(OSError, StorageError):
            if os.fstat(self._descriptor).st_ino == self._path.stat().st_ino:
                files.unlink(self._path)
        os.close(self._descriptor)

    def _forget(self) -> None:
        with suppress(OSError):
            os.close(self._descriptor)


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _close_in_child() -> None:
    # A child that keeps the descriptor would keep the flock of a dead parent.
    for lock in list(_held):
        lock._forget()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep processes from judging the same stale lock at the same time, by an flock on the folder itself."""
    if fcntl is None:
        yield
        return
    with files.storage_errors("open", folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise LockedRecording(
                        f"{folder} is being opened by {_named(owner_of(folder) or {})}; nothing was touched; try again"
                    ) from None
                time.sleep(0.01)
            except OSError:  # some network file systems lock no folders
                break
        yield
    finally:
        os.close(descriptor)
