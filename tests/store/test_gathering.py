"""Snapshots that are gathered and committed together: the same run, in fewer segments, and nothing else is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from ntkdyn.errors import ProbeError
from ntkdyn.probe import Bands, Field
from ntkdyn.store import gathering, outbox
from ntkdyn.store.reader import RunReader
from ntkdyn.store.repair import verify
from ntkdyn.store.writer import RunWriter


def declared(path: Path, commit_every: float) -> RunWriter:
    writer = RunWriter(path, {"run": "1" * 16}, commit_every=commit_every)
    size = Field(name="size", dims=(), shape=(), dtype="i8", static=True)
    writer.declare("ntk", [Field(name="kernel", dims=("sample", "sample_2"), shape=(5, 5)), size])
    writer.declare("units", [Field(name="active", dims=("layer",), shape=(2,), dtype="i8"),
                             Field(name="name", dims=(), shape=(), dtype="str")])  # fmt: skip
    return writer


def kernel(step: int) -> np.ndarray[Any, Any]:
    root = np.random.default_rng(step).normal(size=(5, 5)).astype("f4")
    return root @ root.T


def commit(writer: RunWriter, step: int) -> bool:
    records: dict[str, dict[str, Any]] = {"units": {"active": [step, step + 1], "name": f"step {step}"}}
    if step % 3 == 0:
        records["ntk"] = {"kernel": kernel(step), "size": 5}
    return writer.commit(step, step / 2, records, seconds={"ntk": 0.25, "units": 0.5})


def segments(path: Path) -> list[str]:
    return sorted(file.name for file in (path / "segments").glob("seg-*.h5"))


def content(path: Path) -> dict[str, Any]:
    reader = RunReader.open(path)
    arrays: dict[str, Any] = {name: reader.read(name).tolist() for name in reader.names()}
    costs = [source.facts["costs"] for source in reader.sources]
    return arrays | {group: reader.steps(group).tolist() for group in reader.groups()} | {"costs": costs}


def test_the_run_is_the_same(tmp_path: Path) -> None:
    for name, seconds in (("single", 0.0), ("gathered", 1000.0)):
        writer = declared(tmp_path / name, seconds)
        assert [commit(writer, step) for step in range(7)] == [not seconds] * 7
        writer.close()
    assert content(tmp_path / "single") == content(tmp_path / "gathered")
    assert verify(tmp_path / "gathered") == []
    with h5py.File(tmp_path / "gathered" / "run.h5") as file:
        assert file["ntk/kernel"].shape == (3, 5, 5)


def test_one_segment_of_what_was_gathered(tmp_path: Path) -> None:
    writer = declared(tmp_path / "run", 1000.0)
    for step in range(4):
        assert not commit(writer, step)
    assert segments(tmp_path / "run") == []
    assert writer.flush()
    assert segments(tmp_path / "run") == ["seg-0-000000000000-000000000003.h5"]
    commit(writer, 4)
    writer.close(pack=False)
    assert segments(tmp_path / "run")[1:] == ["seg-0-000000000004-000000000004.h5"]
    assert RunReader.open(tmp_path / "run").steps("units").tolist() == list(range(5))


def test_what_is_gathered_belongs_to_the_writer(tmp_path: Path) -> None:
    writer = declared(tmp_path / "run", 1000.0)
    shared = kernel(0)
    writer.commit(0, None, {"ntk": {"kernel": shared, "size": 5}})
    shared[:] = 0
    writer.close()
    assert np.array_equal(RunReader.open(tmp_path / "run").read("ntk/kernel")[0], kernel(0))


def test_due_by_time_and_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(gathering.time, "monotonic", lambda: now)
    writer = declared(tmp_path / "run", 10.0)
    assert not commit(writer, 0)
    now = 109.9
    assert not commit(writer, 1)
    now = 110.0
    assert commit(writer, 2)
    # From the first of the next ones on.
    now = 200.0
    assert not commit(writer, 3)
    monkeypatch.setattr(gathering, "STREAMED_BYTES", 100)
    assert commit(writer, 6)
    assert len(segments(tmp_path / "run")) == 2
    writer.close()


def test_a_step_is_refused_twice_while_it_is_gathered(tmp_path: Path) -> None:
    writer = declared(tmp_path / "run", 1000.0)
    commit(writer, 0)
    with pytest.raises(ProbeError, match="step 0 recorded already"):
        commit(writer, 0)
    writer.close()


def test_bands_that_fail_take_nothing_with_them(tmp_path: Path) -> None:
    def failing() -> Any:
        yield kernel(3)[:2]
        raise ValueError("no more")

    writer = declared(tmp_path / "run", 1000.0)
    commit(writer, 0)
    commit(writer, 1)
    with pytest.raises(ValueError, match="no more"):
        writer.commit(3, None, {"ntk": {"kernel": Bands(failing), "size": 5}})
    assert segments(tmp_path / "run") == ["seg-0-000000000000-000000000001.h5"]
    assert writer.commit(3, None, {"ntk": {"kernel": Bands(lambda: iter([kernel(3)])), "size": 5}})
    writer.close()
    assert RunReader.open(tmp_path / "run").steps("ntk").tolist() == [0, 3]


def test_a_refusing_disk_gets_all_of_it_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntkdyn.errors import StorageError

    def refuse(*_: Any) -> None:
        raise StorageError("disk: found no space; free some")

    writer = declared(tmp_path / "run", 1000.0)
    commit(writer, 0)
    commit(writer, 3)
    publish = outbox.publish_segment
    monkeypatch.setattr(outbox, "publish_segment", refuse)
    with pytest.warns(RuntimeWarning, match="waits in memory"):
        assert not writer.flush()
    monkeypatch.setattr(outbox, "publish_segment", publish)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.close()
    assert RunReader.open(tmp_path / "run").steps("ntk").tolist() == [0, 3]


def test_given_up_ones_may_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntkdyn.errors import StorageError

    def refuse(*_: Any) -> None:
        raise StorageError("disk: found no space; free some")

    writer = declared(tmp_path / "run", 1000.0)
    publish = outbox.publish_segment
    monkeypatch.setattr(outbox, "publish_segment", refuse)
    monkeypatch.setattr(outbox, "PENDING_BYTES", 10)
    commit(writer, 1)
    with pytest.warns(RuntimeWarning, match="waits in memory"):
        writer.flush()
    commit(writer, 0)
    commit(writer, 3)
    assert not writer.flush()
    monkeypatch.setattr(outbox, "publish_segment", publish)
    commit(writer, 0)
    writer.commit(3, None, {"ntk": {"kernel": kernel(3)}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.close()
    reader = RunReader.open(tmp_path / "run")
    assert reader.steps("ntk").tolist() == [0, 3]
    assert reader.read("ntk/size").tolist() == 5


KILLED = """
import os, signal, sys
import torch
from torch import nn
import ntkdyn as nd
model = nn.Sequential(nn.Linear(3, 4), nd.Gate(4), nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
recorder = nd.Recorder(model, ["units"], torch.randn(5, 3), path=sys.argv[1], commit_every=1000)
with recorder.attach(optimizer):
    for step in range(1, 9):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        if step == 5:
            state = recorder.state_dict()
        if step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_kill_loses_what_was_gathered_since_the_last_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, str(tmp_path / "run")], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert RunReader.open(tmp_path / "run").steps("units").tolist() == list(range(6))
    assert json.loads((tmp_path / "run" / "run.json").read_bytes())["status"] == "running"
    shutil.rmtree(tmp_path / "run")
