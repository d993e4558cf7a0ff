"""Checksums of the manifest: what is accepted by which, what is refused."""

from __future__ import annotations

import gzip
import hashlib
import lzma
from dataclasses import replace
from pathlib import Path

import pytest

from ntkdyn.datasets.manifest import ChecksumKind, DataFile, KnownDataset, Stored
from ntkdyn.datasets.verification import read_verified, verify
from ntkdyn.errors import DamagedData

CONTENT = b"one\ntwo\nthree\n"
PACKED = gzip.compress(CONTENT, mtime=1)
KNOWN = KnownDataset("tiny", "a tiny data set", "text", "example.org/tiny", "none", "nobody", (), ())
FILE = DataFile(
    name="train.en",
    part="train",
    holds="en",
    count=3,
    bytes=len(CONTENT),
    at_most=len(CONTENT),
    kind="sha256",
    checksum=hashlib.sha256(CONTENT).hexdigest(),
    compressed={"gz": Stored(len(PACKED), hashlib.sha256(PACKED).hexdigest())},
)


def write(folder: Path, stored: bytes, suffix: str = "") -> Path:
    path = folder / f"train.en{suffix}"
    path.write_bytes(stored)
    return path


@pytest.mark.parametrize(
    ("stored", "suffix", "verified"),
    [
        (PACKED, ".gz", "sha256 of the file"),
        (gzip.compress(CONTENT, mtime=2), ".gz", "sha256 of the content"),
        (lzma.compress(CONTENT), ".xz", "sha256 of the content"),
        (CONTENT, "", "sha256 of the content"),
    ],
)
def test_file_and_content_are_recognized(tmp_path: Path, stored: bytes, suffix: str, verified: str) -> None:
    path = write(tmp_path, stored, suffix)
    content, record = read_verified(KNOWN, FILE, path, name="tiny/x")
    assert content == CONTENT
    assert record.as_json() == {
        "file": "tiny/x",
        "bytes": len(stored),
        "sha256": hashlib.sha256(stored).hexdigest(),
        "verified": verified,
    }
    assert verify(KNOWN, FILE, path, name="tiny/x") == record


@pytest.mark.parametrize("kind", ["sha1", "md5"])
@pytest.mark.parametrize("exact", [True, False])
def test_other_checksums_are_named_in_the_record(tmp_path: Path, kind: ChecksumKind, exact: bool) -> None:
    checksum = hashlib.new(kind, CONTENT).hexdigest()
    file = replace(FILE, kind=kind, checksum=checksum, bytes=len(CONTENT) if exact else None, at_most=1000)
    content, record = read_verified(KNOWN, file, write(tmp_path, CONTENT), name="x")
    assert (content, record.verified) == (CONTENT, f"{kind} of the content")
    with pytest.raises(DamagedData, match=f"found content of {kind} [0-9a-f]+, expected {checksum}; replace it by"):
        read_verified(KNOWN, file, write(tmp_path, CONTENT[::-1]), name="x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\ntwo\ntHree\n", f"found content of sha256 [0-9a-f]{{64}}, expected {FILE.checksum}"),
        (b"one\ntwo\nthre\n", "found 13 bytes of content, expected 14"),
        (b"one\ntwo\n", "found 2 lines, expected 3, one a sentence"),
        (b"", "found 0 lines, expected 3, one a sentence"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_other_content_is_refused(tmp_path: Path, content: bytes, message: str, suffix: str) -> None:
    path = write(tmp_path, gzip.compress(content) if suffix else content, suffix)
    for read in (read_verified, verify):
        with pytest.raises(DamagedData, match=message) as caught:
            read(KNOWN, FILE, path, name="x")
        text = str(caught.value)
        assert text.startswith(f"data set tiny: {path}: found ")
        assert text.endswith("; replace it by the original from example.org/tiny")
        assert "\n" not in text
