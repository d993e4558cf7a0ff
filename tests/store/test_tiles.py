"""Kernels in tiles on disk: published whole or not at all, read lazily, refused where they are not what they say."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ntkdyn.errors import (
    ConfigurationError,
    DamagedRecording,
    MissingRecording,
    NtkdynError,
    RecordingExists,
    ShapeError,
    StorageError,
    UntrustedFile,
)
from ntkdyn.store import files, tile_reader, tiles
from ntkdyn.store.tile_reader import TiledKernel
from ntkdyn.store.tiles import TileWriter

Array = np.ndarray[Any, Any]
LAYOUTS = {
    2: ["sample", "sample_2"],
    3: ["output", "sample", "sample_2"],
    4: ["sample", "sample_2", "output", "output_2"],
}


def kernel_of(n: int, outputs: int, axes: int, seed: int = 0) -> Array:
    """A symmetric kernel in one of the three layouts."""
    jacobian = np.random.default_rng(seed).standard_normal((n, outputs, 40)).astype("f4")
    full = np.einsum("ncp,mdp->nmcd", jacobian, jacobian)
    full = (full + full.transpose(1, 0, 3, 2)) / 2  # to the last bit
    if axes == 4:
        return full
    each = np.ascontiguousarray(np.einsum("nmcc->cnm", full))
    return each if axes == 3 else each.sum(0)


def described(
    kernel: Array, tile: int, changes: Mapping[str, Any] = MappingProxyType({}), *, symmetric: bool = True
) -> dict[str, Any]:
    return {
        "id": "a1", "dims": LAYOUTS[kernel.ndim], "shape": list(kernel.shape), "dtype": kernel.dtype.str, "tile": tile,
        "symmetric": symmetric, "network": "f" * 64, "inputs": "e" * 64, "inputs_2": None,
        "settings": {"reduce": "x"}, "first": [1.0], "made_with": {},
    } | dict(changes)  # fmt: skip


def blocks_of(kernel: Array, tile: int, *, symmetric: bool = True) -> dict[tuple[int, int], Array]:
    axis = 1 if kernel.ndim == 3 else 0
    rows, columns = (-(-kernel.shape[axis + side] // tile) for side in (0, 1))
    before = (slice(None),) * axis
    return {
        (i, j): kernel[(*before, slice(i * tile, (i + 1) * tile), slice(j * tile, (j + 1) * tile))]
        for i in range(rows)
        for j in range(i if symmetric else 0, columns)
    }


def filled(path: Path, kernel: Array, tile: int, *, symmetric: bool = True) -> Path:
    writer = TileWriter(path)
    writer.begin(described(kernel, tile, symmetric=symmetric))
    for place, block in blocks_of(kernel, tile, symmetric=symmetric).items():
        assert not writer.has(place)
        writer.write(place, block)
        assert writer.has(place)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A symmetric kernel [10, 10, 3, 3] in ten tiles of three."""
    return filled(tmp_path / "k", kernel_of(10, 3, 4), 3)


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_upper_tiles_make_the_whole(tmp_path: Path, axes: int) -> None:
    kernel = kernel_of(10, 3, axes)
    reader = TiledKernel.open(filled(tmp_path / "k", kernel, 3))
    assert reader.shape == kernel.shape
    assert reader.dtype == kernel.dtype
    assert reader.dims == tuple(LAYOUTS[axes])
    assert len(reader) == len(kernel)
    assert reader.missing() == []
    assert len(list((tmp_path / "k" / "tiles").iterdir())) == 10
    assert np.array_equal(reader[...], kernel)
    assert np.array_equal(np.asarray(reader, dtype="f8"), kernel.astype("f8"))
    assert reader.manifest["network"] == "f" * 64
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(reader, copy=False)


def test_two_sample_sets(tmp_path: Path) -> None:
    kernel = np.random.default_rng(0).standard_normal((7, 11, 2, 2))
    reader = TiledKernel.open(filled(tmp_path / "k", kernel, 4, symmetric=False))
    assert reader.dtype == np.float64
    assert np.array_equal(reader[...], kernel)
    assert np.array_equal(reader[2:6, ::-3, 1], kernel[2:6, ::-3, 1])
    vectors = np.random.default_rng(1).standard_normal((22, 5))
    matrix = kernel.transpose(0, 2, 1, 3).reshape(14, 22)
    assert np.allclose(reader @ vectors, matrix @ vectors, rtol=1e-12, atol=1e-12)
    assert sum(block.size for _, _, block in reader.tiles()) == kernel.size


