"""Reading files of unknown size and goodwill: never more than expected, truncation and damage in one line."""

from __future__ import annotations

import gzip
import lzma
import os
import random
import re
import tracemalloc
from pathlib import Path

import pytest

from ntkdyn.datasets.compression import decompress, read_stored
from ntkdyn.errors import DamagedData, MissingData

# Always the same: what a flipped bit makes of a stream depends on the stream.
CONTENT = random.Random(1).randbytes(5000) + b"a" * 3000
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def content_of(path: Path, at_most: int = len(CONTENT)) -> bytes:
    stored = read_stored(path, at_most=at_most, where=f"data {path}", remedy="replace it")
    return decompress(stored, path, at_most=at_most, where=f"data {path}", remedy="replace it")


def refusal(path: Path, at_most: int = len(CONTENT)) -> str:
    with pytest.raises(DamagedData) as caught:
        content_of(path, at_most)
    message = str(caught.value)
    assert message.startswith(f"data {path}: ")
    assert message.endswith("; replace it")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", PACK)
def test_content_is_what_was_packed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(PACK[suffix](CONTENT))
    assert content_of(path) == CONTENT
    assert content_of(path, at_most=10**6) == CONTENT
    # Content that cannot be compressed makes the file larger than itself.
    path.write_bytes(PACK[suffix](CONTENT[:5000]))
    assert content_of(path, at_most=5000) == CONTENT[:5000]


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_several_streams_and_padding(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(PACK[suffix](CONTENT[:100]) + PACK[suffix](CONTENT[100:]) + bytes(8))
    assert content_of(path) == CONTENT
    path.write_bytes(PACK[suffix](b"") * 65)
    assert f"found more than 64 {'gzip' if suffix == '.gz' else 'xz'} streams" in refusal(path)


@pytest.mark.parametrize(("suffix", "name"), [(".gz", "gzip"), (".xz", "xz")])
@pytest.mark.parametrize("kept", [0, 1, 20, 4000, -12, -1])
def test_truncated(tmp_path: Path, suffix: str, name: str, kept: int) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(PACK[suffix](CONTENT)[:kept])
    assert re.search(rf"truncated {name} file, it ends after \d+ bytes of content", refusal(path))


@pytest.mark.parametrize(("suffix", "name"), [(".gz", "gzip"), (".xz", "xz")])
def test_flipped_byte_and_other_format(tmp_path: Path, suffix: str, name: str) -> None:
    path = tmp_path / f"data{suffix}"
    packed = bytearray(PACK[suffix](CONTENT))
    packed[2000] ^= 1
    path.write_bytes(packed)
    assert f"no sound {name} file" in refusal(path)
    path.write_bytes(CONTENT)
    assert f"no sound {name} file" in refusal(path)
    path.write_bytes(PACK[suffix](CONTENT) + b"more")
    assert f"{name} file" in refusal(path)


@pytest.mark.parametrize(("suffix", "name"), [(".gz", "gzip"), (".xz", "xz")])
def test_bomb_is_not_unpacked(tmp_path: Path, suffix: str, name: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(PACK[suffix](bytes(48 * 2**20)))
    assert path.stat().st_size < 2**17
    tracemalloc.start()
    try:
        assert f"found more than {2**20} bytes in the {name} file, expected no more" in refusal(path, 2**20)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_xz_that_asks_for_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**28}]
    path.write_bytes(lzma.compress(CONTENT, filters=filters))
    assert "no sound xz file (Memory usage limit exceeded)" in refusal(path)


def test_file_larger_than_its_content_can_be_is_not_read(tmp_path: Path) -> None:
    for name, limit in (("plain", 1000), ("data.gz", 1000 + 10 + 2**16)):
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(10**12)  # a hole; read, it would fill the memory
        assert f"found {10**12} bytes, expected at most {limit}" in refusal(path, 1000)


def test_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "found a folder, FIFO or device, expected a file" in refusal(tmp_path / "folder")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be read" in refusal(tmp_path / "loop")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "found a folder, FIFO or device, expected a file" in refusal(tmp_path / "pipe")
    with pytest.raises(MissingData, match="absent: not found; replace it"):
        content_of(tmp_path / "absent")
