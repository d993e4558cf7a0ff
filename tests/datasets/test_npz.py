"""npz files of strangers: bombs, heads that lie, damage; what is recorded of one's own file."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntkdyn.datasets import load_npz
from ntkdyn.datasets.npz import _FREE
from ntkdyn.errors import ConfigurationError, MissingData


def members(**changes: bytes) -> dict[str, bytes]:
    arrays: dict[str, np.ndarray] = {
        "x_train": np.ones((8, 1, 2, 2), np.uint8),
        "y_train": np.arange(8) % 3,
        "x_test": np.ones((4, 1, 2, 2), np.uint8),
        "y_test": np.arange(4) % 3,
    }
    packed = {}
    for name, array in arrays.items():
        stream = io.BytesIO()
        np.save(stream, array)
        packed[f"{name}.npy"] = stream.getvalue()
    return packed | {f"{name}.npy": content for name, content in changes.items()}


def write(path: Path, packed: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in packed.items():
            archive.writestr(name, content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_npz(path)
    assert str(caught.value).startswith(f"data {path}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def head(shape: Any, kind: str = "|u1") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_own_file_is_recorded(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.npz", members())
    content = path.read_bytes()
    assert load_npz(path).provenance == {
        "name": "mine.npz",
        "origin": "own data",
        "license": None,
        "partial": None,
        "files": [
            {
                "file": "mine.npz",
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "verified": None,
            }
        ],
    }


def test_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    begin = head((_FREE,))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members().items():
            if name != "x_train.npy":
                archive.writestr(name, content)
        archive.writestr("x_train.npy", begin + bytes(2**20))
    # Zeros take seconds to compress: the sizes in the archive's table are made larger instead.
    content = path.read_bytes()
    true, claimed = ((len(begin) + size).to_bytes(4, "little") for size in (2**20, _FREE))
    assert content.count(true) == 2
    path.write_bytes(content.replace(true, claimed))
    tracemalloc.start()
    try:
        message = refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert re.search(r"found arrays of \d{10} bytes in a file of \d+, expected at most 200 times its size; ", message)


@pytest.mark.parametrize("shape", [(10**12,), (2**31, 2**31), (8, 1, 2, 3), (8, 1, 2)])
def test_head_that_lies_is_refused_before_memory_is_taken(tmp_path: Path, shape: tuple[int, ...]) -> None:
    message = refusal(write(tmp_path / "lie.npz", members(x_train=head(shape) + bytes(32))))
    assert re.search(r"x_train: found \d+ bytes, expected \d+ by its head of shape \[.*\]; the file is", message)


def test_negative_shape(tmp_path: Path) -> None:
    path = write(tmp_path / "lie.npz", members(x_train=head((-8, -4)) + bytes(32)))
    assert "not readable as npz without pickle" in refusal(path)


def test_single_array_with_a_head_that_lies(tmp_path: Path) -> None:
    path = tmp_path / "single.npy"
    path.write_bytes(head((10**12,)) + bytes(32))
    assert "found a single array, expected an npz file of x_train, y_train, x_test, y_test" in refusal(path)


def test_damaged_archives(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.npz", members(x_train=head((3000, 4)) + os.urandom(12_000)))
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:4], b""):
        path.write_bytes(content)
        assert "not readable as npz without pickle" in refusal(path)
    changed = bytearray(whole)
    changed[5000] ^= 0xFF
    path.write_bytes(changed)
    assert "not readable as npz without pickle (Bad CRC-32 for file 'x_train.npy')" in refusal(path)
    encrypted = bytearray(whole)
    for place in (place for place in range(len(whole)) if whole[place : place + 4] in (b"PK\1\2", b"PK\3\4")):
        encrypted[place + (8 if whole[place + 2] == 1 else 6)] |= 1
    path.write_bytes(encrypted)
    assert "not readable as npz without pickle" in refusal(path)


def test_no_file(tmp_path: Path) -> None:
    told = "found a folder, FIFO or device, expected an npz file of x_train, y_train, x_test, y_test; write them with"
    assert told in refusal(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.npz")
        assert told in refusal(tmp_path / "pipe.npz")
    with pytest.raises(
        MissingData, match=re.escape(f"data {tmp_path / 'absent.npz'}: not found, expected an npz file")
    ):
        load_npz(tmp_path / "absent.npz")


def test_label_out_of_range(tmp_path: Path) -> None:
    labels = io.BytesIO()
    np.save(labels, np.array([0, 1, 2, 10**9]))
    path = write(tmp_path / "mine.npz", members(y_test=labels.getvalue()))
    message = "found label 1000000000 among 12 samples, expected classes numbered from 0 on"
    assert message in refusal(path)


def saved(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.full((8, 2), -1e300)}, "x_train: found -1e+300, which float32 cannot hold, expected numbers"),
        ({"x_train": np.full((8, 2), 3.5e38)}, "x_train: found 3.5e+38, which float32 cannot hold"),
        ({"x_test": np.full((4, 2), 2**63, np.uint64)}, "x_test: found 9223372036854775808, which int64 cannot hold"),
        ({"y_test": np.full(4, 2**64 - 1, np.uint64)}, "y_test: found 18446744073709551615, which int64 cannot hold"),
        ({"y_train": np.full(8, -1)}, "y_train: found label -1, expected labels from 0 on"),
        ({"x_train": np.full((8, 2), np.inf)}, "x_train: found NaN or infinity, expected finite numbers"),
    ],
)
def test_numbers_that_are_others_as_they_are_loaded(
    tmp_path: Path, changes: dict[str, np.ndarray], message: str
) -> None:
    """1e300 became infinity in float32, and labels of uint64 wrapped."""
    path = write(tmp_path / "mine.npz", members(**{name: saved(array) for name, array in changes.items()}))
    assert message in refusal(path)


def test_numbers_at_the_edge(tmp_path: Path) -> None:
    edges = {"x_train": np.full((8, 2), 3.4e38), "x_test": np.full((4, 2), -3.4e38), "y_test": np.ones(4, np.uint64)}
    split = load_npz(write(tmp_path / "mine.npz", members(**{name: saved(array) for name, array in edges.items()})))
    assert split.train.inputs.isfinite().all()
    assert split.test.targets.tolist() == [1] * 4
