"""How the runs of a sweep stand, what a killed one leaves, and its worker processes."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ntkdyn import Sweep
from ntkdyn.errors import NewerRecording
from ntkdyn.store import outbox
from ntkdyn.store.segment import FORMAT
from ntkdyn.sweep import make_plan, run_status, run_sweep

STARTER = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from ntkdyn.sweep.running import _start_worker
pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)
print(pool.submit(os.getpid).result(), flush=True)
pool.submit(time.sleep, 60).result()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_workers_end_with_a_killed_sweep() -> None:
    with subprocess.Popen([sys.executable, "-P", "-c", STARTER], stdout=subprocess.PIPE, text=True) as sweep:
        assert sweep.stdout is not None
        worker = int(sweep.stdout.readline())
        sweep.send_signal(signal.SIGKILL)
        try:
            # The worker holds the other end of this pipe for as long as it lives.
            sweep.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.kill(worker, signal.SIGKILL)
            pytest.fail("the worker went on without its sweep")


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (None, "unfinished"),
        ("", "damaged"),
        ("[1]", "damaged"),
        ('{"status": 3}', "damaged"),
        (f'{{"format": "{FORMAT}", "status": "running"}}', "running"),
        (f'{{"format": "{FORMAT}", "status": "finished"}}', "finished"),
    ],
)
def test_how_a_run_stands(tmp_path: Path, content: str | None, status: str) -> None:
    assert run_status(tmp_path / "run") is None
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "run.json").write_text(content)
    assert run_status(tmp_path / "run") == status


def test_a_run_of_a_later_version_is_not_set_aside(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": "ntkdyn recording 99", "status": "running"}')
    with pytest.raises(NewerRecording):
        run_status(tmp_path)


TINY = f"{Path(__file__).parent / 'tiny_experiment.py'}:Tiny"
# Killed when it is about to do the run of that number.
KILLED = """
import os, signal, sys
from pathlib import Path
from ntkdyn.sweep import make_plan, run_sweep, running
experiment, out, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
work, done = running._work, []
def counted(*arguments):
    done.append(arguments)
    if len(done) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(*arguments)
running._work = counted
run_sweep(make_plan(experiment, grid={"start": [0, 4]}, seeds=2), out, jobs=1)
"""


def weights(folder: Path) -> dict[str, str]:
    return {name: run.manifest["final_weights_sha256"] for name, run in Sweep.open(folder).runs.items()}


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_sweep_killed_between_runs_goes_on(tmp_path: Path) -> None:
    plan = make_plan(TINY, grid={"start": [0, 4]}, seeds=2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_sweep(plan, whole, jobs=1)
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, TINY, killed, "4"], check=False)
    assert done.returncode == -signal.SIGKILL
    before = {file: file.stat().st_mtime_ns for file in killed.rglob("run.h5")}
    assert len(before) == 3
    summary = run_sweep(plan, killed, jobs=1)
    assert (len(summary.kept), len(summary.finished), summary.failed) == (3, 3, {})
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert weights(killed) == weights(whole)


def test_one_job_here_does_what_worker_processes_do(tmp_path: Path) -> None:
    plan = make_plan(TINY, grid={"start": [0, 4]}, seeds=2)
    run_sweep(plan, tmp_path / "here", jobs=1)
    run_sweep(plan, tmp_path / "there", jobs=2)
    found = weights(tmp_path / "here")
    assert len(found) == 6
    assert weights(tmp_path / "there") == found


@pytest.mark.parametrize("frozen", [False, True])
def test_garbage_is_collected_as_before(tmp_path: Path, frozen: bool) -> None:
    thresholds = gc.get_threshold()
    if frozen:
        gc.freeze()
    try:
        run_sweep(make_plan(TINY, grid={"start": [0]}, seeds=1), tmp_path / "out", jobs=1)
        assert gc.get_threshold() == thresholds
        assert (gc.get_freeze_count() > 0) == frozen
    finally:
        gc.unfreeze()


def test_a_failing_run_leaves_the_others_alone(tmp_path: Path) -> None:
    plan = make_plan(TINY, grid={"broken": [True, False]}, seeds=1)
    summary = run_sweep(plan, tmp_path / "out", jobs=1)
    assert len(summary.finished) == 2
    assert list(summary.failed.values()) == ["ValueError: this arm is broken"]


def test_snapshots_of_a_run_are_committed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[Path] = []
    publish = outbox.publish_segment

    def noted(path: Path, *arguments: Any) -> None:
        published.append(path)
        publish(path, *arguments)

    monkeypatch.setattr(outbox, "publish_segment", noted)
    run_sweep(make_plan(TINY, settings=["kind=trunk"]), tmp_path / "out", jobs=1)
    assert [path.name for path in published if path.name.startswith("seg-")] == ["seg-0-000000000000-000000000006.h5"]
    (run,) = Sweep.open(tmp_path / "out").runs.values()
    assert run.steps("units").tolist() == [0, 2, 4, 6]


def test_arms_of_a_trunk_that_diverged_diverge_too(tmp_path: Path) -> None:
    small = ["width=4", "depth=1", "epochs=6", "pairs=128", "batch_size=32", "test_pairs=100", "probe_per_class=1"]
    arms = ["start_epoch=3", "ramp_epochs=1", "settle_epochs=1", "learning_rate=1e30"]
    plan = make_plan("nonlinear-advantage", settings=small + arms, seeds=1)
    summary = run_sweep(plan, tmp_path / "sweep", jobs=1)
    assert not summary.failed
    table = Sweep.open(tmp_path / "sweep").table
    assert sorted(table["kind"]) == ["arm", "trunk"]
    assert (table["diverged"] == 1).all()
    assert table["test_accuracy"].isna().all()