_index = st.one_of(st.integers(-10, 9), st.slices(10))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.one_of(
        st.tuples(_index), st.tuples(_index, _index), st.tuples(_index, _index, st.slices(3)),
        st.tuples(_index, st.just(Ellipsis), st.integers(0, 2)), st.tuples(st.just(Ellipsis), st.slices(3)),
    )
)  # fmt: skip
def test_indexing_as_numpy(folder: Path, key: tuple[Any, ...]) -> None:
    kernel = kernel_of(10, 3, 4)
    found, expected = TiledKernel.open(folder)[key], kernel[key]
    assert found.shape == expected.shape
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "key", [10, -11, (0, 10), (0, 0, 3), (0,) * 5, "a", [1, 2], True, 1.5, (..., ...), None], ids=repr
)
def test_impossible_index(folder: Path, key: Any) -> None:
    with pytest.raises(IndexError, match="expected"):
        TiledKernel.open(folder)[key]


def test_only_needed_tiles_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, read = TiledKernel.open(folder), []
    real = tile_reader.get_array
    monkeypatch.setattr(tile_reader, "get_array", lambda *a: read.append(a[1].name) or real(*a))
    assert reader[7, 1, 0, 2] == kernel_of(10, 3, 4)[7, 1, 0, 2]
    assert read == ["000000-000002.h5"]
    read.clear()
    reader[3:6]
    assert sorted(read) == ["000000-000001.h5", "000001-000001.h5", "000001-000002.h5", "000001-000003.h5"]
    read.clear()
    list(reader.tiles())
    assert len(read) == len(set(read)) == 10


@pytest.mark.parametrize("axes", [2, 4])
def test_products(tmp_path: Path, axes: int) -> None:
    kernel = kernel_of(10, 3, axes)
    matrix = kernel if axes == 2 else kernel.transpose(0, 2, 1, 3).reshape(30, 30)
    reader = TiledKernel.open(filled(tmp_path / "k", kernel, 3))
    assert reader.matrix_shape == matrix.shape
    generator = np.random.default_rng(2)
    for shape in [matrix.shape[:1], (len(matrix), 4)]:
        vectors = generator.standard_normal(shape)
        product = reader @ vectors
        assert product.dtype == np.float64
        assert np.abs(product - matrix.astype("f8") @ vectors).max() <= 1e-10 * np.abs(product).max()
        assert (reader @ vectors.astype("f4")).dtype == np.float32
    with pytest.raises(ShapeError, match=rf"expected \[{len(matrix)}\]"):
        reader @ np.zeros(7)


def test_products_of_one_output_each(tmp_path: Path) -> None:
    reader = TiledKernel.open(filled(tmp_path / "k", kernel_of(10, 3, 3), 3))
    with pytest.raises(ShapeError, match="take one output"):
        reader @ np.zeros(10)


def test_eigenvalues_from_disk(folder: Path) -> None:
    from scipy.sparse.linalg import LinearOperator, eigsh

    reader = TiledKernel.open(folder)
    operator = LinearOperator(reader.matrix_shape, matvec=reader.__matmul__, dtype=np.float64)
    exact = np.linalg.eigvalsh(kernel_of(10, 3, 4).transpose(0, 2, 1, 3).reshape(30, 30).astype("f8"))
    assert np.allclose(eigsh(operator, k=3, return_eigenvectors=False), exact[-3:], rtol=1e-8)


def test_missing_tiles_are_named(folder: Path) -> None:
    for place in ("000000-000003", "000001-000002", "000002-000002", "000003-000003"):
        (folder / "tiles" / f"{place}.h5").unlink()
    reader = TiledKernel.open(folder)
    assert reader.missing() == [(0, 3), (1, 2), (2, 2), (3, 3)]
    with pytest.raises(
        MissingRecording,
        match=r"6 of 10 tiles, here are missing \(0, 3\), \(1, 2\), \(2, 2\) and 1 more; call sharded_ntk",
    ):
        reader[...]
    with pytest.raises(MissingRecording, match=r"missing \(1, 2\); call"):
        reader[3:6, 6:7]
    with pytest.raises(MissingRecording):
        reader @ np.zeros(30)
    # What is there can be read, and so can what comes later.
    assert np.array_equal(reader[:3, :9], kernel_of(10, 3, 4)[:3, :9])
    writer = TileWriter(folder)
    writer.begin(described(kernel_of(10, 3, 4), 3))
    writer.write((1, 2), blocks_of(kernel_of(10, 3, 4), 3)[1, 2])
    assert reader[3:6, 6:7].shape == (3, 1, 3, 3)


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no", Path(__file__)):
        with pytest.raises(MissingRecording, match=r"found no kernel.json"):
            TiledKernel.open(path)


