"""Adam without what torch does around it: torch's own steps, bit for bit, and no compiler loaded for nothing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from ntkdyn.adam import Adam, FusedSteps

SHAPES = [(7, 5), (64,), (3, 4, 2), (1,)]


def tensors(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def give_gradients(parameters: list[Tensor], step: int, *, without: int | None = None) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for number, one in enumerate(parameters):
        one.grad = None if number == without else torch.randn(one.shape, generator=generator)


def assert_same_state(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    for one, other in zip(found.values(), expected.values(), strict=True):
        assert list(one) == list(other)
        for name in one:
            assert torch.equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_torch_s_adam(weight_decay: float) -> None:
    found, expected = tensors(), tensors()
    ours = Adam(found, learning_rate=0.01, weight_decay=weight_decay)
    theirs = torch.optim.Adam(expected, lr=0.01, weight_decay=weight_decay, fused=True)
    for step in range(5):
        if step == 3:  # each goes on from the other's state
            kept = ours.state_dict()
            ours.load_state_dict(theirs.state_dict())
            theirs.load_state_dict(kept)
        for parameters, optimizer in ((found, ours), (expected, theirs)):
            give_gradients(parameters, step, without=2 if step < 2 else None)
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert all(one.grad is None for one in found)
    assert_same_state(ours.state_dict()["state"], theirs.state_dict()["state"])
    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]


def test_hooks_of_a_step_are_called() -> None:
    parameters, called = tensors(), []
    optimizer = Adam(parameters, learning_rate=0.1)
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    give_gradients(parameters, 0)
    optimizer.step()
    assert called == ["before", "after"]


@pytest.mark.parametrize("begun", [0, 2])
def test_steps_alone_are_those_of_the_optimizer(begun: int) -> None:
    expected = tensors()
    expected[1].requires_grad_(False)
    optimizer = Adam(expected, learning_rate=0.01, weight_decay=0.1)
    for step in range(begun):
        give_gradients(expected, step, without=1)
        optimizer.step()
    found = [one.detach().clone().requires_grad_(one.requires_grad) for one in expected]
    states = [{name: value.clone() for name, value in optimizer.state.get(one, {}).items()} for one in expected]
    steps = FusedSteps(found, optimizer.param_groups[0], states)
    for step, learning_rate in enumerate((0.02, 0.005, 0.0)):
        optimizer.param_groups[0]["lr"] = learning_rate
        for parameters in (found, expected):
            give_gradients(parameters, step, without=1)
        steps.step(learning_rate)
        optimizer.step()
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    moved = [other for other in expected if other in optimizer.state]
    assert len(steps.states) == len(moved) == 3
    assert_same_state(
        dict(enumerate(steps.states.values())), dict(enumerate(optimizer.state[other] for other in moved))
    )


@pytest.mark.parametrize(
    ("option", "value", "plain"),
    [("betas", (0.8, 0.9), True), ("weight_decay", 0.1, True), ("amsgrad", True, False), ("maximize", True, False)],
)
def test_a_plain_one(option: str, value: Any, plain: bool) -> None:
    optimizer = Adam(tensors(), learning_rate=0.1)
    optimizer.param_groups[0][option] = value
    assert optimizer.is_plain == plain
    optimizer.add_param_group({"params": [torch.zeros(2)]})
    assert not optimizer.is_plain


def test_a_recorded_run_does_not_load_the_compiler_of_torch(tmp_path: Any) -> None:
    settings = ["epochs=4", "width=4", "depth=1", "pairs=256", "start_epoch=0", "ramp_epochs=1", "settle_epochs=1"]
    arguments = ["record", "nonlinear-advantage", "--probe", "ntk", "--out", str(tmp_path / "run")]
    arguments += [part for setting in settings for part in ("--set", setting)]
    lines = ["import sys", "from ntkdyn.cli import main", "try:", "    main()", "except SystemExit as end:"]
    script = "\n".join([*lines, "    assert not end.code", "assert 'torch._dynamo' not in sys.modules"])
    done = subprocess.run([sys.executable, "-P", "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "run.json").is_file()
