"""Several processes train together: the first one records, none waits for it in vain."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ntkdyn as nd

WORKER = Path(__file__).with_name("distributed_worker.py")


def together(folder: Path, kind: str, size: int = 2) -> list[dict[str, Any]]:
    """What each of the processes answers."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-P", str(WORKER), str(folder)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size), kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(size)
    ]
    try:
        answers = []
        for process in processes:
            output, complaint = process.communicate(timeout=120)
            assert process.returncode == 0, complaint
            answers.append(json.loads(output.splitlines()[-1]))
        return answers
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("kind", ["early", "late", "zero"])
def test_the_first_process_records_without_collective_calls(tmp_path: Path, kind: str) -> None:
    plain = together(tmp_path / "plain", "without") if kind == "early" else None
    answers = together(tmp_path / kind, kind)
    assert answers[0]["weights"] == answers[1]["weights"]
    if plain is not None:
        assert answers[0]["weights"] == plain[0]["weights"]
    # ZeroRedundancyOptimizer broadcasts in its own steps, through functions that it has imported by name or not.
    if kind != "zero":
        assert answers[0]["calls"] == answers[1]["calls"] == []
    assert answers[0]["warnings"] == answers[1]["warnings"] == []
    run = nd.Run.open(tmp_path / kind / "run")
    assert (run.manifest["status"], run.steps("ntk").tolist()) == ("finished", [0, 2, 4])
    assert run.manifest["parameters"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_snapshot_that_may_outlast_the_timeout_is_warned_of(tmp_path: Path) -> None:
    first, second = together(tmp_path / "run", "slow")
    assert [warning for warning in first["warnings"] if "more than half of the 11 s after which collective" in warning]
    assert second["warnings"] == []
    assert first["weights"] == second["weights"]


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("sharded", "parameter '0.weight' sharded over processes by fully_shard"),
        ("flat", "layer '<root>' sharded over processes by FullyShardedDataParallel"),
    ],
)
def test_sharded_parameters_are_refused_by_name_in_every_process(tmp_path: Path, kind: str, what: str) -> None:
    for answer in together(tmp_path / "run", kind):
        assert f"found {what}" in answer["error"]
    assert not (tmp_path / "run" / "run").exists()