def test_folder_of_something_else(tmp_path: Path) -> None:
    kernel = kernel_of(4, 1, 2)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.json").write_text("{}")
    (tmp_path / "b").write_text("a file")
    for name in "ab":
        with pytest.raises(RecordingExists, match="nothing was touched"):
            TileWriter(tmp_path / name).begin(described(kernel, 2))
    assert os.listdir(tmp_path / "a") == ["run.json"]
    with pytest.raises(ConfigurationError, match="no leading dot"):
        TileWriter(tmp_path / ".hidden")


def test_a_tile_must_fit(tmp_path: Path) -> None:
    kernel, writer = kernel_of(5, 2, 4), TileWriter(tmp_path / "k")
    with pytest.raises(ConfigurationError, match="call begin first"):
        writer.write((0, 0), kernel)
    writer.begin(described(kernel, 3))
    with pytest.raises(ConfigurationError, match=r"\(1, 0\), expected one of 2 rows and 2 columns on or above"):
        writer.write((1, 0), kernel[3:, :3])
    with pytest.raises(ShapeError, match=r"tile \(0, 1\) is float32 \[3, 3, 2, 2\], expected <f4 \[3, 2, 2, 2\]"):
        writer.write((0, 1), kernel[:3, :3])
    with pytest.raises(ShapeError, match="float64"):
        writer.write((0, 1), kernel[:3, 3:].astype("f8"))
    assert TiledKernel.open(tmp_path / "k").missing() == [(0, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize(
    "changes",
    [
        {"dims": ["sample", "other"]}, {"shape": [10]}, {"shape": [10, 9]}, {"shape": [2**41, 2**41]}, {"tile": 0},
        {"shape": [10, 10.0]}, {"dtype": "<f2"}, {"dtype": "|O"}, {"symmetric": 1}, {"tile": True},
        {"shape": [10**7, 10**7], "tile": 1}, {"shape": [10**9, 10**9], "tile": 10**9}, {"dims": 3},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_kernels(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="expected"):
        TileWriter(tmp_path / "k").begin(described(kernel_of(10, 1, 2), 3, changes))
    assert not (tmp_path / "k").exists()


@pytest.mark.parametrize("function", ["create", "write", "fsync", "replace", "sync_folder"])
def test_disk_that_fails_at_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    kernel, real = kernel_of(10, 3, 4), getattr(files, function)
    writer = TileWriter(tmp_path / "k")
    writer.begin(described(kernel, 3))
    blocks = blocks_of(kernel, 3)
    for number, (place, block) in enumerate(blocks.items()):
        calls = 0

        def flaky(*arguments: Any, failing: int = 1 + number % 2) -> Any:
            nonlocal calls
            calls += 1
            if calls >= failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        monkeypatch.setattr(files, function, flaky)
        if number % 2 and function in ("create", "replace", "sync_folder"):
            writer.write(place, block)  # one call each: the second never comes
        else:
            with pytest.raises(StorageError, match=r"No space left on device; nothing committed before is lost"):
                writer.write(place, block)
        monkeypatch.setattr(files, function, real)
        # All or nothing; the file is visible already where only the fsync of the folder failed.
        missing = TiledKernel.open(tmp_path / "k", trusted=True).missing()
        assert set(missing) <= set(list(blocks)[number:])
        assert not list((tmp_path / "k" / "tiles").glob(f"{files.TEMPORARY}*"))
        writer.write(place, block)
    assert np.array_equal(TiledKernel.open(tmp_path / "k")[...], kernel)


def test_disk_without_room_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(399))
    with pytest.raises(StorageError, match="found 399 bytes free, expected 400 for the tiles that are missing"):
        TileWriter(tmp_path / "k").begin(described(kernel_of(10, 1, 2), 10))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["tile/kernel"][0, 1] += 1


def _other_shape(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        crc = file["tile/kernel"].attrs["crc32"]
        del file["tile/kernel"]
        file["tile/kernel"] = np.zeros((300, 3, 3, 3), "f4")
        file["tile/kernel"].attrs["crc32"] = crc


def _other_tile(path: Path) -> None:
    shutil.copy(path.with_name("000000-000000.h5"), path)


def _other_kernel(path: Path) -> None:
    kernel = kernel_of(10, 3, 4)
    other = TileWriter(path.parents[2] / "other")
    other.begin(described(kernel, 3, {"network": "0" * 64}))
    other.write((0, 1), kernel[:3, 3:6])
    shutil.copy(other.path / "tiles" / "000000-000001.h5", path)


def _link_outside(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["tile/kernel"]
        file["tile/kernel"] = h5py.ExternalLink("/etc/passwd", "/x")


def _declares_more(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["tile/kernel"]
        file.create_dataset("tile/kernel", (2**20, 2**20), "f4", chunks=(2**10, 2**10))


def _sparse(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["tile/kernel"]
        file.create_dataset("tile/kernel", (2**14, 2**12), "f4", chunks=(2**10, 2**10))


@pytest.mark.parametrize(
    "spoil",
    [_cut, _empty, _flip, _other_shape, _other_tile, _other_kernel, _link_outside, _declares_more, _sparse],
)
def test_spoiled_tiles(folder: Path, as_stranger: Callable[[], None], spoil: Callable[[Path], None]) -> None:
    path = folder / "tiles" / "000000-000001.h5"
    whole = path.read_bytes()
    spoil(path)
    as_stranger()
    with pytest.raises((DamagedRecording, UntrustedFile), match="000000-000001") as caught:
        TiledKernel.open(folder)[...]
    assert "\n" not in str(caught.value)
    if spoil not in (_link_outside, _declares_more, _sparse):
        assert isinstance(caught.value, DamagedRecording)
        with pytest.raises(DamagedRecording, match="remove it and call sharded_ntk again"):
            TiledKernel.open(folder, trusted=True)[...]
    # Others are not affected.
    assert TiledKernel.open(folder)[6:, 6:].shape == (4, 4, 3, 3)
    writer = TileWriter(folder)
    writer.begin(described(kernel_of(10, 3, 4), 3))
    if spoil is not _flip:  # which only reading it all would show
        with pytest.warns(RuntimeWarning, match="computed again"):
            assert not writer.has((0, 1))
    writer.write((0, 1), kernel_of(10, 3, 4)[:3, 3:6])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": "other"}',
        '{"format": "ntkdyn kernel tiles 1"}',
        "[" * 10**5,
        "{}" + " " * 2**20,
    ],
    ids=lambda text: text[:30],
)
def test_spoiled_manifest(folder: Path, text: str) -> None:
    (folder / "kernel.json").write_text(text)
    with pytest.raises(DamagedRecording, match=r"kernel\.json is damaged"):
        TiledKernel.open(folder)
    with pytest.raises((DamagedRecording, RecordingExists)):
        TileWriter(folder).begin(described(kernel_of(10, 3, 4), 3))


@pytest.mark.parametrize(
    "changes",
    [{"shape": [9, 9, 3, 3]}, {"tile": 4}, {"dtype": "<f8"}, {"network": "0" * 64}, {"symmetric": False}],
    ids=str,
)
def test_manifest_that_lies(folder: Path, changes: dict[str, Any]) -> None:
    manifest = json.loads((folder / "kernel.json").read_text())
    (folder / "kernel.json").write_text(json.dumps({**manifest, **changes}))
    with pytest.raises(NtkdynError):
        TiledKernel.open(folder)[...]


def test_each_tile_is_validated_once(folder: Path, as_stranger: Callable[[], None], monkeypatch: Any) -> None:
    from ntkdyn.store import verify

    as_stranger()
    checked: list[list[str]] = []
    real = verify._in_child
    monkeypatch.setattr(
        verify, "_in_child", lambda paths, *rest: checked.append([p.name for p in paths]) or real(paths, *rest)
    )
    reader = TiledKernel.open(folder)
    reader[0]
    reader[:2]
    reader[...]
    assert [len(names) for names in checked] == [4, 6]


def test_what_a_killed_process_left_is_removed_later(folder: Path) -> None:
    old, new = (folder / "tiles" / f"{files.TEMPORARY}1-{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    TileWriter(folder).begin(described(kernel_of(10, 3, 4), 3))
    assert not old.exists()
    assert new.exists()
    assert TiledKernel.open(folder).missing() == []


def test_largest_tile(tmp_path: Path) -> None:
    grid = tiles.Grid.of(described(kernel_of(10, 3, 4), 4))
    assert len(grid) == len(list(grid)) == 6
    assert [grid.tile_shape(place) for place in ((0, 0), (0, 2), (2, 2))] == [(4, 4, 3, 3), (4, 2, 3, 3), (2, 2, 3, 3)]
    with pytest.raises(ConfigurationError, match="choose a tile below 100000"):
        TileWriter(tmp_path / "k").begin(described(kernel_of(2, 1, 2), 10**5, {"shape": [10**5, 10**5]}))
