"""SIGKILL at random moments of recording, compaction and packing: nothing that was acknowledged is lost."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntkdyn.probe import Field
from ntkdyn.store import compact
from ntkdyn.store.reader import RunReader
from ntkdyn.store.repair import repair, verify
from ntkdyn.store.writer import RunWriter

SEED = 20261125
STEPS = 40


def kernel(step: int) -> np.ndarray[Any, Any]:
    return np.full((64, 64), step, "f4") + np.add.outer(np.arange(64, dtype="f4"), np.arange(64, dtype="f4"))


def child(path: Path, acknowledge: int) -> None:
    """Record, pack, and say after each commit that it is one."""
    writer = RunWriter(path, {})
    writer.declare("ntk", [Field(name="kernel", dims=("sample", "sample_2"), shape=(64, 64))])
    os.write(acknowledge, b"\0")
    for step in range(STEPS):
        assert writer.commit(step, None, {"ntk": {"kernel": kernel(step)}})
        os.write(acknowledge, b"+")
    writer.close()
    os.write(acknowledge, b".")


def killed_after(path: Path, seconds: float | None) -> tuple[int, bool]:
    """Snapshots that a child acknowledged until it was killed (None: until its end), and whether it came to its end."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        try:
            child(path, writing)
        finally:
            os._exit(0)
    os.close(writing)
    heard = os.read(reading, 1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    while data := os.read(reading, 4096):
        heard += data
    os.close(reading)
    return heard.count(b"+"), heard.endswith(b".")


def test_nothing_acknowledged_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compact, "FAN", 4)
    kills = 1000 if request.config.getoption("--long") else 15
    begin = time.perf_counter()
    assert killed_after(tmp_path / "whole", None) == (STEPS, True)
    whole = time.perf_counter() - begin
    chance = random.Random(SEED)
    acknowledged = ended = in_flight = 0
    for number in range(kills):
        folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "run"
        said, done = killed_after(folder, chance.uniform(0, whole))
        acknowledged += said
        ended += done
        # Trusted, because a process for each of a thousand checks would take longer than the kills; every byte is read.
        reader = RunReader.open(folder, trusted=True)
        steps = reader.steps("ntk").tolist() if "ntk" in reader.groups() else []
        assert steps in (list(range(said)), list(range(said + 1)))
        in_flight += len(steps) - said
        if steps:
            values = reader.read("ntk/kernel")
            assert all(np.array_equal(value, kernel(step)) for step, value in zip(steps, values, strict=True))
        if number % 8 == 0:
            left = verify(folder)
            assert all(finding.harmless for finding in left), left
            done_by_repair = repair(folder)
            assert len(done_by_repair) >= len([one for one in left if one.path.name != "LOCK"])
            assert verify(folder) == []
            writer = RunWriter(folder, {}, after=max(steps, default=-1))
            writer.declare("ntk", [Field(name="kernel", dims=("sample", "sample_2"), shape=(64, 64))])
            assert writer.commit(STEPS, None, {"ntk": {"kernel": kernel(STEPS)}})
            writer.close()
            assert RunReader.open(folder, trusted=True).steps("ntk").tolist() == [*steps, STEPS]
        shutil.rmtree(folder.parent)
    with capsys.disabled():
        print(
            f"\n{kills} kills in {time.perf_counter() - begin:.0f} s: {acknowledged} committed snapshots, 0 lost, "
            f"0 unreadable files, {in_flight} more had been in flight and are there, {ended} runs had ended"
        )
