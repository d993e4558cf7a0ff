"""Comparison: which runs make a group, what is averaged, along what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ntkdyn import cli
from ntkdyn.analysis import kernel_distance_centered
from ntkdyn.comparison import MOST_GROUPS, compare
from ntkdyn.comparison.measures import LR_TIME
from ntkdyn.errors import ConfigurationError, UndefinedMeasure, UnknownName
from ntkdyn.probe import Field
from ntkdyn.results import Run, Sweep
from ntkdyn.store.writer import RunWriter

SAMPLES = 4
STEPS = (0, 10, 20)


def _kernel(seed: int) -> np.ndarray[Any, Any]:
    features = np.random.default_rng(seed).standard_normal((SAMPLES, 7))
    return np.asarray(features @ features.T)


def record(
    path: Path,
    *,
    seed: int = 0,
    width: int | None = 8,
    steps: tuple[int, ...] = STEPS,
    probe_set: str = "train",
    epochs: bool = True,
    rates: bool = False,
    slope: float = 1.0,
) -> Run:
    """A finished run whose loss falls by slope / 10 a step, on every sample by another offset."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = RunWriter(path, {"seed": seed, "config": {} if width is None else {"width": width}})
    kernel = Field(name="kernel", dims=("sample", "sample_2"), shape=(SAMPLES, SAMPLES), dtype="f8")
    writer.declare(f"ntk/{probe_set}", [kernel])
    loss = Field(name="loss", dims=("sample",), shape=(SAMPLES,), dtype="f8", unit="nat")
    writer.declare(f"outputs/{probe_set}", [loss, Field(name="accuracy", dtype="f8")])
    if rates:
        writer.declare("learning_rate", [Field(name="sum", dtype="f8")])
    for step in steps:
        losses = 10 - slope * step / 10 + np.arange(SAMPLES) - (SAMPLES - 1) / 2
        records: dict[str, Any] = {
            f"ntk/{probe_set}": {"kernel": _kernel(seed) + step * _kernel(seed + 50)},
            f"outputs/{probe_set}": {"loss": losses, "accuracy": seed + step / 100},
        }
        if rates:
            records["learning_rate"] = {"sum": 0.5 * step}
        writer.commit(step, step / 10 if epochs else None, records)
    writer.close()
    return Run.open(path)


def test_a_study_averaged_over_seeds(tmp_path: Path) -> None:
    runs = [record(tmp_path / f"{width}-{seed}", width=width, seed=seed) for width in (16, 8) for seed in (0, 1, 2)]
    found = compare(runs, "kernel-distance")
    assert list(dict.fromkeys(found.groups["group"])) == ["width = 8", "width = 16"]
    assert set(found.groups["set"]) == {"train"}
    last = found.last
    single = [kernel_distance_centered(run["ntk/train/kernel"][-1], run["ntk/train/kernel"][0]) for run in runs[3:]]
    np.testing.assert_allclose(last["mean"][0], np.mean(single), rtol=1e-12)
    np.testing.assert_allclose(last["standard_deviation"][0], np.std(single, ddof=1), rtol=1e-12)
    assert (last["least"][0], last["greatest"][0], last["runs"][0]) == (min(single), max(single), 3)
    assert found.unit == "1"
    assert found.pooled == {}
    assert len(found.runs) == 6 * len(STEPS)
    other = compare(runs, "kernel-distance:to_end")
    assert other.last["mean"][0] == 0
    assert "to the last snapshot" in other.measure


def test_a_recorded_array_is_averaged_over_its_axes(tmp_path: Path) -> None:
    found = compare([record(tmp_path / "a")], "outputs/train/loss")
    np.testing.assert_allclose(found.groups["mean"], [10, 9, 8], rtol=1e-12)
    assert found.groups["standard_deviation"].isna().all()
    assert found.measure == "outputs/train/loss: loss, mean over sample"
    assert found.unit == "nat"


@pytest.mark.parametrize(
    ("against", "expected"),
    [("step", [0, 10, 20]), ("epoch", [0, 1, 2]), ("lr_time", [0, 5, 10]), ("train_loss", [10, 8.5, 7])],
)
def test_against(tmp_path: Path, against: Any, expected: list[float]) -> None:
    runs = [record(tmp_path / str(seed), seed=seed, slope=1 + seed, rates=True) for seed in (0, 1)]
    found = compare(runs, "outputs/train/accuracy", against=against)
    np.testing.assert_allclose(found.groups["x"], expected, rtol=1e-12)
    np.testing.assert_allclose(found.groups["mean"], [0.5, 0.6, 0.7], rtol=1e-12)
    assert found.groups["runs"].tolist() == [2, 2, 2]


def test_what_a_run_lacks_is_said_in_one_line(tmp_path: Path) -> None:
    with_rates = record(tmp_path / "a", rates=True)
    without = record(tmp_path / "b", epochs=False)
    found = compare([with_rates, without], "outputs/train/accuracy", against="lr_time")
    assert set(found.runs["run"]) == {"a"}
    assert f"records no learning rates ({LR_TIME}); compare against step or epoch" in found.left_out["b"]
    assert "records no epochs" in compare([with_rates, without], "outputs/train/loss", against="epoch").left_out["b"]
    with pytest.raises(UndefinedMeasure, match=r"none of 1 runs has it; .* records no learning rates") as caught:
        compare([without], "outputs/train/accuracy", against="lr_time")
    assert "\n" not in str(caught.value)
    other = record(tmp_path / "c", probe_set="test")
    assert "no train loss" in compare([with_rates, other], "kernel-distance", against="train_loss").left_out["c"]


