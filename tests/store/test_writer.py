"""RunWriter: what is committed stays, whatever fails."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntkdyn.errors import ConfigurationError, NtkdynError, ProbeError, RecordingExists, ShapeError
from ntkdyn.probe import Field
from ntkdyn.store import block, files, outbox
from ntkdyn.store.reader import RunReader
from ntkdyn.store.writer import RunWriter

Start = Callable[[Path], RunWriter]
Records = Callable[[int], dict[str, dict[str, Any]]]


def test_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("x")
    with pytest.raises(RecordingExists, match="'precious' already; nothing was touched"):
        RunWriter(tmp_path / "run", {})
    assert os.listdir(tmp_path / "run") == ["precious"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecordingExists):
        RunWriter(tmp_path / "file", {})
    assert (tmp_path / "file").read_text() == "x"
    (tmp_path / "empty").mkdir()
    RunWriter(tmp_path / "empty", {})
    with pytest.raises(RecordingExists, match=r"run\.json|segments"):
        RunWriter(tmp_path / "empty", {})


def test_two_writers_at_once(tmp_path: Path) -> None:
    won, lost = [], []
    gate = threading.Barrier(8)

    def attempt(number: int) -> None:
        gate.wait()
        try:
            RunWriter(tmp_path / "run", {"seed": number})
        except RecordingExists:
            lost.append(number)
        else:
            won.append(number)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) <= 1
    assert len(won) + len(lost) == 8
    if won:
        assert json.loads((tmp_path / "run" / "run.json").read_text())["seed"] == won[0]


def test_name_of_the_folder_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="run 'my run'"):
        RunWriter(tmp_path / "my run", {})
    assert not (tmp_path / "my run").exists()
    recording = RunWriter(tmp_path / "run", {})
    with pytest.raises(ConfigurationError, match="probe set"):
        recording.write_arrays({"probe_sets/a b": {"x": [1]}}, dims={"probe_sets/a b/x": ("n",)})


def test_secrets_are_masked(tmp_path: Path) -> None:
    manifest = {
        "config": {
            "lr": 0.1,
            "HF_TOKEN": "t1",
            "nested": [{"password": "t2", "keys": "shown"}],
            "max_tokens": 5,
            "key": "t3",
        },
        "command": "ntkdyn record x --set api_key=t4 --set width=3",
    }
    recording = RunWriter(tmp_path / "run", manifest)
    recording.update(config={"secret_thing": ["t5"]})
    recording.close()
    text = (tmp_path / "run" / "run.json").read_text()
    packed = (tmp_path / "run" / "run.h5").read_bytes()
    assert not any(f"t{number}" in text for number in range(1, 6))
    assert b"t5" not in packed.split(b"recording")[0]
    first = RunWriter(tmp_path / "other", manifest).manifest
    assert first["config"] == {
        "lr": 0.1,
        "HF_TOKEN": "***",
        "nested": [{"password": "***", "keys": "shown"}],
        "max_tokens": 5,
        "key": "***",
    }
    assert first["command"] == "ntkdyn record x --set api_key=*** --set width=3"


def test_a_command_that_is_no_utf8(tmp_path: Path) -> None:
    command = os.fsdecode("ntkdyn record möde.py".encode("latin-1"))
    RunWriter(tmp_path / "run", {"command": command}).close()
    for path in (tmp_path / "run", tmp_path / "run" / "run.h5"):
        assert RunReader.open(path).manifest["command"] == command


def test_manifest_with_nan_is_valid_json(tmp_path: Path) -> None:
    recording = RunWriter(tmp_path / "run", {})
    recording.close(results={"gap": float("nan"), "best": float("-inf")}, pack=False)
    json.loads((tmp_path / "run" / "run.json").read_text(), parse_constant=pytest.fail)
    manifest = RunReader.open(tmp_path / "run").manifest
    assert np.isnan(manifest["results"]["gap"])
    assert manifest["results"]["best"] == float("-inf")
    assert manifest["status"] == "finished"


def test_refused_records(tmp_path: Path, start: Start, records: Records) -> None:
    recording = start(tmp_path / "run")
    good = records(0)
    gates = good["gates/test"]
    refused: list[tuple[type[NtkdynError], str, dict[str, Any]]] = [
        (ProbeError, "expected a declaration first", {"unknown": {}}),
        (ProbeError, "expected a declaration first", {"probe_sets/test": {"targets": np.eye(6, 3)}}),
        (ProbeError, "undeclared field 'extra'", {"gates/test": {**gates, "extra": 1}}),
        (
            ProbeError,
            "'gates/test/mean' at step 0: found nothing",
            {"gates/test": {k: gates[k] for k in gates if k != "mean"}},
        ),
        (ShapeError, r"found shape \[2\], expected \[3\]", {"gates/test": {**gates, "trunk.0/slope": [1, 2]}}),
        (
            ProbeError,
            "found dtype float64, expected |b1".replace("|", r"\|"),
            {"gates/test": {**gates, "trunk.0/frozen": np.zeros(3)}},
        ),
    ]
    for error, message, bad in refused:
        with pytest.raises(error, match=message):
            recording.commit(0, None, bad)
    assert recording.commit(0, None, good)
    with pytest.raises(ProbeError, match="step 0 recorded already"):
        recording.commit(0, None, good)
    with pytest.raises(ProbeError, match="negative"):
        recording.commit(-1, None, {"ntk/test": {"kernel": np.eye(6)}})
    with pytest.raises(ShapeError, match="one name per axis"):
        recording.write_arrays({"extra": {"x": np.zeros(3)}}, dims={"extra/x": ()})
    with pytest.raises(ConfigurationError, match="found no dims"):
        recording.write_arrays({"good": {"x": [1]}, "extra": {"x": np.zeros(3)}}, dims={"good/x": ("n",)})
    assert not recording.has_arrays("good")
    recording.close()
    with pytest.raises(ProbeError, match="after close"):
        recording.commit(1, None, {"ntk/test": {"kernel": np.eye(6)}})
    assert RunReader.open(tmp_path / "run").steps("gates/test").tolist() == [0]


def test_groups_of_one_step_in_two_commits(tmp_path: Path, start: Start, records: Records) -> None:
    recording = start(tmp_path / "run")
    for group, arrays in records(4).items():
        assert recording.commit(4, None, {group: arrays})
    reader = RunReader.open(tmp_path / "run")
    assert reader.steps("ntk/test").tolist() == reader.steps("gates/test").tolist() == [4]
    assert np.isnan(reader.epochs("ntk/test")).all()


def test_close_is_idempotent(live: RunWriter) -> None:
    live.close(status="interrupted")
    before = (live.path / "run.h5").stat().st_mtime_ns
    live.close()
    assert (live.path / "run.h5").stat().st_mtime_ns == before
    assert RunReader.open(live.path).manifest["status"] == "interrupted"


@pytest.mark.parametrize("function", ["create", "write", "fsync", "replace", "sync_folder"])
def test_disk_that_fails_at_any_call(
    tmp_path: Path, start: Start, records: Records, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    real = getattr(files, function)
    for failing in (1, 2, 3, 5, 8):
        recording = start(tmp_path / f"run{failing}")
        calls = 0

        def flaky(*arguments: Any, limit: int = failing) -> Any:
            nonlocal calls
            calls += 1
            if calls >= limit and calls < limit + 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        monkeypatch.setattr(files, function, flaky)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in (0, 3, 4, 8, 9):
                recording.commit(step, step / 4, records(step))
                seen = RunReader.open(recording.path, trusted=True)
                for group in seen.groups():
                    assert set(seen.steps(group)) <= {0, 3, 4, 8, 9}
            recording.close()
            recording.close()
        monkeypatch.setattr(files, function, real)
        recording.close()
        assert len(caught) <= 3, [str(entry.message) for entry in caught]
        reader = RunReader.open(recording.path)
        assert reader.steps("ntk/test").tolist() == [0, 4, 8]
        assert reader.steps("gates/test").tolist() == [0, 3, 4, 9]
        assert reader.read("gates/test/total").tolist() == [3, 5]
        assert not [path for path in recording.path.rglob("*") if path.name.startswith(files.TEMPORARY)]


def test_full_disk_gives_one_warning_and_loses_nothing(
    tmp_path: Path, start: Start, records: Records, monkeypatch: pytest.MonkeyPatch, kernel_at: Any
) -> None:
    recording = start(tmp_path / "run")
    real = files.write

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    with pytest.warns(RuntimeWarning, match=r"No space left on device.*tried again") as caught:
        assert [recording.commit(step, None, records(step)) for step in (0, 3, 4)] == [False] * 3
    assert len(caught) == 1
    with pytest.warns(RuntimeWarning, match="steps 0, 3, 4 could not be written.*close again"):
        recording.close()
    monkeypatch.setattr(files, "write", real)
    recording.close()
    reader = RunReader.open(tmp_path / "run")
    assert reader.steps("gates/test").tolist() == [0, 3, 4]
    assert reader.manifest["status"] == "finished"
    assert np.array_equal(reader.read("ntk/test/kernel")[1], kernel_at(4))


def test_memory_for_a_full_disk_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = RunWriter(tmp_path / "run", {})
    recording.declare("p", [Field(name="x", dims=("n",), shape=(1000,)), Field(name="s", static=True)])
    monkeypatch.setattr(outbox, "PENDING_BYTES", 20_000)
    real = files.replace

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "replace", fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(8):
            recording.commit(step, None, {"p": {"x": np.full(1000, step), "s": 1}})
    assert "tried again" in str(caught[0].message)
    assert len(caught) == 1
    monkeypatch.setattr(files, "replace", real)
    # A step that was given up may be recorded again.
    recording.commit(7, None, {"p": {"x": np.full(1000, 7), "s": 1}})
    with pytest.warns(
        RuntimeWarning, match="steps 4, 5, 6 could not be written; all that was committed before is kept"
    ):
        recording.close()
    reader = RunReader.open(tmp_path / "run")
    steps = reader.steps("p").tolist()
    assert 0 in steps
    assert 7 in steps
    assert len(steps) < 8
    assert reader.read("p/x")[:, 0].tolist() == steps
    assert reader.read("p/s") == 1


def test_static_fields_of_a_snapshot_that_was_given_up_go_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = RunWriter(tmp_path / "run", {})
    recording.declare("q", [Field(name="x", dims=("n",), shape=(5000,))])
    recording.declare("p", [Field(name="x", dims=("n",), shape=(1000,)), Field(name="s", static=True)])
    monkeypatch.setattr(outbox, "PENDING_BYTES", 20_000)

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(files, "replace", fail)
        recording.commit(0, None, {"q": {"x": np.zeros(5000)}})
        # Given up; the field is given once, as by a probe that has recorded it.
        static = np.array(3.0)
        recording.commit(1, None, {"p": {"x": np.ones(1000), "s": static}})
        static[()] = 4
    recording.commit(2, None, {"p": {"x": np.ones(1000)}})
    with pytest.warns(RuntimeWarning, match="step 1 could not be written"):
        recording.close()
    reader = RunReader.open(tmp_path / "run")
    assert reader.steps("p").tolist() == [2]
    assert reader.read("p/s") == 3


CHILD = """
import sys, numpy as np
from ntkdyn.probe import Field
from ntkdyn.store.writer import RunWriter
recording = RunWriter(sys.argv[1], {})
recording.declare("p", [Field(name="x", dims=("n", "n_2"), shape=(64, 64))])
for step in range(100_000):
    if recording.commit(step, None, {"p": {"x": np.full((64, 64), step)}}):
        sys.stdout.write(f"{step}\\n"); sys.stdout.flush()
