"""When the recorder records, what it writes, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import atexit
import os
import signal
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ntkdyn as nd
from ntkdyn.errors import (
    ConfigurationError,
    DivergedTraining,
    NondeterministicForward,
    ProbeError,
    RecordingExists,
    ShapeError,
    StorageError,
    UnknownName,
)
from ntkdyn.gates import Gate
from ntkdyn.kernel.rules import rules
from ntkdyn.recorder import passes
from ntkdyn.recorder.recording import git_commit, weights_digest
from ntkdyn.store import files
from ntkdyn.store.reader import RunReader

X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1])


class Norm:
    """Norm of all weights; may do something else at a step."""

    name = "norm"

    def __init__(self, at: int | None = None, act: Any = None, **field: Any) -> None:
        self.at, self.act = at, act
        self.field = {"name": "norm", "dtype": "f8"} | field
        self.steps: list[int] = []
        self.previous: list[Any] = []

    def fields(self, snapshot: nd.Snapshot) -> list[nd.Field]:
        return [nd.Field(**self.field)]

    def measure(self, snapshot: nd.Snapshot) -> Mapping[str, Any]:
        self.steps.append(snapshot.step)
        self.previous.append(snapshot.previous("norm"))
        if snapshot.step == self.at:
            return self.act()  # type: ignore[no-any-return]
        return {"norm": sum(float(p.detach().square().sum()) for p in snapshot.model.parameters())}


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), Gate(5), nn.Linear(5, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()


def run_with(
    tmp_path: Path, probes: list[Any], steps: int = 10, **options: Any
) -> tuple[nd.Recorder, torch.optim.Optimizer]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = nd.Recorder(model, probes, {"test": (X, Y)}, path=tmp_path / "run", **options)
    with recorder.attach(optimizer, total_steps=steps):
        train(model, optimizer, steps)
    return recorder, optimizer


def hooks_of(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_post_hooks) + len(optimizer._optimizer_step_pre_hooks)


def status(path: Path) -> str:
    return str(RunReader.open(path).manifest["status"])


def test_first_due_and_last_steps(tmp_path: Path) -> None:
    probe = Norm()
    recorder, optimizer = run_with(tmp_path, [probe], schedule=nd.every(4), steps_per_epoch=5)
    assert probe.steps == [0, 4, 8, 10]
    assert recorder.step == 10
    assert hooks_of(optimizer) == 0
    assert status(recorder.path) == "running"
    recorder.finish({"accuracy": 0.5})
    recorder.close()
    recorder.close()
    reader = RunReader.open(recorder.path)
    assert reader.steps("norm/test").tolist() == probe.steps
    assert reader.epochs("norm/test").tolist() == [0, 0.8, 1.6, 2]
    assert reader.attributes("norm/test")["schedule"] == "every(4)"
    assert reader.manifest["results"] == {"accuracy": 0.5}
    assert reader.manifest["status"] == "finished"
    assert reader.manifest["parameters"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert len(reader.manifest["final_weights_sha256"]) == 64
    assert np.array_equal(reader.read("probe_sets/test/inputs"), X)
    assert np.array_equal(reader.read("probe_sets/test/targets"), Y)
    assert [None if one is None else float(one) for one in probe.previous] == [
        None,
        *reader.read("norm/test/norm")[:-1],
    ]


def test_finished_when_the_recorder_is_gone(tmp_path: Path) -> None:
    recorder, _ = run_with(tmp_path, [Norm()], schedule=nd.every(4))
    del recorder
    assert status(tmp_path / "run") == "finished"
    assert (tmp_path / "run" / "run.h5").exists()


def test_after_divergence_it_is_finished_too(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = nd.Recorder(model, [Norm()], X, path=tmp_path / "run")

    def diverge() -> None:
        train(model, optimizer, 2)
        raise DivergedTraining("found loss nan")

    with pytest.raises(DivergedTraining), recorder.attach(optimizer):
        diverge()
    assert status(tmp_path / "run") == "running"
    del recorder
    assert status(tmp_path / "run") == "finished"
    assert RunReader.open(tmp_path / "run").manifest["final_weights_sha256"] == weights_digest(model)


def test_attached_often_it_is_held_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, optimizer = run_with(tmp_path, [Norm()], 1)
    model, registered = recorder._model, []
    monkeypatch.setattr(atexit, "register", registered.append)
    for _ in range(5):
        with recorder.attach(optimizer):
            train(model, optimizer, 1)
    assert registered == []
    held = [one.peek() for one in list(weakref.finalize._registry)]  # type: ignore[attr-defined]
    assert sum(one is not None and one[0] is recorder for one in held) == 1
    recorder.close()


@pytest.mark.filterwarnings("ignore:found no space; training goes on")
@pytest.mark.parametrize("again", ["close", "load_state_dict"])
def test_a_close_that_the_disk_refuses_can_be_repeated(
    again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, optimizer = run_with(tmp_path, [Norm()], 3)

    def refuse(path: Path, data: Any) -> None:
        raise StorageError("found no space")

    with monkeypatch.context() as patch:
        patch.setattr(files, "publish", refuse)
        with pytest.warns(RuntimeWarning, match="close again"):
            recorder.close("interrupted")
    assert recorder.closed
    assert status(tmp_path / "run") == "running"
    if again == "close":
        recorder.close()
        assert status(tmp_path / "run") == "interrupted"
        return
    recorder.load_state_dict(recorder.state_dict())
    assert status(tmp_path / "run") == "interrupted"
    with recorder.attach(optimizer):
        pass
    recorder.close()
    assert status(tmp_path / "run") == "finished"


def test_watches_have_schedules_sets_and_names(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probes = [
        nd.Watch(Norm(), schedule=nd.paired(nd.every(5), 2), name="MyNorm", sets=["a"]),
        nd.Watch("units", schedule=lambda step: step == 3),
    ]
    recorder = nd.Recorder(model, probes, {"a": X, "b": X}, path=tmp_path / "run")
    with recorder.attach(optimizer, first_step=2):
        train(model, optimizer, 6)
    recorder.close()
    reader = RunReader.open(tmp_path / "run")
    assert sorted(reader.groups()) == ["learning_rate", "my_norm/a", "units"]
    assert reader.steps("my_norm/a").tolist() == [2, 5, 7, 8]
    assert reader.steps("units").tolist() == [2, 3, 8]
    assert reader.attributes("my_norm/a")["dt_steps"] == 2


def test_manual_recording_counts_calls_and_obeys_schedules(tmp_path: Path) -> None:
    probe = Norm()
    recorder = nd.Recorder(network(), [probe], X, path=tmp_path / "run", schedule=nd.every(2))
    for _ in range(5):
        recorder.record()
    recorder.record(10, epoch=2.5)
    recorder.record(10)
    with pytest.raises(ConfigurationError, match="found step 9 after step 10"):
        recorder.record(9)
    recorder.close()
    assert probe.steps == [0, 2, 4, 10]
    assert RunReader.open(tmp_path / "run").epochs("norm")[-1] == 2.5
    with pytest.raises(ConfigurationError, match=r"found record\(\) after close"):
        recorder.record()


@pytest.mark.parametrize("fused", [False, True])
def test_steps_skipped_by_loss_scaling_do_not_count(fused: bool, tmp_path: Path) -> None:
    model, probe = network(), Norm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    recorder = nd.Recorder(model, [probe], X, path=tmp_path / "run")
    with recorder.attach(optimizer):
        for index in range(4):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(X), Y)).backward()
            if index in (1, 2):
                model[0].weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
    assert probe.steps == [0, 1, 2]


def test_several_optimizers_count_the_last(tmp_path: Path) -> None:
    model, probe = network(), Norm()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(model[2].parameters(), lr=0.1)
    recorder = nd.Recorder(model, [probe], X, path=tmp_path / "run")
    with recorder.attach(first, second):
        nn.functional.cross_entropy(model(X), Y).backward()
        first.step()
        assert probe.steps == [0]
        second.step()
        assert probe.steps == [0, 1]
    assert hooks_of(first) == hooks_of(second) == 0


BAD = {
    "raises": (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
    "shape": (lambda: {"norm": np.zeros(3)}, r"field 'norm': found shape \[3\], expected \[\] as declared"),
    "dtype": (lambda: {"norm": 1j}, "field 'norm': found dtype complex128, expected float64"),
    "NaN": (lambda: {"norm": np.nan}, "field 'norm': found NaN in 1 of 1 numbers"),
    "undeclared": (lambda: {"norm": 1.0, "more": 2}, "field 'more': found no declaration"),
    "missing": (lambda: {}, "field 'norm': found nothing"),
    "no mapping": (lambda: 3.0, r"measure\(\) gave float, expected a mapping"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_failing_probe_ends_the_recording_cleanly(kind: str, tmp_path: Path) -> None:
    act, message = BAD[kind]
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = nd.Recorder(model, [Norm(4, act)], {"test": X}, path=tmp_path / "run", schedule=nd.every(2))
    with (
        pytest.raises(ProbeError, match=f"probe 'norm', set 'test', step 4.*{message}") as caught,
        recorder.attach(optimizer),
    ):
        train(model, optimizer, 6)
    assert "\n" not in str(caught.value)
    assert hooks_of(optimizer) == 0
    reader = RunReader.open(tmp_path / "run")
    assert reader.steps("norm/test").tolist() == [0, 2]
    assert reader.manifest["status"] == "failed"


def test_caught_inside_the_block_the_hooks_are_gone_too(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = nd.Recorder(model, [Norm(1, lambda: 1 / 0)], X, path=tmp_path / "run")
    with recorder.attach(optimizer):
        with pytest.raises(ProbeError):
            train(model, optimizer, 3)
        assert hooks_of(optimizer) == 0
        train(model, optimizer, 3)
    assert status(tmp_path / "run") == "failed"


@pytest.mark.parametrize(("on_error", "steps"), [("warn", [0, 2, 6, 8]), ("disable", [0, 2])])
def test_training_goes_on(on_error: str, steps: list[int], tmp_path: Path) -> None:
    probes = [Norm(4, lambda: 1 / 0), "outputs"]
    with pytest.warns(RuntimeWarning, match=r"probe 'norm', set 'test', step 4: ZeroDivisionError.*training goes on"):
        recorder, _ = run_with(tmp_path, probes, 8, schedule=nd.every(2), on_error=on_error)
    recorder.close()
    reader = RunReader.open(tmp_path / "run")
    assert reader.steps("norm/test").tolist() == steps
    assert reader.steps("outputs/test").tolist() == [0, 2, 4, 6, 8]


def test_nan_where_it_is_declared(tmp_path: Path) -> None:
    probe = Norm(2, lambda: {"norm": np.nan}, attributes={"allow_nan": True})
    recorder, _ = run_with(tmp_path, [probe], 3)
    recorder.close()
    assert np.isnan(RunReader.open(tmp_path / "run").read("norm/test/norm")).tolist() == [False, False, True, False]


@pytest.fixture
def default_signals() -> Iterator[None]:
    """The handlers of an interactive Python: a job in the background starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("inside", [False, True])
