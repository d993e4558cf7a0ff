"""One name for any data: a data set of the manifest, an npz file, or a folder of images."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigurationError, MissingData, UnknownName
from .digits import digit_images
from .folder import image_folder
from .images import load_images
from .manifest import known_datasets, nearest
from .npz import load_npz
from .split import Split


def named_data(name: str | Path, *, data_dir: str | Path | None = None, size: int | None = None) -> Split:
    """Load images by the name of a data set (``ntkdyn datasets`` lists them), an npz file or a folder of images.

    A name of the manifest means that data set, in ``data_dir``, else in the folder that NTKDYN_DATA names, else in
    ``data``; "./mnist" or a Path means a folder. Nothing is downloaded; files are compared with their checksums on
    each load. "digits" needs no files.

    Args: size: for a folder of images, see ``image_folder``.
    Returns: a Split. Data sets of the manifest and folders: inputs [N, C, H, W] float32 in [0, 1]; npz: ``load_npz``.
    Raises: UnknownName: neither a known name nor a path. MissingData, DamagedData: the files are not there, or are not
        the originals. ConfigurationError, ShapeError: as ``load_npz`` and ``image_folder``, and a size for other data.
    """
    known = known_datasets()
    text, path = str(name), Path(name)
    by_name = isinstance(name, str) and text in known
    if text and not by_name and path.is_dir():
        return image_folder(path, size=size)
    if size is not None:
        raise ConfigurationError(f"data {text}: found size={size}, expected it only for a folder of images")
    if by_name:
        if known[text].kind != "images":
            raise ConfigurationError(f"data set {text}: found {known[text].kind}, expected images; use parallel_text")
        return digit_images() if known[text].built_in else load_images(known[text], data_dir)
    if path.suffix == ".npz":
        return load_npz(path)
    if text and path.exists():
        found = "a file" if path.is_file() else "a FIFO or device"
        raise ConfigurationError(
            f"data {path}: found {found}, expected an npz file, a folder of images or a known name"
        )
    if len(path.parts) > 1:
        raise MissingData(f"data {path}: not found, expected an npz file, a folder of images or a known name")
    raise UnknownName(f"data {text!r} is no npz file, no folder and no known data set; {nearest(text, known)}")