def test_only_steps_that_all_runs_of_a_group_have_are_averaged(tmp_path: Path) -> None:
    runs = [record(tmp_path / "a"), record(tmp_path / "b", seed=1, steps=(0, 5, 20, 30))]
    found = compare(runs, "outputs/train/accuracy")
    assert found.groups["step"].tolist() == [0, 20]
    assert len(found.runs) == 7
    with pytest.raises(UndefinedMeasure, match="the 2 runs of the group 'of all' have no step in common"):
        compare([runs[0], record(tmp_path / "c", steps=(1, 2))], "outputs/train/accuracy")


def test_groups(tmp_path: Path) -> None:
    runs = [record(tmp_path / f"{width}-{seed}", width=width, seed=seed) for width in (8, 16) for seed in (0, 1)]
    found = compare(runs, "outputs/train/accuracy", by=["seed"])
    assert list(dict.fromkeys(found.groups["group"])) == ["seed = 0", "seed = 1"]
    assert found.pooled == {"seed = 0": ("width",), "seed = 1": ("width",)}
    assert set(compare(runs, "outputs/train/accuracy", by=["width", "seed"]).groups["runs"]) == {1}
    with pytest.raises(UnknownName, match="no run has a setting 'depth'; there are: seed, width"):
        compare(runs, "outputs/train/accuracy", by=["depth"])
    own = [record(tmp_path / name, width=None) for name in ("mine", "yours")]
    assert list(compare(own, "outputs/train/accuracy").last["group"]) == ["mine", "yours"]


def test_runs_of_one_name_and_of_sweeps(tmp_path: Path) -> None:
    names = ["trunks/0123456789ab/0", "arms/0123456789ab/0", "arms/0123456789ab/1"]
    for seed, name in enumerate(names):
        record(tmp_path / "sweep" / name, seed=seed)
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"plan": [{"run": name} for name in names]}))
    alone = record(tmp_path / "a" / "run"), record(tmp_path / "b" / "run")
    found = compare([*alone, Sweep.open(tmp_path / "sweep")], "outputs/train/accuracy")
    assert list(dict.fromkeys(found.runs["run"])) == ["run", "run (2)", *[f"sweep/{name}" for name in names[1:]]]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "sweep.json").write_text('{"plan": []}')
    with pytest.raises(ConfigurationError, match="found no finished run"):
        compare([Sweep.open(tmp_path / "empty")], "outputs/train/accuracy")


def test_nothing_in_common(tmp_path: Path) -> None:
    runs = [record(tmp_path / "a"), record(tmp_path / "b", probe_set="test")]
    with pytest.raises(UndefinedMeasure, match="no probe set in common; a has 'train'; b has 'test'") as caught:
        compare(runs, "kernel-distance")
    assert "\n" not in str(caught.value)


def test_unknown_measures(tmp_path: Path) -> None:
    run = record(tmp_path / "a")
    with pytest.raises(UnknownName, match=r"'kernel-distanze' is neither a study nor an array.*did you mean") as caught:
        compare([run], "kernel-distanze")
    assert "outputs/train/accuracy" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UnknownName, match="neither a study nor an array"):
        compare([run], "outputs/test/loss")
    with pytest.raises(UndefinedMeasure, match="no curve 'to_middle' over steps; it has: to_start"):
        compare([run], "kernel-distance:to_middle")
    with pytest.raises(UndefinedMeasure, match="reads a whole sweep"):
        compare([run], "advantage")
    with pytest.raises(ConfigurationError, match="found against='loss'"):
        compare([run], "kernel-distance", against="loss")  # type: ignore[arg-type]


def test_too_many_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkdyn.comparison.MOST_GROUPS", 1)
    runs = [record(tmp_path / str(width), width=width) for width in (1, 2)]
    with pytest.raises(ConfigurationError, match="found 2 groups of runs, expected at most 1"):
        compare(runs, "outputs/train/accuracy")
    assert MOST_GROUPS == 20


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(["compare", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize("against", ["step", "train_loss"])
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], against: str) -> None:
    for seed in (0, 1):
        record(tmp_path / str(seed), seed=seed)
    record(tmp_path / "test", probe_set="test")
    out = tmp_path / "out"
    paths = [tmp_path / name for name in ("0", "1", "test")]
    status, text, error = command(
        capsys, *paths, "--measure", "outputs/train/accuracy", "--against", against, "--out", out
    )
    assert status == 0
    assert "all runs: 0.7 ± 0.71 (step 20, 2 runs)" in text
    assert "sample standard deviation over the runs of a group" in text
    assert [line for line in error.splitlines() if "left out test" in line]
    assert {file.name for file in out.iterdir()} == {
        "comparison.png", "comparison.svg", "comparison.csv", "runs.csv", "comparison.json"
    }  # fmt: skip
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    groups = pd.read_csv(out / "comparison.csv")
    np.testing.assert_allclose(groups["mean"], [0.5, 0.6, 0.7], rtol=1e-12)
    content = json.loads((out / "comparison.json").read_text())
    assert [row["mean"] for row in content["groups"]] == groups["mean"].tolist()
    before = (out / "comparison.csv").stat()
    status, _, error = command(capsys, *paths, "--measure", "outputs/train/accuracy", "--out", out)
    assert status == 2
    assert len(error.splitlines()) == 1
    assert "exists already; nothing was touched; choose another --out" in error
    assert (out / "comparison.csv").stat() == before


def test_command_on_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = command(capsys, tmp_path)
    assert (status, len(error.splitlines())) == (1, 1)
    assert "is no run" in error
    status, _, error = command(capsys, tmp_path / "nothing")
    assert (status, len(error.splitlines())) == (2, 1)
    record(tmp_path / "a")
    status, _, error = command(capsys, tmp_path / "a", "--measure", "nothing")
    assert (status, len(error.splitlines())) == (2, 1)
    assert not (tmp_path / "out").exists()
