"""Learning rates in a recording: the rates that the applied steps used, and their sum."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntkdyn as nd
from ntkdyn.cli import main
from ntkdyn.comparison import compare
from ntkdyn.recorder import learning_rates
from ntkdyn.recorder.state import initial_state

X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1])


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nd.Gate(5), nn.Linear(5, 2))


def recorder_of(model: nn.Module, path: Path, **options: Any) -> nd.Recorder:
    return nd.Recorder(model, options.pop("probes", ["outputs"]), {"test": (X, Y)}, path=path, **options)


def attached_for_one_step(recorder: nd.Recorder, optimizer: torch.optim.Optimizer, **options: Any) -> None:
    with recorder.attach(optimizer, **options):
        backward(recorder._model)
        optimizer.step()


def backward(model: nn.Module) -> None:
    model.zero_grad()
    nn.functional.cross_entropy(model(X), Y).backward()


@pytest.fixture
def run(tmp_path: Path) -> nd.Run:
    """Three steps at 0.1 and two at 0.01, every step recorded."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3])
    with recorder_of(model, tmp_path / "run").attach(optimizer) as recorder:
        for _ in range(5):
            backward(model)
            optimizer.step()
            scheduler.step()
    recorder.close()
    return nd.Run.open(tmp_path / "run")


def test_rates_and_their_sum(run: nd.Run) -> None:
    assert run.steps("learning_rate").tolist() == [0, 1, 2, 3, 4, 5]
    # Before the first step it is the rate to come.
    np.testing.assert_allclose(run["learning_rate/value"], [0.1, 0.1, 0.1, 0.1, 0.01, 0.01], rtol=1e-12)
    np.testing.assert_allclose(run["learning_rate/sum"], [0, 0.1, 0.2, 0.3, 0.31, 0.32], rtol=1e-12)
    assert run["learning_rate/sum"].dtype == np.float64
    assert run.attributes("learning_rate") == {"optimizer": "SGD", "parameter_group": 0, "since_step": 0}


