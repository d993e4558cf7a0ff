"""One writer a run: living owners are named, dead ones lose the lock whatever they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ntkdyn.errors import LockedRecording, ProbeError, RecordingExists, StorageError
from ntkdyn.probe import Field
from ntkdyn.store import files, lock
from ntkdyn.store.lock import Lock
from ntkdyn.store.repair import repair
from ntkdyn.store.writer import RunWriter

OWNER = """
import os, sys, time
from pathlib import Path
from ntkdyn.store.writer import RunWriter
writer = RunWriter(Path(sys.argv[1]), {})
if sys.argv[2] == "fork" and os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print("ready", flush=True)
time.sleep(60)
"""


def owner(path: Path, how: str = "alone") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", OWNER, str(path), how], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    """Kill an owner and whatever it has forked."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_living_owner_is_named_at_once(tmp_path: Path) -> None:
    process = owner(tmp_path / "run")
    try:
        before = sorted(tmp_path.rglob("*"))
        begin = time.monotonic()
        with pytest.raises(LockedRecording, match=rf"is being written by process {process.pid} on host '.+' since "):
            RunWriter(tmp_path / "run", {})
        with pytest.raises(LockedRecording, match=f"process {process.pid}"):
            RunWriter(tmp_path / "run", {}, after=3)
        with pytest.raises(LockedRecording, match=f"process {process.pid}"):
            repair(tmp_path / "run")
        assert time.monotonic() - begin < 1
        assert sorted(tmp_path.rglob("*")) == before
    finally:
        end(process)


def test_a_killed_owner_loses_the_lock_even_if_a_forked_child_lives_on(tmp_path: Path) -> None:
    process = owner(tmp_path / "run", "fork")
    try:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        RunWriter(tmp_path / "run", {}, after=0).close()
    finally:
        end(process)


def test_a_descriptor_that_outlives_its_owner_does_not_count(tmp_path: Path) -> None:
    # A child forked by code that calls no hooks keeps the flock of its dead parent.
    writer = RunWriter(tmp_path / "run", {})
    descriptor = os.dup(writer._lock._descriptor)
    content = json.loads((tmp_path / "run" / "LOCK").read_text())
    content["pid"], content["started"] = 2**22 - 1, "1"
    (tmp_path / "run" / "LOCK").write_text(json.dumps(content))
    try:
        RunWriter(tmp_path / "run", {}, after=0).close()
    finally:
        os.close(descriptor)


def test_a_number_given_to_another_process_is_not_the_owner(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", {}).close(pack=False)
    lock._held.clear()
    content = {**lock._myself(), "pid": os.getppid(), "started": "1"}
    (tmp_path / "run" / "LOCK").write_text(json.dumps(content))
    RunWriter(tmp_path / "run", {}, after=0).close()


def test_another_host_cannot_be_judged_and_is_unlocked_by_hand(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", {}).close(pack=False)
    (tmp_path / "run" / "LOCK").write_text(json.dumps({**lock._myself(), "host": "elsewhere", "pid": 7}))
    with pytest.raises(LockedRecording, match=r"process 7 on host 'elsewhere'.*ntkdyn repair --unlock"):
        RunWriter(tmp_path / "run", {}, after=0)
    with pytest.raises(LockedRecording, match="elsewhere"):
        repair(tmp_path / "run")
    repair(tmp_path / "run", unlock=True)
    assert not (tmp_path / "run" / "LOCK").exists()
    # A reboot of this host ends all its processes.
    (tmp_path / "run" / "LOCK").write_text(json.dumps({**lock._myself(), "boot": "earlier"}))
    RunWriter(tmp_path / "run", {}, after=0).close()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": "x"}', b'{"pid": -1}'])
def test_a_torn_lock_is_no_owner(tmp_path: Path, content: bytes) -> None:
    RunWriter(tmp_path / "run", {}).close(pack=False)
    (tmp_path / "run" / "LOCK").write_bytes(content)
    RunWriter(tmp_path / "run", {}, after=0).close()


def test_the_lock_goes_with_its_writer(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    with pytest.raises(LockedRecording, match="this very process"):
        RunWriter(tmp_path / "run", {}, after=0)
    del writer
    assert not (tmp_path / "run" / "LOCK").exists()


def test_a_lock_that_cannot_be_written_leaves_no_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    for function in ("create", "write", "fsync", "replace", "sync_folder"):

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(files, function, fail)
            with pytest.raises(StorageError, match="LOCK: No space left"):
                Lock(tmp_path / "run")
        assert list((tmp_path / "run").iterdir()) == []
    Lock(tmp_path / "run").release()


def test_a_forked_child_writes_and_releases_nothing(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    writer.declare("p", [Field(name="x")])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            writer.commit(0, None, {"p": {"x": 1.0}})
        except ProbeError as error:
            status = 0 if "a fork of the writer" in str(error) else 2
        writer.close()
        writer._release()
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "run" / "LOCK").exists()
    assert writer.commit(0, None, {"p": {"x": 1.0}})
    writer.close()
    with pytest.raises(RecordingExists, match=r"holds '.*' already"):
        RunWriter(tmp_path / "run", {})


def test_an_owner_of_many_lines_is_named_in_one(tmp_path: Path) -> None:
    strange = {"pid": 10**4000, "host": "a\nb" * 1000, "since": ["\n\x1b[31m"]}
    (tmp_path / "LOCK").write_text(json.dumps(strange))
    with pytest.raises(LockedRecording) as caught:
        Lock(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("content", ["[" * 60_000, '{"pid": ' + "1" * 10_000 + "}", "\udcff", "null", '{"pid": true}'])
def test_a_lock_that_cannot_be_understood_is_stale(tmp_path: Path, content: str) -> None:
    (tmp_path / "LOCK").write_bytes(content.encode(errors="surrogateescape"))
    assert lock.owner_of(tmp_path) == {}
    Lock(tmp_path).release()


def test_a_number_beyond_those_of_processes_is_no_owner(tmp_path: Path) -> None:
    (tmp_path / "LOCK").write_text(json.dumps({**lock._myself(), "pid": 10**30, "started": None}))
    Lock(tmp_path).release()


def test_a_fifo_is_no_lock(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "LOCK")
    assert lock.owner_of(tmp_path) == {}
    Lock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []
