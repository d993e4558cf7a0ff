"""One name for any data: a data set of the manifest, an npz file, or a folder of images."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigurationError, MissingData, UnknownName
from .images import load_images
from .manifest import known_datasets, nearest
from .npz import load_npz
from .split import Split


def named_data(name: str | Path, *, data_dir: str | Path | None = None) -> Split:
    """Load images by the name of a data set (``ntkdyn datasets`` lists them), an npz file or a folder of images.

    A name of the manifest means that data set, in ``data_dir``, else in the folder that NTKDYN_DATA names, else in
    ``data``; ``./mnist`` means a folder. Nothing is downloaded; files are compared with their checksums on each load.

    Returns: a Split. Data sets of the manifest and folders: inputs [N, C, H, W] float32 in [0, 1]; npz: ``load_npz``.
    Raises: UnknownName: neither a known name nor a path. MissingData, DamagedData: the files are not there, or are not
        the originals. ConfigurationError, ShapeError: as ``load_npz``.
    """
    known = known_datasets()
    text = str(name)
    if text in known:
        if known[text].kind != "images":
            raise ConfigurationError(f"data set {text}: found {known[text].kind}, expected images; use parallel_text")
        return load_images(known[text], data_dir)
    path = Path(name)
    if path.suffix == ".npz":
        return load_npz(path)
    if text and path.exists():
        raise ConfigurationError(f"data {path}: found a {_kind(path)}, expected an npz file; use numpy.savez")
    if len(path.parts) > 1:
        raise MissingData(f"data {path}: not found, expected an npz file or the name of a data set")
    raise UnknownName(f"data {text!r} is neither an npz file nor a known data set; {nearest(text, known)}")


def _kind(path: Path) -> str:
    return "folder" if path.is_dir() else "file"
