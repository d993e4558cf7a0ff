"""A folder of images, one subfolder a class, as ImageNet is laid out: train/CLASS/*.png and val or test/CLASS/*.png."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch

from ..errors import ConfigurationError, DamagedData, MissingData, ShapeError
from .compression import plain_file, read_stored
from .idx import Array
from .images import scaled
from .split import Dataset, Split
from .verification import FileRecord, own_provenance

if TYPE_CHECKING:
    from PIL import Image

_ENDINGS = {".png", ".jpg", ".jpeg"}
_BYTES_AT_MOST = 2**27  # of one file; the largest of ImageNet has 15 MB
_PIXELS_AT_MOST = 2**26  # of one image; the largest of ImageNet has 62 million
_SIZE_AT_MOST = 4096
_REMEDY = "replace or remove it"
_GRAY = {"1", "L", "LA"}
_COLOR = {"RGB", "RGBA", "P", "CMYK", "YCbCr"}


@dataclass(frozen=True)
class _Head:
    """What the first bytes of an image say of it."""

    gray: bool
    width: int
    height: int


@dataclass(frozen=True)
class _Picture:
    """A decoded image [C, H, W] of unsigned bytes, and its file's size and checksum."""

    pixels: Array
    bytes: int
    sha256: str


def image_folder(path: str | Path, *, size: int | None = None) -> Split:
    """Load images from train/CLASS/ and test/CLASS/ (val/CLASS/ where test has no classes): [N, C, H, W] in [0, 1].

    PNG and JPEG of 8 bits a channel. Classes are numbered in the order of their names; images come class by class,
    in the order of their names. C is 1 if all images are gray, else 3; transparency is dropped, and pixels are taken
    as they are stored: an orientation in EXIF is not applied, as torchvision's ImageFolder does not. All images are
    held in memory as float32.

    Args: size: pixels of height and width, to which the middle square of each image is scaled (bilinear, antialiased).
        None: all images must have one size.
    Raises: MissingData: no such folder, or no classes in it. ConfigurationError: a file that is no image, a class
        that only the test set has, an impossible size, or more than the memory holds. ShapeError: images of several
        sizes. DamagedData: an image that cannot be decoded, or of absurd size.
    """
    root = Path(path)
    if size is not None and not 1 <= size <= _SIZE_AT_MOST:
        raise ConfigurationError(f"data {root}: found size={size}, expected 1 to {_SIZE_AT_MOST} pixels")
    train = _listing(root, "train")
    test_part = "test" if _classes(root / "test") else "val"
    test = _listing(root, test_part)
    strange = sorted(test.keys() - train.keys())
    if strange:
        raise ConfigurationError(
            f"data {root}: found class {strange[0]} in {test_part} only, expected the classes of train"
        )
    names = tuple(sorted(train))
    files = {
        part: [(label, file) for label, name in enumerate(names) for file in listing.get(name, [])]
        for part, listing in (("train", train), (test_part, test))
    }
    every = [file for part in files.values() for _, file in part]
    colors = _refuse_heads(every, size, root)
    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(lambda file: _decode(file, size), every))
    split, records, start = {}, [], 0
    for part, labeled in files.items():
        taken = pictures[start : start + len(labeled)]
        start += len(labeled)
        pixels = np.stack([np.broadcast_to(one.pixels, (colors, *one.pixels.shape[1:])) for one in taken])
        labels = torch.tensor([label for label, _ in labeled])
        split[part] = Dataset(scaled(pixels), labels, len(names), f"{root.absolute().name} {part}", names)
        records.append(_record(root, part, [file for _, file in labeled], taken))
    provenance = own_provenance(root.absolute().name, records) | ({} if size is None else {"size": size})
    return Split(split["train"], split[test_part], provenance)


