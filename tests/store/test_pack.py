"""Packing: a file for netCDF4 readers, published only when it equals the segments."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray as xr

from ntkdyn.errors import DamagedRecording, ReplacedFile, StorageError
from ntkdyn.probe import Field
from ntkdyn.results import Run
from ntkdyn.store import files, pack
from ntkdyn.store.reader import RunReader
from ntkdyn.store.writer import RunWriter


def test_xarray_reads_every_group_as_run_does(live: RunWriter) -> None:
    before = Run.open(live.path).to_xarray()
    live.close()
    after = Run.open(live.path / "run.h5").to_xarray()
    with xr.open_datatree(live.path / "run.h5", engine="h5netcdf") as tree:
        found = tree.load()
    xr.testing.assert_equal(before, after)
    xr.testing.assert_equal(found, after)
    kernel = found["ntk/test/kernel"]
    assert kernel.dims == ("step", "sample", "sample_2")
    assert kernel.attrs["units"] == "1"
    assert kernel.attrs["long_name"] == "kernel"
    assert kernel.attrs["reduce"] == "trace"
    assert found["ntk/test"]["step"].values.tolist() == [0, 4, 8]
    assert found["ntk/test"].coords["epoch"].dims == ("step",)
    # The step axis of a nested gate is its group's.
    slope = found["gates/test/trunk.0/slope"]
    assert slope.dims == ("step", "channel")
    assert slope["step"].values.tolist() == [0, 3, 4, 9]
    assert found["gates/test/share"]["gate"].values.tolist() == ["trunk.0", "trunk.2"]
    assert found["gates/test/total"].dims == ("gate",)
    assert found["gates/test/trunk.0/frozen"].dtype == bool
    assert found["probe_sets/test/label"].values.tolist() == ["a", "ü", "c"]
    assert found.attrs["Conventions"] == "CF-1.10"
    assert found.attrs["seed"] == 3
    assert found.attrs["config"] == '{"width": 8, "api_key": "***"}'
    assert found["ntk/test"].sel(step=4)["epoch"] == 1.0


def test_dimension_scales_and_unlimited_steps(packed: Path) -> None:
    with h5py.File(packed / "run.h5") as file:
        kernel = file["ntk/test/kernel"]
        assert kernel.maxshape == (None, 6, 6)
        assert kernel.dims[0][0] == file["ntk/test/step"]
        assert kernel.dims[1][0] == file["ntk/test/sample"]
        assert kernel.dims[2][0] == file["ntk/test/sample_2"]
        assert file["gates/test/trunk.0/slope"].dims[0][0] == file["gates/test/step"]
        assert file["gates/test/total"].maxshape == (2,)
        assert len(kernel.attrs["crc32"]) == 3


def test_one_dataset_opens_without_a_tree(packed: Path) -> None:
    with xr.open_dataset(packed / "run.h5", engine="h5netcdf", group="ntk/test") as dataset:
        assert dataset["kernel"].sel(step=8, sample=0, sample_2=0).shape == ()


def test_user_attributes_that_readers_reserve(tmp_path: Path) -> None:
    recording = RunWriter(tmp_path / "run", {"": 1, "Conventions": "mine", "deep": {"a": [1]}, "big": 2**70})
    attributes = {
        "units": "m",
        "scale_factor": 2.0,
        "note": "a\0b",
        "list": [1, 2],
        "none": None,
        "yes": True,
        "a\0b": 1,
        "a": 2,
    }
    recording.declare("p", [Field(name="x", attributes=attributes)], attributes={"coordinates": "x", "": 2})
    recording.commit(0, None, {"p": {"x": 3}})
    recording.close()
    reader = RunReader.open(tmp_path / "run" / "run.h5")
    assert reader.field("p/x").attributes == attributes
    assert reader.attributes("p") == {"coordinates": "x", "": 2}
    assert reader.manifest["Conventions"] == "mine"
    with xr.open_datatree(tmp_path / "run" / "run.h5", engine="h5netcdf") as tree:
        assert tree["p/x"].values.tolist() == [3.0]
        assert tree["p/x"].attrs["yes"] == 1
        assert tree["p/x"].attrs["a"] == 2


def test_many_steps_and_their_checksums(tmp_path: Path) -> None:
    count = 120
    recording = RunWriter(tmp_path / "run", {})
    recording.declare("p", [Field(name="x", dtype="i8"), Field(name="y", dims=("n",), shape=(3,))])
    for step in range(count):
        recording.commit(step, None, {"p": {"x": step, "y": [step] * 3}})
    recording.close()
    reader = RunReader.open(tmp_path / "run")
    assert reader.read("p/x").tolist() == list(range(count))
    assert reader.read("p/y")[:, 2].tolist() == list(range(count))


def test_large_run_stays_in_segments(live: RunWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "AUTOMATIC_BYTES", 1000)
    live.close()
    assert not (live.path / "run.h5").exists()
    assert RunReader.open(live.path).manifest["status"] == "finished"
    pack.pack(live.path)
    assert (live.path / "run.h5").exists()
    assert pack.pack(live.path) == live.path / "run.h5"
    assert RunReader.open(live.path / "run.h5").steps("ntk/test").tolist() == [0, 4, 8]


@pytest.mark.parametrize("function", ["create", "write", "fsync", "replace", "sync_folder"])
def test_disk_that_fails_while_packing(live: RunWriter, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    live.close(pack=False)
    segments = sorted((live.path / "segments").iterdir())
    real: Callable[..., Any] = getattr(files, function)
    for failing in range(1, 30, 3):
        calls = 0

        def flaky(*arguments: Any, limit: int = failing) -> Any:
            nonlocal calls
            calls += 1
            if calls >= limit:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        monkeypatch.setattr(files, function, flaky)
        with suppress(StorageError):
            pack.pack(live.path)
        packed = (live.path / "run.h5").exists()
        assert packed or sorted((live.path / "segments").iterdir()) == segments
        monkeypatch.setattr(files, function, real)
        assert RunReader.open(live.path, trusted=True).read("ntk/test/kernel").shape == (3, 6, 6)
        assert not [path for path in live.path.rglob("*") if path.name.startswith(files.TEMPORARY)]
        if calls < failing:
            break


def test_failure_names_the_file(live: RunWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    live.close(pack=False)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(StorageError, match=r"cannot write .*run\.h5: No space left on device"):
        pack.pack_locked(RunReader.open(live.path))


def test_rows_go_to_the_disk_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from caches of HDF5 at the end, when all of them would be in memory."""
    fields = [Field(name=name, dims=("n",), shape=(2**16,)) for name in "abcd"]
    recording = RunWriter(tmp_path / "run", {})
    recording.declare("p", fields)
    for step in range(6):
        recording.commit(step, None, {"p": {field.name: np.full(2**16, step, "f4") for field in fields}})
    written: list[int] = []
    real = pack._Packing.run

    def run(packing: Any) -> Any:
        sums = real(packing)
        (temporary,) = recording.path.glob(f"{files.TEMPORARY}*")
        written.append(temporary.stat().st_size)
        return sums

    monkeypatch.setattr(pack._Packing, "run", run)
    recording.close()
    assert written[0] > 0.9 * (recording.path / "run.h5").stat().st_size


