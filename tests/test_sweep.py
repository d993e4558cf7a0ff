"""Sweep: how its runs stand, and its worker processes; plans and restarts are tested through the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ntkdyn.errors import NewerRecording
from ntkdyn.store.segment import FORMAT
from ntkdyn.sweep import run_status

STARTER = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from ntkdyn.sweep import _start_worker
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
