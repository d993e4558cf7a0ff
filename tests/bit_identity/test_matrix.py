"""Families of networks × optimizers × places of record() × autocast: with a recorder nothing differs, bit for bit."""

from __future__ import annotations

import gc
import itertools
import os
import random
import signal
import sys
import warnings
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.utils._pytree import tree_leaves

import ntkdyn as nd

OPTIMIZERS = ("momentum", "adamw", "fused", "rmsprop")
POSITIONS = ("after the step", "between backward and step", "in the middle of accumulation")
STEPS = 3


class Vandal:
    """A probe that leaves everything in the process as a careless notebook does."""

    name = "vandal"

    def fields(self, snapshot: nd.Snapshot) -> list[nd.Field]:
        return [nd.Field(name="one")]

    def measure(self, snapshot: nd.Snapshot) -> dict[str, float]:
        snapshot.kernel().zero_()
        snapshot.outputs.zero_()
        snapshot.model.train()
        snapshot.model(snapshot.inputs).square().mean().backward()
        for parameter in snapshot.model.parameters():
            parameter.data.zero_()
            parameter.requires_grad_(False)
        for leaf in tree_leaves(snapshot.inputs):
            leaf.zero_()
        for module in snapshot.model.modules():
            module.register_forward_hook(lambda *_: None)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.autograd.set_detect_anomaly(True)
        torch.set_grad_enabled(False)
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_cache_enabled(False)
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = True
        modules.register_module_forward_hook(lambda *_: None)
        np.seterr(all="ignore")
        warnings.simplefilter("ignore")
        os.environ["OMP_NUM_THREADS"] = "7"
        os.chdir("/")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return {"one": 1.0}


class Failing:
    """A probe that raises in the middle of its work."""

    name = "failing"

    def fields(self, snapshot: nd.Snapshot) -> list[nd.Field]:
        return [nd.Field(name="one")]

    def measure(self, snapshot: nd.Snapshot) -> dict[str, float]:
        torch.set_num_threads(3)
        torch.rand(5)
        raise RuntimeError("a bug of the user")


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "momentum":
        return torch.optim.SGD(learning, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    if name == "adamw":
        return torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.1, amsgrad=True)
    if name == "fused":
        return torch.optim.Adam(learning, lr=1e-2, fused=True)
    return torch.optim.RMSprop(learning, lr=1e-2, momentum=0.5, centered=True)


def process() -> dict[str, Any]:
    """State of the process that training shares with the recorder."""
    backends: Any = torch.backends
    return {
        "random states": (random.getstate(), np.random.get_state(), torch.get_rng_state()),  # noqa: NPY002
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "defaults": (torch.get_default_dtype(), torch.get_default_device()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            backends.cudnn.deterministic, backends.cudnn.benchmark, backends.cudnn.enabled, backends.mkldnn.enabled,
        ),
        "autocast": (
            torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled(),
        ),
        "precision": [
            part.fp32_precision for part in (
                backends, backends.mkldnn, backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn,
                backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul,
            )
        ],
        "hooks of all modules": [
            list(table) for name, table in vars(modules).items()
            if name.startswith("_global_") and isinstance(table, dict)
        ],
        "NumPy's errors": np.geterr(),
        "warnings": list(map(str, warnings.filters)),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "signals": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
        "tracing": (sys.gettrace(), sys.getprofile(), gc.isenabled()),
    }  # fmt: skip


