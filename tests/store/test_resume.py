"""A run that is continued: no step lost, none doubled, nothing deleted, another configuration refused."""

from __future__ import annotations

import datetime
import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from ntkdyn.errors import (
    ConfigurationError,
    DamagedRecording,
    MissingRecording,
    NewerRecording,
    RecordingExists,
    StorageError,
)
from ntkdyn.probe import Field
from ntkdyn.store import compact, files, pack
from ntkdyn.store.reader import RunReader, Source
from ntkdyn.store.repair import repair, verify
from ntkdyn.store.writer import RunWriter

SETTINGS = {"config": {"width": 8, "data": {"task": "sum"}}, "seed": 3}
FIELDS = [Field(name="x", dims=("n",), shape=(2,)), Field(name="total", static=True)]


def begin(path: Path, steps: range) -> RunWriter:
    writer = RunWriter(path, SETTINGS)
    writer.declare("p", FIELDS)
    record(writer, steps, 0.0)
    return writer


def record(writer: RunWriter, steps: range, offset: float) -> None:
    for step in steps:
        assert writer.commit(step, None, {"p": {"x": [step, offset], "total": 5}})


def again(path: Path, step: int, **changes: Any) -> RunWriter:
    writer = RunWriter(path, {**SETTINGS, **changes}, after=step, same=("config", "seed"))
    writer.declare("p", FIELDS)
    return writer


def rows(path: Path) -> list[list[float]]:
    reader = RunReader.open(path)
    assert reader.steps("p").tolist() == reader.read("p/x")[:, 0].tolist()
    assert reader.read("p/total") == 5
    found: list[list[float]] = reader.read("p/x").tolist()
    return found


@pytest.mark.parametrize("fan", [2, 32])
def test_later_steps_are_superseded_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fan: int) -> None:
    monkeypatch.setattr(compact, "FAN", fan)
    begin(tmp_path / "run", range(8)).close(pack=False)
    writer = again(tmp_path / "run", 4)
    # From the first moment on, also before anything new is recorded.
    assert rows(tmp_path / "run") == [[step, 0] for step in range(5)]
    record(writer, range(5, 10), 1.0)
    writer.close(pack=False)
    writer = again(tmp_path / "run", 6)
    record(writer, range(7, 9), 2.0)
    expected = [[0, 0], [1, 0], [2, 0], [3, 0], [4, 0], [5, 1], [6, 1], [7, 2], [8, 2]]
    assert rows(tmp_path / "run") == expected
    assert verify(tmp_path / "run") == []
    writer.close()
    assert rows(tmp_path / "run") == expected
    assert rows(tmp_path / "run" / "run.h5") == expected
    superseded = sorted((tmp_path / "run" / "superseded").glob("*.h5"))
    kept = {source.branch: source.axes["p"][0].tolist() for source in map(Source.open, superseded)}
    assert kept == {(): [5, 6, 7], (4,): [7, 8, 9]}
    assert list((tmp_path / "run" / "segments").iterdir()) == []
    assert verify(tmp_path / "run") == []
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [branch["after"] for branch in manifest["branches"]] == [4, 6]
    assert manifest["status"] == "finished"


def test_a_packed_run_can_be_continued(tmp_path: Path) -> None:
    begin(tmp_path / "run", range(6)).close()
    writer = again(tmp_path / "run", 3)
    record(writer, range(4, 6), 1.0)
    writer.close()
    assert rows(tmp_path / "run") == [[0, 0], [1, 0], [2, 0], [3, 0], [4, 1], [5, 1]]
    writer = again(tmp_path / "run", 1)
    record(writer, range(2, 4), 2.0)
    writer.close()
    assert rows(tmp_path / "run") == [[0, 0], [1, 0], [2, 2], [3, 2]]
    kept = [Source.open(path) for path in sorted((tmp_path / "run" / "superseded").glob("*.h5"))]
    assert [(one.branch, one.axes["p"][0].tolist()) for one in kept] == [((), [4, 5]), ((3,), [2, 3, 4, 5])]


