"""Where data sets are looked for, and what is said of those that are not there."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ntkdyn.datasets.location import data_directory, loadable, locate, where_to_put
from ntkdyn.datasets.manifest import Layout, known_dataset
from ntkdyn.errors import MissingData


def test_argument_then_environment_then_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NTKDYN_DATA", "somewhere")
    assert data_directory(tmp_path) == tmp_path
    assert data_directory() == Path("somewhere")
    monkeypatch.delenv("NTKDYN_DATA")
    assert data_directory() == Path("data")


def test_named_folder_must_exist_and_the_default_need_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_cifar: Any
) -> None:
    known = tiny_cifar().known
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NTKDYN_DATA", raising=False)
    assert locate(known) is None
    with pytest.raises(MissingData, match=r"^data directory nowhere: found no such folder, expected the folder of"):
        locate(known, "nowhere")
    monkeypatch.setenv("NTKDYN_DATA", str(tmp_path / "absent"))
    with pytest.raises(MissingData, match="absent: found no such folder"):
        loadable(known)


def test_missing_data_set_says_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(MissingData) as caught:
        loadable(known_dataset("cifar-100"), tmp_path)
    message = str(caught.value)
    assert message == (
        f"data set cifar-100: not found in {tmp_path}; put train.bin, test.bin into cifar-100-binary/, or train, test "
        "into cifar-100-python/, each as it is or as .gz or .xz, from www.cs.toronto.edu/~kriz/cifar.html (unpack "
        "cifar-100-binary.tar.gz or cifar-100-python.tar.gz); or name another folder by data_dir or NTKDYN_DATA"
    )
    assert where_to_put(known_dataset("mnist")).endswith(" from yann.lecun.com/exdb/mnist")


def test_missing_files_are_named(tiny_idx: Any) -> None:
    tiny = tiny_idx(".gz")
    (tiny.directory / "tiny" / "test-labels.gz").unlink()
    (tiny.directory / "tiny" / "train-labels.gz").unlink()
    message = (
        f"data set tiny: found test-images.gz, train-images.gz in {tiny.directory / 'tiny'}, missing train-labels, "
        "test-labels; put them there (each may be .gz or .xz), from example.org/tiny"
    )
    with pytest.raises(MissingData, match=f"^{re.escape(message)}$"):
        loadable(tiny.known, tiny.directory)


def test_some_training_batches_are_enough(tiny_cifar: Any) -> None:
    tiny = tiny_cifar()
    folder = tiny.directory / "tiny-bin"
    assert loadable(tiny.known, tiny.directory).partial is None
    (folder / "two.bin").unlink()
    located = loadable(tiny.known, tiny.directory)
    assert located.partial == "2 of 3 training batches"
    assert [file.name for file, _ in located.files("train")] == ["one.bin", "three.bin"]
    (folder / "four.bin").unlink()
    with pytest.raises(MissingData, match=r"missing four\.bin; put them there"):
        loadable(tiny.known, tiny.directory)
    (folder / "four.bin").touch()
    (folder / "one.bin").unlink()
    (folder / "three.bin").unlink()
    with pytest.raises(MissingData, match=r"missing one\.bin, two\.bin, three\.bin; put them there"):
        loadable(tiny.known, tiny.directory)


def test_the_layout_with_the_fewest_gaps_is_taken(tiny_cifar: Any) -> None:
    tiny = tiny_cifar()
    first = tiny.known.layouts[0]
    known = replace(tiny.known, layouts=(Layout("cifar-binary", ("other", "third"), first.files, first.labels), first))
    located = locate(known, tiny.directory)
    assert located is not None
    assert located.folder == "tiny-bin"
    third = tiny.directory / "third"
    third.mkdir()
    for name in ("one.bin", "two.bin", "three.bin"):
        (third / name).touch()
    located = locate(known, tiny.directory)
    assert located is not None
    assert located.folder == "tiny-bin", "three training batches and no test batch cannot be loaded"
    (third / "four.bin").touch()
    (tiny.directory / "tiny-bin" / "one.bin").unlink()
    located = locate(known, tiny.directory)
    assert located is not None
    assert located.folder == "third"


def test_uncompressed_files_come_first(tiny_idx: Any) -> None:
    for suffix in (".xz", ".gz", ""):
        tiny = tiny_idx(suffix)
        located = loadable(tiny.known, tiny.directory)
        assert {os.path.splitext(path)[1] for path in located.found.values()} == {suffix}
