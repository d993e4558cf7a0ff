"""The manifest of data sets: complete, and equal to the list beside the real files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ntkdyn.datasets.manifest import known_dataset, known_datasets, nearest
from ntkdyn.errors import UnknownName


@pytest.mark.parametrize("name", sorted(known_datasets()))
def test_every_entry_is_complete(name: str) -> None:
    known = known_dataset(name)
    assert all((known.title, known.origin, known.license, known.citation))
    assert known.kind in ("images", "text")
    assert len(set(known.classes)) == len(known.classes)
    for layout in known.layouts:
        assert {file.part for file in layout.files} >= {"train", "test"}
        assert len({file.name for file in layout.files}) == len(layout.files)
        for file in layout.files:
            assert len(file.checksum) == {"sha256": 64, "sha1": 40, "md5": 32}[file.kind]
            assert all(len(stored.sha256) == 64 for stored in file.compressed.values())
            assert file.bytes is None or file.bytes == file.at_most


def test_sizes_follow_from_the_formats() -> None:
    for known in known_datasets().values():
        for layout in known.layouts:
            for file in layout.files:
                if layout.format == "idx":
                    assert file.bytes == (16 + 784 * file.count if file.holds == "images" else 8 + file.count)
                if layout.format == "cifar-binary":
                    assert file.bytes == (3072 + len(layout.labels)) * file.count


def test_manifest_says_what_the_list_beside_the_files_says(data_folder: Path) -> None:
    rows = re.findall(r"\| `([\w./-]+)` \| (\d+) \| `(\w{64})` \|", (data_folder / "SOURCES.md").read_text())
    listed = {name: (int(size), checksum) for name, size, checksum in rows}
    found = {
        f"{layout.folders[0]}/{file.name}.{suffix}": (stored.bytes, stored.sha256)
        for known in known_datasets().values()
        for layout in known.layouts
        for file in layout.files
        for suffix, stored in file.compressed.items()
    }
    assert found == {name: listed[name] for name in found}
    # What ntkdyn does not read: names of classes, which the manifest has, and results of another tool.
    assert {name.split("/")[1] for name in listed.keys() - found.keys()} == {
        "batches.meta.txt",
        "neural_tangents_mnist_linearization.json",
    }


@pytest.mark.parametrize(
    ("name", "meant"),
    [("cifar10", "cifar-10"), ("CIFAR-100", "cifar-100"), ("FashionMNIST", "fashion-mnist"), ("multi-30k", "multi30k")],
)
def test_unknown_name_says_what_was_meant(name: str, meant: str) -> None:
    with pytest.raises(UnknownName, match=rf"^data set '{name}' is unknown; did you mean {meant}\? known: cifar-10, "):
        known_dataset(name)


def test_name_like_no_other_lists_all() -> None:
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
