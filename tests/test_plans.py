"""Plans that come with the experiments: each can be laid out, and is found by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ntkdyn.cli import main
from ntkdyn.errors import ConfigurationError
from ntkdyn.sweep import find_plan, make_plan
from ntkdyn.sweep.plan_file import read_plan_file

FOLDER = Path(__file__).parent.parent / "experiments"
PLANS = sorted(file.stem for file in FOLDER.glob("*.toml"))
# Plans whose data are those of a folder of real data sets: the steps of an epoch are counted from them.
REAL = {"resnet56", "resnet56_short", "translation", "translation_smoke"}


def experiment_of(name: str) -> str:
    (line,) = [line for line in (FOLDER / f"{name}.toml").read_text().splitlines() if line.startswith("experiment = ")]
    return line.split('"')[1]


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_can_be_laid_out(name: str, request: pytest.FixtureRequest) -> None:
    if name in REAL:
        request.getfixturevalue("data_folder")
    with find_plan(name) as file:
        assert file is not None
        plan = make_plan(experiment_of(name), file=file)
        seeds = read_plan_file(file).seeds
    assert seeds is not None
    arms = [run for run in plan.runs if run.kind == "arm"]
    assert arms
    assert all(run.parent is None or run.parent.startswith("trunks/") for run in arms)


def test_a_file_wins_over_a_name_and_what_is_neither_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text('seeds = 1\n[[grid]]\ntask = ["first"]\n')
    with find_plan("demo") as file:
        assert file == Path("demo")
    with find_plan(None) as file:
        assert file is None
    with (
        pytest.raises(
            ConfigurationError, match=r"--config digit: found neither .* plans are cifar, collapse, .*digits"
        ),
        find_plan("digit"),
    ):
        pass


def test_a_plan_is_shown_by_its_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "nonlinear-advantage", "--config", "smoke", "--plan", "--out", str(tmp_path / "none")])
    assert ended.value.code == 0
    assert "plan " in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
