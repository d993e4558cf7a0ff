"""Image data sets: pixels and labels as they were written, partial sets, damage, and the real files."""

from __future__ import annotations

import gzip
import json
import lzma
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ntkdyn.datasets import Split, named_data
from ntkdyn.datasets.cifar import parse_binary
from ntkdyn.datasets.idx import parse_idx, parse_images_and_labels
from ntkdyn.datasets.images import load_images
from ntkdyn.errors import DamagedData

# As published with the data sets, and for the batches of CIFAR-10 counted when they were checked.
COUNTS = {
    "mnist": (
        [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
        [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
    ),
    "fashion-mnist": ([6000] * 10, [1000] * 10),
    "cifar-10": (
        [1989, 1981, 2042, 2011, 2009, 1925, 2038, 2027, 2012, 1966],  # batches 1 and 2
        [1000] * 10,
    ),
}
SHAPES = {"mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28), "cifar-10": (3, 32, 32)}


def check_against_written(split: Split, images: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> None:
    for part, data in (("train", split.train), ("test", split.test)):
        assert data.inputs.dtype == torch.float32
        assert data.targets.dtype == torch.int64
        expected = images[part].reshape(data.inputs.shape).astype(np.float64) / 255
        assert np.abs(data.inputs.double().numpy() - expected).max() <= 2**-25  # rounded to float32 once
        assert data.targets.tolist() == labels[part].tolist()
        assert data.classes == 3
        assert data.class_names == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_idx_files(tiny_idx: Any, suffix: str) -> None:
    tiny = tiny_idx(suffix)
    split = load_images(tiny.known, tiny.directory)
    assert split.train.inputs.shape == (12, 1, 5, 4)
    check_against_written(split, tiny.images, tiny.labels)
    assert split.train.name == "tiny train"
    assert split.provenance["partial"] is None
    files = [entry["file"] for entry in split.provenance["files"]]
    assert files == [f"tiny/{part}-{holds}{suffix}" for part in ("train", "test") for holds in ("images", "labels")]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
@pytest.mark.parametrize("layout", [{}, {"coarse": True}, {"python": True}], ids=["one-label", "two-labels", "python"])
def test_cifar_batches(tiny_cifar: Any, suffix: str, layout: dict[str, bool]) -> None:
    tiny = tiny_cifar(suffix, **layout)
    split = load_images(tiny.known, tiny.directory)
    assert split.train.inputs.shape == (12, 3, 32, 32)
    check_against_written(split, tiny.images, tiny.labels)


def test_part_of_the_batches_is_loaded_and_said_so(tiny_cifar: Any) -> None:
    tiny = tiny_cifar(".gz")
    (tiny.directory / "tiny-bin" / "two.bin.gz").unlink()
    split = load_images(tiny.known, tiny.directory)
    kept = np.r_[0:4, 8:12]
    images = {"train": tiny.images["train"][kept], "test": tiny.images["test"]}
    check_against_written(split, images, {"train": tiny.labels["train"][kept], "test": tiny.labels["test"]})
    assert split.provenance["partial"] == "2 of 3 training batches"
    assert [entry["file"] for entry in split.provenance["files"]] == [
        f"tiny-bin/{name}.bin.gz" for name in ("one", "three", "four")
    ]
    assert {"name": "tiny", "license": "none", "origin": "example.org/tiny"}.items() <= split.provenance.items()


def test_epoch_keeps_the_names_of_classes(tiny_idx: Any) -> None:
    tiny = tiny_idx()
    split = load_images(tiny.known, tiny.directory)
    epoch = split.epoch(seed=0, data_order=0, epoch=0)
    assert epoch.class_names == split.train.class_names
    assert sorted(epoch.targets.tolist()) == sorted(split.train.targets.tolist())


def test_a_damaged_batch_is_refused_and_not_left_out(tiny_cifar: Any) -> None:
    tiny = tiny_cifar(".xz")
    path = tiny.directory / "tiny-bin" / "two.bin.xz"
    content = bytearray(lzma.decompress(path.read_bytes()))
    content[5] ^= 1
    path.write_bytes(lzma.compress(content))
    with pytest.raises(DamagedData, match=r"two\.bin\.xz: found content of sha256"):
        load_images(tiny.known, tiny.directory)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DamagedData, match=r"two\.bin\.xz: truncated xz file"):
        load_images(tiny.known, tiny.directory)
    path.write_bytes(lzma.compress(content[:-3072]))
    with pytest.raises(DamagedData, match=rf"found {4 * 3073 - 3072} bytes of content, expected {4 * 3073}"):
        load_images(tiny.known, tiny.directory)


# Files whose checksum is right and whose content is not: a mistake in the manifest, which must not pass for data.
def test_content_that_is_not_of_its_format(tiny_idx: Any) -> None:
    labels = bytes([0, 0, 8, 1, 0, 0, 0, 12]) + bytes(range(12))
    tiny = tiny_idx(train_labels=labels)
    with pytest.raises(DamagedData, match=r"^data set tiny: found label 3 of sample 3, expected 0 to 2; the file is"):
        load_images(tiny.known, tiny.directory)
    tiny = tiny_idx(train_labels=bytes([0, 0, 8, 1, 0, 0, 0, 11]) + bytes(11))
    with pytest.raises(DamagedData, match=r"^data set tiny: found 12 images and 11 labels, expected as many"):
        load_images(tiny.known, tiny.directory)
    tiny = tiny_idx(train_images=labels)
    with pytest.raises(DamagedData, match="found IDX magic number 0x00000801, expected 0x00000803"):
        load_images(tiny.known, tiny.directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes([0, 0, 8, 3]) + bytes(11), "found 15 bytes, expected a head of 16; the file is truncated"),
        (bytes([0, 0, 9, 3]) + bytes(12), "found IDX magic number 0x00000903, expected 0x00000803"),
        (bytes([1, 0, 8, 3]) + bytes(12), "found IDX magic number 0x01000803, expected 0x00000803"),
        (
            bytes([0, 0, 8, 3]) + b"\0\0\0\2\0\0\0\3\0\0\0\4" + bytes(23),
            "found 23 bytes behind the head, expected 2 x 3 x 4 = 24; the file is truncated or damaged",
        ),
        (
            bytes([0, 0, 8, 3]) + b"\xff" * 12 + bytes(24),
            "found 24 bytes behind the head, expected 4294967295 x 4294967295 x 4294967295",
        ),
    ],
)
def test_bad_idx(content: bytes, message: str) -> None:
    with pytest.raises(DamagedData, match=f"^the file: {re.escape(message)}"):
        parse_idx(content, axes=3, where="the file")
    with pytest.raises(DamagedData, match=f"^the file images: {re.escape(message)}"):
        parse_images_and_labels(content, b"", classes=3, where="the file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found 0 bytes, expected a multiple of 3073 bytes"),
        (bytes(3072), "found 3072 bytes, expected a multiple of 3073 bytes, one record an image; the file is trunc"),
        (bytes(3073) + b"\3" + bytes(3072), "found label 3 of sample 1, expected 0 to 2"),
    ],
)
def test_bad_records(content: bytes, message: str) -> None:
    with pytest.raises(DamagedData, match=f"^the file: {re.escape(message)}"):
        parse_binary(content, labels=1, classes=3, where="the file")


