"""Small data sets in the layouts of the real ones, with a manifest entry of their own."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntkdyn.datasets.manifest import DataFile, KnownDataset, Layout

PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


@dataclass(frozen=True)
class Tiny:
    """A known data set, the folder it lies in, and the arrays that went into it."""

    known: KnownDataset
    directory: Path
    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]


def describe(name: str, content: bytes, *, part: str, holds: str, count: int) -> DataFile:
    """A manifest entry for a content."""
    return DataFile(name, part, holds, count, len(content), len(content), "sha256", hashlib.sha256(content).hexdigest())


def known(name: str, layouts: Sequence[Layout], *, kind: Any = "images", classes: int = 3) -> KnownDataset:
    """A manifest entry."""
    names = tuple(f"class {label}" for label in range(classes)) if kind == "images" else ()
    return KnownDataset(name, "a tiny data set", kind, "example.org/tiny", "none", "nobody", names, tuple(layouts))


def idx(array: np.ndarray) -> bytes:
    """An array of unsigned bytes in IDX format."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def tiny_idx(tmp_path: Path) -> Callable[..., Tiny]:
    """What writes a small data set like MNIST: train 12, test 6 images of 5 x 4 pixels, 3 classes."""

    def write(suffix: str = "", **changes: bytes) -> Tiny:
        generator = np.random.default_rng(0)
        files, images, labels = [], {}, {}
        folder = tmp_path / "tiny"
        folder.mkdir(exist_ok=True)
        for part, count in (("train", 12), ("test", 6)):
            images[part] = generator.integers(0, 256, (count, 5, 4), dtype=np.uint8)
            labels[part] = np.arange(count, dtype=np.uint8) % 3
            for holds, array in (("images", images[part]), ("labels", labels[part])):
                content = changes.get(f"{part}_{holds}", idx(array))
                files.append(describe(f"{part}-{holds}", content, part=part, holds=holds, count=count))
                (folder / f"{part}-{holds}{suffix}").write_bytes(PACK[suffix](content))
        return Tiny(known("tiny", [Layout("idx", ("tiny",), tuple(files))]), tmp_path, images, labels)

    return write


@pytest.fixture
def tiny_cifar(tmp_path: Path) -> Callable[..., Tiny]:
    """What writes a small data set like CIFAR: three training batches of 4 and a test batch of 3."""

    def write(suffix: str = "", *, coarse: bool = False, python: bool = False) -> Tiny:
        generator = np.random.default_rng(0)
        files, images, labels = [], {"train": [], "test": []}, {"train": [], "test": []}
        folder = tmp_path / "tiny-bin"
        folder.mkdir(exist_ok=True)
        for name, part, count in (("one", "train", 4), ("two", "train", 4), ("three", "train", 4), ("four", "test", 3)):
            pixels = generator.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
            targets = generator.integers(0, 3, count, dtype=np.uint8)
            head = [targets[:, None]] if not coarse else [targets[:, None] + 9, targets[:, None]]
            rows = pixels.reshape(count, -1)
            content = np.concatenate([*head, rows], axis=1).tobytes()
            if python:
                content = pickle.dumps({"data": rows, "fine_labels": targets.tolist()}, protocol=2)
            files.append(describe(f"{name}.bin", content, part=part, holds="batch", count=count))
            (folder / f"{name}.bin{suffix}").write_bytes(PACK[suffix](content))
            images[part].append(pixels)
            labels[part].append(targets)
        names = ("coarse label", "fine label") if coarse else ("label",)
        layout = Layout("cifar-binary", ("tiny-bin",), tuple(files), names, "tiny.tar.gz")
        if python:
            layout = Layout("cifar-python", ("tiny-bin",), tuple(files), ("fine_labels",))
        together = [{part: np.concatenate(arrays) for part, arrays in held.items()} for held in (images, labels)]
        return Tiny(known("tiny", [layout]), tmp_path, *together)

    return write
