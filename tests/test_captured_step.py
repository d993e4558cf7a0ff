"""Replayed steps against steps run anew; needs a CUDA device, as the graphs do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkdyn import Linearizer
from ntkdyn.captured_step import CapturedStep
from ntkdyn.datasets import Dataset
from ntkdyn.experiments.networks import NETWORKS, build_network
from ntkdyn.gates import learn_slopes, weights
from ntkdyn.training_loop import TrainingLoop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEPTHS = {
    "resnet50": 14, "resnet18": 10, "vgg": 11, "repvgg": 10, "vit": 2, "mlp": 2, "plain": 8, "resnet": 8,
    "resnet-preactivation": 8,
}  # fmt: skip
STEPS = 12


def data(size: int) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(32, 2, size, size, generator=generator, dtype=torch.float64)
    return Dataset(inputs, torch.arange(32) % 3, 3)


def trained(
    name: str, captured: bool, change: Callable[[nn.Module], Callable[[int], None]] | None = None
) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    samples = data(4 if name in ("mlp", "vit") else 8)
    options = {"patch": 2, "heads": 2} if name == "vit" else {}
    model = build_network(name, samples.inputs[:4], 3, width=4, depth=DEPTHS[name], options=options).double().cuda()
    learn_slopes(model, False)
    optimizer = torch.optim.SGD(list(weights(model).values()), lr=0.02, momentum=0.9)
    values: list[float] = []
    loop = TrainingLoop(
        model=model,
        optimizer=optimizer,
        epoch_data=lambda epoch: samples,
        batch_size=8,
        steps_per_epoch=4,
        last_step=STEPS,
        after_step=change(model) if change else None,
        captured=captured,
    )
    check = loop.check

    def noted(value: float) -> None:
        values.append(value)
        check(value)

    loop.check = noted  # type: ignore[method-assign]
    loop.run()
    return model, values


def same(one: tuple[nn.Module, list[float]], other: tuple[nn.Module, list[float]]) -> None:
    assert one[1] == pytest.approx(other[1], rel=1e-8)
    assert len(one[1]) == STEPS
    states: list[dict[str, Any]] = [model.state_dict() for model, _ in (one, other)]
    assert list(states[0]) == list(states[1])
    for name, found in states[0].items():
        expected: Tensor = states[1][name]
        assert torch.allclose(found.double(), expected.double(), rtol=1e-8, atol=1e-9), name


def ramp(model: nn.Module) -> Callable[[int], None]:
    """Slopes learn from the third step on, freeze by and by, and stand still from the ninth on."""
    owner: list[Linearizer] = []

    def after_step(step: int) -> None:
        if step == 2:
            learn_slopes(model, True)
            owner.append(Linearizer(model, remaining=0.25, steps=6))
        elif owner and not owner[0].done:
            owner[0].step()
            learn_slopes(model, not owner[0].done)

    return after_step


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_replayed_step_is_the_step(name: str) -> None:
    same(trained(name, captured=True), trained(name, captured=False))


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_slopes_that_learn_and_freeze_are_seen(name: str) -> None:
    found, expected = trained(name, True, ramp), trained(name, False, ramp)
    same(found, expected)
    frozen = sum(int(part.sum()) for key, part in found[0].state_dict().items() if key.endswith("frozen"))
    assert frozen > 0


def test_the_network_is_left_as_it_was_by_the_capture() -> None:
    samples = data(8)
    torch.manual_seed(0)
    model = build_network("resnet", samples.inputs[:4], 3, width=4, depth=8, options={}).double().cuda()
    inputs, targets = (part[:8].cuda() for part in (samples.inputs, samples.targets))
    before = {key: part.clone() for key, part in model.state_dict().items()}
    drawn = torch.cuda.get_rng_state()
    step = CapturedStep(model, lambda x, y: nn.functional.cross_entropy(model(x), y), inputs, targets)
    assert torch.equal(torch.cuda.get_rng_state(), drawn)
    for key, part in model.state_dict().items():
        assert torch.equal(part, before[key]), key
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not step.fits(inputs[:4], targets[:4])
    learn_slopes(model, False)
    assert not step.fits(inputs, targets)
