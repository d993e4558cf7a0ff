"""Glance: the curves of a run, read sparsely and read on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntkdyn.analysis import kernel_distance_centered
from ntkdyn.errors import StorageError
from ntkdyn.glance import Glance
from ntkdyn.probe import Field
from ntkdyn.results import Run
from ntkdyn.store.recorded_array import RecordedArray
from ntkdyn.store.writer import RunWriter

SAMPLES = 5


def _kernel(step: int) -> np.ndarray[Any, Any]:
    features = np.random.default_rng(step).standard_normal((SAMPLES, 8))
    return np.asarray(features @ features.T, dtype="f4")


@pytest.fixture
def writer(tmp_path: Path) -> RunWriter:
    recording = RunWriter(tmp_path / "run", {})
    recording.declare("ntk/test", [Field(name="kernel", dims=("sample", "sample_2"), shape=(SAMPLES, SAMPLES))])
    recording.declare("outputs/test", [Field(name="loss", dims=("sample",), shape=(SAMPLES,)), Field(name="accuracy")])
    gates = {"dims": ("gate",), "shape": (2,), "dtype": "i8"}
    recording.declare("units", [Field(name="active", **gates), Field(name="total", static=True, **gates)])
    return recording


def commit(writer: RunWriter, *steps: int) -> None:
    for step in steps:
        outputs = {"loss": np.full(SAMPLES, 1 / (1 + step)), "accuracy": step / 100}
        units = {"active": [8 - step % 8, 8], "total": [8, 8]}
        writer.commit(step, step / 10, {"ntk/test": {"kernel": _kernel(step)}, "outputs/test": outputs, "units": units})


def test_reads_what_is_recorded(writer: RunWriter) -> None:
    commit(writer, 0, 3, 4)
    glance = Glance(Run.open(writer.path))
    loss, accuracy, drift, units = glance.curves
    assert [(one.name, one.set) for one in glance.curves] == [
        ("loss", "test"), ("accuracy", "test"), ("kernel drift", "test"), ("active units", "")
    ]  # fmt: skip
    assert loss.steps == drift.steps == [0, 3, 4]
    np.testing.assert_allclose(loss.values, [1, 1 / 4, 1 / 5], rtol=1e-6)
    np.testing.assert_allclose(accuracy.values, [0, 3, 4], rtol=1e-6)
    kernels = Run.open(writer.path)["ntk/test/kernel"]
    assert drift.values == [kernel_distance_centered(kernel, kernels[0]) for kernel in kernels]
    assert units.values == [16, 13, 12]
    assert units.of == 16
    assert (glance.step, glance.epoch, glance.status) == (4, 0.4, "running")
    assert 0 <= glance.age < 60


def test_refresh_reads_new_snapshots_only(writer: RunWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(writer, 0, 1)
    glance = Glance(Run.open(writer.path))
    assert not glance.refresh()
    commit(writer, 5, 9)
    read: list[tuple[str, Any]] = []
    getitem = RecordedArray.__getitem__

    def noted(array: RecordedArray, index: Any) -> Any:
        read.append((array.name, index))
        return getitem(array, index)

    monkeypatch.setattr(RecordedArray, "__getitem__", noted)
    assert glance.refresh()
    assert len({name for name, _ in read}) == len(read) == 4
    assert all(index == [2, 3] for _, index in read)
    assert all(curve.steps == [0, 1, 5, 9] for curve in glance.curves)
    writer.close()
    assert glance.refresh()
    assert glance.status == "finished"


def test_a_long_run_is_read_at_a_few_steps(writer: RunWriter) -> None:
    commit(writer, *range(40))
    glance = Glance(Run.open(writer.path), points=7)
    assert all(len(curve.steps) == 7 for curve in glance.curves)
    assert glance.curves[0].steps[0] == 0
    assert glance.curves[0].steps[-1] == 39
    steps = glance.curves[2].steps
    np.testing.assert_allclose(
        glance.curves[2].values, [kernel_distance_centered(_kernel(step), _kernel(0)) for step in steps], atol=1e-12
    )


def test_large_kernels_are_read_at_fewer_steps_or_not_at_all(writer: RunWriter) -> None:
    commit(writer, *range(10))
    size = 4 * SAMPLES**2
    (few,) = Glance(Run.open(writer.path), most_bytes=3 * size, names={"kernel drift"}).curves
    assert few.steps == [0, 4, 9]
    drift = Glance(Run.open(writer.path), most_bytes=size - 1).curves[2]
    assert drift.values == []
    assert "more than" in drift.left_out


def test_a_resumed_run_is_read_again(writer: RunWriter) -> None:
    commit(writer, 0, 2, 4)
    glance = Glance(Run.open(writer.path))
    writer.close(pack=False, status="interrupted")
    glance.refresh()
    resumed = RunWriter(writer.path, {}, after=2)
    samples: dict[str, Any] = {"dims": ("sample",), "shape": (SAMPLES,)}
    resumed.declare("outputs/test", [Field(name="loss", **samples), Field(name="accuracy")])
    resumed.commit(3, None, {"outputs/test": {"loss": np.ones(SAMPLES), "accuracy": 1.0}})
    resumed.commit(4, None, {"outputs/test": {"loss": np.ones(SAMPLES), "accuracy": 1.0}})
    assert glance.refresh()
    accuracy = glance.curves[1]
    assert accuracy.steps == [0, 2, 3, 4]
    assert accuracy.values[-1] == 100
    resumed.close()


@pytest.mark.parametrize("remove", [shutil.rmtree, lambda path: [shutil.rmtree(path), path.mkdir()]])
def test_a_run_that_vanishes(writer: RunWriter, remove: Callable[[Path], object]) -> None:
    commit(writer, 0, 7)
    glance = Glance(Run.open(writer.path))
    remove(writer.path)
    with pytest.raises(StorageError, match="vanished while it was watched: found nothing after step 7"):
        glance.refresh()


def test_a_recorder_that_was_killed(writer: RunWriter) -> None:
    commit(writer, 0)
    glance = Glance(Run.open(writer.path))
    lock = writer.path / "LOCK"
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"pid": 2**22 - 1, "started": "1"}))
    assert glance.status == "abandoned"
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"host": "elsewhere"}))
    assert glance.status == "running"


def test_no_snapshot_yet_and_not_finite(writer: RunWriter) -> None:
    glance = Glance(Run.open(writer.path))
    assert glance.step is None
    assert np.isnan(glance.epoch)
    writer.commit(0, None, {"ntk/test": {"kernel": _kernel(0)}})
    writer.commit(1, None, {"ntk/test": {"kernel": np.full((SAMPLES, SAMPLES), np.nan)}})
    glance.refresh()
    (drift,) = [curve for curve in glance.curves if curve.name == "kernel drift"]
    assert drift.values[0] == 0
    assert np.isnan(drift.values[1])
