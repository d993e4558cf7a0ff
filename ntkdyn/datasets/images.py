"""Image data sets of the manifest, from verified files to tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cifar import parse_binary, parse_python
from .idx import Array, parse_images_and_labels
from .location import Located, loadable
from .manifest import DataFile, KnownDataset
from .split import Dataset, Split
from .verification import FileRecord, known_provenance, read_verified

Contents = Sequence[tuple[DataFile, bytes]]


def _idx(located: Located, contents: Contents, where: str) -> tuple[Array, Array]:
    held = {file.holds: content for file, content in contents}
    classes = len(located.known.classes)
    return parse_images_and_labels(held["images"], held["labels"], classes=classes, where=where)


def _cifar_binary(located: Located, contents: Contents, where: str) -> tuple[Array, Array]:
    labels, classes = len(located.layout.labels), len(located.known.classes)
    return _together(
        parse_binary(content, labels=labels, classes=classes, where=f"{where} {file.name}")
        for file, content in contents
    )


def _cifar_python(located: Located, contents: Contents, where: str) -> tuple[Array, Array]:
    key, classes = located.layout.labels[-1], len(located.known.classes)
    return _together(
        parse_python(content, key=key, classes=classes, where=f"{where} {file.name}") for file, content in contents
    )


# What makes images [N, C, H, W] and labels [N] of the files of one part, by the layout's format.
_FORMATS: dict[str, Callable[[Located, Contents, str], tuple[Array, Array]]] = {
    "idx": _idx,
    "cifar-binary": _cifar_binary,
    "cifar-python": _cifar_python,
}


def load_images(known: KnownDataset, data_dir: str | Path | None) -> Split:
    """Load an image data set of the manifest: inputs [N, C, H, W] float32 in [0, 1], the pixels divided by 255.

    Raises: MissingData: not there. DamagedData: a file is not the one that its checksum names.
    """
    located = loadable(known, data_dir)
    files = [(part, file, path) for part in ("train", "test") for file, path in located.files(part)]
    # Threads, because hashing and decompressing let go of the interpreter: xz takes seconds a batch.
    with ThreadPoolExecutor(max_workers=len(files)) as pool:
        read = list(pool.map(lambda one: _read(located, one[1], one[2]), files))
    parts = {}
    for part in ("train", "test"):
        contents = [(file, content) for (of, file, _), (content, _) in zip(files, read, strict=True) if of == part]
        images, labels = _FORMATS[located.layout.format](located, contents, f"data set {known.name}")
        parts[part] = Dataset(
            scaled(images),
            torch.from_numpy(labels.astype(np.int64)),
            len(known.classes),
            f"{known.name} {part}",
            known.classes,
        )
    return Split(parts["train"], parts["test"], known_provenance(located, [record for _, record in read]))


def scaled(images: Array) -> Tensor:
    """Return images of unsigned bytes as float32 in [0, 1]."""
    # Divided in place: the set in float32 is the largest thing in memory, and is there once.
    return torch.tensor(images, dtype=torch.float32).div_(255)


def _read(located: Located, file: DataFile, path: Path) -> tuple[bytes, FileRecord]:
    return read_verified(located.known, file, path, name=f"{located.folder}/{path.name}")


def _together(batches: Any) -> tuple[Array, Array]:
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(labels)
