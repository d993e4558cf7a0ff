"""Interventions before the switch: what they change up to it, and that nothing is changed after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from ntkdyn.checkpoint import Checkpoint, load
from ntkdyn.configuration import configure
from ntkdyn.datasets import digit_pairs
from ntkdyn.errors import ConfigurationError
from ntkdyn.experiment import run_experiment
from ntkdyn.experiments.advantage_config import BEFORE, AdvantageConfig
from ntkdyn.experiments.before import Intervention
from ntkdyn.experiments.nonlinear_advantage import NonlinearAdvantage
from ntkdyn.experiments.training import Training
from ntkdyn.kernel import empirical_ntk
from ntkdyn.results import Run

STEPS_PER_EPOCH = 4
SWITCH = 3 * STEPS_PER_EPOCH
SMALL: dict[str, Any] = {
    "width": 8, "depth": 2, "epochs": 8, "pairs": 128, "batch_size": 32, "test_pairs": 200, "probe_per_class": 2,
    "latest_start": 3, "ramp_epochs": 2, "settle_epochs": 1, "remaining": 0.25, "start_epoch": 3,
}  # fmt: skip
INTERVENTIONS: list[dict[str, Any]] = [
    {"rate_before": 0.1},
    {"scale_before": 2.0},
    {"labels_before": "random"},
    {"labels_before": "parity"},
    {"train_before": "readout"},
    {"anchor_before": 1.0},
]


def config(**changes: Any) -> AdvantageConfig:
    return configure(AdvantageConfig, SMALL | changes)


def run(path: Path, settings: AdvantageConfig, *, start: Checkpoint | None = None, resume: bool = False) -> Checkpoint:
    steps = {0, 4, SWITCH, SWITCH + 4, 32}
    run_experiment(
        NonlinearAdvantage(), settings, seed=1, path=path, start=start, probes=["units"], resume=resume,
        checkpoint_steps=frozenset(steps),
    )  # fmt: skip
    return load(path / "checkpoints" / "32")


@pytest.mark.parametrize("changes", INTERVENTIONS, ids=json.dumps)
def test_an_arm_of_the_trunk_equals_one_that_trains_alone(changes: dict[str, Any], tmp_path: Path) -> None:
    settings = config(**changes)
    origin = NonlinearAdvantage().trunk(settings)
    assert origin is not None
    trunk, step = origin
    assert (step, trunk.start_epoch, trunk.before, trunk.intervention) == (SWITCH, 3, next(iter(changes)), "none")
    assert trunk.is_trunk
    assert NonlinearAdvantage().trunk(trunk) is None
    run(tmp_path / "trunk", trunk)
    branch = run(tmp_path / "arm", settings, start=load(tmp_path / "trunk" / "checkpoints" / str(step)))
    alone = run(tmp_path / "alone", settings)
    assert all(torch.equal(value, alone.model[name]) for name, value in branch.model.items())
    assert Run.open(tmp_path / "arm").results == Run.open(tmp_path / "alone").results


@pytest.mark.parametrize("changes", INTERVENTIONS, ids=json.dumps)
def test_the_intervention_matters_and_ends_at_the_switch(changes: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path / "plain", config(intervention="none", start_epoch=0))
    run(tmp_path / "moved", config(**changes).trunk())
    folders = [tmp_path / name / "checkpoints" for name in ("plain", "moved")]
    first, second = (load(folder / "0") for folder in folders)
    assert all(torch.equal(value, second.model[name]) for name, value in first.model.items())
    first, second = (load(folder / str(SWITCH)) for folder in folders)
    assert not all(torch.equal(value, second.model[name]) for name, value in first.model.items())

    training = Training.of(config(**changes), seed=1)
    model, _ = training.build()
    intervention = Intervention(training, config(**changes), model, switch=SWITCH)
    x, y = training.data.test[:8]
    assert intervention.rate_factor(SWITCH) == 1
    assert torch.equal(intervention.epoch_data(3).targets, training.epoch_data(3).targets)
    if intervention.objective is not None:
        after = intervention.objective(SWITCH, x, y)
        assert torch.equal(after, functional.cross_entropy(model(x), y))


@pytest.mark.parametrize("changes", [{"scale_before": 2.0}, {"train_before": "readout"}], ids=json.dumps)
def test_a_cut_off_run_goes_on_as_if_it_was_not(changes: dict[str, Any], tmp_path: Path) -> None:
    settings = config(**changes)
    whole, cut = run(tmp_path / "whole", settings), tmp_path / "cut"
    run(cut, settings)
    # As a kill between two checkpoints before the switch leaves it.
    for step in (SWITCH, SWITCH + 4, 32):
        for file in (cut / "checkpoints" / str(step)).iterdir():
            file.unlink()
    manifest = json.loads((cut / "run.json").read_text())
    manifest["status"] = "running"
    manifest.pop("crc32", None)
    (cut / "run.json").write_text(json.dumps(manifest))
    again = run(cut, settings, resume=True)
    assert all(torch.equal(value, again.model[name]) for name, value in whole.model.items())


def test_only_the_readout_learns(tmp_path: Path) -> None:
    run(tmp_path, config(train_before="readout"))
    start, end = (load(tmp_path / "checkpoints" / str(step)).model for step in (0, SWITCH))
    for name, value in start.items():
        assert torch.equal(value, end[name]) != name.startswith("readout"), name
    # The recorded kernel is that of all weights all the same.
    assert len(Run.open(tmp_path).manifest["parameters"]) == 6
    later = load(tmp_path / "checkpoints" / str(SWITCH + 4)).model
    assert all(not torch.equal(value, later[name]) for name, value in end.items() if name.endswith("weight"))


def test_the_scaled_output_is_that_of_the_motion_since_the_start() -> None:
    settings = config(scale_before=2.0)
    training = Training.of(settings, seed=0)
    model, optimizer = training.build()
    intervention = Intervention(training, settings, model, switch=SWITCH)
    assert intervention.rate_factor(0) == 1 / 2  # Adam takes the other factor away
    x, y = training.data.test[:64]
    with torch.no_grad():
        start = model(x)
    assert intervention.objective is not None
    for _ in range(3):
        optimizer.zero_grad()
        intervention.objective(0, x, y).backward()
        optimizer.step()
    expected = functional.cross_entropy(2 * (model(x) - start), y)
    torch.testing.assert_close(intervention.objective(0, x, y), expected)
    assert expected < 2.3  # below ln 10, where it began


def test_the_scaled_output_starts_at_zero_and_moves_weights_by_one_over_the_scale() -> None:
    # dw = -(eta / a^2) a J^T L'(0): a plain gradient step from outputs 0, divided by a.
    settings = config(scale_before=4.0, optimizer="sgd", momentum=0.0, learning_rate=0.1)
    training = Training.of(settings, seed=0)
    model, optimizer = training.build()
    intervention = Intervention(training, settings, model, switch=SWITCH)
    x, y = training.data.test[:32]
    outputs = model(x)
    upstream = (torch.softmax(torch.zeros_like(outputs), 1) - functional.one_hot(y, 10)) / len(y)
    weights = [part for part in model.parameters() if part.requires_grad]
    expected = [-0.1 / 4 * gradient for gradient in torch.autograd.grad(outputs, weights, upstream)]
    before = [part.detach().clone() for part in weights]
    assert intervention.objective is not None
    intervention.objective(0, x, y).backward()
    optimizer.param_groups[0]["lr"] = 0.1 * intervention.rate_factor(0)
    optimizer.step()
    for part, old, change in zip(weights, before, expected, strict=True):
        torch.testing.assert_close(part.detach() - old, change, rtol=1e-4, atol=1e-7)


def test_the_anchor_is_the_relative_motion_of_the_kernel() -> None:
    settings = config(anchor_before=3.0)
    training = Training.of(settings, seed=0)
    model, _ = training.build()
    model.double()
    train = training.data.train
    object.__setattr__(train, "inputs", train.inputs.double())
    inputs = training.calibration[:16]
    x, y = (part[:8] for part in (train.inputs, train.targets))
    intervention = Intervention(training, settings, model, switch=SWITCH)
    kernel = empirical_ntk(model, inputs, engine="reference")
    weights = [part for name, part in model.named_parameters() if "slope" not in name]
    with torch.no_grad():
        for part in weights:
            part.add_(torch.randn(part.shape, generator=torch.Generator().manual_seed(0), dtype=part.dtype), alpha=0.05)
    moved = empirical_ntk(model, inputs, engine="reference")
    assert intervention.objective is not None
    total = intervention.objective(0, x, y)
    center = torch.eye(16, dtype=torch.float64) - 1 / 16
    kernel, moved = (center @ part @ center for part in (kernel, moved))
    drift = (moved - kernel).square().sum() / kernel.square().sum()
    torch.testing.assert_close(total, functional.cross_entropy(model(x), y) + 3 * drift)
    total.backward()
    weight, step = model.linear1.weight, 1e-6
    with torch.no_grad():
        row = (weight.grad.abs().argmax() // weight.shape[1]).item()
        column = (weight.grad.abs().argmax() % weight.shape[1]).item()
        values = []
        for sign in (1, -1):
            weight[row, column] += sign * step
            values.append(intervention.objective(0, x, y))
            weight[row, column] -= sign * step
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), weight.grad[row, column], rtol=1e-5, atol=1e-8)


def test_other_labels_on_the_same_inputs() -> None:
    training = Training.of(config(labels_before="parity"), seed=5)
    own, other, random = (
        part.epoch_data(2) for part in (training, training.with_labels("parity"), training.with_labels("random"))
    )
    assert torch.equal(own.inputs, other.inputs)
    assert torch.equal(own.inputs, random.inputs)
    rule = digit_pairs("parity", pairs=128).epoch(seed=5, data_order=0, epoch=2)
    assert torch.equal(rule.inputs, own.inputs)
    assert torch.equal(other.targets, rule.targets)
    agreement = (random.targets == own.targets).double().mean()
    assert 0 < agreement < 0.25
    assert not torch.equal(random.targets, training.with_labels("random").epoch_data(3).targets)


def test_what_cannot_be_intervened_on() -> None:
    with pytest.raises(
        ConfigurationError, match=r"labels_before: found 'sum' with 19 labels, expected .* at most the 10"
    ):
        Training.of(config(), seed=0).with_labels("sum")
    training = Training.of(config(), seed=0)
    batch = nn.Sequential(nn.Linear(128, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 10))
    with pytest.raises(ConfigurationError, match="anchor_before: found BatchNorm"):
        Intervention(training, config(anchor_before=1.0), batch, switch=SWITCH)
    with pytest.raises(ConfigurationError, match="train_before: found Sequential without a linear layer"):
        Intervention(training, config(train_before="readout"), nn.Sequential(nn.Conv1d(1, 1, 1)), switch=SWITCH)


def test_own_labels_are_no_intervention() -> None:
    assert config(labels_before="sum10").before is None
    assert config(labels_before="sum10") == config()
    assert set(BEFORE) <= set(AdvantageConfig.model_fields)