"""


def test_killed_writer_loses_no_committed_step(tmp_path: Path) -> None:
    generator = random.Random(0)
    total = 0
    for trial in range(4):
        path = tmp_path / f"run{trial}"
        with subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            first = child.stdout.readline()
            time.sleep(generator.uniform(0.0, 0.15))
            os.kill(child.pid, signal.SIGKILL)
            acknowledged = [int(line) for line in (first + child.stdout.read()).split(b"\n")[:-1]]
        reader = RunReader.open(path, trusted=True)
        steps = reader.steps("p").tolist()
        assert set(acknowledged) <= set(steps)
        assert reader.read("p/x")[:, 3, 5].tolist() == steps
        assert reader.manifest["status"] == "running"
        total += len(acknowledged)
    assert total > 5


def test_reading_while_writing(tmp_path: Path) -> None:
    recording = RunWriter(tmp_path / "run", {})
    recording.declare("p", [Field(name="x", dims=("n",), shape=(50,))])
    done = threading.Event()

    def write() -> None:
        for step in range(40):
            recording.commit(step, None, {"p": {"x": np.full(50, step)}})
        recording.close()
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = 0
    while not done.is_set():
        reader = RunReader.open(tmp_path / "run", trusted=True)
        if "p" in reader.groups():
            count = len(reader.steps("p"))
            # A reload after packing may show more steps than were there at opening, never fewer.
            assert count >= seen
            values = reader.read("p/x")[:, 0]
            assert values.tolist() == list(range(len(values)))
            seen = count
    thread.join()
    assert RunReader.open(tmp_path / "run").steps("p").tolist() == list(range(40))


@pytest.mark.parametrize("refuse", [False, True])
def test_large_segments_are_streamed(
    tmp_path: Path, start: Start, records: Records, monkeypatch: pytest.MonkeyPatch, kernel_at: Any, refuse: bool
) -> None:
    monkeypatch.setattr(block, "STREAMED_BYTES", 0)
    recording = start(tmp_path / "run")
    real = files.write
    if refuse:

        def full(descriptor: int, data: Any, offset: int) -> int:
            if offset > 2000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(descriptor, data, offset)

        monkeypatch.setattr(files, "write", full)
        with pytest.warns(RuntimeWarning, match="No space left on device.*tried again"):
            assert not recording.commit(0, 0.0, records(0))
        assert not list((tmp_path / "run").rglob(f"{files.TEMPORARY}*"))
        monkeypatch.setattr(files, "write", real)
    else:
        assert recording.commit(0, 0.0, records(0))
    assert recording.commit(4, 1.0, records(4))
    reader = RunReader.open(tmp_path / "run")
    assert reader.steps("ntk/test").tolist() == [0, 4]
    assert np.array_equal(reader.read("ntk/test/kernel"), [kernel_at(0), kernel_at(4)])


def test_what_waits_for_the_disk_is_the_recorders_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(tmp_path / "run", {})
    writer.declare(
        "p", [Field(name="x", dims=("n",), shape=(3,), dtype="<f4"), Field(name="s", dtype="<f4", static=True)]
    )
    measured, fixed = np.arange(3, dtype="<f4"), np.array(2.0, "<f4")

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", full)
        with pytest.warns(RuntimeWarning, match="tried again"):
            writer.commit(0, None, {"p": {"x": measured, "s": fixed}})
    measured += 7
    fixed += 7
    writer.close()
    reader = RunReader.open(tmp_path / "run")
    assert reader.read("p/x").tolist() == [[0, 1, 2]]
    assert reader.read("p/s") == 2