def test_close_on_a_full_disk_keeps_segments(live: RunWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.write

    def full(descriptor: int, data: Any, offset: int) -> int:
        if offset + len(data) > 4000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(files, "write", full)
    with pytest.warns(RuntimeWarning, match="stays unpacked, its segments are complete"):
        live.close()
    assert not (live.path / "run.h5").exists()
    assert RunReader.open(live.path).steps("gates/test").tolist() == [0, 3, 4, 9]


def test_file_that_differs_from_the_segments_is_not_published(live: RunWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    live.close(pack=False)
    real = pack._Packing._put

    def wrong(self: Any, path: str, field: Any, selection: Any, data: Any) -> None:
        real(self, path, field, selection, data + 1 if path == "ntk/test/kernel" else data)

    monkeypatch.setattr(pack._Packing, "_put", wrong)
    with pytest.raises(DamagedRecording, match="'ntk/test/kernel' at step 0"):
        pack.pack(live.path)
    assert not (live.path / "run.h5").exists()
    assert len(list((live.path / "segments").iterdir())) == 6


def test_segments_left_by_an_interrupted_packing(live: RunWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "unlink", lambda path: None)
    live.close()
    assert len(list((live.path / "segments").iterdir())) == 6
    reader = RunReader.open(live.path)
    assert reader.steps("ntk/test").tolist() == [0, 4, 8]
    assert np.array_equal(reader.read("gates/test/total"), [3, 5])


def test_a_segment_that_was_swapped_is_not_packed(
    live: RunWriter, tmp_path: Path, as_stranger: Callable[[], None]
) -> None:
    as_stranger()
    reader = RunReader.open(live.path)
    segment = live.path / "segments" / "seg-0-000000000004-000000000004.h5"
    shutil.copy(segment, tmp_path / "other.h5")
    os.replace(tmp_path / "other.h5", segment)
    names = sorted(entry.name for entry in (live.path / "segments").iterdir())
    with pytest.raises(ReplacedFile, match=segment.name):
        pack.pack_locked(reader)
    assert sorted(entry.name for entry in (live.path / "segments").iterdir()) == names
    assert not (live.path / "run.h5").exists()
