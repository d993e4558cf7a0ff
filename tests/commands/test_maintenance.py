"""``ntkdyn verify``, ``repair``, ``pack`` and ``prune``: what they say, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from ntkdyn import cli
from ntkdyn.probe import Field
from ntkdyn.results import Run
from ntkdyn.store import files, lock
from ntkdyn.store.writer import RunWriter


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def begin(path: Path, steps: int = 7) -> RunWriter:
    writer = RunWriter(path, {"seed": 1})
    writer.declare(
        "ntk", [Field(name="kernel", dims=("sample", "sample_2"), shape=(4, 4)), Field(name="n", static=True)]
    )
    writer.declare("units", [Field(name="active")])
    for step in range(steps):
        records = {"units": {"active": 9.0 - step}}
        if step % 2 == 0:
            records["ntk"] = {"kernel": np.eye(4) * step, "n": 4}  # type: ignore[dict-item]
        writer.commit(step, None, records)
    return writer


def test_a_sound_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path / "run").close()
    assert command(capsys, "verify", tmp_path / "run")[:2] == (0, f"{tmp_path / 'run'}: 1 files, sound\n")
    assert command(capsys, "repair", tmp_path / "run")[:2] == (0, f"{tmp_path / 'run'}: nothing to repair\n")


def test_damage_and_leftovers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path / "run").close(pack=False)
    (tmp_path / "run" / f"{files.TEMPORARY}1-a").write_bytes(b"half")
    status, out, err = command(capsys, "verify", tmp_path / "run")
    assert status == 0
    assert "leftover: " in out
    damaged = tmp_path / "run" / "segments" / "seg-0-000000000003-000000000003.h5"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    status, out, err = command(capsys, "verify", tmp_path / "run")
    assert status == 1
    assert "damaged: " in out
    assert "found 1 damaged files, expected none; run ntkdyn repair" in err
    status, out, err = command(capsys, "repair", tmp_path / "run")
    assert status == 0
    assert "moved to quarantine/seg-0-000000000003" in out
    assert "2 repairs" in out
    assert command(capsys, "verify", tmp_path / "run")[0] == 0
    assert Run.open(tmp_path / "run").steps("units").tolist() == [0, 1, 2, 4, 5, 6]


def test_a_sweep_is_all_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        begin(tmp_path / "arms" / "0123456789ab" / str(seed)).close(pack=False)
    (tmp_path / "sweep.json").write_text(json.dumps({"plan": []}))
    status, out, _ = command(capsys, "verify", tmp_path)
    assert status == 0
    assert out.count("sound") == 2


def test_a_run_that_is_written_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = begin(tmp_path / "run")
    for arguments in (("repair",), ("pack",), ("prune", "--keep", "every=2")):
        status, _, err = command(capsys, *arguments, tmp_path / "run")
        assert status == 2
        assert "is being written by process" in err
        assert len(err.splitlines()) == 1
    assert command(capsys, "verify", tmp_path / "run")[0] == 0
    writer.close()


def test_a_lock_from_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path / "run").close(pack=False, status="running")
    (tmp_path / "run" / "LOCK").write_text(json.dumps({**lock._myself(), "host": "elsewhere", "pid": 7}))
    status, _, err = command(capsys, "pack", tmp_path / "run")
    assert status == 2
    assert "ntkdyn repair --unlock" in err
    status, out, _ = command(capsys, "repair", "--unlock", tmp_path / "run")
    assert status == 0
    assert "status is interrupted now" in out
    assert command(capsys, "pack", tmp_path / "run")[0] == 0


def test_pruning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path / "run", 24).close(pack=False)
    before = Run.open(tmp_path / "run")["ntk/kernel"]
    status, out, _ = command(capsys, "prune", tmp_path / "run", "--keep", "every=10")
    assert status == 0
    assert "ntk: 3 of 12 snapshots kept" in out
    assert "units: 4 of 24 snapshots kept" in out
    run = Run.open(tmp_path / "run")
    assert run.steps("ntk").tolist() == [0, 20, 22]
    assert run.steps("units").tolist() == [0, 10, 20, 23]
    assert np.array_equal(run["ntk/kernel"], before[[0, 10, 11]])
    assert run["ntk/n"] == 4
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.h5", "run.json", "segments"]
    # A packed run can be pruned again.
    assert command(capsys, "prune", tmp_path / "run", "--keep", "every=2")[0] == 0
    assert Run.open(tmp_path / "run").steps("units").tolist() == [0, 20, 23]


@pytest.mark.parametrize("keep", ["every", "every=0", "every=-1", "every=x", "last=3", ""])
def test_a_rule_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], keep: str) -> None:
    begin(tmp_path / "run").close()
    content = (tmp_path / "run" / "run.h5").read_bytes()
    status, _, err = command(capsys, "prune", tmp_path / "run", "--keep", keep)
    assert status == 2
    assert "expected every=N" in err
    assert (tmp_path / "run" / "run.h5").read_bytes() == content


def test_a_packed_file_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path / "run").close()
    alone = tmp_path / "run" / "run.h5"
    assert command(capsys, "verify", alone)[:2] == (0, f"{alone}: 1 files, sound\n")
    (tmp_path / "run" / "run.json").unlink()
    status, out, _ = command(capsys, "verify", tmp_path / "run")
    assert status == 0
    assert "leftover: " in out
    content = bytearray(alone.read_bytes())
    content[len(content) // 2] ^= 255
    alone.write_bytes(content[:-7])
    status, out, err = command(capsys, "verify", alone)
    assert status == 1
    assert "is damaged" in out
    assert len(err.splitlines()) == 1


def test_a_run_of_a_later_format_is_not_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path / "run").close()
    with h5py.File(tmp_path / "run" / "run.h5", "r+") as file:
        file.attrs["format"] = "ntkdyn recording 12"
    for path in (tmp_path / "run", tmp_path / "run" / "run.h5"):
        status, out, err = command(capsys, "verify", path)
        assert (status, out) == (1, "")
        assert "update ntkdyn" in err
        assert "repair" not in err


@pytest.mark.parametrize("name", ["verify", "repair", "pack"])
def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "file").write_text("x")
    for path, status in ((tmp_path / "nothing", 2), (tmp_path, 1), (tmp_path / "file", 1)):
        found, _, err = command(capsys, name, path)
        assert found == status, err
        assert len(err.splitlines()) == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]
