"""Sweep: what becomes of its worker processes; plans and restarts are tested through the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

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