@pytest.fixture(scope="module", params=sorted(COUNTS))
def real(request: pytest.FixtureRequest, data_folder: Path) -> tuple[str, Split]:
    """A real data set."""
    return request.param, named_data(request.param, data_dir=data_folder)


def test_real_data_sets(real: tuple[str, Split]) -> None:
    name, split = real
    for data, counts in zip((split.train, split.test), COUNTS[name], strict=True):
        assert torch.bincount(data.targets, minlength=10).tolist() == counts
        assert data.inputs.shape == (sum(counts), *SHAPES[name])
        assert (float(data.inputs.min()), float(data.inputs.max())) == (0, 1)
        assert len(data.class_names or ()) == data.classes == 10
    assert split.provenance["partial"] == ("2 of 5 training batches" if name == "cifar-10" else None)
    assert {entry["verified"] for entry in split.provenance["files"]} == {"sha256 of the file"}
    assert json.loads(json.dumps(split.provenance)) == split.provenance


def test_real_pixels_by_a_reader_of_another_kind(real: tuple[str, Split], data_folder: Path) -> None:
    name, split = real
    if name == "cifar-10":
        index = 10_007
        with lzma.open(data_folder / "cifar-10-batches-bin/data_batch_2.bin.xz") as file:
            label, *pixels = file.read(8 * 3073)[7 * 3073 :]  # image 7 of the second batch
    else:
        index = 9_990
        with gzip.open(data_folder / name / "train-images-idx3-ubyte.gz") as file:
            pixels = list(file.read(16 + 784 * (index + 1))[16 + 784 * index :])
        with gzip.open(data_folder / name / "train-labels-idx1-ubyte.gz") as file:
            label = file.read()[8 + index]
    assert int(split.train.targets[index]) == label
    found = (split.train.inputs[index].double() * 255).flatten().tolist()
    assert found == pytest.approx(pixels, abs=1e-4)
