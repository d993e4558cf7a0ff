"""Seeds of a sweep that are trained as one: which, and that nothing but the time is another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ntkdyn.experiment import run_experiment
from ntkdyn.experiments.advantage_config import AdvantageConfig
from ntkdyn.experiments.nonlinear_advantage import NonlinearAdvantage
from ntkdyn.experiments.translation import Translation
from ntkdyn.experiments.translation_config import TranslationConfig
from ntkdyn.schedule import every
from ntkdyn.sweep import make_plan, run_sweep, running

PLAN = """
experiment = "nonlinear-advantage"
seeds = 3
[record]
probes = ["units"]
[settings]
task = "sum10"
width = 16
depth = 2
epochs = 8
pairs = 256
latest_start = 2
ramp_epochs = 2
settle_epochs = 1
[[grid]]
start_epoch = [2]
survivors = ["keep"]
[[grid]]
start_epoch = [2]
survivors = ["common"]
optimizer_at_switch = ["new"]
rate_before = [0.3]
[[grid]]
mask = ["late-path"]
survivors = ["relu"]
[[grid]]
intervention = ["none", "linear"]
"""


def test_an_experiment_with_a_run_of_its_own_keeps_it(tmp_path: Path) -> None:
    class Own(NonlinearAdvantage):
        def run(self, *arguments: Any, **options: Any) -> Any:
            return {**super().run(*arguments, **options), "own": 1.0}

    (tmp_path / "plan.toml").write_text(PLAN)
    plan = make_plan("nonlinear-advantage", file=tmp_path / "plan.toml")
    config = AdvantageConfig.model_validate(plan.runs[0].config)
    assert running._together(Own(), plan.runs, 1) == [plan.runs[0]]
    results = run_experiment(Own(), config, seed=0, path=tmp_path / "run", probes=["units"], schedule=every(1000))
    assert results["own"] == 1.0


def test_what_a_configuration_says_is_said_in_the_run(tmp_path: Path) -> None:
    text = PLAN.replace("latest_start = 2", "latest_start = 4").replace("start_epoch = [2]", "start_epoch = [4]", 1)
    (tmp_path / "plan.toml").write_text(text)
    code = (
        "import sys; from pathlib import Path; from ntkdyn.sweep import make_plan, run_sweep\n"
        "here = Path(sys.argv[1])\n"
        "run_sweep(make_plan('nonlinear-advantage', file=here / 'plan.toml', seeds=2), here / 'sweep', jobs=1)"
    )
    subprocess.run([sys.executable, "-P", "-c", code, tmp_path], check=True, capture_output=True)
    logs = [file.read_text() for file in (tmp_path / "sweep" / "arms").glob("*/*/log.txt")]
    assert any("has no time to recover" in text for text in logs)


def test_a_sweep_has_the_bits_of_runs_alone(
    stacked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    plan = make_plan("nonlinear-advantage", file=tmp_path / "plan.toml")
    assert not run_sweep(plan, tmp_path / "together", jobs=1).failed
    assert set(stacked) == {3}
    steps = len(stacked)
    monkeypatch.setattr(running, "_together", lambda experiment, ready, workers: list(ready[:1]))
    assert not run_sweep(plan, tmp_path / "alone", jobs=1).failed
    assert len(stacked) == steps
    for run in plan.runs:
        found, expected = (
            json.loads((tmp_path / sweep / run.run / "run.json").read_text()) for sweep in ("together", "alone")
        )
        assert str(found["results"]) == str(expected["results"])
        assert found["final_weights_sha256"] == expected["final_weights_sha256"]
        for folder in (tmp_path / "alone" / run.run / "checkpoints").glob("*"):
            other = tmp_path / "together" / folder.relative_to(tmp_path / "alone")
            assert (folder / "tensors.safetensors").read_bytes() == (other / "tensors.safetensors").read_bytes()
            # As texts: the order counts too.
            one, two = (json.loads((place / "checkpoint.json").read_text()) for place in (folder, other))
            assert all(json.dumps(one[part]) == json.dumps(two[part]) for part in ("model", "optimizer"))


def test_seeds_leave_no_worker_idle(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    runs = make_plan("nonlinear-advantage", file=tmp_path / "plan.toml").runs
    trunks, experiment = [run for run in runs if run.kind == "trunk"], NonlinearAdvantage()
    assert [run.seed for run in running._together(experiment, runs, 1)] == [0, 1, 2]
    assert len({run.run.rsplit("/", 1)[0] for run in running._together(experiment, runs, 1)}) == 1
    one = [run for run in trunks if run.config == trunks[0].config]
    assert [run.seed for run in running._together(experiment, one, 2)] == [0, 1]
    assert [run.seed for run in running._together(experiment, one, 8)] == [0]
    assert not experiment.trains_together(AdvantageConfig(network="resnet"))
    assert not experiment.trains_together(AdvantageConfig(optimizer="sgd"))
    assert not experiment.trains_together(AdvantageConfig(start_epoch=2, train_before="readout"))
    many = make_plan("nonlinear-advantage", file=tmp_path / "plan.toml", seeds=12).runs
    assert [run.seed for run in running._together(experiment, many, 1)] == [0, 1, 2, 3, 4, 5]
    assert not Translation().trains_together(TranslationConfig())
