"""Recording in loops of torch's own kind: closures, compiled models, averaged weights, workers that load data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import ntkdyn as nd

Build = Callable[..., Any]


def loss_of(model: nn.Module, data: Any) -> Any:
    return nn.functional.cross_entropy(model(data[0]), data[1])


def test_one_step_of_lbfgs_is_one_step(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any, weights: Build
) -> None:
    def train(folder: Path | None) -> Any:
        model = network()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
        calls = 0

        def closure() -> Any:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = loss_of(model, data)
            loss.backward()
            return loss

        def steps() -> None:
            torch.manual_seed(7)
            for _ in range(4):
                optimizer.step(closure)

        if folder is None:
            steps()
        else:
            recorder = recorder_of(model, folder)
            with recorder.attach(optimizer):
                steps()
            recorder.close()
        return weights(model), calls

    expected, calls = train(None)
    found, again = train(tmp_path / "run")
    assert calls == again > 8
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert nd.Run.open(tmp_path / "run").steps("ntk").tolist() == [0, 2, 4]


@pytest.mark.parametrize("which", ["compiled", "original"])
def test_of_a_compiled_model_the_original_is_recorded(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any, which: str
) -> None:
    def train(folder: Path, compiled: bool) -> None:
        model = network()
        called = torch.compile(model, backend="eager") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = recorder_of(called if which == "compiled" else model, folder)
        torch.manual_seed(7)
        with recorder.attach(optimizer):
            for _ in range(4):
                optimizer.zero_grad()
                loss_of(called, data).backward()
                optimizer.step()
        recorder.close()

    train(tmp_path / "plain", compiled=False)
    train(tmp_path / "compiled", compiled=True)
    plain, compiled = nd.Run.open(tmp_path / "plain"), nd.Run.open(tmp_path / "compiled")
    assert (
        compiled.manifest["parameters"] == plain.manifest["parameters"] == ["0.weight", "0.bias", "3.weight", "3.bias"]
    )
    assert compiled.steps("ntk").tolist() == [0, 2, 4]
    for name in plain.names():
        np.testing.assert_allclose(compiled[name], plain[name], rtol=1e-5, atol=1e-6)


def test_compiled_steps_of_an_optimizer_are_steps(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any, weights: Build
) -> None:
    def train(folder: Path, compiled: bool) -> Any:
        torch.manual_seed(7)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        recorder = recorder_of(model, folder)
        with recorder.attach(optimizer):
            for _ in range(5):
                loss_of(model, data).backward()
                step()
                optimizer.zero_grad()
        assert recorder.step == 5
        recorder.close()
        return weights(model)

    plain, compiled = train(tmp_path / "plain", False), train(tmp_path / "compiled", True)
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)
    first, second = nd.Run.open(tmp_path / "plain"), nd.Run.open(tmp_path / "compiled")
    assert first.names() == second.names()
    assert all(np.array_equal(first[name], second[name]) for name in first.names())


def test_averaged_weights_as_the_probed_model(tmp_path: Path, network: Build, recorder_of: Build, data: Any) -> None:
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # Registered before the recorder's hook, so that the average of the step is the one that is recorded.
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))
    recorder = recorder_of(average, tmp_path / "run")
    logits = []
    with recorder.attach(optimizer):
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, data).backward()
            optimizer.step()
            if step % 2:
                with torch.no_grad():
                    logits.append(average.module.eval()(data[0][:5]))
                average.module.train()
    recorder.close()
    recorded = nd.Run.open(tmp_path / "run")["outputs/test/logits"]
    np.testing.assert_allclose(recorded[1:], torch.stack(logits).numpy(), rtol=1e-5, atol=1e-6)
    assert not np.allclose(recorded[2], model.eval()(data[0][:5]).detach().numpy())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_that_load_data(tmp_path: Path, network: Build, recorder_of: Build, data: Any, method: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(
        TensorDataset(*data), batch_size=8, num_workers=2, multiprocessing_context=method, persistent_workers=True
    )
    recorder = recorder_of(model, tmp_path / "run")
    with recorder.attach(optimizer):
        for _ in range(2):
            for batch in loader:
                optimizer.zero_grad()
                loss_of(model, batch).backward()
                optimizer.step()
    # The workers still live, with what they have inherited of the lock.
    recorder.close()
    assert not (tmp_path / "run" / "LOCK").exists()
    run = nd.Run.open(tmp_path / "run")
    assert (run.manifest["status"], run.steps("ntk").tolist()) == ("finished", [0, 2, 4, 6, 8])
