"""One name for any data: what it means, and what is said of one that means nothing."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ntkdyn.datasets import named_data
from ntkdyn.errors import ConfigurationError, MissingData, NtkdynError, UnknownName


def test_digits_are_always_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_digits

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NTKDYN_DATA", raising=False)
    split = named_data("digits")
    assert split.train.inputs.shape == (1347, 1, 8, 8)
    assert split.test.inputs.shape == (450, 1, 8, 8)
    assert split.train.class_names == tuple("0123456789")
    bunch = load_digits()
    found = sorted(
        (target, tuple((image * 16).flatten().tolist()))
        for part in (split.train, split.test)
        for image, target in zip(part.inputs, part.targets.tolist(), strict=True)
    )
    assert found == sorted(
        (target, tuple(image.flatten())) for image, target in zip(bunch.images, bunch.target, strict=True)
    )
    assert split.provenance["origin"] == "scikit-learn, from the UCI repository"
    with pytest.raises(ConfigurationError, match="data digits: found size=3, expected it only for a folder"):
        named_data("digits", size=3)


def test_npz_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    arrays = {"x_train": np.ones((4, 1, 2, 2)), "y_train": np.arange(4), "x_test": np.ones((2, 1, 2, 2))}
    np.savez(path, **arrays, y_test=np.arange(2))
    for name in (path, str(path)):
        assert named_data(name).train.inputs.shape == (4, 1, 2, 2)


def test_folder_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "val"):
        folder = tmp_path / "mnist" / part / "one"
        folder.mkdir(parents=True)
        Image.new("L", (6, 4)).save(folder / "a.png")
    assert named_data(tmp_path / "mnist").train.inputs.shape == (1, 1, 4, 6)
    assert named_data(tmp_path / "mnist", size=3).train.inputs.shape == (1, 1, 3, 3)
    monkeypatch.chdir(tmp_path)
    for name in ("./mnist", Path("mnist")):
        assert named_data(name).train.name == "mnist train"


def test_size_is_for_folders_of_images() -> None:
    for name in ("mnist", "absent.npz"):
        with pytest.raises(ConfigurationError, match=f"^data {name}: found size=3, expected it only for a folder of"):
            named_data(name, size=3)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "cifar11",
            UnknownName,
            "data 'cifar11' is no npz file, no folder and no known data set; did you mean cifar-10?",
        ),
        ("", UnknownName, "data '' is no npz file, no folder and no known data set; known: cifar-10, "),
        ("multi30k", ConfigurationError, "data set multi30k: found text, expected images; use parallel_text"),
        (
            "some/where",
            MissingData,
            "data some/where: not found, expected an npz file, a folder of images or a known name",
        ),
        ("absent.npz", MissingData, "data absent.npz: not found, expected an npz file of x_train"),
        ("text.txt", ConfigurationError, "data text.txt: found a file, expected an npz file, a folder of images or a"),
        ("/dev/zero", ConfigurationError, "data /dev/zero: found a FIFO or device, expected an npz file, a folder of"),
        ("mnist", MissingData, "data set mnist: not found in nothing; put train-images-idx3-ubyte, "),
    ],
)
def test_names_that_mean_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[NtkdynError], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "mnist").mkdir()  # the data set of that name is meant, not this folder
    with pytest.raises(error, match=f"^{re.escape(message)}") as caught:
        named_data(name, data_dir="nothing")
    assert "\n" not in str(caught.value)
    assert caught.value.usage
