"""Folders of images: pixels, classes, scaling, and what is refused."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ntkdyn.datasets import folder as folder_module
from ntkdyn.datasets import image_folder
from ntkdyn.errors import ConfigurationError, DamagedData, MissingData, NtkdynError, ShapeError


def write(root: Path, name: str, pixels: np.ndarray, mode: str | None = None) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> dict[str, np.ndarray]:
    """Two classes of color images, 5 high and 7 wide, on disk as PNG below tmp_path/set."""
    generator = np.random.default_rng(0)
    names = ["train/cat/b.png", "train/cat/a.PNG", "train/ant/1.png", "val/cat/x.png"]
    pixels = {name: generator.integers(0, 256, (5, 7, 3), dtype=np.uint8) for name in names}
    for name, array in pixels.items():
        write(tmp_path / "set", name, array)
    return pixels


def test_pixels_classes_and_order(tmp_path: Path, images: dict[str, np.ndarray]) -> None:
    split = image_folder(tmp_path / "set")
    order = ["train/ant/1.png", "train/cat/a.PNG", "train/cat/b.png"]
    expected = np.stack([images[name] for name in order]).transpose(0, 3, 1, 2) / 255
    assert split.train.inputs.dtype == torch.float32
    assert np.abs(split.train.inputs.double().numpy() - expected).max() <= 2**-25
    assert split.train.targets.tolist() == [0, 1, 1]
    assert split.test.targets.tolist() == [1]
    assert split.test.inputs.shape == (1, 3, 5, 7)
    assert split.train.class_names == split.test.class_names == ("ant", "cat")
    assert (split.train.classes, split.train.name, split.test.name) == (2, "set train", "set val")


def test_what_is_recorded(tmp_path: Path, images: dict[str, np.ndarray]) -> None:
    root = tmp_path / "set"
    provenance = image_folder(root, size=4).provenance
    paths = ["ant/1.png", "cat/a.PNG", "cat/b.png"]
    content = {path: (root / "train" / path).read_bytes() for path in paths}
    listing = "".join(f"{hashlib.sha256(content[path]).hexdigest()}  {path}\n" for path in paths)
    assert provenance["files"][0] == {
        "file": "train (3 images)",
        "bytes": sum(map(len, content.values())),
        "sha256": hashlib.sha256(listing.encode()).hexdigest(),
        "verified": None,
    }
    assert provenance["files"][1]["file"] == "val (1 images)"
    assert (provenance["name"], provenance["size"]) == ("set", 4)
    assert "size" not in image_folder(root).provenance


def test_test_comes_before_val_where_it_has_classes(tmp_path: Path, images: dict[str, np.ndarray]) -> None:
    root = tmp_path / "set"
    (root / "test").mkdir()
    (root / "test" / "unlabeled.png").touch()  # as in ImageNet
    assert image_folder(root).test.name == "set val"
    write(root, "test/ant/1.png", images["train/ant/1.png"])
    assert image_folder(root).test.name == "set test"


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "RGBA", "RGB"])
def test_kinds_of_pixels(tmp_path: Path, mode: str) -> None:
    gray = np.random.default_rng(0).integers(0, 2, (4, 4), dtype=np.uint8) * 255
    for part in ("train", "test"):
        write(tmp_path, f"{part}/one/a.png", gray if mode in ("L", "1") else np.stack([gray] * 3, axis=2), mode)
    split = image_folder(tmp_path)
    assert split.train.inputs.shape == (1, 1 if mode in ("L", "1", "LA") else 3, 4, 4)
    assert np.abs(split.train.inputs[0].numpy() - gray / 255).max() <= 2**-25


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg(tmp_path: Path, mode: str) -> None:
    color = np.array([120, 120, 120] if mode == "L" else [200, 40, 90], np.uint8)
    for part in ("train", "test"):
        write(tmp_path, f"{part}/one/a.JPEG", np.broadcast_to(color, (16, 16, 3)).copy(), mode)
    found = image_folder(tmp_path).train.inputs[0].numpy()
    assert found.shape == (1 if mode == "L" else 3, 16, 16)
    assert np.abs(found - color[: len(found), None, None] / 255).max() < 3 / 255  # JPEG is lossy


def test_gray_among_colored(tmp_path: Path, images: dict[str, np.ndarray]) -> None:
    gray = images["train/ant/1.png"][:, :, 0].copy()
    write(tmp_path / "set", "train/ant/1.png", gray)
    inputs = image_folder(tmp_path / "set").train.inputs
    assert inputs.shape == (3, 3, 5, 7)
    for channel in range(3):
        assert torch.equal((inputs[0, channel] * 255).round().byte(), torch.from_numpy(gray))


def test_middle_square_is_scaled(tmp_path: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (6, 14, 3), dtype=np.uint8)
    write(tmp_path, "train/one/wide.png", wide)
    write(tmp_path, "train/one/high.png", np.ascontiguousarray(wide.transpose(1, 0, 2)))
    ramp = np.repeat(np.arange(0, 240, 20, dtype=np.uint8)[None], 12, axis=0)
    write(tmp_path, "test/one/ramp.png", ramp)
    split = image_folder(tmp_path, size=3)
    assert split.train.inputs.shape == (2, 3, 3, 3)
    # The same as scaling the whole image to 3 x 7, of which the middle is columns 2 to 4.
    scaled = np.asarray(Image.fromarray(wide).resize((7, 3), Image.Resampling.BILINEAR))[:, 2:5]
    assert np.abs(split.train.inputs[1].permute(1, 2, 0).numpy() - scaled / 255).max() < 1.5 / 255
    assert np.abs(split.train.inputs[0].permute(2, 1, 0).numpy() - scaled / 255).max() < 1.5 / 255
    # Antialiased: a reduction by four averages over neighbors, with weights symmetric about the middle.
    assert split.test.inputs[0, 0, 0, 1] == pytest.approx(110 / 255, abs=1 / 255)


def refusal(root: Path, error: type[NtkdynError], size: Any = None) -> str:
    with pytest.raises(error) as caught:
        image_folder(root, size=size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_that_are_no_set(tmp_path: Path, images: dict[str, np.ndarray]) -> None:
    root = tmp_path / "set"
    message = refusal(tmp_path, MissingData)
    expected = f"data {tmp_path}: found no folders of classes, expected train/CLASS/*.png (or .jpg, .jpeg)"
    assert message == expected
    assert "found size=0, expected 1 to 4096" in refusal(root, ConfigurationError, 0)
    assert "found size=100000, expected 1 to 4096" in refusal(root, ConfigurationError, 100_000)
    write(root, "val/dog/1.png", images["train/ant/1.png"])
    assert "found class dog in val only, expected the classes of train" in refusal(root, ConfigurationError)
    (root / "train" / "dog").mkdir()
    assert "train/dog: found no images, expected some; remove a class" in refusal(root, ConfigurationError)
    (root / "train" / "dog" / ".hidden").touch()
    assert "train/dog: found no images" in refusal(root, ConfigurationError)
    (root / "train" / "dog" / "notes.txt").touch()
    assert "notes.txt: found neither .png nor .jpg, expected only images" in refusal(root, ConfigurationError)
    shutil.rmtree(root / "train" / "dog")
    shutil.rmtree(root / "val")
    assert "no folders of classes, expected test/CLASS/*.png or val/CLASS/*.png" in refusal(root, MissingData)


def test_images_of_several_sizes(tmp_path: Path, images: dict[str, np.ndarray]) -> None:
    path = write(tmp_path / "set", "train/cat/c.png", np.zeros((7, 5, 3), np.uint8))
    message = refusal(tmp_path / "set", ShapeError)
    expected = f"data {path}: found an image of 5 x 7 pixels, expected 7 x 5 as in 1.png; give size= to scale and crop"
    assert message.startswith(expected)
    assert image_folder(tmp_path / "set", size=2).train.inputs.shape == (4, 3, 2, 2)


@pytest.fixture
def decoding_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(folder_module, "_decode", decode)


def test_sizes_are_compared_before_anything_is_decoded(
    tmp_path: Path, images: dict[str, np.ndarray], decoding_fails: None
) -> None:
    """All images were decoded, into memory, before the last one was refused for its size."""
    write(tmp_path / "set", "val/cat/z.png", np.zeros((7, 5, 3), np.uint8))
    assert "z.png: found an image of 5 x 7 pixels, expected 7 x 5 as in 1.png" in refusal(tmp_path / "set", ShapeError)


def test_memory_is_that_of_all_images_not_of_the_first(
    tmp_path: Path, images: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, decoding_fails: None
) -> None:
    """A gray image in front made the others look like gray ones, of a third of their size."""
    write(tmp_path / "set", "train/ant/1.png", images["train/ant/1.png"][:, :, 0].copy())
    monkeypatch.setattr(folder_module, "_memory", lambda: 4 * 3 * 35 * 4 - 1.0)
    assert "found 4 images of [3, 5, 7], 0.0 GiB as float32" in refusal(tmp_path / "set", ConfigurationError)
    monkeypatch.setattr(folder_module, "_memory", lambda: 4 * 3 * 4 * 4 - 1.0)
    assert "found 4 images of [3, 2, 2]" in refusal(tmp_path / "set", ConfigurationError, 2)


def test_orientation_in_exif_is_not_applied(tmp_path: Path) -> None:
    """As the docstring says, and torchvision's loader does."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for part, ending in (("train", "png"), ("test", "jpg")):
        (tmp_path / part / "one").mkdir(parents=True)
        Image.new("L", (6, 4)).save(tmp_path / part / "one" / f"a.{ending}", exif=exif)
    split = image_folder(tmp_path)
    assert split.train.inputs.shape == split.test.inputs.shape == (1, 1, 4, 6)


