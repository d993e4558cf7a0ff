"""The one small interface through which every byte of a recording reaches the disk.

``publish`` makes a file visible all at once: temporary file in the same folder, fsync, rename, fsync of the folder.
A file is committed when ``publish`` returns. Crash tests replace the functions of this module by failing ones.
"""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import ConfigurationError, NtkdynError, RecordingExists, StorageError, UntrustedFile

TEMPORARY = ".tmp-"
_REMEDIES = {
    errno.ENOSPC: "; free disk space",
    errno.EDQUOT: "; free disk space, the quota is used up",
    errno.EACCES: "; give yourself write permission there, or choose another folder",
    errno.EPERM: "; give yourself write permission there, or choose another folder",
    errno.EROFS: "; choose a folder on a file system that is not mounted read-only",
}
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it may name a run or a probe set.

    Raises: ConfigurationError: anything but 1 to 100 of A-Z a-z 0-9 . _ - without a leading dot.
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{what} {name!r}: expected 1 to 100 of the characters A-Z a-z 0-9 . _ - and no leading dot; rename it"
        )
    return name


def refuse_existing(out: Path) -> None:
    """Refuse a place for results where there is something.  Raises: RecordingExists: nothing was touched."""
    if out.exists() or out.is_symlink():
        raise RecordingExists(f"{out} exists already; nothing was touched; choose another --out")


@contextmanager
def storage_errors(action: str, path: str | Path) -> Iterator[None]:
    """Turn OSError into StorageError with what was done to which file."""
    try:
        yield
    except NtkdynError:
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "")
        reason = error.strerror or error
        failure = StorageError(f"cannot {action} {path}: {reason}; nothing committed before is lost{remedy}")
        failure.errno = error.errno
        raise failure from error