def test_it_is_a_group_as_others(run: nd.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compare([run], "outputs/test/accuracy", against="lr_time")
    np.testing.assert_allclose(found.groups["x"], [0, 0.1, 0.2, 0.3, 0.31, 0.32], rtol=1e-12)
    assert float(run.to_xarray()["learning_rate/sum"].sel(step=5)) == pytest.approx(0.32)
    for arguments in (["info", str(run.path)], ["export", str(run.path), "--to", "csv"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    assert "learning_rate/sum [step=6] <f8 unit 1" in capsys.readouterr().out
    rows = (tmp_path / "run-csv" / "learning_rate.csv").read_text().splitlines()
    assert rows[0] == "step,epoch,value,sum"
    assert len(rows) == 7


def test_the_first_group_of_the_last_optimizer_counts(tmp_path: Path) -> None:
    model = network()
    other = torch.optim.SGD(model[0].parameters(), lr=7.0)
    groups = [{"params": [model[2].weight], "lr": 0.25}, {"params": [model[2].bias], "lr": 5.0}]
    counted = torch.optim.Adam(groups)
    with recorder_of(model, tmp_path / "run", schedule=nd.every(2)).attach(other, counted) as recorder:
        for _ in range(3):
            backward(model)
            other.step()
            counted.step()
            counted.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    recorder.close()
    run = nd.Run.open(tmp_path / "run")
    assert run["learning_rate/value"].tolist() == [0.25, 0.25, 0.25]
    assert run["learning_rate/sum"].tolist() == [0, 0.5, 0.75]


@pytest.mark.parametrize("fused", [False, True])
def test_steps_skipped_by_loss_scaling_do_not_count(fused: bool, tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with recorder_of(model, tmp_path / "run").attach(optimizer) as recorder:
        for index in range(4):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(X), Y)).backward()
            if index in (1, 2):
                model[0].weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
    recorder.close()
    assert nd.Run.open(tmp_path / "run")["learning_rate/sum"].tolist() == [0, 0.5, 1]


@pytest.mark.parametrize("kind", [float, Tensor])
def test_a_scheduler_that_is_a_hook_before_ours(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_rates, "_MOST_WAITING", 3)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0 if kind is float else torch.tensor(1.0))

    def halve(*_: Any) -> None:
        # A rate that is a tensor is written in place.
        optimizer.param_groups[0]["lr"] /= 2

    optimizer.register_step_post_hook(halve)
    with recorder_of(model, tmp_path / "run", schedule=nd.every(4)).attach(optimizer) as recorder:
        for _ in range(9):
            backward(model)
            optimizer.step()
    recorder.close()
    run = nd.Run.open(tmp_path / "run")
    assert run["learning_rate/value"].tolist() == [1, 2**-3, 2**-7, 2**-8]
    assert run["learning_rate/sum"].tolist() == [0, 2 - 2**-3, 2 - 2**-7, 2 - 2**-8]


class Rateless(torch.optim.Optimizer):
    """An optimizer that has no learning rate, or None for one."""

    def __init__(self, parameters: Any, defaults: dict[str, Any]) -> None:
        super().__init__(parameters, defaults)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change nothing."""


@pytest.mark.parametrize("defaults", [{}, {"lr": None}])
def test_without_a_rate_there_is_no_group(defaults: dict[str, Any], tmp_path: Path) -> None:
    model = network()
    optimizer = Rateless(model.parameters(), defaults)
    with recorder_of(model, tmp_path / "run").attach(optimizer) as recorder:
        optimizer.step()
    recorder.close()
    assert nd.Run.open(tmp_path / "run").groups() == ["outputs/test"]


def test_recorded_by_hand_there_is_no_group(tmp_path: Path) -> None:
    recorder = recorder_of(network(), tmp_path / "run")
    with recorder.attach():
        recorder.record()
    recorder.close()
    assert nd.Run.open(tmp_path / "run").groups() == ["outputs/test"]


def test_a_probe_of_that_name_takes_its_place(tmp_path: Path) -> None:
    class Own:
        """A constant."""

        name = "learning_rate"
        uses_inputs = False

        def fields(self, snapshot: nd.Snapshot) -> list[nd.Field]:
            return [nd.Field(name="sum")]

        def measure(self, snapshot: nd.Snapshot) -> dict[str, float]:
            return {"sum": 3.0}

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorder_of(model, tmp_path / "run", probes=[Own()]).attach(optimizer) as recorder:
        backward(model)
        optimizer.step()
    recorder.close()
    assert nd.Run.open(tmp_path / "run")["learning_rate/sum"].tolist() == [3, 3]


def test_what_was_trained_before_is_known_by_a_parent_only(tmp_path: Path) -> None:
    def sums(name: str, first_step: int, state: dict[str, Any] | None) -> tuple[list[float], int]:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        recorder = recorder_of(model, tmp_path / name)
        if state is not None:
            recorder.load_state_dict(state)
        with recorder.attach(optimizer, first_step=first_step):
            backward(model)
            optimizer.step()
        states.append(recorder.state_dict())
        recorder.close()
        run = nd.Run.open(tmp_path / name)
        return run["learning_rate/sum"].tolist(), run.attributes("learning_rate")["since_step"]

    states: list[dict[str, Any]] = []
    assert sums("trunk", 0, None) == ([0, 0.5], 0)
    branch = initial_state(None, states[0])
    assert sums("arm", 1, branch) == ([0.5, 1], 0)
    # Not where it branched from, but from the beginning: a training of its own.
    assert sums("again", 0, branch) == ([0, 0.5], 0)
    assert sums("later", 8, None) == ([0, 0.5], 8)


def test_attached_again_it_counts_on(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    recorder = recorder_of(model, tmp_path / "run")
    for _ in range(2):
        with recorder.attach(optimizer):
            backward(model)
            optimizer.step()
        # Without an optimizer nothing is said of rates.
        recorder.record(recorder.step)
    recorder.close()
    run = nd.Run.open(tmp_path / "run")
    assert run.steps("learning_rate").tolist() == run.steps("outputs").tolist() == [0, 1, 2]
    assert run["learning_rate/sum"].tolist() == [0, 0.5, 1]


def test_behind_steps_that_nobody_counted_the_sum_is_unknown(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    recorder = recorder_of(model, tmp_path / "run")
    attached_for_one_step(recorder, optimizer)
    optimizer.param_groups[0]["lr"] = 0.25
    with pytest.warns(RuntimeWarning, match=r"found 1 of 3 applied steps counted, .*; learning_rate/sum is NaN"):
        attached_for_one_step(recorder, optimizer, first_step=3)
    state = json.loads(json.dumps(recorder.state_dict(), allow_nan=False))
    recorder.close()
    # Told once, and unknown for good.
    recorder.load_state_dict(state)
    with warnings.catch_warnings(action="error"):
        attached_for_one_step(recorder, optimizer)
    recorder.close()
    run = nd.Run.open(tmp_path / "run")
    assert run.steps("learning_rate").tolist() == [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(run["learning_rate/sum"], [0, 0.5, np.nan, np.nan, np.nan])
    assert run["learning_rate/value"].tolist() == [0.5, 0.5, 0.25, 0.25, 0.25]


def test_a_state_without_rates_leaves_none(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    recorder = recorder_of(model, tmp_path / "run")
    with recorder.attach(optimizer):
        backward(model)
        optimizer.step()
        # As those were that older versions wrote.
        state = recorder.state_dict() | {"learning_rate": None}
        backward(model)
        optimizer.step()
    recorder.close()
    recorder.load_state_dict(state)
    with pytest.warns(RuntimeWarning, match="found 0 of 1 applied steps counted"):
        attached_for_one_step(recorder, optimizer)
    recorder.close()
    np.testing.assert_array_equal(nd.Run.open(tmp_path / "run")["learning_rate/sum"], [0, 0.5, np.nan])
