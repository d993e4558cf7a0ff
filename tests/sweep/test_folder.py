"""One process a sweep: a second one is refused, a killed one blocks nobody, and live runs stay where they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ntkdyn import cli
from ntkdyn.errors import LockedRecording, RecordingExists
from ntkdyn.store import lock
from ntkdyn.store.lock import Lock
from ntkdyn.sweep import make_plan, run_sweep

TINY = f"{Path(__file__).parent / 'tiny_experiment.py'}:Tiny"
# Says that its first run is under way, and waits there.
HELD = """
import sys, time
from pathlib import Path
from ntkdyn.sweep import make_plan, run_sweep, running
def waiting(*arguments):
    print("running", flush=True)
    time.sleep(60)
running._work = waiting
run_sweep(make_plan(sys.argv[1], settings=["kind=trunk"]), Path(sys.argv[2]), jobs=1)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_second_sweep_is_refused_and_a_killed_one_blocks_nobody(tmp_path: Path) -> None:
    """Two ``ntkdyn sweep`` on one folder set each other's live runs aside, and both reported success."""
    plan, out = make_plan(TINY, settings=["kind=trunk"]), tmp_path / "out"
    with subprocess.Popen([sys.executable, "-P", "-c", HELD, TINY, out], stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "running\n"
            with pytest.raises(LockedRecording, match=f"is being written by process '?{first.pid}") as refused:
                run_sweep(plan, out, jobs=1)
            assert "\n" not in str(refused.value)
        finally:
            first.send_signal(signal.SIGKILL)
    assert (out / "LOCK").exists()
    assert len(run_sweep(plan, out, jobs=1).finished) == 1
    assert sorted(entry.name for entry in out.iterdir()) == ["arms", "sweep.json"]


def test_a_live_run_is_not_set_aside(tmp_path: Path) -> None:
    plan, out = make_plan(TINY, settings=["kind=trunk"]), tmp_path / "out"
    folder = out / plan.runs[0].run
    run_sweep(plan, out, jobs=1)
    (folder / "run.json").unlink()
    held = Lock(folder)
    with pytest.raises(LockedRecording, match=f"{folder} is being written by process {os.getpid()}"):
        run_sweep(plan, out, jobs=1)
    assert folder.is_dir()
    held.release()
    assert len(run_sweep(plan, out, jobs=1).finished) == 1
    assert folder.with_name("0.unfinished-1").is_dir()


def test_a_sweep_from_elsewhere_is_unlocked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, out = make_plan(TINY, settings=["kind=trunk"]), tmp_path / "out"
    folder = out / plan.runs[0].run
    run_sweep(plan, out, jobs=1)
    (folder / "run.json").unlink()
    for place in (out, folder):
        (place / "LOCK").write_text(json.dumps({**lock._myself(), "host": "elsewhere", "pid": 7}))
    with pytest.raises(LockedRecording, match=f"run ntkdyn repair --unlock {out}$"):
        run_sweep(plan, out, jobs=1)
    with pytest.raises(SystemExit) as ended:
        cli.main(["repair", "--unlock", str(out)])
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("unlocked") == 2
    assert len(run_sweep(plan, out, jobs=1).finished) == 1


def test_a_sweep_that_was_killed_before_its_plan_was_written(tmp_path: Path) -> None:
    plan, out = make_plan(TINY, settings=["kind=trunk"]), tmp_path / "out"
    out.mkdir()
    (out / "LOCK").write_text(json.dumps({**lock._myself(), "boot": "an earlier one"}))
    assert len(run_sweep(plan, out, jobs=1).finished) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").touch()
    with pytest.raises(RecordingExists, match="holds something that is no sweep"):
        run_sweep(plan, tmp_path / "other", jobs=1)
    assert [entry.name for entry in (tmp_path / "other").iterdir()] == ["notes"]
