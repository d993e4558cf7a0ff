"""Modes and hooks that the caller has entered see nothing of a snapshot, and are entered again when it is over."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

import ntkdyn as nd
from ntkdyn.recorder import guard, learning_rates


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nd.Gate(8), nn.Dropout(0.3), nn.Linear(8, 3))


class Functions(TorchFunctionMode):
    """Counts the calls of torch's functions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.calls[str(function)] += 1
        return function(*arguments, **(keywords or {}))


class Operations(TorchDispatchMode):
    """Counts the operations that they come to, those of the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.calls[str(operation)] += 1
        return operation(*arguments, **(keywords or {}))


class Leaving:
    """A probe that enters modes and hooks of its own and fails before it leaves them."""

    name = "leaving"

    def fields(self, snapshot: nd.Snapshot) -> list[nd.Field]:
        return [nd.Field(name="one")]

    def measure(self, snapshot: nd.Snapshot) -> dict[str, Any]:
        Functions().__enter__()
        Operations().__enter__()
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor).__enter__()
        torch.set_default_device("meta")
        raise RuntimeError("a bug of the user")


def counted(folder: Path | None, default_device: str | None, rate: Any = 0.1) -> dict[str, Any]:
    """What counters see of a training, with a recorder where there is a folder."""
    model, inputs = network(), torch.randn(6, 4)
    # A fused optimizer can be told of overflow, by a GradScaler for one.
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, fused=isinstance(rate, Tensor))
    if isinstance(rate, Tensor):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    packed: list[Any] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.shape)
        return tensor

    recorder = None
    if folder is not None:
        probes = ["ntk", "gates", "units", "outputs", "path-length", Leaving()]
        recorder = nd.Recorder(
            model, probes, {"test": (inputs, torch.arange(6) % 3)}, path=folder, schedule=nd.every(1),
            calibration=inputs, on_error="warn",
        )  # fmt: skip
    device = nullcontext() if default_device is None else torch.device(default_device)
    functions, operations, flops = Functions(), Operations(), FlopCounterMode(display=False)
    with functions, device, operations, flops, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        entered = _get_current_function_mode_stack(), _get_current_dispatch_mode_stack()
        with recorder.attach(optimizer) if recorder is not None else nullcontext():
            for _ in range(3):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), torch.arange(6) % 3).backward()
                optimizer.step()
        left = _get_current_function_mode_stack(), _get_current_dispatch_mode_stack()
        where = str(torch.get_default_device())
    if recorder is not None:
        recorder.close()
    return {
        "functions": functions.calls,
        "operations": operations.calls,
        "flops": flops.get_flop_counts(),
        "saved tensors": packed,
        "the same modes": [list(map(id, modes)) for modes in entered] == [list(map(id, modes)) for modes in left],
        "default device": where,
        "weights": [parameter.tolist() for parameter in model.parameters()],
    }


@pytest.mark.filterwarnings("ignore:probe 'leaving'.*a bug of the user")
@pytest.mark.parametrize("default_device", [None, "cpu"])
def test_counters_of_the_caller_do_not_see_snapshots(tmp_path: Path, default_device: str | None) -> None:
    plain, recorded = counted(None, default_device), counted(tmp_path / "run", default_device)
    assert plain["flops"]["Global"]
    assert all(plain[kind] for kind in ("functions", "operations", "saved tensors"))
    assert recorded == plain
    assert nd.Run.open(tmp_path / "run", trusted=True).steps("ntk").tolist() == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:probe 'leaving'.*a bug of the user")
def test_counters_of_the_caller_do_not_see_rates_that_are_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning_rates, "_MOST_WAITING", 2)
    plain, recorded = counted(None, None, torch.tensor(0.1)), counted(tmp_path / "run", None, torch.tensor(0.1))
    assert recorded == plain
    np.testing.assert_allclose(
        nd.Run.open(tmp_path / "run", trusted=True)["learning_rate/sum"], [0, 0.1, 0.2, 0.3], rtol=1e-6
    )


def test_modes_and_saved_tensors_hooks_of_the_caller_do_not_change_snapshots() -> None:
    model, inputs = network(), torch.randn(5, 4)

    class Doubling(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            result = operation(*arguments, **(keywords or {}))
            return 2 * result if operation is torch.ops.aten.addmm.default else result

    expected = nd.measure(model, ["ntk", "outputs", "path-length"], inputs, batchnorm="running")
    with Doubling(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: 3 * tensor, lambda tensor: tensor):
        assert not np.allclose(model.eval()(inputs).detach(), expected["outputs/logits"])
        found = nd.measure(model, ["ntk", "outputs", "path-length"], inputs, batchnorm="running")
    for name, value in expected.items():
        assert np.array_equal(value, found[name]), name


def test_the_generators_of_all_accelerators_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins, as no such device is here: one state for each device, set again as it was."""
    put_back = []
    for name in ("cuda", "xpu"):
        module = getattr(torch, name)
        monkeypatch.setattr(module, "is_initialized", lambda: True)
        monkeypatch.setattr(module, "device_count", lambda: 2)
        monkeypatch.setattr(module, "get_rng_state", lambda one, name=name: f"{name} {one}")
        monkeypatch.setattr(module, "set_rng_state", lambda state, one: put_back.append((state, one)))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: "mps")
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: put_back.append((state, 0)))
    for one in guard.random_states():
        one()
    assert put_back == [("cuda 0", 0), ("cuda 1", 1), ("xpu 0", 0), ("xpu 1", 1), ("mps", 0)]
