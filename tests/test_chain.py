"""Chains sent back by hand: every bit that autograd gives, and autograd for everything that is no chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ntkdyn.adam import Adam
from ntkdyn.chain import StackedChain, chain_of
from ntkdyn.datasets import Dataset
from ntkdyn.errors import DivergedTraining
from ntkdyn.experiments.networks import GatedMLP
from ntkdyn.gates import Gate, gates
from ntkdyn.training_loop import TrainingLoop


def chain(*, inputs: int = 7, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Layers with and without bias, two gates in a row, layer-wise and frozen ones, slopes of both signs."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 9), Gate(9), nn.Linear(9, 6, bias=False), Gate(6, granularity="layer"),
        Gate(6), nn.Linear(6, 6), nn.Linear(6, 5), Gate(5, dim=-1), nn.Linear(5, 4),
    )  # fmt: skip
    for gate in gates(model).values():
        with torch.no_grad():
            gate.slope.uniform_(-0.5, 1.5)
    model[2].freeze(torch.arange(9) % 3 == 0)
    model[8].freeze()
    return model.to(dtype)


def by_autograd(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Any) -> tuple[Tensor, list[Tensor | None]]:
    model.zero_grad()
    value = loss(model(inputs), targets)
    value.backward()
    return value.detach(), [one.grad for one in model.parameters()]


def by_hand(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Any) -> tuple[Tensor, list[Tensor | None]]:
    model.zero_grad()
    found = chain_of(model, inputs)
    assert found is not None
    value, send_back = found.loss(inputs, targets, loss)
    assert all(one.grad is None for one in model.parameters())
    send_back()
    return value.detach(), [one.grad for one in model.parameters()]


def assert_same_bits(found: tuple[Tensor, list[Tensor | None]], expected: tuple[Tensor, list[Tensor | None]]) -> None:
    for one, other in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one, other)
            assert one.dtype == other.dtype


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets[:, None]) ** 2).mean()


@pytest.mark.parametrize("loss", [functional.cross_entropy, squares])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 5, 128])
def test_gradients_are_those_of_autograd(size: int, dtype: torch.dtype, loss: Callable[..., Tensor]) -> None:
    model = chain(dtype=dtype)
    inputs, targets = torch.randn(size, 7, dtype=dtype), torch.randint(4, (size,))
    inputs[0] = 0.0  # preactivations at exactly 0
    assert_same_bits(by_hand(model, inputs, targets, loss), by_autograd(model, inputs, targets, loss))


@pytest.mark.parametrize("learning", ["0", "2", "1 3", "4", "9", "1 2 3 4 5 6 7 8 9", "7.bias"])
def test_only_what_learns_gets_gradients(learning: str) -> None:
    model = chain()
    wanted = learning.split()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted or name.split(".")[0] in wanted)
    inputs, targets = torch.randn(6, 7), torch.randint(4, (6,))
    if learning == "0":  # nothing
        assert all(gradient is None for gradient in by_hand(model, inputs, targets, functional.cross_entropy)[1])
        return
    assert_same_bits(
        by_hand(model, inputs, targets, functional.cross_entropy),
        by_autograd(model, inputs, targets, functional.cross_entropy),
    )


def test_images_are_flattened() -> None:
    model = chain(inputs=12)
    inputs, targets = torch.randn(6, 3, 2, 2), torch.randint(4, (6,))
    assert_same_bits(
        by_hand(model, inputs, targets, functional.cross_entropy),
        by_autograd(model, inputs, targets, functional.cross_entropy),
    )
    assert chain_of(model[1:], inputs) is None
    assert chain_of(model[1:], inputs.flatten(1)) is not None


def no_chains() -> dict[str, tuple[Callable[[], nn.Module], Tensor]]:
    shared, tied = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight

    def hooked(register: str) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4))
        getattr(model[0], register)(lambda *_: None)
        return model

    def watched() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4))
        model[0].weight.register_hook(lambda gradient: 2 * gradient)
        return model

    class Own(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) + 1

    class Doubled(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return 2 * super().forward(inputs)

    x = torch.randn(3, 4)
    return {
        "no Sequential": (lambda: nn.Linear(4, 4), x),
        "forward of its own": (lambda: Own(nn.Linear(4, 4)), x),
        "layer of its own": (lambda: nn.Sequential(Doubled(4, 4)), x),
        "another layer": (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), x),
        "used twice": (lambda: nn.Sequential(shared, shared), x),
        "tied": (lambda: tied, x),
        "empty": (nn.Sequential, x),
        "flattened only": (lambda: nn.Sequential(nn.Flatten()), x),
        "sequence": (lambda: nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 2, 4)),
        "single sample": (lambda: nn.Sequential(nn.Linear(4, 4)), x[0]),
        "other width": (lambda: nn.Sequential(nn.Linear(5, 4)), x),
        "gate of other width": (lambda: nn.Sequential(nn.Linear(4, 4), Gate(3)), x),
        "gate on samples": (lambda: nn.Sequential(nn.Linear(4, 3), Gate(3, dim=0)), x),
        "double": (lambda: nn.Sequential(nn.Linear(4, 4)), x.double()),
        "token ids": (lambda: nn.Sequential(nn.Linear(4, 4)), x.long()),
        "inputs that learn": (lambda: nn.Sequential(nn.Linear(4, 4)), x.clone().requires_grad_()),
        "forward hook": (lambda: hooked("register_forward_hook"), x),
        "forward pre-hook": (lambda: hooked("register_forward_pre_hook"), x),
        "backward hook": (lambda: hooked("register_full_backward_hook"), x),
        "backward pre-hook": (lambda: hooked("register_full_backward_pre_hook"), x),
        "hook on a weight": (watched, x),
        "parametrized": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), x),
    }


@pytest.mark.parametrize("name", list(no_chains()))
def test_everything_else_is_no_chain(name: str) -> None:
    build, inputs = no_chains()[name]
    assert chain_of(build(), inputs) is None


def test_autocast_is_left_to_autograd() -> None:
    model, inputs = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert chain_of(model, inputs) is None
    assert chain_of(model, inputs) is not None


def trained(monkeypatch: pytest.MonkeyPatch, *, by_hand: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    data = Dataset(torch.randn(96, 12, generator=generator), torch.arange(96) % 4, 4)
    torch.manual_seed(0)
    model = GatedMLP(12, 4, width=16, depth=3)
    owners = list(gates(model).values())
    used = []

    def noted(*arguments: Any) -> Any:
        used.append(chain_of(*arguments) if by_hand else None)
        return used[-1]

    def after_step(step: int) -> None:
        for number, gate in enumerate(owners):
            gate.slope.requires_grad_(step % 3 == number)
            with torch.no_grad():
                gate.slope -= 0 if gate.slope.grad is None else gate.slope.grad
            gate.slope.grad = None
            gate.freeze(torch.arange(16) < step)

    monkeypatch.setattr("ntkdyn.training_loop.chain_of", noted)
    TrainingLoop(
        model=model,
        optimizer=Adam([one for name, one in model.named_parameters() if "slope" not in name], learning_rate=1e-2),
        epoch_data=lambda epoch: data,
        batch_size=32,
        steps_per_epoch=3,
        last_step=14,
        after_step=after_step,
    ).run()
    assert len(used) == 5
    assert all((one is not None) == by_hand for one in used)
    return [one.detach() for one in model.parameters()]


def test_training_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = trained(monkeypatch, by_hand=True), trained(monkeypatch, by_hand=False)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_divergence_takes_no_step() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    before = [one.clone() for one in model.parameters()]
    data = Dataset(torch.full((4, 2), torch.inf), torch.zeros(4, dtype=torch.int64), 2)
    with pytest.raises(DivergedTraining):
        TrainingLoop(
            model=model,
            optimizer=Adam(model.parameters(), learning_rate=1.0),
            epoch_data=lambda epoch: data,
            batch_size=4,
            steps_per_epoch=1,
            last_step=1,
        ).run()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


def test_losses_whose_sum_is_too_large_are_looked_at_one_by_one() -> None:
    layers = [nn.Sequential(nn.Linear(2, 2)) for _ in range(2)]
    inputs, targets = torch.full((1, 2), 3e38), torch.zeros(1, dtype=torch.int64)
    for model in layers:
        nn.init.constant_(model[0].bias, 0.0)
        model[0].weight.data = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    chains = [chain for model in layers if (chain := chain_of(model, inputs)) is not None]
    losses = StackedChain(chains).losses([inputs] * 2, [targets] * 2, functional.cross_entropy)
    assert not losses.finite
    assert torch.tensor([float(one) for one in losses.each()]).tolist() == [pytest.approx(3e38)] * 2
