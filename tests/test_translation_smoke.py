"""The experiment translation on real sentences: Multi30k, English to German."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ntkdyn.configuration import configure
from ntkdyn.experiment import run_experiment
from ntkdyn.experiments.translation import Translation
from ntkdyn.experiments.translation_config import TranslationConfig
from ntkdyn.results import Run, Sweep
from ntkdyn.sweep import make_plan, packaged_plan, run_sweep


def test_one_arm_on_real_sentences(data_folder: Path, tmp_path: Path) -> None:
    with packaged_plan("translation_smoke.toml") as file:
        settings = make_plan("translation", file=file).settings
    config = configure(TranslationConfig, settings | {"pairs": 256, "test_pairs": 12, "start_epoch": 1})
    results = run_experiment(Translation(), config, seed=0, path=tmp_path / "run", probes=["units"])
    assert set(results) == set(Translation.results)
    assert results["active_units"] == 6
    assert results["test_loss"] < results["dense_loss"]
    run = Run.open(tmp_path / "run")
    assert run.manifest["data"]["name"] == "multi30k"
    assert len(run.manifest["data"]["files"]) == 6


@pytest.mark.slow
def test_the_smoke_sweep(data_folder: Path, tmp_path: Path) -> None:
    with packaged_plan("translation_smoke.toml") as file:
        plan = make_plan("translation", file=file)
    summary = run_sweep(plan, tmp_path / "sweep", jobs=1)
    assert not summary.failed
    table = Sweep.open(tmp_path / "sweep").table
    assert len(table) == len(plan.runs) == 6
    assert (table["diverged"] == 0).all()
    linearized = table[table["intervention"] == "linearize"]
    assert (linearized["active_units"] == (64 * linearized["remaining"]).round()).all()
    # Better than guessing one of 500 subwords.
    assert (table["test_loss"] < math.log(500)).all()
