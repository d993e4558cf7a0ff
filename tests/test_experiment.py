"""Settings from texts and files, the shared loop, and one run on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from ntkdyn.adam import Adam
from ntkdyn.checkpoint import load
from ntkdyn.configuration import configure, parse_assignment, parse_settings
from ntkdyn.datasets import Dataset
from ntkdyn.errors import ConfigurationError, DivergedTraining, RecordingExists
from ntkdyn.experiment import RecorderFactory, run_experiment
from ntkdyn.results import Run
from ntkdyn.schedule import at_steps, every
from ntkdyn.training_loop import TrainingLoop, evaluate, evaluate_batches, linear_tail


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    epochs: int = Field(2, ge=1)
    rate: float = 1e-2
    kind: Literal["plain", "fancy"] = "plain"

    @model_validator(mode="after")
    def _fits(self) -> Settings:
        if self.kind == "fancy" and self.epochs > 5:
            raise ValueError(f"setting 'epochs': found {self.epochs}, expected at most 5 with kind='fancy'")
        return self


def test_texts_become_values() -> None:
    assert parse_assignment("a=3") == ("a", 3)
    assert parse_assignment("a = [1, 2]") == ("a", [1, 2])
    assert parse_assignment("a=b=c") == ("a", "b=c")
    assert parse_assignment('a="3"') == ("a", "3")
    assert parse_assignment("a=net.py:build") == ("a", "net.py:build")
    assert parse_assignment("a=1\nb = 2") == ("a", "1\nb = 2")
    for text in ("a", "=3", " =3"):
        with pytest.raises(ConfigurationError, match="found no KEY=VALUE"):
            parse_assignment(text)


def test_assignments_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('experiment = "x"\n[settings]\nepochs = 4\nrate = 0.5\n')
    assert parse_settings(Settings, file, ["epochs=3"]) == Settings(epochs=3, rate=0.5)
    assert parse_settings(Settings, None) == Settings()
    assert parse_settings(Settings, None, ["rate=1"]).rate == 1.0


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["epoch=3"], "setting 'epoch' is unknown; did you mean 'epochs'?"),
        (["zzz=3"], "setting 'zzz' is unknown; known are epochs, rate, kind"),
        (["epochs=0"], "setting 'epochs': found 0, expected greater than or equal to 1"),
        (["epochs=2.5"], "setting 'epochs': found 2.5, expected a valid integer"),
        (['epochs="2"'], "setting 'epochs': found '2', expected a valid integer"),
        (["kind=odd"], "setting 'kind': found 'odd', expected 'plain' or 'fancy'"),
        (["kind=fancy", "epochs=6"], "setting 'epochs': found 6, expected at most 5 with kind='fancy'"),
    ],
)
def test_bad_settings_are_named(assignments: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_settings(Settings, None, assignments)
    assert str(caught.value) == message


def test_all_problems_come_in_one_line() -> None:
    with pytest.raises(ConfigurationError) as caught:
        configure(Settings, {"epochs": 0, "colour": 1})
    assert "; " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = 3", "found epochs, expected one [settings] table"),
        ("seeds = 3\n[settings]\nepochs = 3", "seeds and grids belong to ntkdyn sweep"),
        ("settings = 3", "found settings that are no table"),
        ("= 3", "not readable as TOML"),
    ],
)
def test_bad_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        parse_settings(Settings, file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def samples(epoch: int) -> Dataset:
    generator = torch.Generator().manual_seed(epoch)
    inputs = torch.randn(40, 4, generator=generator)
    return Dataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 1).long(), 3)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
    settings = {"epoch_data": samples, "batch_size": 8, "steps_per_epoch": 5, "last_step": 20, "seed": 3} | options
    TrainingLoop(model=model, optimizer=optimizer, **settings).run()


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(equal(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


@pytest.mark.parametrize("step", [0, 5, 7, 20])
def test_a_branch_equals_uninterrupted_training(step: int, tmp_path: Path) -> None:
    rate = linear_tail(0.01, total_steps=20, tail_steps=8)
    torch.manual_seed(0)
    model = network()
    optimizer = Adam(model.parameters(), learning_rate=0.01)
    train(model, optimizer, learning_rate=rate, factory=RecorderFactory(tmp_path, checkpoint_steps=frozenset({step})))
    torch.manual_seed(99)
    branch = network()
    branch_optimizer = Adam(branch.parameters(), learning_rate=0.01)
    checkpoint = load(tmp_path / "checkpoints" / str(step))
    checkpoint.restore(branch, branch_optimizer)
    train(branch, branch_optimizer, learning_rate=rate, first_step=checkpoint.step)
    assert equal(dict(model.state_dict()), dict(branch.state_dict()))
    assert equal(optimizer.state_dict()["state"], branch_optimizer.state_dict()["state"])


def test_fit_equals_a_plain_loop() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    plain = nn.Linear(4, 3)
    plain.load_state_dict(model.state_dict())
    seen: list[int] = []
    train(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        learning_rate=linear_tail(0.1, total_steps=20, tail_steps=10),
        after_step=seen.append,
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 0.1 if step < 10 else 0.1 * (20 - step) / 10
        data = samples(step // 5)
        rows = slice(step % 5 * 8, step % 5 * 8 + 8)
        optimizer.zero_grad()
        functional.cross_entropy(plain(data.inputs[rows]), data.targets[rows]).backward()
        optimizer.step()
    torch.testing.assert_close(model.weight, plain.weight)
    assert seen == list(range(1, 21))


def test_inputs_may_be_several_tensors() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            result: Tensor = self.linear(first + second)
            return result

    class Halves:
        """Batches of the samples of an epoch, each input in two parts."""

        def __init__(self, epoch: int) -> None:
            self.data = samples(epoch)

        def __getitem__(self, index: slice) -> tuple[tuple[Tensor, Tensor], Tensor]:
            inputs, targets = self.data[index]
            return (inputs / 4, 3 * inputs / 4), targets

    torch.manual_seed(0)
    model, plain = Sum(), nn.Linear(4, 3)
    plain.load_state_dict(model.linear.state_dict())
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), epoch_data=Halves)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    torch.testing.assert_close(model.linear.weight, plain.weight)


def test_the_hooks_are_gone_on_every_way_out() -> None:
    model = network()
    optimizer = Adam(model.parameters(), learning_rate=0.01)
    train(model, optimizer)
    with pytest.raises(ZeroDivisionError):
        train(model, optimizer, after_step=lambda step: 1 // 0)
    assert not optimizer._optimizer_step_post_hooks


def test_divergence_is_named_and_the_weights_stay() -> None:
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    with pytest.raises(DivergedTraining, match="found loss nan at step 0, expected a finite number"):
        train(model, Adam(model.parameters(), learning_rate=0.01), loss=lambda y, t: y.sum() * math.nan)
    assert torch.equal(model.weight, before)


def test_evaluation_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    model = network()
    data = samples(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    accuracy, loss = evaluate(model, data, calibration=data.inputs, batch_size=7)
    assert model.training
    assert equal(before, dict(model.state_dict()))
    # Independent: a batch normalized by its own (unbiased) statistics, no dropout.
    hidden = model[0](data.inputs)
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=True) + 1e-5).sqrt()
    outputs = model[4](functional.relu(hidden))
    assert accuracy == pytest.approx(float((outputs.argmax(1) == data.targets).float().mean()))
    assert loss == pytest.approx(float(functional.cross_entropy(outputs, data.targets)), rel=1e-5)
    uncalibrated = evaluate(model, data)[1]
    assert uncalibrated == pytest.approx(float(functional.cross_entropy(model.eval()(data.inputs), data.targets)))


class Toy:
    """Smallest experiment: a linear network on ``samples``."""

    name = "toy"
    Config = Settings

    def run(self, config: Settings, *, seed: int, recorder: RecorderFactory, start: Any = None) -> dict[str, float]:
        torch.manual_seed(seed)
        model = nn.Linear(4, 3)
        optimizer = Adam(model.parameters(), learning_rate=config.rate)
        data = samples(0)
        recording = recorder(
            model,
            sets={"probe": (data.inputs[:6], data.targets[:6])},
            steps_per_epoch=5,
            total_steps=5 * config.epochs,
            schedule=at_steps([0, 5]),
            probes=["outputs"],
        )
        train(model, optimizer, last_step=5 * config.epochs, recorder=recording, factory=recorder)
        accuracy, loss = evaluate(model, data)
        return {"accuracy": accuracy, "loss": loss, "gap": math.nan}


def test_one_run_on_disk(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    results = run_experiment(
        Toy(),
        Settings(epochs=3),
        seed=7,
        path=tmp_path / "run",
        checkpoint_steps=frozenset({0, 10}),
        parent="trunks/abc/7/checkpoints/0",
        command="ntkdyn record toy",
    )
    assert torch.equal(state, torch.get_rng_state())
    run = Run.open(tmp_path / "run")
    assert run.seed == 7
    assert run.config == {"epochs": 3, "rate": 0.01, "kind": "plain"}
    assert run.manifest["status"] == "finished"
    assert run.manifest["experiment"] == "toy"
    assert run.manifest["parent"] == "trunks/abc/7/checkpoints/0"
    assert run.manifest["command"] == "ntkdyn record toy"
    assert run.results["accuracy"] == results["accuracy"]
    assert math.isnan(run.results["gap"])
    assert run.steps("outputs").tolist() == [0, 5, 15]
    assert load(tmp_path / "run" / "checkpoints" / "10").step == 10


def test_the_users_schedule_and_probes_win(tmp_path: Path) -> None:
    run_experiment(Toy(), Settings(), seed=0, path=tmp_path / "a", schedule=every(4))
    assert Run.open(tmp_path / "a").steps("outputs").tolist() == [0, 4, 8, 10]
    run_experiment(Toy(), Settings(), seed=0, path=tmp_path / "b", log_spaced=3, probes=["ntk"])
    run = Run.open(tmp_path / "b")
    assert run.groups() == ["learning_rate", "ntk/probe"]
    assert run.steps("ntk").tolist() == [0, 1, 3, 10]


def test_an_occupied_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(RecordingExists):
        run_experiment(Toy(), Settings(), seed=0, path=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_that_fails_is_not_finished(tmp_path: Path) -> None:
    class Failing(Toy):
        def run(self, config: Settings, *, seed: int, recorder: RecorderFactory, start: Any = None) -> dict[str, float]:
            super().run(config, seed=seed, recorder=recorder)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_experiment(Failing(), Settings(), seed=0, path=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] != "finished"


def test_an_experiment_without_a_recorder_is_named(tmp_path: Path) -> None:
    class Silent(Toy):
        def run(self, config: Settings, *, seed: int, recorder: RecorderFactory, start: Any = None) -> dict[str, float]:
            return {}

    with pytest.raises(ConfigurationError, match="experiment toy: recorded nothing"):
        run_experiment(Silent(), Settings(), seed=0, path=tmp_path / "run")


def test_evaluation_over_batches_of_any_targets() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(9, 3), torch.arange(9) % 2
    model = nn.Linear(3, 2)
    whole = evaluate(model, Dataset(x, y, 2))
    parts = evaluate_batches(model, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert parts[0] == whole[0]
    assert parts[1] == pytest.approx(whole[1], rel=1e-6)
    accuracy, loss = evaluate_batches(model, [(x, x[:, :2])], loss=functional.mse_loss)
    assert math.isnan(accuracy)
    assert loss == pytest.approx(functional.mse_loss(model(x), x[:, :2]).item())
    # Class numbers at every position: outputs [N, C, L], targets [N, L].
    long = nn.Conv1d(3, 2, 1)
    sequence, places = torch.randn(4, 3, 5), torch.randint(2, (4, 5))
    accuracy, _ = evaluate_batches(long, [(sequence, places)])
    assert accuracy == (long(sequence).argmax(1) == places).double().mean().item()
    with pytest.raises(ConfigurationError, match="evaluation: found no batch, expected at least one"):
        evaluate_batches(model, [])


def test_experiments_need_no_sklearn() -> None:
    import subprocess
    import sys

    code = "import sys, ntkdyn.experiment, ntkdyn.experiments.nonlinear_advantage; print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
