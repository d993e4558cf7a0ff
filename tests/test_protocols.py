"""Experiments on shared settings: core-network, collapse, layerwise-vs-channelwise, linearized-training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

from ntkdyn.checkpoint import load
from ntkdyn.configuration import configure
from ntkdyn.datasets import digit_pairs
from ntkdyn.errors import ConfigurationError
from ntkdyn.experiment import Experiment, run_experiment
from ntkdyn.experiments.collapse import Collapse
from ntkdyn.experiments.core_network import CoreNetwork
from ntkdyn.experiments.layerwise_vs_channelwise import LayerwiseVsChannelwise
from ntkdyn.experiments.linearized_training import LinearizedTraining, TaylorNetwork
from ntkdyn.experiments.networks import GatedMLP, GatedResNet
from ntkdyn.gates import gates, nonlinear_units
from ntkdyn.results import Run

SMALL: dict[str, Any] = {
    "width": 8, "depth": 2, "epochs": 8, "pairs": 128, "batch_size": 32, "test_pairs": 200, "probe_per_class": 2,
}  # fmt: skip
LINEARIZATION = {"start_epoch": 3, "ramp_epochs": 2, "settle_epochs": 1, "remaining": 0.25}
STEPS_PER_EPOCH = 4
CASES: list[tuple[Experiment, dict[str, Any]]] = [
    (CoreNetwork(), {"start_epoch": 3, "ramp_epochs": 2, "penalty_weight": 0.1}),
    (Collapse(), LINEARIZATION),
    (LayerwiseVsChannelwise(), LINEARIZATION | {"granularity": "layer", "remaining": 0.5}),
    (LinearizedTraining(), {"start_epoch": 3, "child": "weights"}),
    (LinearizedTraining(), LINEARIZATION | {"child": "units"}),
]


@pytest.mark.parametrize(("experiment", "changes"), CASES, ids=lambda part: getattr(part, "name", None))
def test_an_arm_of_the_trunk_equals_one_that_trains_alone(
    experiment: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    assert isinstance(experiment, Experiment)
    config = configure(experiment.Config, SMALL | changes)
    trunk, step = experiment.trunk(config)
    assert step == 3 * STEPS_PER_EPOCH
    assert experiment.trunk(trunk) is None
    run_experiment(experiment, trunk, seed=1, path=tmp_path / "trunk", checkpoint_steps=frozenset({step}))
    start = load(tmp_path / "trunk" / "checkpoints" / str(step))
    arm = run_experiment(experiment, config, seed=1, path=tmp_path / "arm", start=start)
    alone = run_experiment(experiment, config, seed=1, path=tmp_path / "alone")
    np.testing.assert_equal(dict(arm), dict(alone))
    assert set(arm) == set(experiment.results)
    assert arm["diverged"] == 0
    first, second = Run.open(tmp_path / "arm"), Run.open(tmp_path / "alone")
    assert first.manifest["final_weights_sha256"] == second.manifest["final_weights_sha256"]


@pytest.mark.parametrize("experiment", {type(case[0]): case[0] for case in CASES}.values(), ids=lambda e: e.name)
def test_a_configuration_survives_its_dump(experiment: Any) -> None:
    for changes in ({}, {"data": "x.npz"}, {"model": "net.py:f"}):
        config = configure(experiment.Config, changes)
        assert configure(experiment.Config, config.model_dump(mode="json")) == config


def core(path: Path, seed: int = 0, **changes: Any) -> Any:
    settings = SMALL | {"start_epoch": 3, "ramp_epochs": 2, "penalty_weight": 0.1} | changes
    return run_experiment(
        CoreNetwork(), configure(CoreNetwork.Config, settings), seed=seed, path=path, probes=["units"]
    )


def test_a_higher_price_leaves_a_smaller_core(tmp_path: Path) -> None:
    left = [
        core(tmp_path / str(weight), width=16, penalty_weight=weight)["active_units"]
        for weight in (0.0, 0.15, 0.4, 2.0)
    ]
    assert left == sorted(left, reverse=True)
    assert left[0] == 32
    assert left[-1] < 32
    # The price acts during the ramp alone, and what is frozen stays frozen.
    active = Run.open(tmp_path / "0.4")["units/active"].sum(axis=1)
    assert (np.diff(active) <= 0).all()


def test_down_to_a_linear_network(tmp_path: Path) -> None:
    config = configure(Collapse.Config, SMALL | LINEARIZATION | {"remaining": 0.0})
    results = run_experiment(Collapse(), config, seed=0, path=tmp_path, probes=["units"])
    assert (results["active_units"], results["napl"], results["diverged"]) == (0, 0, 0)
    assert np.isnan(results["survivor_nonlinearity"])


@pytest.mark.parametrize("kind", ["scratch", "scratch-wide"])
def test_shallow_networks_from_scratch(kind: str, tmp_path: Path) -> None:
    experiment = Collapse()
    config = configure(Collapse.Config, SMALL | {"depth": 4, "width": 16, "kind": kind, "shallow_depth": 2})
    assert experiment.trunk(config) is None
    results = run_experiment(experiment, config, seed=0, path=tmp_path / "run", probes=["units"])
    assert results["napl"] == 2

    def parameters(width: int, depth: int) -> int:
        return 128 * width + width + (depth - 1) * (width * width + width) + width * 10 + 10

    whole = parameters(16, 4)
    if kind == "scratch":
        assert results["parameters"] == parameters(16, 2)
    else:
        best = min(range(16, 64), key=lambda width: abs(parameters(width, 2) - whole))
        assert results["parameters"] == parameters(best, 2)
        assert abs(results["parameters"] / whole - 1) < 0.05


@pytest.mark.parametrize(
    ("experiment", "changes", "message"),
    [
        (CoreNetwork, {"start_epoch": 7, "ramp_epochs": 2}, "setting 'start_epoch': found 7, expected at most 6"),
        (CoreNetwork, {"penalty_weight": -0.1}, "setting 'penalty_weight': found -0.1"),
        (Collapse, {"kind": "scratch"}, "setting 'shallow_depth': found None, expected a depth with kind='scratch'"),
        (Collapse, {"start_epoch": 3, "shallow_depth": 1}, "found 1, expected none with kind='extracted'"),
        (Collapse, {"start_epoch": 7}, "setting 'start_epoch': found 7, expected at most"),
        (LinearizedTraining, {"start_epoch": 9}, "setting 'start_epoch': found 9, expected at most epochs=8"),
        (
            LinearizedTraining,
            {"child": "both"},
            "setting 'child': found 'both', expected 'weights', 'units' or 'network'",
        ),
    ],
)
def test_impossible_settings(experiment: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        configure(experiment.Config, SMALL | changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("network", ["mlp", "resnet"])
def test_the_expansion_is_first_order_in_the_weights(network: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = (
        GatedMLP(12, 3, width=6, depth=2) if network == "mlp" else GatedResNet(1, 3, blocks=1, widths=(2,))
    )
    for gate in gates(model).values():
        gate.slope.data.fill_(0.3)
    model.double().eval()
    inputs = (
        torch.randn(3, 12, dtype=torch.float64) if network == "mlp" else torch.randn(3, 1, 6, 6, dtype=torch.float64)
    )
    if network == "resnet":
        # Statistics of nothing would be those of evaluation mode.
        model.train()(inputs)
        model.eval()
    child = TaylorNetwork(model, calibration=inputs)
    origin = child.origin
    torch.testing.assert_close(child(inputs), origin(inputs))
    generator = torch.Generator().manual_seed(1)
    for part in child.shift:
        part.data = torch.randn(part.shape, generator=generator, dtype=torch.float64)
    present = dict(origin.named_parameters())
    weights = {name: present[name] for name in child.names}

    def one(values: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return functional_call(origin, values, (sample[None],))[0]

    jacobian = vmap(jacrev(one), (None, 0))(weights, inputs)
    change = sum(
        torch.einsum("nc...,...->nc", jacobian[name], shift)
        for name, shift in zip(child.names, child.shift, strict=True)
    )
    torch.testing.assert_close(child(inputs), origin(inputs) + change)
    # Its gradient in the shift is that of the network at w_t, wherever the shift is.
    upstream = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(child(inputs), list(child.shift), upstream)
    for name, gradient in zip(child.names, found, strict=True):
        torch.testing.assert_close(gradient, torch.einsum("nc...,nc->...", jacobian[name], upstream))
    assert "slope" not in " ".join(child.names)
    assert not child.train().origin.training


def test_the_expansion_leaves_its_network_alone() -> None:
    model = GatedMLP(12, 3, width=6, depth=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    child = TaylorNetwork(model, calibration=torch.randn(4, 12))
    child(torch.randn(4, 12)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(part.requires_grad and part.grad is None for part in model.parameters())
    assert nonlinear_units(model).active_total == 12


def test_a_child_in_the_weights_goes_on_with_the_trunks_optimizer(tmp_path: Path) -> None:
    config = configure(LinearizedTraining.Config, SMALL | {"start_epoch": 3})
    last = 8 * STEPS_PER_EPOCH
    run_experiment(LinearizedTraining(), config, seed=1, path=tmp_path, checkpoint_steps=frozenset({12, last}))
    first, end = (load(tmp_path / "checkpoints" / str(step)).optimizer for step in (12, last))
    assert {int(state["step"]) for state in first["state"].values()} == {12}
    assert {int(state["step"]) for state in end["state"].values()} == {last}
    assert any(bool(state["exp_avg"].any()) for state in first["state"].values())


@pytest.mark.parametrize(
    "changes", [{"child": "weights"}, LINEARIZATION | {"child": "units"}], ids=["weights", "units"]
)
def test_divergence_before_the_switch_is_divergence(changes: dict[str, Any], tmp_path: Path) -> None:
    config = configure(LinearizedTraining.Config, SMALL | {"start_epoch": 3, "learning_rate": 1e30} | changes)
    results = run_experiment(LinearizedTraining(), config, seed=0, path=tmp_path)
    assert results["diverged"] == 1
    assert np.isnan(results["test_accuracy"])


def test_a_child_in_the_weights_learns(tmp_path: Path) -> None:
    settings = configure(
        LinearizedTraining.Config,
        {"epochs": 8, "width": 32, "depth": 2, "pairs": 512, "batch_size": 64, "test_pairs": 400, "task": "first"}
        | {"start_epoch": 2, "probe_per_class": 2},
    )
    results = run_experiment(LinearizedTraining(), settings, seed=0, path=tmp_path)
    assert results["test_accuracy"] > results["dense_accuracy"] + 0.05
    assert Run.open(tmp_path).steps("outputs/test").tolist() == [16, 64]
    assert len(digit_pairs("first", pairs=512).test) > 0
