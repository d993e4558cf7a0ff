"""What a probe, the caller's modes and the caller's hooks do to a snapshot: nothing, and it does nothing to them."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ntkdyn as nd
from ntkdyn.gates import Gate


class Counting(nn.Module):
    """A layer whose forward moves plain attributes and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen: list[float] = []
        self.register_buffer("total", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(float(inputs.detach().sum()))
        self.total += inputs.detach().mean()
        return inputs


class Vandal:
    """A probe that does everything a careless notebook does."""

    name = "vandal"

    def fields(self, snapshot: nd.Snapshot) -> list[nd.Field]:
        return [nd.Field(name="loss")]

    def measure(self, snapshot: nd.Snapshot) -> dict[str, Any]:
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(3)
        snapshot.model.train()
        loss = snapshot.model(snapshot.inputs).square().mean()
        loss.backward()
        torch.optim.SGD(snapshot.model.parameters(), lr=0.5).step()
        snapshot.model[0].register_forward_hook(lambda *_: None)
        snapshot.inputs.zero_()
        snapshot.outputs.zero_()
        snapshot.kernel().zero_()
        for parameter in snapshot.model.parameters():
            parameter.data.mul_(3)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_grad_enabled(False)
        return {"loss": loss}


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), Gate(8), nn.Dropout(0.3), Counting(), nn.Linear(8, 8),
        nn.ReLU(inplace=True), nn.Linear(8, 3),
    )  # fmt: skip


def test_probes_do_not_spoil_each_other(tmp_path: Path) -> None:
    model, inputs = network(), torch.randn(5, 4)
    alone = nd.measure(model, ["outputs", "ntk"], inputs, batchnorm="running")
    after = nd.measure(model, [Vandal(), "outputs", "ntk"], inputs, batchnorm="running")
    assert np.array_equal(alone["ntk/kernel"], after["ntk/kernel"])
    assert np.array_equal(alone["outputs/logits"], after["outputs/logits"])


class Innocent:
    """A probe that trusts the process to be as its user has it."""

    name = "innocent"

    def fields(self, snapshot: nd.Snapshot) -> list[nd.Field]:
        return [nd.Field(name="mean"), nd.Field(name="state", dims=("byte",), shape=(5056,), dtype="u1")]

    def measure(self, snapshot: nd.Snapshot) -> dict[str, Any]:
        fresh = torch.ones(3, requires_grad=True)
        assert (fresh.dtype, fresh.device.type) == (torch.float32, "cpu")
        (2 * fresh).sum().backward()
        assert fresh.grad is not None
        return {"mean": fresh.grad.mean(), "state": torch.get_rng_state()}


def test_what_one_probe_switches_does_not_reach_the_next() -> None:
    model, inputs = network(), torch.randn(5, 4)
    alone = nd.measure(model, [Innocent()], inputs, batchnorm="running")
    after = nd.measure(model, [Vandal(), Innocent()], inputs, batchnorm="running")
    assert alone["innocent/mean"] == after["innocent/mean"] == 2
    assert np.array_equal(alone["innocent/state"], after["innocent/state"])


def test_callers_autocast_and_modes_do_not_reach_the_snapshot() -> None:
    model, inputs = network(), torch.randn(5, 4)
    expected = nd.measure(model, ["ntk", "outputs"], inputs, batchnorm="running")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = nd.measure(model, ["ntk", "outputs"], inputs, batchnorm="running")
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        inside = nd.measure(model, ["ntk", "outputs"], inputs, batchnorm="running")
        assert torch.is_inference_mode_enabled()
    for name, value in expected.items():
        assert np.array_equal(value, found[name])
        assert np.array_equal(value, inside[name])


def test_cached_parametrizations_of_the_caller_stay_hers() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 3))
    inputs = torch.randn(5, 4)
    with nn.utils.parametrize.cached():
        before = model[0].weight
        for _ in range(3):
            with torch.no_grad():
                model[0].parametrizations.weight.original0.add_(0.5)
            found = nd.measure(model, ["outputs", "ntk"], inputs)
            assert model[0].weight is before
            with torch.no_grad():
                # What the parameters say now, not what the caller's cache holds.
                expected = nd.measure(copy.deepcopy(model), ["outputs", "ntk"], inputs)
            for name, value in expected.items():
                assert np.array_equal(value, found[name]), name
    alone = nd.measure(model, ["outputs", "ntk"], inputs)
    for name, value in alone.items():
        assert np.array_equal(value, found[name]), name


def test_hooks_on_all_modules_do_not_see_snapshots() -> None:
    model, inputs = nn.Sequential(nn.Linear(4, 6), Gate(6), nn.Linear(6, 3)), torch.randn(5, 4)
    calls: list[str] = []
    handles = [
        nn.modules.module.register_module_forward_hook(lambda *_: calls.append("forward")),
        nn.modules.module.register_module_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    try:
        nd.measure(model, ["outputs", "ntk"], inputs)
        assert calls == []
        model(inputs).sum().backward()
        assert {"forward", "backward"} == set(calls)
    finally:
        for handle in handles:
            handle.remove()
