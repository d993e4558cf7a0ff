"""The kernel's benchmark runs with the peers that are installed, and its report says what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    import kernel_report

    return kernel_report


def test_the_benchmark_runs_on_its_smallest_case(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """The rates of matrix products, three processes more, only by --long."""
    rates = pytestconfig.getoption("--long")
    command = [sys.executable, "-P", str(HERE / "kernel.py"), "--case", "tiny", "--rounds", "1", "--out", str(tmp_path)]
    command += ["--tool", "ntkdyn", "--tool", "torch.func Jacobian", "--tool", "torchntk"]
    command += [] if rates else ["--no-rates"]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    case = json.loads((tmp_path / "kernel.json").read_text())["cases"][0]
    ours, peer, refused = case["tools"]
    assert case["reference"]["difference"] < 1e-10
    for tool in (ours, peer):
        assert tool["failed"] is None
        assert tool["error_frobenius"] < 1e-5
        assert tool["error_maximum"] < 1e-5
        assert len(tool["cpu_s"]) == 1
    assert refused["failed"] in {"not installed", "NotImplementedError: one output only, no full kernel"}
    assert not rates or case["rates"]["NumPy matmul"] > 0
    assert "| goal |" in (tmp_path / "kernel.md").read_text()


def test_errors_leave_out_samples_at_a_kink(report: Any, tmp_path: Path) -> None:
    exact = np.ones((4, 4))
    found = exact.copy()
    found[2] = found[:, 2] = 5
    found[0, 0] = 1.5
    np.save(tmp_path / "exact.npy", exact)
    np.save(tmp_path / "found.npy", found)
    assert report.errors(tmp_path / "found.npy", tmp_path / "exact.npy", [2]) == pytest.approx((0.5 / 3, 0.5))
    assert report.errors(tmp_path / "found.npy", tmp_path / "exact.npy", [])[1] == 4


def test_the_fastest_peer_is_a_right_one(report: Any) -> None:
    def tool(name: str, seconds: float, error: float, failed: str | None = None) -> dict[str, Any]:
        return {"tool": name, "cpu_s": [seconds], "error_frobenius": error, "failed": failed}

    tools = [tool("ntkdyn", 1, 0), tool("wrong", 2, 0.2), tool("broken", 3, 0, "> 60 s"), tool("right", 4, 1e-7)]
    assert report.fastest(tools)["tool"] == "right"


def test_reasons_are_short(report: Any) -> None:
    text = "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 134000000000 bytes."
    assert report.reason(text, 8000) == "> 8 GB, asks for 134.0 GB at once"
    assert len(report.reason("x" * 500, 8000)) == 160


def test_slopes_of_powers(report: Any) -> None:
    assert report.slope([1, 2, 4, 8], [None, 4.0, 16.0, 64.0]) == pytest.approx(2)
    assert report.slope([1, 2, 4], [None, None, 1.0]) is None
