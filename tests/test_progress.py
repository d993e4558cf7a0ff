"""Progress: plain lines where there is no terminal, nothing where it is not wanted."""

from __future__ import annotations

import sys

import pytest

from ntkdyn.progress import counted, progress_bar


def test_plain_lines_outside_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted(list(range(200)), what="runs")) == list(range(200))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "ntkdyn: 20 of 200 runs"
    assert lines[-1] == "ntkdyn: 200 of 200 runs"


def test_work_done_before_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(10, what="runs", done=9) as bar:
        bar.update()
        assert bar.n == 10
    assert capsys.readouterr().err.splitlines() == ["ntkdyn: 10 of 10 runs"]


def test_silent_when_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(3, what="runs", shown=False) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted([], what="runs")) == []
    assert capsys.readouterr().err == ""


def test_a_process_that_only_starts_kernels_is_no_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    import ipykernel  # noqa: F401  # as nbclient imports it
    import IPython

    assert {"ipykernel", "IPython"} <= set(sys.modules)
    assert IPython.get_ipython() is None
    test_plain_lines_outside_a_terminal(capsys)


def test_a_bar_in_a_notebook(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython

    class Shell:
        kernel = object()

    monkeypatch.setattr(IPython, "get_ipython", Shell)
    assert list(counted([1, 2], what="runs")) == [1, 2]
    assert "ntkdyn:" not in capsys.readouterr().err