def test_signals_give_a_last_snapshot(number: int, error: type[BaseException], inside: bool, tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    recorder = nd.Recorder(model, [Norm()], X, path=tmp_path / "run", schedule=nd.every(100))

    def interrupted() -> None:
        train(model, optimizer, 3)
        if inside:
            optimizer.register_step_pre_hook(lambda *_: os.kill(os.getpid(), number))
            train(model, optimizer, 3)
        os.kill(os.getpid(), number)

    with pytest.raises(error), recorder.attach(optimizer):
        interrupted()
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == before
    reader = RunReader.open(tmp_path / "run")
    # Inside a step the signal waits until the step is applied.
    assert reader.steps("norm").tolist() == ([0, 4] if inside else [0, 3])
    assert reader.manifest["status"] == "interrupted"


def test_another_exception_closes_as_failed(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = nd.Recorder(model, [Norm()], X, path=tmp_path / "run")
    with pytest.raises(ZeroDivisionError), recorder.attach(optimizer):
        raise ZeroDivisionError
    assert hooks_of(optimizer) == 0
    assert status(tmp_path / "run") == "failed"


class FunctionalDropout(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.dropout(inputs, 0.5)


class DropoutBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.readout(nn.functional.dropout(inputs, 0.5))
        return outputs


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (FunctionalDropout(), r"layer '1' \(FunctionalDropout\) gives other outputs on the same inputs"),
        (DropoutBetween(), r"something before layer '1\.readout' \(Linear\) gives other outputs on the same inputs"),
        (
            nn.BatchNorm1d(3, track_running_stats=False),
            r"': layer '1' \(BatchNorm1d\) .* depend on the other samples of the batch",
        ),
    ],
)
def test_a_forward_that_is_no_function_of_each_sample(layer: nn.Module, message: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), layer, nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = nd.Recorder(model, ["outputs"], {"test": X}, path=tmp_path / "run", on_error="warn")
    with pytest.raises(NondeterministicForward, match=message) as caught, recorder.attach(optimizer):
        pass
    assert "set 'test'" in str(caught.value)
    assert hooks_of(optimizer) == 0
    assert not (tmp_path / "run").exists()


def test_batchnorm_is_reestimated_on_the_clone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    calibration, inputs = 3 + 2 * torch.randn(50, 3).double(), torch.randn(5, 3).double()
    buffers = [buffer.clone() for buffer in model.buffers()]
    found = nd.measure(model, ["outputs"], inputs, calibration=calibration)["outputs/logits"]
    assert all(torch.equal(old, new) for old, new in zip(buffers, model.buffers(), strict=True))
    running = nd.measure(model, ["outputs"], inputs, batchnorm="running")["outputs/logits"]
    np.testing.assert_array_equal(running, model.eval()(inputs).detach())
    for module in model:
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = None
    model.train()(calibration)
    np.testing.assert_allclose(found, model.eval()(inputs).detach(), rtol=1e-12, atol=1e-12)
    with pytest.warns(RuntimeWarning, match="running statistics, which are those of nothing at step 0"):
        nd.measure(model, ["outputs"], inputs)
    with pytest.raises(ConfigurationError, match="sees 1 value a channel"):
        nd.measure(model, ["outputs"], inputs, calibration=calibration[:1])


def test_forward_runs_once_for_all_probes(tmp_path: Path) -> None:
    calls = []

    def forward(model: nn.Module, inputs: Any) -> Tensor:
        calls.append(len(inputs["x"]))
        return model(inputs["x"])  # type: ignore[no-any-return]

    sets = {"test": ({"x": X, "unused": torch.zeros(4, 2)}, Y)}
    recorder = nd.Recorder(network(), ["gates", "outputs"], sets, path=tmp_path / "run", forward=forward)
    recorder.record()
    assert calls == [4, 4, 2, 2, 4]
    recorder.record()
    assert calls[5:] == [4]
    recorder.close()
    assert {"probe_sets/test/inputs_0", "probe_sets/test/inputs_1"} <= set(RunReader.open(tmp_path / "run").names())


def test_costs_are_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probes = [nd.Watch("ntk", schedule=nd.at_steps([0, 3, 99])), nd.Watch("units", schedule=nd.every(4))]
    run_with(tmp_path, probes, 10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("ntkdyn: ntk: ")
    assert lines[0].endswith(" s × 3 snapshots")
    assert lines[1].endswith(" s × 4 snapshots")
    assert len(lines) == 2
    model = network()
    with nd.Recorder(model, probes, X, path=tmp_path / "other").attach():
        pass
    assert " s per snapshot, every(4)" in capsys.readouterr().err


def test_max_overhead_skips_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import time

    def slow() -> dict[str, float]:
        time.sleep(0.05)
        return {"norm": 1.0}

    probe = Norm()
    probe.act = slow
    probe.measure = lambda snapshot: (probe.steps.append(snapshot.step), slow())[1]  # type: ignore[method-assign]
    recorder, _ = run_with(tmp_path, [probe], 20, max_overhead=0.05)
    recorder.close()
    assert probe.steps == [0, 20]
    assert "norm: 20 scheduled snapshots skipped, max_overhead=0.05" in capsys.readouterr().err


def test_only_the_first_process_records(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "get_rank", lambda: 1)
            patch.setattr(torch.distributed, "get_world_size", lambda: 2)
            recorder, _ = run_with(tmp_path, [Norm()], 3)
        assert recorder.step == 3
        recorder.finish({})
        recorder.close()
        assert not (tmp_path / "run").exists()
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """What the recorder has compared with plain autograd: number of samples, reduction."""
    made: list[tuple[int, Any]] = []

    def check(model: nn.Module, inputs: Tensor, **options: Any) -> Any:
        made.append((len(inputs), options["reduce"]))
        return nd.check_ntk(model, inputs, **options)

    monkeypatch.setattr(passes, "check_ntk", check)
    return made


def test_kernels_are_checked_when_the_network_changes(checks: list[Any], tmp_path: Path) -> None:
    model, sets = network(), {"train": X, "test": X[:3]}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = nd.Recorder(model, ["ntk", "units"], sets, path=tmp_path / "run")
    with recorder.attach(optimizer):
        assert checks == [(4, "trace"), (3, "trace")]
        train(model, optimizer, 3)
        assert len(checks) == 2
        model.eval()
        train(model, optimizer, 2)
        assert len(checks) == 4
        model[0].requires_grad_(False)
        train(model, optimizer, 2)
        assert len(checks) == 6
        model.train()
        model[0].requires_grad_(True)
        model[1].freeze(torch.tensor([True, False, False, False, False]))
        model[1].slope.requires_grad_(False)
        train(model, optimizer, 1)
        # Known again; and the slopes are not in this kernel.
        assert len(checks) == 6
    recorder.close()


def test_freezing_slopes_of_the_kernel_is_a_change(checks: list[Any], tmp_path: Path) -> None:
    model = network()
    recorder = nd.Recorder(model, ["ntk"], X, path=tmp_path / "run", parameters=["*"])
    recorder.record()
    recorder.record()
    assert len(checks) == 1
    for _ in range(2):
        model[1].freeze(torch.tensor([True, False, False, False, False]))
        recorder.record()
        assert len(checks) == 2
    model[1].slope.requires_grad_(False)
    recorder.record()
    assert len(checks) == 3
    recorder.close()


def test_every_kernel_that_is_taken_is_checked(checks: list[Any], tmp_path: Path) -> None:
    nd.measure(network(), ["ntk:per=layer", nd.Watch("ntk:reduce=full", name="full")], X)
    assert checks == [(4, "trace"), (4, "full")]
    run_with(tmp_path, [Norm(), "units", "outputs"], 3)
    assert len(checks) == 2


def test_recorders_of_networks_built_alike_share_what_they_checked(checks: list[Any], tmp_path: Path) -> None:
    shared: set[Any] = set()

    class Mute(nn.Module):
        def extra_repr(self) -> str:
            raise ValueError("nothing to say")

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs

    def record(model: nn.Module, sets: Any, number: int, **options: Any) -> int:
        before = len(checks)
        recorder = nd.Recorder(model, ["ntk"], sets, path=tmp_path / f"{number}", checked_kernels=shared, **options)
        recorder.record()
        recorder.close()
        return len(checks) - before

    strided = [nn.Sequential(nn.Conv1d(1, 2, 3, stride=stride), nn.Flatten(), nn.LazyLinear(2)) for stride in (1, 1, 2)]
    signals = torch.randn(4, 1, 6)
    for model in strided:
        model[2] = nn.Linear(model[:2](signals).shape[1], 2)
    other = nn.Sequential(nn.Linear(3, 5), Gate(5), nn.Tanh(), nn.Linear(5, 2))
    cases: list[tuple[nn.Module, Any, dict[str, Any], int]] = [
        (network(), X, {}, 1),
        (network(), X, {}, 0),
        (network(), X + 1, {}, 0),
        (network(), X[:3], {}, 1),
        (network(), {"other": X}, {}, 1),
        (network().double(), X.double(), {}, 1),
        (network().eval(), X, {}, 1),
        (network(), X, {"parameters": ["0.*"]}, 1),
        (network(), X, {"forward": lambda model, inputs: model(inputs)}, 1),
        (other, X, {}, 1),
        (strided[0], signals, {}, 1),
        (strided[1], signals, {}, 0),
        (strided[2], signals, {}, 1),
        (nn.Sequential(nn.Linear(3, 2), Mute()), X, {}, 1),
        (nn.Sequential(nn.Linear(3, 2), Mute()), X, {}, 0),
    ]
    for number, (model, sets, options, expected) in enumerate(cases):
        assert record(model, sets, number, **options) == expected, number


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_wrong_layer_is_named(on_error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = rules()[functional.linear]

    def gradient(site: Any) -> Any:
        right = rule.gradient(site)
        return right | {"weight": lambda upstream: right["weight"](1.1 * upstream)}

    monkeypatch.setitem(rules(), functional.linear, replace(rule, gradient=gradient))
    message = (
        r"probe 'ntk', set 'test', step 0: layer '[02]' \(Linear\), parameter '[02].weight': the kernel of samples"
    )
    if on_error == "raise":
        with pytest.raises(ProbeError, match=message):
            run_with(tmp_path, ["ntk"], 3)
        return
    with pytest.warns(RuntimeWarning, match=message):
        recorder, _ = run_with(tmp_path, ["ntk", "outputs"], 3, on_error=on_error)
    recorder.close()
    assert RunReader.open(tmp_path / "run").groups() == ["learning_rate", "outputs/test"]


def test_what_a_snapshot_costs_is_told_without_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(passes, "check_ntk", lambda *_, **__: time.sleep(1.2))
    run_with(tmp_path, ["ntk"], 1)
    cost = capsys.readouterr().err.partition("ntkdyn: ntk: ")[2].partition(" s ")[0]
    assert float(cost) < 1


def test_an_existing_recording_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("x")
    with pytest.raises(RecordingExists, match="holds 'precious' already; nothing was touched"):
        nd.Recorder(network(), ["units"], X, path=tmp_path / "run")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sets": {}}, ConfigurationError, "found no probe set"),
        ({"sets": 3}, ConfigurationError, "sets: found int, expected a tensor"),
        ({"sets": X[:0]}, ConfigurationError, "found no sample"),
        ({"sets": (X, Y[:2])}, ConfigurationError, "found 4 inputs and targets of shape \\[2\\]"),
        ({"sets": {"a": {"x": X, "y": X[:2]}}}, ConfigurationError, "probe set 'a': found inputs with 2 and 4 samples"),
        ({"sets": {"a": "text"}}, ConfigurationError, "probe set 'a': found str"),
        ({"sets": {"a/b": X}}, ConfigurationError, "probe set 'a/b'"),
        ({"sets": {3: X}}, ConfigurationError, "sets: found the name 3 of type int, expected a string"),
        ({"sets": torch.full((4, 3), torch.nan)}, ConfigurationError, "found NaN in 12 of 12 numbers"),
        ({"probes": []}, ConfigurationError, "probes: found none"),
        ({"probes": "ntk"}, ConfigurationError, "expected a list of probes"),
        ({"probes": [Norm]}, ConfigurationError, "found the class Norm, expected an object"),
        ({"probes": [3]}, ConfigurationError, "found int without name"),
        ({"probes": ["ntk", "ntk"]}, ConfigurationError, "found two with the name 'ntk'"),
        ({"probes": ["nkt"]}, UnknownName, "did you mean 'ntk'"),
        (
            {"probes": [nd.Watch("ntk", sets=["tset"])], "sets": {"test": X}},
            UnknownName,
            "no probe set 'tset'; expected 'test'",
        ),
        ({"probes": [nd.Watch("ntk", sets=[])]}, ConfigurationError, "found no probe set, expected at least one"),
        ({"schedule": 50}, ConfigurationError, "found schedule=50, expected a function"),
        ({"on_error": "ignore"}, ConfigurationError, "on_error='ignore', expected one of 'raise', 'warn', 'disable'"),
        ({"batchnorm": "train"}, ConfigurationError, "batchnorm='train'"),
        ({"batchnorm": "reestimate"}, ConfigurationError, "expected calibration=inputs"),
        ({"max_overhead": 2}, ConfigurationError, "found max_overhead=2"),
        ({"steps_per_epoch": 0}, ConfigurationError, "found steps_per_epoch=0"),
        ({"commit_every": -1.0}, ConfigurationError, "found commit_every=-1.0, expected seconds from 0 on"),
    ],
)
def test_settings_are_refused_in_one_line(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"probes": ["ntk"], "sets": X} | options
    with pytest.raises(error, match=message) as caught:
        nd.Recorder(network(), path=tmp_path / "run", **arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("targets", "loss", "message"),
    [
        (torch.tensor([0, 1, 2, 0]), None, "found class numbers from 0 to 2, expected 0 to 1"),
        (torch.zeros(4, 3), None, r"found targets \[4, 3\] for outputs \[4, 2\]"),
        (Y, nn.functional.cross_entropy, r"the loss gave \[\] for 4 samples.*reduction='none'"),
    ],
)
def test_losses_that_do_not_fit(targets: Tensor, loss: Any, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        nd.measure(network(), ["outputs"], (X, targets), loss=loss)


def test_bad_forward_and_parameters() -> None:
    with pytest.raises(ShapeError, match=r"outputs have shape \[2, 4\]; expected 4 samples"):
        nd.measure(network(), ["outputs"], X, forward=lambda model, inputs: model(inputs).T)
    with pytest.raises(UnknownName, match=r"did you mean '0\.weight'"):
        nd.measure(network(), ["ntk"], X, parameters=["0.wieght"])
    with pytest.raises(ConfigurationError, match=r"parameters is the string '0\.weight'"):
        nd.measure(network(), ["ntk"], X, parameters="0.weight")


@pytest.mark.parametrize(
    ("inputs", "calibration"), [(torch.zeros(4, 9), None), (X.double(), None), (X, torch.zeros(4, 9))]
)
def test_inputs_that_the_network_does_not_take(inputs: Tensor, calibration: Tensor | None, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = nd.Recorder(
        model,
        ["outputs"],
        {"test": inputs},
        path=tmp_path / "run",
        batchnorm="running" if calibration is None else None,
        calibration=calibration,
    )
    where = "probe set 'test'" if calibration is None else "calibration"
    message = rf"{where}: the forward pass fails on inputs \[4, \d\] torch.float.*: RuntimeError: .*; expected inputs"
    with pytest.raises(ConfigurationError, match=message) as caught, recorder.attach(optimizer):
        pass
    assert "\n" not in str(caught.value)
    assert hooks_of(optimizer) == 0
    assert not (tmp_path / "run").exists()


def test_what_is_no_network_or_optimizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"found the class Linear as model, expected a torch\.nn\.Module"):
        nd.Recorder(nn.Linear, ["units"], X, path=tmp_path / "run")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="found function as model"):
        nd.measure(lambda inputs: inputs, ["units"], X)  # type: ignore[arg-type]
    model = network()
    recorder = nd.Recorder(model, ["units"], X, path=tmp_path / "run")
    with (
        pytest.raises(ConfigurationError, match=r"found Sequential, expected attach\(optimizer\)"),
        recorder.attach(model),  # type: ignore[arg-type]
    ):
        pass
    assert not (tmp_path / "run").exists()


class Fieldless(Norm):
    def __init__(self, given: Any) -> None:
        super().__init__()
        self.given = given

    def fields(self, snapshot: nd.Snapshot) -> Any:
        return self.given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"fields\(\) gave NoneType, expected a list of ntkdyn.Field"),
        (nd.Field(name="norm"), r"fields\(\) gave Field, expected a list"),
        ([], r"fields\(\) gave none, expected at least one"),
        (["norm"], r"fields\(\) gave str, expected ntkdyn.Field"),
    ],
)
def test_fields_that_are_none(given: Any, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        nd.measure(network(), [Fieldless(given)], X)


def test_git_commit(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    folder = tmp_path / ".git"
    (folder / "refs" / "heads").mkdir(parents=True)
    (folder / "HEAD").write_text("ref: refs/heads/main\n")
    (folder / "packed-refs").write_text("# pack-refs\n" + "a" * 40 + " refs/heads/main\n")
    assert git_commit(tmp_path) == "a" * 40
    (folder / "refs" / "heads" / "main").write_text("b" * 40 + "\n")
    (tmp_path / "inner").mkdir()
    assert git_commit(tmp_path / "inner") == "b" * 40
    (folder / "HEAD").write_text("c" * 40)
    assert git_commit(tmp_path) == "c" * 40
