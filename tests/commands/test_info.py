"""``ntkdyn info``: runs, sweeps, and words for everything else."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from ntkdyn import cli
from ntkdyn.probe import Field
from ntkdyn.store.writer import RunWriter


def _info(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["info", str(path)])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out + captured.err


@pytest.fixture
def run(tmp_path: Path) -> RunWriter:
    recording = RunWriter(tmp_path / "dense", {"seed": 4, "config": {"width": 8, "note": "a\x1b[31mb"}})
    kernel = Field(name="kernel", dims=("sample", "sample_2"), shape=(4, 4))
    recording.declare("ntk/test", [kernel, Field(name="total", dtype="i8", static=True)])
    for step in (0, 50):
        records = {"ntk/test": {"kernel": np.eye(4), "total": 3}}
        recording.commit(step, step / 10, records, seconds={"ntk/test": 0.25})
    return recording


@pytest.mark.parametrize("packed", [False, True])
def test_run(run: RunWriter, capsys: pytest.CaptureFixture[str], packed: bool) -> None:
    if packed:
        run.close(results={"test_accuracy": 0.75})
    status, text = _info(run.path / "run.h5" if packed else run.path, capsys)
    assert status == 0
    assert "ntk/test: 2 steps, 0 to 50 (epochs 0 to 5)" in text
    assert "ntk/test/kernel [step=2, sample=4, sample_2=4] <f4 unit 1" in text
    assert "ntk/test/total [] <i8 unit 1, static" in text
    assert "width = 8" in text
    assert ("test_accuracy = 0.75" in text) == packed
    assert "\x1b" not in text
    assert "ntk/test: 2 snapshots, 0.50 s, 0.00 MiB, " in text
    assert "% of the time" in text


def test_costs_of_a_stranger_that_are_no_numbers(run: RunWriter, capsys: pytest.CaptureFixture[str]) -> None:
    (segment,) = (run.path / "segments").glob("seg-0-000000000000*")
    with h5py.File(segment, "r+") as file:
        recording = json.loads(file.attrs["recording"])
        recording["costs"] = {"ntk/test": ["x", None, {}]}
        file.attrs["recording"] = json.dumps(recording)
        file.attrs["crc32"] = np.uint32(zlib.crc32(json.dumps(recording).encode()))
    status, text = _info(run.path, capsys)
    assert status == 1
    assert "is damaged or no recording" in text
    assert len(text.splitlines()) == 1


def test_sweep(tmp_path: Path, run: RunWriter, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sweep"
    names = ["trunks/0123456789ab/0", "arms/0123456789ab/0", "arms/0123456789ab/1", "arms/0123456789ab/2"]
    for name, status in zip(names, ["finished", "finished", "running"], strict=False):
        (folder / name).mkdir(parents=True)
        (folder / name / "run.json").write_text(json.dumps({"status": status}))
    (folder / "sweep.json").write_text(json.dumps({"experiment": "demo", "plan": [{"run": name} for name in names]}))
    status, text = _info(folder, capsys)
    assert status == 0
    assert "trunks: 1 of 1 finished, 0 unfinished" in text
    assert "arms: 1 of 3 finished, 2 unfinished, 1 running" in text
    (folder / "sweep.json").write_text("{}")
    status, text = _info(folder, capsys)
    assert status == 1
    assert "sweep.json is damaged: found KeyError 'plan'" in text


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = _info(tmp_path / "nothing", capsys)
    assert status == 2
    assert text.count("\n") == 1
    assert "found nothing, expected the folder of a run" in text
    status, text = _info(tmp_path, capsys)
    assert status == 1
    assert "is no run" in text
