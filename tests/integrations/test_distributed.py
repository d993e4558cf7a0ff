"""Several processes train together: the first one records, none waits for it in vain."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ntkdyn as nd
from ntkdyn.errors import ConfigurationError

WORKER = Path(__file__).with_name("distributed_worker.py")


KINDS = ("without", "early", "late", "zero", "slow", "sharded", "flat", "inner")
Answers = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes record, each kind of training in a folder of its own."""
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    """What each of two processes answers, by kind of training; the two go through all kinds, a group for each."""
    command = [sys.executable, "-P", str(WORKER), str(folder)]
    processes = [
        subprocess.Popen([*command, str(rank), "2", *KINDS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n".join(complaint for _, complaint in said)
        lines = [[json.loads(line) for line in output.splitlines() if line.startswith("{")] for output, _ in said]
        return {kind: list(pair) for kind, *pair in zip(KINDS, *lines, strict=True)}
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("kind", ["early", "late", "zero"])
def test_the_first_process_records_without_collective_calls(answers: Answers, folder: Path, kind: str) -> None:
    first, second = answers[kind]
    assert first["weights"] == second["weights"]
    # ZeroRedundancyOptimizer broadcasts in its own steps, through functions that it has imported by name or not.
    if kind != "zero":
        assert first["weights"] == answers["without"][0]["weights"]
        assert first["calls"] == second["calls"] == []
    assert first["warnings"] == second["warnings"] == []
    run = nd.Run.open(folder / kind / "run")
    assert (run.manifest["status"], run.steps("ntk").tolist()) == ("finished", [0, 2, 4])
    assert run.manifest["parameters"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_snapshot_that_may_outlast_the_timeout_is_warned_of(answers: Answers) -> None:
    first, second = answers["slow"]
    assert [warning for warning in first["warnings"] if "more than half of the 11 s after which collective" in warning]
    assert second["warnings"] == []
    assert first["weights"] == second["weights"]


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("sharded", "parameter '0.weight' sharded over processes by fully_shard"),
        ("flat", "layer '<root>' sharded over processes by FullyShardedDataParallel"),
        ("inner", "parameter '0.weight' sharded over processes by FullyShardedDataParallel"),
    ],
)
def test_sharded_parameters_are_refused_by_name_in_every_process(
    answers: Answers, folder: Path, kind: str, what: str
) -> None:
    for answer in answers[kind]:
        assert f"found {what}" in answer["error"]
    assert not (folder / kind / "run").exists()


class ZeroParamStatus(Enum):
    """DeepSpeed's states of a parameter."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


def partitioned(parameter: nn.Parameter, number: int, persistent: bool) -> None:
    """Do to a parameter what DeepSpeed does to it in ZeRO stage 3.

    A stand-in, since DeepSpeed is not among what the tests install: the attributes and the empty data are those of
    ``deepspeed/runtime/zero/partition_parameters.py`` (``Init._convert_to_deepspeed_param``, ``_partition_param``,
    ``free_param``), seen at rank 0 of two. Parameters below ``param_persistence_threshold`` stay whole.
    """
    stand_in: Any = parameter
    half = (parameter.numel() + 1) // 2
    stand_in.ds_id = number
    stand_in.ds_shape, stand_in.ds_numel = parameter.shape, parameter.numel()
    stand_in.ds_persist = persistent
    stand_in.ds_tensor = parameter.detach().flatten()[:half].clone()
    stand_in.ds_tensor.ds_numel = half
    stand_in.ds_status = ZeroParamStatus.AVAILABLE
    if not persistent:
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        stand_in.ds_status = ZeroParamStatus.NOT_AVAILABLE

    def all_gather(*_: Any, **__: Any) -> None:
        raise AssertionError(f"parameter {number} was gathered, which is a collective call")

    stand_in.all_gather = all_gather


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize(
    ("whole", "first"), [((), "body.weight"), (("body.weight", "body.bias"), "body.weight"), (None, "head.weight")]
)
def test_parameters_of_deepspeed_stage_3_are_refused_by_name(
    tmp_path: Path, attached: bool, whole: tuple[str, ...] | None, first: str
) -> None:
    """Partitioned, partitioned except for small ones that stay whole, and where only a part is DeepSpeed's."""
    network = nn.Sequential()
    network.add_module("body", nn.Linear(4, 6))
    network.add_module("gate", nd.Gate(6))
    network.add_module("head", nn.Linear(6, 3))
    recorder = nd.Recorder(network, ["ntk"], {"test": torch.randn(5, 4)}, path=tmp_path / "run")
    for number, (name, parameter) in enumerate(network.named_parameters()):
        if whole is not None:
            partitioned(parameter, number, persistent=name in whole)
        elif name == "head.weight":
            partitioned(parameter, number, persistent=False)
    with pytest.raises(ConfigurationError) as refused, recorder.attach() if attached else nullcontext():
        recorder.record()
    assert f"found parameter '{first}' sharded over processes by DeepSpeed ZeRO stage 3, expected" in str(refused.value)
    assert not (tmp_path / "run").exists()