def test_a_step_is_recorded_once(tmp_path: Path) -> None:
    begin(tmp_path / "run", range(4)).close(pack=False)
    writer = again(tmp_path / "run", 2)
    with pytest.raises(Exception, match="step 2 recorded already"):
        writer.commit(2, None, {"p": {"x": [2, 1]}})
    # Static arrays are there already.
    assert writer.commit(3, None, {"p": {"x": [3, 1]}})
    writer.close()


def test_the_next_start_repairs_and_says_so(tmp_path: Path) -> None:
    writer = begin(tmp_path / "run", range(4))
    del writer
    for place in ("", "segments"):
        (tmp_path / "run" / place / f"{files.TEMPORARY}1-ab").write_bytes(b"half")
    damaged = tmp_path / "run" / "segments" / "seg-0-000000000002-000000000002.h5"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    writer = again(tmp_path / "run", 3)
    assert len(writer.repaired) == 3
    assert sum("removed, a writer was killed" in line for line in writer.repaired) == 2
    assert any("seg-0-000000000002" in line and "moved to quarantine" in line for line in writer.repaired)
    record(writer, range(4, 5), 1.0)
    writer.close()
    assert rows(tmp_path / "run") == [[0, 0], [1, 0], [3, 0], [4, 1]]


def test_another_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    begin(tmp_path / "run", range(3)).close(pack=False)
    # Nothing is repaired either.
    (tmp_path / "run" / "segments" / f"{files.TEMPORARY}1-ab").write_bytes(b"half")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for changes, message in (
        ({"config": {"width": 9, "data": {"task": "sum"}}}, "config.width was 8, is 9; nothing was touched"),
        (
            {"config": {"width": 8, "data": {"task": "or"}}, "seed": 4},
            'config.data.task was "sum", is "or"; seed was 3',
        ),
        ({"config": {"width": 8}}, "config.data was {.*}, is null"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            again(tmp_path / "run", 1, **changes)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again(tmp_path / "run", 1).close()


def test_other_fields_are_refused(tmp_path: Path) -> None:
    begin(tmp_path / "run", range(3)).close(pack=False)
    writer = RunWriter(tmp_path / "run", SETTINGS, after=1)
    with pytest.raises(ConfigurationError, match=r"'p/x' was recorded as <f4 \(2,\), is now <f4 \(3,\) or labeled"):
        writer.declare("p", [Field(name="x", dims=("n",), shape=(3,)), FIELDS[1]])
    with pytest.raises(ConfigurationError, match=r"'p/total' was recorded as .* is now missing"):
        writer.declare("p", FIELDS[:1])
    with pytest.raises(ConfigurationError, match="'p/y' is new in a run that is continued"):
        writer.declare("p", [*FIELDS, Field(name="y")])
    # A probe that was not there before may join.
    writer.declare("q", [Field(name="y")])
    assert writer.commit(2, None, {"q": {"y": 1.0}})
    writer.close()
    assert RunReader.open(tmp_path / "run").steps("q").tolist() == [2]


def test_there_must_be_a_run(tmp_path: Path) -> None:
    with pytest.raises(MissingRecording, match="found no run to continue"):
        RunWriter(tmp_path / "nothing", {}, after=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(MissingRecording, match="found no run to continue"):
        RunWriter(tmp_path / "other", {}, after=1)
    with pytest.raises(RecordingExists):
        RunWriter(tmp_path / "other", {})
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["file"]


def test_a_manifest_that_is_gone_is_made_again(tmp_path: Path) -> None:
    begin(tmp_path / "run", range(4)).close(pack=False)
    writer = again(tmp_path / "run", 1)
    record(writer, range(2, 3), 1.0)
    del writer
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(DamagedRecording):
        RunReader.open(tmp_path / "run")
    done = repair(tmp_path / "run")
    assert any("made again without configuration" in line for line in done)
    assert rows(tmp_path / "run") == [[0, 0], [1, 0], [2, 1]]
    assert verify(tmp_path / "run") == []
    pack.pack(tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    assert rows(tmp_path / "run") == [[0, 0], [1, 0], [2, 1]]
    assert any("made again from run.h5" in line for line in repair(tmp_path / "run"))
    assert rows(tmp_path / "run") == [[0, 0], [1, 0], [2, 1]]


@pytest.mark.parametrize("branches", [3, [3], [{"before": 1}], [{"after": "x"}], {"after": 1}])
def test_a_manifest_with_strange_branches_is_damaged(tmp_path: Path, branches: Any) -> None:
    begin(tmp_path / "run", range(2)).close(pack=False)
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    del manifest["crc32"]
    (tmp_path / "run" / "run.json").write_text(json.dumps({**manifest, "branches": branches}))
    with pytest.raises(DamagedRecording, match="branches that are no list"):
        RunReader.open(tmp_path / "run")


def test_packing_cut_off_after_a_resumption_is_finished_by_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path / "run", range(6)).close(pack=False)
    writer = again(tmp_path / "run", 3)
    # The same numbers again, as a deterministic training records them.
    record(writer, range(4, 8), 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(files, "unlink", lambda path: None)
        writer.close()
    assert len(list((tmp_path / "run" / "segments").iterdir())) > 0
    repair(tmp_path / "run")
    assert list((tmp_path / "run" / "segments").iterdir()) == []
    assert rows(tmp_path / "run") == [[step, 0] for step in range(8)]
    (kept,) = [Source.open(path) for path in (tmp_path / "run" / "superseded").glob("*.h5")]
    assert np.array_equal(kept.axes["p"][0], [4, 5])


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Backwards(datetime.datetime):
        left = 400

        @classmethod
        def now(cls, zone: Any = None) -> Backwards:
            Backwards.left -= 1
            return Backwards(2000, 1, 1, tzinfo=zone) + datetime.timedelta(days=Backwards.left)

    monkeypatch.setattr("ntkdyn.store.writer.datetime", Backwards)
    monkeypatch.setattr("ntkdyn.store.lock.datetime", Backwards)
    monkeypatch.setattr(time, "time", lambda: float(Backwards.left))
    begin(tmp_path / "run", range(4)).close(pack=False)
    for file in (tmp_path / "run" / "segments").iterdir():
        os.utime(file, (Backwards.left, Backwards.left))
        Backwards.left -= 1
    writer = again(tmp_path / "run", 2)
    record(writer, range(3, 6), 1.0)
    writer.close()
    assert rows(tmp_path / "run") == [[0, 0], [1, 0], [2, 0], [3, 1], [4, 1], [5, 1]]
    manifest = RunReader.open(tmp_path / "run").manifest
    assert manifest["branches"][0]["created"] < manifest["created"]


@pytest.mark.parametrize("where", ["run.json", "segment"])
def test_a_later_format_is_refused_and_left_alone(tmp_path: Path, where: str) -> None:
    begin(tmp_path / "run", range(3)).close(pack=False)
    if where == "run.json":
        target = tmp_path / "run" / "run.json"
        target.write_text(target.read_text().replace("ntkdyn recording 1", "ntkdyn recording 12"))
    else:
        target = sorted((tmp_path / "run" / "segments").iterdir())[1]
        with h5py.File(target, "r+") as file:
            file.attrs["format"] = "ntkdyn recording 12"
    (tmp_path / "run" / "segments" / f"{files.TEMPORARY}1-ab").write_bytes(b"half")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    message = f"{target.name} was written by a later version .* found format 'ntkdyn recording 12'.*update ntkdyn"
    for action in (RunReader.open, verify, repair, lambda path: again(path, 1)):
        with pytest.raises(NewerRecording, match=message):
            action(tmp_path / "run")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_without_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    begin(tmp_path / "run", range(3)).close(pack=False)

    # Permissions bind no superuser, so that the system's answer is played.
    def refuse(path: Path) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "create", refuse)
    for action in (lambda: again(tmp_path / "run", 1), lambda: RunWriter(tmp_path / "new", {})):
        with pytest.raises(StorageError, match=rf"cannot write .*LOCK: {os.strerror(code)}; .*; (give|choose)"):
            action()
    assert rows(tmp_path / "run") == [[0, 0], [1, 0], [2, 0]]
