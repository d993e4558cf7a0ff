"""Run: recordings as users open them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntkdyn.errors import DamagedRecording, UndefinedMeasure, UnknownName
from ntkdyn.probe import Field
from ntkdyn.results import Run, Sweep
from ntkdyn.store.writer import RunWriter


@pytest.fixture
def writer(tmp_path: Path) -> RunWriter:
    recording = RunWriter(tmp_path / "dense", {"seed": 4, "config": {"width": 8}, "results": {"gap": float("nan")}})
    for probe_set in ("train", "test"):
        kernel = Field(name="kernel", dims=("sample", "sample_2"), shape=(4, 4), coordinates={"sample": [3, 1, 4, 2]})
        recording.declare(f"ntk/{probe_set}", [kernel], attributes={"reduce": "trace"})
    sets = {f"probe_sets/{name}": {"targets": np.eye(4) * scale} for name, scale in (("train", 1), ("test", 2))}
    recording.write_arrays(sets, dims={f"{group}/targets": ("sample", "class") for group in sets})
    recording.declare("units", [Field(name="active", dims=("gate",), shape=(1,), dtype="i8")])
    recording.declare("odd/a", [Field(name="x")])
    recording.declare("odd/b", [Field(name="x")])
    for step in (0, 5, 10):
        features = np.random.default_rng(step).standard_normal((4, 9))
        kernels = {f"ntk/{name}": {"kernel": features @ features.T} for name in ("train", "test")}
        odd: dict[str, Any] = {"odd/a": {"x": 1}, **({"odd/b": {"x": 2}} if step else {})}
        recording.commit(step, step / 10 if step else None, {**kernels, **odd, "units": {"active": [step]}})
    return recording


@pytest.mark.parametrize("state", ["live", "packed", "alone"])
def test_run(writer: RunWriter, tmp_path: Path, state: str) -> None:
    path = writer.path
    if state != "live":
        writer.close()
    if state == "alone":
        path = tmp_path / "copied.h5"
        shutil.copy(writer.path / "run.h5", path)
    run = Run.open(path)
    assert run.path == path
    assert run.name == ("copied" if state == "alone" else "dense")
    assert run.seed == 4
    assert run.config == {"width": 8}
    assert np.isnan(run.results["gap"])
    assert run.manifest["status"] == ("running" if state == "live" else "finished")
    assert run.groups() == ["ntk/test", "ntk/train", "odd/a", "odd/b", "units"]
    assert run.sets("ntk") == ["test", "train"]
    assert run.sets("units") == [""]
    assert run.steps("ntk").tolist() == run.steps("ntk/test").tolist() == run.steps("units").tolist() == [0, 5, 10]
    assert np.array_equal(run.epochs("ntk"), [np.nan, 0.5, 1.0], equal_nan=True)
    assert run["ntk/test/kernel"].shape == (3, 4, 4)
    assert "ntk/test/kernel" in run
    assert "ntk/kernel" not in run
    assert np.array_equal(run.targets("test"), 2 * np.eye(4))
    assert run.field("units/active").dtype == "<i8"
    assert run.attributes("ntk/train") == {"reduce": "trace"}
    assert "dense" in repr(run) or state == "alone"
    tree = run.to_xarray()
    assert tree["ntk/test/kernel"].sel(step=5, sample=4).dims == ("sample_2",)
    assert tree["units"]["epoch"].dims == ("step",)


def test_unknown(writer: RunWriter) -> None:
    run = Run.open(writer.path)
    with pytest.raises(UnknownName, match="found no probe 'nkt'; there are: ntk/test"):
        run.steps("nkt")
    with pytest.raises(UnknownName, match="different steps; name one of: odd/a, odd/b"):
        run.steps("odd")
    with pytest.raises(UnknownName, match="found no array 'ntk/kernel'"):
        run["ntk/kernel"]
    with pytest.raises(UnknownName, match="probe_sets/validation/targets"):
        run.targets("validation")


def test_run_without_manifest_entries(tmp_path: Path) -> None:
    run = Run.open(RunWriter(tmp_path / "bare", {}).path)
    assert run.seed is None
    assert run.config == {}
    assert run.results == {}
    assert run.groups() == []
    assert list(run.to_xarray().children) == []
    with pytest.raises(DamagedRecording):
        Run.open(tmp_path)


def test_analyze_and_plot(writer: RunWriter) -> None:
    import matplotlib.pyplot as plt

    run = Run.open(writer.path)
    dataset = run.analyze("kernel_distance")
    assert dataset.equals(run.analyze("kernel-distance"))
    assert dataset["step"].values.tolist() == [0, 5, 10]
    figure = run.plot("kernel_distance")
    assert figure.axes
    host, axes = plt.subplots(1, 2)
    assert run.plot("kernel_distance", ax=axes[1]) is host
    assert host.subfigs[0].axes
    assert not host.subfigs[0].axes[0].get_title().startswith("None")
    plt.close("all")
    with pytest.raises(UndefinedMeasure, match="reads a whole sweep"):
        run.analyze("advantage")
    with pytest.raises(UndefinedMeasure, match="study"):
        run.analyze("path-length")
    with pytest.raises(UnknownName):
        run.analyze("kernel-distanze")


def test_a_sweep_without_a_finished_run_is_empty(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"plan": [{"run": "trunks/0123456789ab/0"}]}')
    sweep = Sweep.open(tmp_path)
    assert list(sweep.table.columns) == ["kind", "run", "seed"]
    assert not len(sweep.table)
    assert not sweep.runs
    with pytest.raises(UndefinedMeasure, match="no run of this sweep records what this study needs"):
        sweep.analyze("kernel-distance")


def test_a_setting_named_like_a_column_of_the_table_hides_none(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"plan": [{"run": "arms/0123456789ab/3"}]}')
    config = {"kind": "scratch", "seed": 9, "width": 4}
    run = RunWriter(tmp_path / "arms" / "0123456789ab" / "3", {"config": config, "seed": 3, "results": {"napl": 2.0}})
    run.close()
    (row,) = Sweep.open(tmp_path).table.to_dict("records")
    assert row == {
        "kind": "arm", "run": "arms/0123456789ab/3", "seed": 3, "setting_kind": "scratch", "setting_seed": 9,
        "width": 4, "napl": 2.0,
    }  # fmt: skip


def test_a_run_is_read_while_xarray_has_it_open(writer: RunWriter, tmp_path: Path) -> None:
    writer.close()
    xr = pytest.importorskip("xarray")
    with xr.open_datatree(tmp_path / "dense" / "run.h5", engine="h5netcdf") as tree:
        run = Run.open(tmp_path / "dense")
        np.testing.assert_array_equal(run["ntk/test/kernel"], tree["ntk/test/kernel"])


@pytest.mark.parametrize(("entry", "value"), [("seed", "x" * 500), ("config", 3), ("results", [1.0])])
def test_strange_entries_of_a_manifest_are_refused_where_they_are_asked_for(
    entry: str, value: Any, tmp_path: Path
) -> None:
    RunWriter(tmp_path / "run", {entry: value}).close()
    run = Run.open(tmp_path / "run")
    with pytest.raises(
        DamagedRecording, match=f"found {entry} .* in the manifest, expected a (whole|mapping)"
    ) as error:
        getattr(run, entry)
    assert len(str(error.value)) < 300