def test_a_pipe_among_images(tmp_path: Path, images: dict[str, np.ndarray]) -> None:
    os.mkfifo(tmp_path / "set" / "train" / "cat" / "c.png")
    message = refusal(tmp_path / "set", DamagedData)
    assert "c.png: found a folder, FIFO or device, expected a file; replace or remove it" in message


def test_damaged_images(tmp_path: Path, images: dict[str, np.ndarray]) -> None:
    path = tmp_path / "set" / "train" / "cat" / "b.png"
    whole = path.read_bytes()
    for content in (b"", b"text", b"GIF89a" + bytes(50)):
        path.write_bytes(content)
        message = refusal(tmp_path / "set", DamagedData)
        assert message == f"data {path}: found no PNG or JPEG, expected one; replace or remove it"
    for content in (whole[:60], whole[:-30], whole[:50] + b"\0\0" + whole[52:]):
        path.write_bytes(content)
        assert re.search("found no (sound )?PNG or JPEG", refusal(tmp_path / "set", DamagedData))
    path.write_bytes(whole)
    write(tmp_path / "set", "train/cat/b.png", np.zeros((5, 7), np.uint16))
    assert "found pixels of kind I;16, expected 8 bits a channel" in refusal(tmp_path / "set", DamagedData)


def test_absurd_sizes_are_not_decoded(
    tmp_path: Path, images: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = write(tmp_path / "set", "train/cat/b.png", np.zeros((8200, 8200), np.uint8))
    assert bomb.stat().st_size < 2**20
    message = refusal(tmp_path / "set", DamagedData)
    assert f"found 8200 x 8200 pixels, expected at most {2**26}" in message
    bomb.unlink()
    monkeypatch.setattr(folder_module, "_memory", lambda: 1000.0)
    message = refusal(tmp_path / "set", ConfigurationError)
    assert re.search(r"found 3 images of \[3, 5, 7\], 0\.0 GiB as float32, expected less than the 0\.0 GiB of", message)
