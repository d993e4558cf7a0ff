"""``ntkdyn record --resume``: a run that was cut off ends as one that was not, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntkdyn.configuration import configure
from ntkdyn.errors import ConfigurationError
from ntkdyn.experiment import run_experiment
from ntkdyn.experiments import arm
from ntkdyn.experiments.advantage_config import AdvantageConfig
from ntkdyn.experiments.nonlinear_advantage import NonlinearAdvantage
from ntkdyn.results import Run
from ntkdyn.store import files
from ntkdyn.store.repair import verify

SMALL: dict[str, Any] = {
    "width": 6,
    "depth": 2,
    "epochs": 8,
    "batch_size": 64,
    "pairs": 256,
    "test_pairs": 64,
    "start_epoch": 2,
    "latest_start": 2,
    "ramp_epochs": 2,
    "settle_epochs": 1,
    "probe_per_class": 1,
    "checkpoint_epochs": [1, 3, 5],
}
STEPS_PER_EPOCH = 4
COMMAND = [sys.executable, "-P", "-c", "from ntkdyn.cli import main; main()"]


def config(**changes: Any) -> AdvantageConfig:
    return configure(AdvantageConfig, SMALL | changes)


def run(path: Path, *, resume: bool = False, **changes: Any) -> dict[str, float]:
    return dict(run_experiment(NonlinearAdvantage(), config(**changes), seed=1, path=path, resume=resume))


def cut_off(path: Path, step: int, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    real = arm.Arm.after_step

    def after_step(self: Any, now: int) -> None:
        real(self, now)
        if now == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(arm.Arm, "after_step", after_step)
        with pytest.raises(KeyboardInterrupt):
            run(path, resume=(path / "run.json").exists(), **changes)


def same(one: Path, other: Path) -> None:
    found, expected = Run.open(one), Run.open(other)
    assert found.names() == expected.names()
    for name in expected.names():
        assert np.array_equal(found[name], expected[name]), name
    for group in expected.groups():
        assert found.steps(group).tolist() == expected.steps(group).tolist()
    for key in ("final_weights_sha256", "results", "status", "config", "seed"):
        assert found.manifest[key] == expected.manifest[key], key
    assert verify(one) == []


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, [2]),  # before any checkpoint: begins again
        ({}, [6, 14, 22]),  # before the switch, in the ramp, while all stand still
        ({"mask": "random"}, [13]),
        ({"intervention": "none"}, [13]),
        ({"granularity": "layer", "remaining": 0.5}, [14]),
    ],
)
def test_what_was_cut_off_ends_as_what_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], steps: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    expected = run(tmp_path / "whole", **changes)
    for step in steps:
        cut_off(tmp_path / "run", step, monkeypatch, **changes)
    found = run(tmp_path / "run", resume=True, **changes)
    assert found == expected
    same(tmp_path / "run", tmp_path / "whole")
    said = capsys.readouterr().err
    last = max((e * STEPS_PER_EPOCH for e in (1, 3, 5) if e * STEPS_PER_EPOCH <= steps[-1]), default=None)
    assert (
        f"goes on from the checkpoint of step {last}" if last else "goes on from its beginning, as it has no"
    ) in said


def test_a_checkpoint_that_was_cut_off_or_damaged_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "whole")
    cut_off(tmp_path / "run", 22, monkeypatch)
    tensors = tmp_path / "run" / "checkpoints" / "12" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    (tmp_path / "run" / "checkpoints" / "20" / "checkpoint.json").unlink()
    with pytest.warns(RuntimeWarning, match=r"12: .*does not match its checksum.*an earlier checkpoint is taken"):
        run(tmp_path / "run", resume=True)
    assert "goes on from the checkpoint of step 4;" in capsys.readouterr().err
    same(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is_and_another_is_refused(tmp_path: Path) -> None:
    # Without a run, --resume begins one, so that one command serves a job that is requeued.
    expected = run(tmp_path / "run", resume=True)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert run(tmp_path / "run", resume=True) == expected
    with pytest.raises(ConfigurationError, match=r"config.width was 6, is 7; nothing was touched"):
        run(tmp_path / "run", resume=True, width=7)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_disk_that_refuses_a_checkpoint_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(tmp_path / "whole")
    real = files.replace

    def full(source: Path, target: Path) -> None:
        if target.name == "tensors.safetensors":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(files, "replace", full)
    with pytest.warns(RuntimeWarning, match="tensors.safetensors: No space left.*goes on without this checkpoint"):
        assert run(tmp_path / "run") == expected


def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    options = [f"--set={key}={json.dumps(value)}" for key, value in (SMALL | {"epochs": 80}).items()]
    arguments = [*COMMAND, "record", "nonlinear-advantage", *options, "--probe", "units", "--every", "5", "--resume"]
    process = subprocess.Popen([*arguments, "--out", str(tmp_path / "run")], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "run" / "checkpoints" / "12" / "checkpoint.json").exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    (tmp_path / "run" / "segments" / f"{files.TEMPORARY}1-ab").write_bytes(b"half")
    done = subprocess.run([*arguments, "--out", str(tmp_path / "run")], capture_output=True, text=True, check=True)
    assert "goes on from the checkpoint of step" in done.stderr
    assert f"repaired: segments/{files.TEMPORARY}1-ab: removed" in done.stderr
    found = Run.open(tmp_path / "run")
    assert found.manifest["status"] == "finished"
    assert found.steps("units").tolist() == [0, *range(5, 321, 5)]
    assert "Traceback" not in done.stderr