def _classes(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _listing(root: Path, part: str) -> dict[str, list[Path]]:
    """The images of a part by class."""
    classes = _classes(root / part)
    if not classes:
        expected = "train/CLASS/*.png" if part == "train" else "test/CLASS/*.png or val/CLASS/*.png"
        raise MissingData(f"data {root}: found no folders of classes, expected {expected} (or .jpg, .jpeg)")
    listing = {}
    for folder in classes:
        files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
        other = next((file for file in files if file.suffix.lower() not in _ENDINGS), None)
        if other is not None:
            raise ConfigurationError(f"data {other}: found neither .png nor .jpg, expected only images of one class")
        if not files:
            raise ConfigurationError(f"data {folder}: found no images, expected some; remove a class without any")
        listing[folder.name] = files
    return listing


def _refuse_heads(files: Sequence[Path], size: int | None, root: Path) -> int:
    """Refuse images that do not go together or into memory, before any is decoded; return the number of channels."""
    with ThreadPoolExecutor() as pool:
        heads = list(pool.map(_read_head, files))
    first = heads[0]
    for file, head in zip(files, heads, strict=True):
        if size is None and (head.width, head.height) != (first.width, first.height):
            raise ShapeError(
                f"data {file}: found an image of {head.width} x {head.height} pixels, expected {first.width} x "
                f"{first.height} as in {files[0].name}; give size= to scale and crop all of them"
            )
    colors = 1 if all(head.gray for head in heads) else 3
    shape = [colors, first.height, first.width] if size is None else [colors, size, size]
    needed = len(files) * math.prod(shape) * 4  # as float32
    if needed > _memory():
        raise ConfigurationError(
            f"data {root}: found {len(files)} images of {shape}, {needed / 2**30:.1f} GiB as float32, expected less "
            f"than the {_memory() / 2**30:.1f} GiB of memory; give a smaller size"
        )
    return colors


def _read_head(file: Path) -> _Head:
    where = f"data {file}"
    with (
        plain_file(file, at_most=_BYTES_AT_MOST, where=where, remedy=_REMEDY) as stream,
        _opened(stream, where) as image,
    ):
        return _checked(image, where)


def _decode(file: Path, size: int | None) -> _Picture:
    where = f"data {file}"
    stored = read_stored(file, at_most=_BYTES_AT_MOST, where=where, remedy=_REMEDY)
    with _opened(io.BytesIO(stored), where) as image:
        head = _checked(image, where)
        pixels = np.asarray(_cropped(image.convert("L" if head.gray else "RGB"), size))
    # [H, W] or [H, W, 3] to [C, H, W]
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return _Picture(pixels, len(stored), hashlib.sha256(stored).hexdigest())


@contextmanager
def _opened(stream: BinaryIO, where: str) -> Iterator[Image.Image]:
    """An image of which only the head was read.  Raises: DamagedData: here, or while it is decoded."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(stream, formats=("PNG", "JPEG")) as image:
            yield image
    except DamagedData:
        raise
    except UnidentifiedImageError as error:
        raise DamagedData(f"{where}: found no PNG or JPEG, expected one; {_REMEDY}") from error
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        reason = " ".join(f"{type(error).__name__} {error}".split())[:100]
        raise DamagedData(f"{where}: found no sound PNG or JPEG ({reason}); {_REMEDY}") from error


def _checked(image: Image.Image, where: str) -> _Head:
    mode, (width, height) = image.mode, image.size
    if mode not in _GRAY | _COLOR:
        raise DamagedData(f"{where}: found pixels of kind {mode}, expected 8 bits a channel; convert it")
    if width * height > _PIXELS_AT_MOST:
        raise DamagedData(f"{where}: found {width} x {height} pixels, expected at most {_PIXELS_AT_MOST}; {_REMEDY}")
    return _Head(mode in _GRAY, width, height)


def _cropped(image: Image.Image, size: int | None) -> Image.Image:
    """The middle square of an image, scaled to ``size`` pixels a side."""
    if size is None:
        return image
    from PIL import Image

    side = min(image.size)
    left, top = ((extent - side) / 2 for extent in image.size)
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _record(root: Path, part: str, files: Sequence[Path], pictures: Sequence[_Picture]) -> FileRecord:
    """One record for all images of a part: its SHA-256 is that of the lines "checksum  path", as sha256sum prints."""
    lines = [
        f"{picture.sha256}  {file.relative_to(root / part).as_posix()}\n"
        for file, picture in zip(files, pictures, strict=True)
    ]
    digest = hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    return FileRecord(f"{part} ({len(files)} images)", sum(one.bytes for one in pictures), digest, None)


def _memory() -> float:
    """Bytes of memory of this machine; without bound where the system does not say."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return float("inf")
    return float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
