"""ntkdyn datasets: the list, one data set, damage, and wrong usage."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

from ntkdyn.cli import main
from ntkdyn.datasets.manifest import known_datasets


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of one call."""
    with pytest.raises(SystemExit) as end:
        main(["datasets", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def test_missing_data_sets_say_what_to_put_where(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NTKDYN_DATA", raising=False)
    code, out, error = run(capsys)
    assert (code, error) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "data directory data (does not exist)"
    states = {line.split()[0]: line.split()[1] for line in lines[1:] if not line.startswith(" ")}
    assert states == dict.fromkeys(known_datasets(), "missing") | {"digits": "built"}
    assert "digits         built in license: CC BY 4.0, as the UCI repository states" in lines
    assert any("put train.en, train.de, val.en, val.de, " in line and "into multi30k-task1/" in line for line in lines)
    assert "from github.com/zalandoresearch/fashion-mnist, folder data/fashion" in out
    assert "license: MIT (Zalando SE 2017)" in out


def test_one_data_set(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NTKDYN_DATA", str(tmp_path))
    code, out, _ = run(capsys, "cifar-100")
    assert code == 0
    assert f"data directory {tmp_path}" in out
    assert "cifar-100: CIFAR-100, small color images, 100 fine classes" in out
    assert "state     missing" in out
    assert "citation  Krizhevsky 2009" in out
    assert "mnist" not in out


def test_what_is_built_in_has_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "digits")
    assert code == 0
    assert "  state     built in\n  kind      images, 10 classes\n  origin    scikit-learn, from the UCI" in out
    assert "ntkdyn: data set 'digit' is unknown; did you mean digits?" in run(capsys, "digit")[2]


def test_damage_is_exit_code_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "mnist"
    folder.mkdir()
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(60_008)))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(bytes(100))
    (folder / "\x1b[31mred").touch()
    code, out, error = run(capsys, "--data-dir", tmp_path)
    assert code == 1
    (summary,) = error.splitlines()
    assert summary == (
        f"ntkdyn: {tmp_path}: found mnist damaged, expected the originals; replace the files named above"
    )
    assert "mnist          damaged  in mnist/" in out
    assert "train-labels-idx1-ubyte.gz: found content of sha256 " in out
    assert "t10k-labels-idx1-ubyte: found 100 bytes of content, expected 10008; replace it by the original from" in out
    assert "fashion-mnist  missing" in out
    assert run(capsys, "mnist", "--data-dir", tmp_path)[0] == 1
    assert run(capsys, "cifar-10", "--data-dir", tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar10"], "ntkdyn: data set 'cifar10' is unknown; did you mean cifar-10? known: "),
        (
            ["--data-dir", "nowhere"],
            "ntkdyn: data directory nowhere: found no such folder, expected the folder of data",
        ),
    ],
)
def test_wrong_usage_is_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, out, error = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert error.startswith(message)
    assert len(error.splitlines()) == 1


def test_real_data_sets(capsys: pytest.CaptureFixture[str], data_folder: Path) -> None:
    code, out, error = run(capsys, "--data-dir", data_folder)
    assert (code, error) == (0, "")
    states = {line.split()[0]: line.split()[1] for line in out.splitlines()[1:] if not line.startswith(" ")}
    assert states == {
        "digits": "built",
        "mnist": "there",
        "fashion-mnist": "there",
        "cifar-10": "partial",
        "cifar-100": "missing",
        "multi30k": "there",
    }
    assert "2 of 5 training batches" in out
    assert "not there: data_batch_3.bin, data_batch_4.bin, data_batch_5.bin" in out


def test_help_is_light() -> None:
    code = (
        "import sys; from ntkdyn.cli import main\n"
        "try: main(['datasets', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([m for m in ('torch', 'numpy', 'PIL', 'ntkdyn.datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