def network_state(model: nn.Module) -> dict[str, Any]:
    """Everything that hangs on a network, hooks by their number."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    plain = (int, float, str, bool, type(None))
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in tensors},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "tensor hooks": [len(p._backward_hooks or ()) for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "plain values": [
            {
                key: repr(value)
                for key, value in module.__dict__.items()
                if isinstance(value, plain)
                or (isinstance(value, (list, tuple)) and all(isinstance(entry, plain) for entry in value))
            }
            for module in model.modules()
        ],
        "generators": [
            value.get_state() for module in model.modules() for value in module.__dict__.values()
            if isinstance(value, torch.Generator)
        ],
        "hooks": [
            {key: len(value) for key, value in module.__dict__.items() if key.endswith("_hooks")}
            for module in model.modules()
        ],
    }  # fmt: skip


def equal(first: Any, second: Any) -> bool:
    """Equality of bits: NaN equals itself, zeros of different signs differ."""
    if isinstance(first, Tensor):
        same_kind = isinstance(second, Tensor) and (first.dtype, first.shape) == (second.dtype, second.shape)
        return same_kind and first.contiguous().numpy().tobytes() == second.contiguous().numpy().tobytes()
    if isinstance(first, np.ndarray):
        return first.tobytes() == second.tobytes()
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


def trained(build: Any, optimizer_name: str, position: str, autocast: bool, path: Path | None) -> dict[str, Any]:
    """What training leaves behind, with a recorder where there is a path."""
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    model, batch = build()
    probe_inputs = batch()
    probe_targets = torch.arange(8) % 3
    optimizer = optimizer_of(optimizer_name, model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS + 2)
    losses: list[float] = []
    before: dict[str, Any] = {}

    def forward_and_backward() -> None:
        inputs, targets = batch(), torch.randint(3, (8,))
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
            loss = nn.functional.cross_entropy(model(inputs).float(), targets) + random.random() + np.random.rand()  # noqa: NPY002
        (loss / 2).backward()
        losses.append(loss.item())

    with ExitStack() as stack:
        recorder = None
        if path is not None:
            recorder = nd.Recorder(
                model, ["ntk", "gates", "units", "outputs", "path-length", Failing(), Vandal()],
                {"test": (probe_inputs, probe_targets)}, path=path, schedule=nd.every(1), calibration=probe_inputs,
                on_error="warn",
            )  # fmt: skip
        before = process() | {"random states": None}
        if recorder is not None:
            by_hook = position == "after the step"
            stack.enter_context(recorder.attach(optimizer) if by_hook else recorder.attach())
        manual = ("in the middle of accumulation", "between backward and step")
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=optimizer_name != "rmsprop")
            for part in range(2):
                forward_and_backward()
                if recorder is not None and position == manual[part]:
                    recorder.record()
            optimizer.step()
            scheduler.step()
    if recorder is not None:
        recorder.close()
    after = process()
    left = {name for name, value in before.items() if name != "random states" and not equal(value, after[name])}
    return {
        "network": network_state(model),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "hooks of the optimizer": (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)),
        "losses": losses,
        "process": after,
        "left in the process": sorted(left),
    }


def differences(build: Any, optimizer: str, position: str, autocast: bool, folder: Path) -> list[str]:
    """Names of what differs between training with and without a recorder."""
    plain = trained(build, optimizer, position, autocast, None)
    recorded = trained(build, optimizer, position, autocast, folder)
    found = [
        f"{part}: {name}" for part in ("network", "process") for name, value in plain[part].items()
        if not equal(value, recorded[part][name])
    ]  # fmt: skip
    found += [part for part in plain if part not in ("network", "process") and not equal(plain[part], recorded[part])]
    steps = nd.Run.open(folder, trusted=True).steps("vandal").tolist()
    expected = STEPS + 1 if position == "after the step" else STEPS
    return found + [f"recorded {steps}"] * (len(steps) < expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(3600)
def test_recording_changes_nothing(
    families: ModuleType, tmp_path: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """All combinations by --long; else each family once, such that every pair of the other settings occurs."""
    settings = list(itertools.product(OPTIMIZERS, POSITIONS, (False, True)))
    names = list(families.FAMILIES)
    assert len(names) >= 20
    if pytestconfig.getoption("--long"):
        chosen = list(itertools.product(names, settings))
    else:
        # 7 and 24 have no common factor, so that 24 families meet all 24 settings.
        chosen = [(name, settings[7 * index % len(settings)]) for index, name in enumerate(names)]
    # What libraries switch when they are first imported (SciPy a filter of warnings) is not the recorder's doing.
    trained(families.FAMILIES[names[0]], *settings[0], tmp_path / "imports")
    different = {}
    for number, (name, (optimizer, position, autocast)) in enumerate(chosen):
        found = differences(families.FAMILIES[name], optimizer, position, autocast, tmp_path / str(number))
        if found:
            different[f"{name}, {optimizer}, {position}, autocast {autocast}"] = found
    with capsys.disabled():
        print(f"\nbit identity: {len(chosen)} combinations of {len(names)} families, {len(different)} differ")
    assert not different
