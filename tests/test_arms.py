"""Arms of sweeps by task: label rules on pairs of digits, and data sets that take their place."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from ntkdyn import report
from ntkdyn.plugins import load_study
from ntkdyn.studies import arms


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"task": "sum10", "data": None}, "sum10"),
        ({"task": None, "data": "fashion-mnist"}, "fashion-mnist"),
        ({"task": float("nan"), "data": "images/flowers"}, "flowers"),
        ({"data": "here/mine.npz"}, "mine.npz"),
        ({}, ""),
    ],
)
def test_a_task_is_named_by_its_rule_or_its_data(settings: dict[str, Any], name: str) -> None:
    assert arms.task_of(settings) == name
    assert arms.tasks_of(pd.DataFrame([settings])).tolist() == [name]


@pytest.fixture(scope="module")
def images(synthetic: ModuleType) -> Any:
    return synthetic.sweep(seeds=2, gaps={"fashion-mnist": 9.0, "cifar-10": -4.0}, data=True)


def test_studies_of_arms_read_sweeps_of_data_sets(images: Any) -> None:
    advantage = load_study("advantage")
    dataset = advantage.measure(images)
    assert set(dataset["task"].values) == {"cifar-10", "fashion-mnist"}
    assert float(dataset["gap"].sel(task="fashion-mnist", line="survivors common")) == pytest.approx(9, abs=0.9)
    assert float(dataset["gap"].sel(task="cifar-10", line="survivors common")) == pytest.approx(-4, abs=0.9)
    assert any(line.startswith("fashion-mnist") for line in advantage.verdict({"sweep": dataset}))
    for name in ("controls", "drift-gap", "reference-levels"):
        found = load_study(name).measure(images)
        assert set(found["task"].values) == {"cifar-10", "fashion-mnist"}, name
        assert not found["task"].isnull().any()


def test_a_report_names_the_data_set(images: Any, tmp_path: Path) -> None:
    written = report.analyze([images], tmp_path, only=["units", "advantage"])
    assert not written.unavailable
    assert {"units-fashion-mnist.png", "units-cifar-10.png"} <= {file.name for file in written.files}
    assert "None" not in " ".join(written.sentences)


def test_controls_that_one_task_lacks_are_left_out(synthetic: ModuleType) -> None:
    whole = synthetic.sweep(seeds=2)
    kept = {
        name: one
        for name, one in whole.runs.items()
        if one.config["task"] == "sum10" or (one.config["mask"] == "learned" and one.config["budget"] == "total")
    }
    source = type(whole)("sweep", kept, whole.kinds, whole.parents)
    controls = load_study("controls")
    dataset = controls.measure(source)
    said = controls.sentences({"sweep": dataset})
    assert any(line.startswith("sum10, random") for line in said)
    assert any(line.startswith("first, learned") for line in said)
    assert not any(line.startswith("first, random") or "nan" in line for line in said)
