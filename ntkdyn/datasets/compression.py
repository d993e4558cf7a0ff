"""Contents of files that may be compressed with gzip or xz, never more of them than is expected."""

from __future__ import annotations

import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import DamagedData, MissingData

# xz -9 needs 65 MiB to decompress; a file that asks for more was made to exhaust memory.
_XZ_MEMORY = 128 * 2**20
# What cannot be compressed grows by less than this (gzip and xz store it in blocks with short headers).
_OVERHEAD = 2**16
# Each further stream of a file costs a copy of the rest, so that a file of many tiny ones would take forever.
_STREAMS_AT_MOST = 64


def read_stored(path: Path, *, at_most: int, where: str, remedy: str) -> bytes:
    """Return the bytes of a file as it lies on disk.

    Args: at_most: largest size of the content. where, remedy: how messages begin and end.
    Raises: MissingData: there is no file. DamagedData: no plain file, or larger than its content can make it.
    """
    limit = at_most if _suffix(path) is None else at_most + at_most // 100 + _OVERHEAD
    with plain_file(path, at_most=limit, where=where, remedy=remedy) as file:
        return file.read(limit + 1)


@contextmanager
def plain_file(path: Path, *, at_most: int, where: str, remedy: str) -> Iterator[BinaryIO]:
    """Open a file for reading that is a plain one, of no more than ``at_most`` bytes; errors as of ``read_stored``."""
    try:
        # Not blocking: a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DamagedData(f"{where}: found a folder, FIFO or device, expected a file; {remedy}")
            if status.st_size > at_most:
                raise DamagedData(f"{where}: found {status.st_size} bytes, expected at most {at_most}; {remedy}")
            with open(descriptor, "rb", closefd=False) as file:
                yield file
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise MissingData(f"{where}: not found; {remedy}") from error
    except OSError as error:
        if isinstance(error, DamagedData):
            raise
        raise DamagedData(f"{where}: cannot be read ({error.strerror}); {remedy}") from error


def decompress(stored: bytes, path: Path, *, at_most: int, where: str, remedy: str) -> bytes:
    """Return the content of a file: its bytes, or what gzip (.gz) or xz (.xz) makes of them.

    Raises: DamagedData: truncated, damaged, or of more than ``at_most`` bytes, of which no more are made.
    """
    suffix = _suffix(path)
    if suffix is None:
        return stored
    start, name = _STREAMS[suffix]
    parts: list[bytes] = []
    size, rest = 0, stored
    while rest or not parts:
        if len(parts) == _STREAMS_AT_MOST:
            raise DamagedData(f"{where}: found more than {len(parts)} {name} streams, expected one; {remedy}")
        stream = start()
        try:
            # Room for one byte too many: its presence is what tells that there is more.
            parts.append(stream.decompress(rest, at_most + 1 - size))
        except (zlib.error, lzma.LZMAError) as error:
            raise DamagedData(f"{where}: no sound {name} file ({error}); {remedy}") from error
        size += len(parts[-1])
        if size > at_most:
            raise DamagedData(
                f"{where}: found more than {at_most} bytes in the {name} file, expected no more; {remedy}"
            )
        if not stream.eof:
            raise DamagedData(f"{where}: truncated {name} file, it ends after {size} bytes of content; {remedy}")
        rest = stream.unused_data.lstrip(b"\0")  # both formats allow zeros behind a stream, and further streams
    return b"".join(parts)


def _suffix(path: Path) -> str | None:
    return path.suffix if path.suffix in _STREAMS else None


def _gzip() -> zlib._Decompress:
    return zlib.decompressobj(wbits=31)


def _xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


_STREAMS: dict[str, tuple[Callable[[], zlib._Decompress | lzma.LZMADecompressor], str]] = {
    ".gz": (_gzip, "gzip"),
    ".xz": (_xz, "xz"),
}
