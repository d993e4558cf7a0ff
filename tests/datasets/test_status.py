"""The state of a data set: there, partial, missing, damaged."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from ntkdyn.datasets.images import load_images
from ntkdyn.datasets.status import status_of
from ntkdyn.errors import DamagedData


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_there(tiny_cifar: Any, suffix: str) -> None:
    tiny = tiny_cifar(suffix)
    status = status_of(tiny.known, tiny.directory)
    assert (status.state, status.folder, status.remarks) == ("there", "tiny-bin", ())
    assert status.bytes == sum(file.stat().st_size for file in (tiny.directory / "tiny-bin").iterdir())
    assert [record.as_json() for record in status.records] == load_images(tiny.known, tiny.directory).provenance[
        "files"
    ]


def test_partial_and_missing(tiny_cifar: Any, tmp_path: Path) -> None:
    tiny = tiny_cifar()
    folder = tiny.directory / "tiny-bin"
    (folder / "two.bin").unlink()
    status = status_of(tiny.known, tiny.directory)
    assert status.state == "partial"
    put = "not there: two.bin (each may be .gz or .xz), from example.org/tiny"
    assert status.remarks == ("2 of 3 training batches", put)
    (folder / "four.bin").unlink()
    status = status_of(tiny.known, tiny.directory)
    assert status.state == "missing"
    assert status.remarks == (put.replace("two.bin", "four.bin"),)
    for file in folder.iterdir():
        file.unlink()
    status = status_of(tiny.known, tiny.directory)
    assert (status.state, status.folder, status.bytes) == ("missing", None, 0)
    assert status.remarks[0].startswith("put one.bin, two.bin, three.bin, four.bin into tiny-bin/, each as it is or as")


def test_damaged_files_are_all_named(tiny_cifar: Any) -> None:
    tiny = tiny_cifar(".gz")
    folder = tiny.directory / "tiny-bin"
    (folder / "one.bin.gz").write_bytes(gzip.compress(b"other"))
    (folder / "four.bin.gz").write_bytes((folder / "four.bin.gz").read_bytes()[:-10])
    status = status_of(tiny.known, tiny.directory)
    assert status.state == "damaged"
    assert len(status.records) == 2
    first, second = status.remarks
    assert "one.bin.gz: found 5 bytes of content, expected 12292" in first
    assert "four.bin.gz: truncated gzip file" in second
    with pytest.raises(DamagedData) as caught:
        load_images(tiny.known, tiny.directory)
    assert str(caught.value) == first
