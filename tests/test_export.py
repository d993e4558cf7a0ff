"""Exports: what other tools read back is what was recorded, and nothing is overwritten."""

from __future__ import annotations

import json
import re
import sys
import tracemalloc
from pathlib import Path

import click
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import ntkdyn.export
from ntkdyn.cli import main
from ntkdyn.commands.export import export as command
from ntkdyn.errors import ConfigurationError, MissingPackage, RecordingExists, ReplacedFile, UnknownName
from ntkdyn.export import export
from ntkdyn.probe import Field
from ntkdyn.results import Run, Sweep
from ntkdyn.store import compact, verify
from ntkdyn.store.reader import RunReader
from ntkdyn.store.writer import RunWriter

STEPS = [0, 5, 10]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with scalars, text, a labelled vector, a kernel, static arrays and a probe set."""
    writer = RunWriter(tmp_path / "run", {})
    dims = ("sample", "sample_2")
    writer.declare("ntk/test", [Field(name="kernel", dims=dims, shape=(3, 3))])
    layers = {"layer": ["first", "last"]}
    writer.declare(
        "units",
        [
            Field(name="active", dims=("layer",), shape=(2,), dtype="i8", coordinates=layers),
            Field(name="total", dims=("layer",), shape=(2,), dtype="i8", coordinates=layers, static=True),
            Field(name="share", dtype="f8"),
            Field(name="note", dtype="str"),
            Field(name="loss", dims=("sample",), shape=(80,), dtype="f8"),
        ],
    )
    writer.write_arrays({"probe_sets/test": {"targets": np.arange(3)}}, dims={"probe_sets/test/targets": ("sample",)})
    for step in STEPS:
        kernel = np.arange(9, dtype="f4").reshape(3, 3) / 7 + step
        units = {
            "active": [8 - step // 5, 3],
            "total": [8, 3],
            "share": 1 / (step + 3),
            "note": f"é{step}",
            "loss": np.arange(80.0) + step,
        }
        writer.commit(step, step / 4, {"ntk/test": {"kernel": kernel}, "units": units})
    writer.close()
    return Run.open(tmp_path / "run")


def table(folder: Path, name: str, to: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.csv") if to == "csv" else pd.read_parquet(folder / f"{name}.parquet")


@pytest.mark.parametrize("to", ["csv", "parquet"])
def test_tables_hold_every_number(run: Run, tmp_path: Path, to: str) -> None:
    result = export(run, to, tmp_path / "out" / "tables")
    assert result.left_out == {}
    assert sorted(path.stem for path in result.path.iterdir()) == [
        "ntk.test.kernel", "probe_sets.test.targets", "units", "units.active", "units.loss", "units.total",
    ]  # fmt: skip
    units = table(result.path, "units", to)
    assert units["step"].tolist() == STEPS
    assert units["epoch"].tolist() == [0, 1.25, 2.5]
    assert units["share"].tolist() == run["units/share"].tolist()
    assert units["note"].tolist() == ["é0", "é5", "é10"]
    kernel = table(result.path, "ntk.test.kernel", to)
    assert list(kernel.columns) == ["step", "epoch", "sample", "sample_2", "value"]
    assert np.array_equal(kernel["value"].to_numpy("f4").reshape(3, 3, 3), run["ntk/test/kernel"])
    chosen = kernel[(kernel["step"] == 5) & (kernel["sample"] == 1) & (kernel["sample_2"] == 2)]
    assert np.float32(chosen["value"].item()) == run["ntk/test/kernel"][1, 1, 2]
    active = table(result.path, "units.active", to)
    assert active["layer"].tolist() == ["first", "last"] * 3
    assert active["value"].tolist() == [8, 3, 7, 3, 6, 3]
    assert table(result.path, "units.total", to)["value"].tolist() == [8, 3]


def test_what_is_too_large_for_a_table_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ntkdyn.export, "MAX_ROWS", 26)  # the losses are more too
    result = export(run, "csv", tmp_path / "tables")
    assert set(result.left_out) == {"ntk/test/kernel", "units/loss"}
    assert result.left_out["ntk/test/kernel"].startswith("27 numbers, more than the 26 rows")
    assert not (tmp_path / "tables" / "ntk.test.kernel.csv").exists()


def test_netcdf_is_read_by_xarray(run: Run, tmp_path: Path) -> None:
    export(run, "netcdf", tmp_path / "run.nc")
    with xr.open_datatree(tmp_path / "run.nc", engine="h5netcdf") as tree:
        assert np.array_equal(tree["ntk/test/kernel"].to_numpy(), run["ntk/test/kernel"])
        assert tree["ntk/test/kernel"].dims == ("step", "sample", "sample_2")
        assert tree["units/active"].coords["layer"].to_numpy().tolist() == ["first", "last"]
        assert tree["units"]["step"].to_numpy().tolist() == STEPS


def test_netcdf_of_many_snapshots_takes_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 64 MiB in the product; a snapshot here is 256 KiB.
    monkeypatch.setattr("ntkdyn.store.bands._PIECE_BYTES", 2**20)

    def peak(count: int) -> int:
        writer = RunWriter(tmp_path / str(count), {})
        writer.declare("ntk", [Field(name="features", dims=("sample", "feature"), shape=(256, 256))])
        for step in range(count):
            writer.commit(step, None, {"ntk": {"features": np.full((256, 256), step)}})
        writer.close()
        run = Run.open(tmp_path / str(count), trusted=True)
        tracemalloc.start()
        export(run, "netcdf", tmp_path / f"{count}.nc")
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert Run.open(tmp_path / f"{count}.nc")["ntk/features"][:, 3, 4].tolist() == list(range(count))
        return highest

    few, many = peak(8), peak(64)
    assert many - few < 2**20  # of 14 MiB more
    assert many < 8 * 2**20


@pytest.mark.parametrize("to", ["csv", "netcdf"])
def test_a_run_in_progress_is_exported_as_it_was_opened(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "FAN", 3)
    writer = RunWriter(tmp_path / "run", {})
    writer.declare("norm", [Field(name="norm", dtype="f8"), Field(name="other", dtype="f8")])

    def record(steps: range) -> None:
        for step in steps:
            writer.commit(step, None, {"norm": {"norm": step, "other": -step}})

    record(range(5))
    run = Run.open(tmp_path / "run")
    # Merged in between, and longer; then packed.
    record(range(5, 8))
    export(run, to, tmp_path / "first")
    record(range(8, 10))
    writer.close()
    export(run, to, tmp_path / "second")
    for name in ("first", "second"):
        if to == "csv":
            assert table(tmp_path / name, "norm", "csv")["other"].tolist() == [0, -1, -2, -3, -4]
        else:
            assert Run.open(tmp_path / name)["norm/other"].tolist() == [0, -1, -2, -3, -4]
    assert run.steps("norm").tolist() == [0, 1, 2, 3, 4]


def test_a_run_that_branched_off_meanwhile_is_said_to_be_another(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    writer.declare("norm", [Field(name="norm", dtype="f8")])
    for step in range(5):
        writer.commit(step, None, {"norm": {"norm": step}})
    writer.close()
    run = Run.open(tmp_path / "run")
    writer = RunWriter(tmp_path / "run", {}, after=2)
    writer.declare("norm", [Field(name="norm", dtype="f8")])
    writer.commit(3, None, {"norm": {"norm": 7}})
    writer.close()
    with pytest.raises(ReplacedFile, match="was continued from an earlier step, or pruned, while it was read"):
        run["norm/norm"]


def test_netcdf_of_a_run_whose_segments_are_merged_meanwhile(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    writer.declare("norm", [Field(name="norm", dtype="f8")])
    for step in range(5):
        writer.commit(step, None, {"norm": {"norm": step}})
    run = Run.open(tmp_path / "run")
    writer.close()
    assert not list((tmp_path / "run" / "segments").iterdir())
    export(run, "netcdf", tmp_path / "run.nc")
    assert Run.open(tmp_path / "run.nc")["norm/norm"].tolist() == [0, 1, 2, 3, 4]


def test_tensorboard_shows_curves(run: Run, tmp_path: Path) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = export(run, "tensorboard", tmp_path / "events")
    events = loading.EventAccumulator(str(result.path)).Reload()
    tags = events.Tags()["scalars"]
    assert {"units/share", "units/active/first", "units/active/last", "ntk/test/kernel/0/2"} <= set(tags)
    assert [(one.step, np.float32(one.value)) for one in events.Scalars("units/share")] == [
        (step, np.float32(1 / (step + 3))) for step in STEPS
    ]
    assert [one.value for one in events.Scalars("units/loss/mean")] == [step + 39.5 for step in STEPS]
    assert set(result.left_out) == {"units/total", "units/note"}


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """A trunk, two finished arms and one that is not."""
    names = ["trunks/0123456789ab/0", "arms/123456789abc/0", "arms/123456789abc/1", "arms/23456789abcd/0"]
    for index, name in enumerate(names):
        (tmp_path / "starts" / name).parent.mkdir(parents=True, exist_ok=True)
        config = {"start_epoch": index, "at": [index, 2], "head": "plain" if index else 3, "rate": None}
        writer = RunWriter(tmp_path / "starts" / name, {"seed": int(name[-1]), "config": config})
        fields = [Field(name="share", dtype="f8"), Field(name="large", dims=("unit",), shape=(100,))]
        writer.declare("units", fields)
        for step in (0, 4):
            writer.commit(step, None, {"units": {"share": index + step / 8, "large": np.zeros(100)}})
        results = {"accuracy": index / 4, "gap": float("nan")}
        writer.close(status="running" if index == 3 else "finished", results=results)
    (tmp_path / "starts" / "sweep.json").write_text(json.dumps({"plan": [{"run": name} for name in names]}))
    return Sweep.open(tmp_path / "starts")


@pytest.mark.parametrize("to", list(ntkdyn.export.FORMATS))
def test_a_sweep_is_a_table_and_its_runs(sweep: Sweep, tmp_path: Path, to: str) -> None:
    if to == "tensorboard":
        pytest.importorskip("tensorboard")
    result = export(sweep, to, tmp_path / "out")
    runs = table(tmp_path / "out", "runs", "parquet" if to == "parquet" else "csv")
    finished = ["trunks/0123456789ab/0", "arms/123456789abc/0", "arms/123456789abc/1"]
    assert runs["run"].tolist() == finished
    assert runs["kind"].tolist() == ["trunk", "arm", "arm"]
    assert runs["accuracy"].tolist() == [0, 0.25, 0.5]
    assert runs["at"].tolist() == ["[0, 2]", "[1, 2]", "[2, 2]"]
    assert runs["head"].astype(str).tolist() == ["3", "plain", "plain"]
    assert runs["rate"].isna().all()
    for index, name in enumerate(finished):
        place = tmp_path / "out" / name
        if to in ("csv", "parquet"):
            assert table(place, "units", to)["share"].tolist() == [index, index + 0.5]
        elif to == "netcdf":
            with xr.open_datatree(f"{place}.nc", engine="h5netcdf") as tree:
                assert tree["units/share"].to_numpy().tolist() == [index, index + 0.5]
        else:
            assert next(place.iterdir()).name.startswith("events.out")
    assert result.left_out.pop("1 of 4 runs") == "not finished"
    assert list(result.left_out) == (["units/large"] if to == "tensorboard" else [])
    assert all(reason.endswith("TensorBoard shows curves (3 of 3 runs)") for reason in result.left_out.values())


def test_a_sweep_without_a_finished_run(tmp_path: Path) -> None:
    (tmp_path / "starts").mkdir()
    (tmp_path / "starts" / "sweep.json").write_text('{"plan": [{"run": "arms/0123456789ab/0"}]}')
    with pytest.raises(ConfigurationError, match=r"found no finished run in .*starts, expected at least one"):
        export(Sweep.open(tmp_path / "starts"), "csv", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["starts"]


def test_nothing_is_overwritten_and_nothing_half_done_stays(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").write_text("mine")
    with pytest.raises(RecordingExists, match="there exists already; nothing was touched"):
        export(run, "csv", tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"
    with pytest.raises(UnknownName, match="no format 'xls'; there are: csv, parquet, netcdf, tensorboard"):
        export(run, "xls", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackage, match=r"export to parquet: .*pip install -c constraints.txt '.\[export\]'"):
        export(run, "parquet", tmp_path / "out")

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(OSError, match="no space"):
        export(run, "csv", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]


def test_the_command_offers_all_formats() -> None:
    (option,) = (one for one in command.params if one.name == "to")
    assert isinstance(option.type, click.Choice)
    assert list(option.type.choices) == list(ntkdyn.export.FORMATS)


def test_command(run: Run, sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run.path), "--to", "csv"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run-csv")
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run.path), "--to", "csv"])
    assert ended.value.code == 2
    assert "run-csv exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["export", str(sweep.path), "--to", "netcdf"])
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(tmp_path / "starts-netcdf")
    assert captured.err.strip() == "ntkdyn: left out 1 of 4 runs: not finished"
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "nothing"), "--to", "netcdf"])
    assert ended.value.code == 2


def test_own_files_beyond_the_limits_of_strangers(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RunReader.open
    monkeypatch.setattr(RunReader, "open", lambda path, **given: real(path, **{**given, "max_bytes": 10}))
    verify._sound.clear()
    for command_line in (["export", "--to", "csv"], ["analyze"], ["compare"]):
        name, *options = command_line
        with pytest.raises(SystemExit) as ended:
            main([name, str(run.path), *options])
        assert ended.value.code == 1
        assert re.search(r"open with max_bytes=\d+ or trusted=True \(--trusted\)", capsys.readouterr().err)
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run.path), "--to", "csv", "--trusted"])
    assert ended.value.code == 0
