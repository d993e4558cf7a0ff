"""``ntkdyn watch``: lines, the live view, and how it ends."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ntkdyn import cli
from ntkdyn.commands.watch import sparkline, view_of
from ntkdyn.glance import Glance
from ntkdyn.probe import Field
from ntkdyn.results import Run
from ntkdyn.store.writer import RunWriter


@pytest.fixture
def writer(tmp_path: Path) -> RunWriter:
    recording = RunWriter(tmp_path / "dense", {})
    recording.declare("outputs/[red]test", [Field(name="accuracy")])
    recording.commit(0, 0, {"outputs/[red]test": {"accuracy": 0.25}})
    return recording


def watch(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(["watch", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def on_sleep(monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], object]) -> None:
    """Between two looks, do the next of these."""
    left = list(actions)
    monkeypatch.setattr(time, "sleep", lambda _: left.pop(0)())


def test_lines_until_the_run_ends(
    writer: RunWriter, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_sleep(
        monkeypatch,
        lambda: writer.commit(4, 0.5, {"outputs/[red]test": {"accuracy": 0.5}}),
        lambda: None,
        writer.close,
    )
    status, out, error = watch(capsys, writer.path)
    assert (status, error) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 0, epoch 0: accuracy [red]test 25.0 %, running, last written 0 s ago")
    assert lines[1].startswith("step 4, epoch 0.5: accuracy [red]test 50.0 %, running")
    assert lines[2] == "step 4, epoch 0.5: accuracy [red]test 50.0 %, finished"


def test_once(writer: RunWriter, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = watch(capsys, writer.path, "--once")
    assert status == 0
    assert len(out.splitlines()) == 1


def test_the_recorder_is_gone(writer: RunWriter, capsys: pytest.CaptureFixture[str]) -> None:
    (writer.path / "LOCK").unlink()
    status, out, _ = watch(capsys, writer.path)
    assert status == 0
    assert "abandoned" in out.splitlines()[0]
    assert "is gone without closing it" in out.splitlines()[1]


def test_interrupted_by_the_one_who_watches(
    writer: RunWriter, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    on_sleep(monkeypatch, interrupt)
    status, out, error = watch(capsys, writer.path)
    assert (status, error) == (0, "")
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_view(writer: RunWriter, encoding: str) -> None:
    for step in range(1, 30):
        writer.commit(step, step / 10, {"outputs/[red]test": {"accuracy": 0.25 + step / 100}})
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=72, force_terminal=True, legacy_windows=False)
    console.print(view_of(Glance(Run.open(writer.path)), console))
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "dense" in text
    assert "accuracy [red]test" in text
    assert "25.0 %" in text
    assert "54.0 %" in text
    assert ("▁" in text) == (encoding == "utf-8")


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 3], 4) == "▁▃▆█"
    assert sparkline([2, 2], 8) == "▁▁"
    assert sparkline([0, float("nan"), 7], 8) == "▁ █"
    assert sparkline([float("nan")], 3) == " "
    assert sparkline(np.arange(1000).tolist(), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, 2, 3], 0) == sparkline([], 5) == ""
    assert sparkline([1, 2, 3], 1) == "▁"


def test_what_cannot_be_watched(
    writer: RunWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, error = watch(capsys, tmp_path / "nothing")
    assert status == 2
    assert "found nothing, expected the folder of a run" in error
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    status, _, error = watch(capsys, tmp_path / "sweep")
    assert status == 2
    assert "found a sweep, expected one run" in error
    on_sleep(monkeypatch, lambda: shutil.rmtree(writer.path))
    status, out, error = watch(capsys, writer.path)
    assert status == 1
    assert len(error.splitlines()) == 1
    assert "vanished while it was watched: found nothing after step 0" in error
    assert len(out.splitlines()) == 1