def create(path: Path) -> int:
    """Open a new file for reading and writing; an existing one is an error."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)


def write(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """Write at an offset; return how many bytes were taken."""
    return os.pwrite(descriptor, data, offset)


def truncate(descriptor: int, size: int) -> None:
    """Set the length of an open file."""
    os.ftruncate(descriptor, size)


def fsync(descriptor: int) -> None:
    """Bring the bytes of an open file, or the entries of an open folder, to the disk."""
    os.fsync(descriptor)


def replace(source: Path, target: Path) -> None:
    """Rename within one folder; an existing target is replaced atomically."""
    os.replace(source, target)


def link(source: Path, target: Path) -> None:
    """Give a file a second name; an existing target is an error."""
    os.link(source, target)


def unlink(path: Path) -> None:
    """Remove a file; one that is gone already is no error.

    Raises: StorageError.
    """
    with storage_errors("remove", path), suppress(FileNotFoundError):
        path.unlink()


def sync_folder(path: Path) -> None:
    """Bring the entries of a folder to the disk: a rename is committed when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder with its parents; an existing one is no error.

    Raises: StorageError.
    """
    with storage_errors("create the folder", path):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync_folder(folder.parent)


def _without_waiting(path: str, flags: int) -> int:
    # Opening a FIFO would wait for somebody who writes into it.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@contextmanager
def regular_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, nothing else: a FIFO would hang its reader, a device may have no end.

    Raises: UntrustedFile: it is none.  OSError, FileNotFoundError.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UntrustedFile(f"{path}: found no regular file, expected a file of a recording; remove it")
        yield file


def read(path: Path, *, most_bytes: int = -1) -> bytes:
    """Return the content of a file, at most the first ``most_bytes``, or all of it.

    Raises: UntrustedFile: a FIFO or device.  StorageError; FileNotFoundError passes, because a live folder changes
        under its readers.
    """
    try:
        with regular_file(path) as file:
            return file.read(most_bytes)
    except (FileNotFoundError, UntrustedFile):
        raise
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}; check the permissions") from error


class OutputFile(io.RawIOBase):
    """A new file as a Python file object, so that HDF5 never opens a file for writing itself.

    A failing write is kept and raised by ``check`` and ``sync``, outside of HDF5: its own driver ends the process at
    exit when the disk is full, and an exception out of a write that HDF5 asked for ends it as well, later, at the next
    garbage collection (HDF5 2.0.0; test_disk_that_fails_while_packing). What comes after the failure stays in memory,
    so that HDF5 reads back what it wrote until it has closed the file.
    """

    def __init__(self, path: Path, *, target: Path | None = None) -> None:
        self.path = path
        self._target = target or path
        self._descriptor = create(path)
        self._position = 0
        self._failure: BaseException | None = None
        self._unwritten: list[tuple[int, bytes]] = []

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        target = memoryview(buffer).cast("B")
        data = os.pread(self._descriptor, len(target), self._position)
        size = len(data)
        target[:size] = data
        for offset, late in self._unwritten:
            first = max(offset, self._position)
            last = min(offset + len(late), self._position + len(target))
            if first < last:
                target[first - self._position : last - self._position] = late[first - offset : last - offset]
                size = max(size, last - self._position)
        self._position += size
        return size

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        whole = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(whole) and self._failure is None:
                done += write(self._descriptor, whole[done:], self._position + done)
        except BaseException as error:  # Ctrl-C too: h5py would turn it into an error of its own
            self._failure = error
        if done < len(whole):
            self._unwritten.append((self._position + done, bytes(whole[done:])))
        self._position += len(whole)
        return len(whole)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence)
        if start is None:
            ends = [late_offset + len(late) for late_offset, late in self._unwritten]
            start = max([os.fstat(self._descriptor).st_size, *ends])
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int | None = None) -> int:
        length = self._position if size is None else size
        try:
            truncate(self._descriptor, length)
        except BaseException as error:
            self._failure = self._failure or error
        return length

    def check(self) -> None:
        """Raise StorageError for the first write that failed, if one did; an interruption of it as it was."""
        if self._failure is not None:
            with storage_errors("write", self._target):
                raise self._failure

    def sync(self) -> None:
        """Bring what was written to the disk; raises the first failure."""
        self.check()
        fsync(self._descriptor)

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(6)}")


@contextmanager
def open_temporary(path: Path) -> Iterator[tuple[Path, int]]:
    """Yield a new temporary file beside ``path``, and its descriptor, which stays open unless the block fails.

    Raises: StorageError.
    """
    temporary = _temporary(path)
    with storage_errors("write", path):
        descriptor = create(temporary)
        try:
            yield temporary, descriptor
        except BaseException:
            os.close(descriptor)
            with suppress(OSError):
                unlink(temporary)
            raise


@contextmanager
def publishing(path: Path) -> Iterator[OutputFile]:
    """Yield a temporary file that becomes ``path`` when the block ends, or disappears when it fails.

    Raises: StorageError.
    """
    temporary = _temporary(path)
    with storage_errors("write", path):
        try:
            with OutputFile(temporary, target=path) as file:
                yield file
                file.sync()
            replace(temporary, path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):
                unlink(temporary)


def publish(path: Path, data: bytes | memoryview) -> None:
    """Write ``data`` as the whole content of ``path``; when this returns, it is committed.

    Raises: StorageError: nothing was changed, or the new content is visible but not certain to survive a crash.
    """
    with publishing(path) as file:
        file.write(data)


def claim(path: Path, data: bytes) -> None:
    """Publish a file that must not exist yet; of several processes exactly one succeeds.

    Raises: FileExistsError: another process was first; nothing was touched.  StorageError.
    """
    temporary = _temporary(path)
    publish(temporary, data)
    try:
        with storage_errors("write", path):
            try:
                link(temporary, path)
            except FileExistsError:
                raise
            except OSError:
                # Some file systems know no second names (FAT, many network mounts): reserve the name, then rename.
                os.close(create(path))
                replace(temporary, path)
            sync_folder(path.parent)
    except StorageError as error:
        if isinstance(error.__cause__, FileExistsError):
            raise FileExistsError(path) from error
        raise
    finally:
        with suppress(OSError):
            unlink(temporary)
