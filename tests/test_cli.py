"""The command line: what it prints, what it refuses in one line, with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ntkdyn.cli import cli, main
from ntkdyn.store.manifest import encode_manifest, read_manifest

SMALL = ["--set", "width=8", "--set", "depth=2", "--set", "epochs=8", "--set", "pairs=256", "--set", "test_pairs=100"]
SMALL += ["--set", "latest_start=2", "--set", "ramp_epochs=2", "--set", "settle_epochs=1", "--set", "probe_per_class=2"]
RECORD = ["record", "nonlinear-advantage", *SMALL]


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of one call."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def one_line(error: str) -> str:
    """The error's only line, progress bars aside."""
    lines = [line for line in error.splitlines() if line.startswith("ntkdyn:")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small recorded dense run."""
    out = tmp_path_factory.mktemp("runs") / "dense"
    with pytest.raises(SystemExit) as end:
        main([*RECORD, "--set", "intervention=none", "--out", str(out)])
    assert not end.value.code
    return out


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_help_shows_an_example(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert "Example" in out
    assert f"ntkdyn {name}" in out


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("probes", ["ntk", "gates", "units", "path-length", "outputs"]),
        ("experiments", ["nonlinear-advantage"]),
        ("studies", ["kernel-distance", "advantage"]),
    ],
)
def test_lists(capsys: pytest.CaptureFixture[str], command: str, names: list[str]) -> None:
    code, out, _ = run(capsys, command)
    listed = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0
    assert set(names) <= set(listed)
    assert all(len(line.split()) > 3 for line in listed.values()), "every entry says what it is"


def test_settings_of_an_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "experiments", "nonlinear-advantage")
    assert code == 0
    assert "start_epoch" in out
    assert "keep | common | relu" in out
    assert "Optional" not in out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["record", "nonlinear-advantge"], ["nonlinear-advantge", "nonlinear-advantage"]),
        ([*RECORD, "--probe", "nkt"], ["nkt", "ntk"]),
        ([*RECORD, "--probe", "ntk:reduce=most"], ["reduce", "most", "trace"]),
        ([*RECORD, "--probe", "ntk:size=3"], ["size"]),
        ([*RECORD, "--set", "strenght=4"], ["strenght", "strength"]),
        ([*RECORD, "--set", "survivors=all"], ["survivors", "all", "keep"]),
        ([*RECORD, "--set", "start_epoch=99"], ["start_epoch", "99"]),
        ([*RECORD, "--set", "width=wide"], ["width", "wide"]),
        ([*RECORD, "--set", "width"], ["width"]),
        ([*RECORD, "--set", "data=nowhere.npz"], ["nowhere.npz"]),
        ([*RECORD, "--set", "model=nowhere.py:net"], ["nowhere.py"]),
        ([*RECORD, "--every", "5", "--log-spaced", "5"], ["--every", "--log-spaced"]),
        (["record", "nowhere.py:thing"], ["nowhere.py"]),
        (["recrod"], ["recrod"]),
        (["sweep", "nonlinear-advantage", "--over", "start_epoch"], ["start_epoch"]),
        (["sweep", "nonlinear-advantage", "--over", "depht=1,2"], ["depht", "depth"]),
    ],
    ids=lambda value: "-".join(value)[-40:] if isinstance(value, list) else None,
)
def test_wrong_usage_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    out = tmp_path / "out"
    code, _, error = run(capsys, *arguments, *(["--out", out] if arguments[0] != "recrod" else []))
    line = one_line(error)
    assert code == 2, line
    for part in parts:
        assert part in line
    assert not out.exists() or not any(out.iterdir())


def test_output_folder_with_another_run_is_refused(capsys: pytest.CaptureFixture[str], dense: Path) -> None:
    before = {file: file.read_bytes() for file in dense.rglob("*") if file.is_file()}
    code, _, error = run(capsys, *RECORD, "--out", dense)
    assert code == 2
    assert str(dense) in one_line(error)
    assert {file: file.read_bytes() for file in dense.rglob("*") if file.is_file()} == before


def test_probe_from_a_file_is_recorded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    probe = tmp_path / "mine.py"
    probe.write_text(
        "import ntkdyn as nd\n\n"
        "class Largest:\n"
        '    """Largest output per sample (output unit)."""\n'
        '    name = "largest"\n'
        "    def fields(self, s):\n"
        '        return [nd.Field(name="output", dims=("sample",), shape=(len(s.outputs),))]\n'
        "    def measure(self, s):\n"
        '        return {"output": s.outputs.amax(1)}\n'
    )
    out = tmp_path / "run"
    code, _, error = run(capsys, *RECORD, "--probe", f"{probe}:Largest", "--every", "16", "--out", out)
    assert code == 0, error
    from ntkdyn import Run

    assert Run.open(out)["largest/test/output"].ndim == 2


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("{'a': s.outputs[:2]}", "shape"),
        ("{'a': s.outputs * float('nan')}", "NaN"),
        ("{'a': 1 / 0}", "ZeroDivisionError"),
        ("{'b': s.outputs}", "'b'"),
    ],
)
def test_faulty_probe_fails_the_run_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, body: str, part: str
) -> None:
    probe = tmp_path / "mine.py"
    probe.write_text(
        "import ntkdyn as nd\nclass Faulty:\n"
        "    name = 'faulty'\n"
        "    def fields(self, s): return [nd.Field(name='a', dims=('n', 'c'), shape=tuple(s.outputs.shape))]\n"
        f"    def measure(self, s): return {body}\n"
    )
    code, _, error = run(capsys, *RECORD, "--probe", f"{probe}:Faulty", "--out", tmp_path / "run")
    assert code == 1
    assert "faulty" in one_line(error)
    assert part in one_line(error)


def test_analyze_writes_the_same_numbers_twice(
    capsys: pytest.CaptureFixture[str], dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        code, _, error = run(capsys, "analyze", dense, "--out", tmp_path / name)
        assert code == 0, error
        # Rendering takes longest and has no part in the numbers; tests/test_report.py compares figures.
        monkeypatch.setattr("ntkdyn.plots._rendered", lambda *_: b"")
    numbers = sorted(file.name for file in (tmp_path / "a").iterdir() if file.suffix in {".csv", ".json"})
    assert "kernel-distance.csv" in numbers
    for name in numbers:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert (tmp_path / "a" / "report.html").stat().st_size > 10_000


def test_analyze_only(capsys: pytest.CaptureFixture[str], dense: Path, tmp_path: Path) -> None:
    code, _, error = run(capsys, "analyze", dense, "--only", "units", "--out", tmp_path / "a")
    assert code == 0, error
    assert {file.stem for file in (tmp_path / "a").iterdir()} == {"units", "report"}
    code, _, error = run(capsys, "analyze", dense, "--only", "unit", "--out", tmp_path / "b")
    assert code == 2
    assert "units" in one_line(error)


def test_analyze_refuses_damaged_and_foreign_files(
    capsys: pytest.CaptureFixture[str], dense: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.h5"
    text.write_text("no HDF5 at all")
    damaged = tmp_path / "damaged.h5"
    content = bytearray((dense / "run.h5").read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content[: len(content) * 3 // 4])
    import h5py

    foreign = tmp_path / "foreign.h5"
    with h5py.File(foreign, "w") as file:
        file["x"] = np.zeros(3)
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (text, damaged, foreign, empty, tmp_path / "missing"):
        code, _, error = run(capsys, "analyze", path, "--out", tmp_path / "report")
        assert code in (1, 2)
        assert path.name in one_line(error)
        assert not (tmp_path / "report" / "report.html").exists()


def test_info(capsys: pytest.CaptureFixture[str], dense: Path) -> None:
    code, out, _ = run(capsys, "info", dense)
    assert code == 0
    for part in ("ntk/test/kernel", "nonlinear-advantage", "finished"):
        assert part in out


def test_sweep_is_restartable(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    arguments = ["sweep", "nonlinear-advantage", *SMALL, "--over", "start_epoch=0,2", "--seeds", "1", "--out", out]
    code, text, _ = run(capsys, *arguments, "--plan")
    assert code == 0
    assert "2 arms" in text
    # A trunk of 8 epochs of 2 steps, from which the arms leave at epoch 0 and 2.
    assert "cost: 3 runs, 44 training steps, roughly" in text
    assert "none is named" in text
    assert not out.exists()
    code, text, error = run(capsys, *arguments, "--jobs", "1")
    assert code == 0, error
    assert "3 runs finished" in text
    plan = json.loads((out / "sweep.json").read_bytes())["plan"]
    victim = out / next(row["run"] for row in plan if row["kind"] == "arm")
    (victim / "run.json").write_bytes(encode_manifest(read_manifest(victim) | {"status": "running"}))
    code, text, error = run(capsys, *arguments, "--jobs", "1")
    assert code == 0, error
    assert "1 runs finished, 2 kept" in text
    assert victim.with_name(f"{victim.name}.unfinished-1").is_dir()
    code, _, error = run(capsys, *arguments[:-4], "--seeds", "2", "--out", out)
    assert code == 2
    assert "another sweep" in one_line(error)

    from ntkdyn import Sweep

    sweep = Sweep.open(out)
    assert list(sweep.table.kind) == ["trunk", "arm", "arm"]
    assert set(sweep.runs) == set(sweep.table.run)
    arm = sweep.table.run[1]
    assert sweep.trunk_of(arm) == sweep.table.run[0]
    distances = sweep.analyze("kernel_distance")
    assert {"settings", "seed"} <= set(distances.dims)


def test_a_sweep_is_confirmed_on_fresh_seeds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, file = tmp_path / "sweep", tmp_path / "plan.toml"
    file.write_text(
        "seeds = 1\n[plan.primary]\nmeasure = 'test_accuracy'\nof = {start_epoch = 2}\nminus = {start_epoch = 0}\n"
        "where = {intervention = 'linearize'}\n"
    )
    arguments = ["sweep", "nonlinear-advantage", *SMALL, "--over", "start_epoch=0,2", "--config", file, "--out", out]
    code, _, error = run(capsys, *arguments, "--confirm")
    assert code == 2
    assert "run it without --confirm first" in one_line(error)
    assert not out.exists()
    code, text, error = run(capsys, *arguments, "--jobs", "1")
    assert code == 0, error
    code, _, error = run(capsys, *arguments, "--confirm")
    assert code == 2
    assert "expected at least 2" in one_line(error)
    code, text, error = run(capsys, *arguments, "--confirm", "--seeds", "2", "--plan")
    assert code == 0, error
    assert "seeds [1, 2]" in text
    assert "which used seeds [0]" in text
    assert "primary comparison: test_accuracy of start_epoch=2 minus start_epoch=0" in text
    assert not (out / "confirmation").exists()
    code, text, error = run(capsys, *arguments, "--confirm", "--seeds", "2", "--jobs", "1")
    assert code == 0, error
    assert f"next: ntkdyn analyze {out / 'confirmation'}" in text
    file.write_text(file.read_text().replace("seeds = 1", "seeds = [0, 5]"))
    code, _, error = run(capsys, *arguments, "--confirm")
    assert code == 2
    assert "found seeds 0 used already" in one_line(error)

    from ntkdyn import Sweep

    assert set(Sweep.open(out / "confirmation").table.seed) == {1, 2}


def test_demo_smoke(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, error = run(capsys, "demo", "--smoke", "--out", tmp_path / "demo")
    assert code == 0, error
    report = tmp_path / "demo" / "report"
    assert (report / "report.html").is_file()
    assert (report / "advantage.png").is_file()
    assert (report / "advantage.svg").is_file()
    numbers = json.loads((report / "advantage.json").read_bytes())
    assert numbers
    assert "late" in out


def test_a_warning_is_one_line(tmp_path: Path) -> None:
    settings = ["start_epoch=5", "epochs=8", "ramp_epochs=2", "settle_epochs=1", "width=4", "depth=1", "pairs=128"]
    arguments = ["record", "nonlinear-advantage", "--probe", "units", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-P", "-c", "from ntkdyn.cli import main; main()", *arguments]
    done = subprocess.run(
        [*command, *(part for setting in settings for part in ("--set", setting))],
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = [line for line in done.stderr.splitlines() if "warning" in line.lower()]
    assert line.startswith("ntkdyn: warning: start_epoch=5: start_epoch + ramp_epochs=2 + settle_epochs=1 ends after")


def test_the_folder_of_data_sets_is_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NTKDYN_DATA", "elsewhere")
    command = ["record", "nonlinear-advantage", "--set", "data=mnist", "--data-dir", str(tmp_path / "mine")]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"data directory {tmp_path / 'mine'}: found no such folder" in line
    assert not (tmp_path / "run").exists()
