"""Recording under the real Ignite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ntkdyn as nd

pytest.importorskip("ignite", reason="pytorch-ignite is of the extra test")
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver

from ntkdyn.integrations.ignite import RecorderHandler

Build = Callable[..., Any]


def training(model: nn.Module, data: Any, recorder: nd.Recorder | None, fail_at: int | None = None) -> Any:
    """The engine, its optimizer and its batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def update(engine: Engine, batch: Any) -> float:
        if engine.state.iteration == fail_at:
            raise ValueError("a bug of the user")
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        return loss.item()

    engine = Engine(update)
    if recorder is not None:
        RecorderHandler(recorder, optimizer).attach(engine)
    torch.manual_seed(7)
    return engine, optimizer, list(zip(*(part.split(8) for part in data), strict=True))


def test_steps_are_applied_steps_and_weights_are_the_same(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any, weights: Build
) -> None:
    plain, model = network(), network()
    engine, _, batches = training(plain, data, None)
    engine.run(batches, max_epochs=2)
    engine, optimizer, batches = training(model, data, recorder_of(model, tmp_path / "run"))
    engine.run(batches, max_epochs=2)
    found = weights(model)
    assert all(torch.equal(value, found[name]) for name, value in weights(plain).items())
    run = nd.Run.open(tmp_path / "run")
    assert (run.manifest["status"], run.steps("ntk").tolist()) == ("finished", [0, 2, 4, 6, 8])
    assert not optimizer._optimizer_step_post_hooks


def test_a_second_run_of_the_engine_goes_on_with_the_recording(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = network()
    engine, optimizer, batches = training(model, data, recorder_of(model, tmp_path / "run"))
    engine.run(batches, max_epochs=1)
    assert nd.Run.open(tmp_path / "run").manifest["status"] == "finished"
    capsys.readouterr()
    engine.run(batches, max_epochs=3)
    assert "× 5 snapshots" in capsys.readouterr().err  # of steps 4 to 12
    assert not optimizer._optimizer_step_post_hooks
    run = nd.Run.open(tmp_path / "run")
    assert (run.manifest["status"], run.steps("ntk").tolist()) == ("finished", [0, 2, 4, 6, 8, 10, 12])
    assert [branch["after"] for branch in run.manifest["branches"]] == [4]


@pytest.mark.parametrize("skip", [False, True])
def test_a_terminated_engine_ends_the_recording(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any, skip: bool
) -> None:
    model = network()
    engine, optimizer, batches = training(model, data, recorder_of(model, tmp_path / "run"))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: engine.terminate(skip_completed=skip))
    engine.run(batches, max_epochs=2)
    assert not optimizer._optimizer_step_post_hooks
    run = nd.Run.open(tmp_path / "run")
    assert (run.manifest["status"], run.steps("ntk").tolist()) == ("finished", [0, 2, 3])


@pytest.mark.parametrize(("error", "status"), [(ValueError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_an_exception_leaves_no_hook_and_a_closed_recording(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any, error: type[BaseException], status: str
) -> None:
    model = network()
    engine, optimizer, batches = training(model, data, recorder_of(model, tmp_path / "run"))

    def stop() -> None:
        raise error("stop")

    engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), stop)
    with pytest.raises(error, match="stop"):
        engine.run(batches, max_epochs=2)
    assert not optimizer._optimizer_step_post_hooks
    run = nd.Run.open(tmp_path / "run")
    assert run.manifest["status"] == status
    # An interrupted run has the snapshot of the moment.
    assert run.steps("ntk").tolist() == [0, 2, 4] + [5] * (status == "interrupted")


def test_handlers_of_the_user_decide_what_becomes_of_an_exception(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any
) -> None:
    model = network()
    engine, optimizer, batches = training(model, data, recorder_of(model, tmp_path / "run"), fail_at=4)
    caught = []
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda _, error: caught.append(str(error)))
    engine.run(batches, max_epochs=2)
    assert caught == ["a bug of the user"]
    assert not optimizer._optimizer_step_post_hooks
    assert nd.Run.open(tmp_path / "run").manifest["status"] == "failed"


def test_two_recorders_both_learn_of_an_exception(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any
) -> None:
    model = network()
    engine, optimizer, batches = training(model, data, recorder_of(model, tmp_path / "one"), fail_at=4)
    RecorderHandler(recorder_of(model, tmp_path / "other"), optimizer).attach(engine)
    with pytest.raises(ValueError, match="a bug of the user"):
        engine.run(batches, max_epochs=2)
    assert not optimizer._optimizer_step_post_hooks
    for name in ("one", "other"):
        assert nd.Run.open(tmp_path / name).manifest["status"] == "failed"


def test_a_checkpoint_continues_the_recording(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any, same_recording: Build
) -> None:
    def run(folder: Path, checkpoint: Path | None) -> None:
        model = network()[:2].append(nn.Linear(6, 3))
        recorder = recorder_of(model, folder / "run")
        engine, optimizer, batches = training(model, data, recorder)
        parts = {"model": model, "optimizer": optimizer, "engine": engine, "recorder": recorder}
        if checkpoint is not None:
            Checkpoint.load_objects(parts, torch.load(checkpoint, weights_only=True))
        else:
            saver = Checkpoint(parts, DiskSaver(str(folder / "saved"), create_dir=True), n_saved=None)
            engine.add_event_handler(Events.EPOCH_COMPLETED, saver)
        engine.run(batches, max_epochs=3)

    run(tmp_path / "whole", None)
    run(tmp_path / "parts", None)
    run(tmp_path / "parts", tmp_path / "parts" / "saved" / "checkpoint_4.pt")
    assert len(nd.Run.open(tmp_path / "parts" / "run").manifest["branches"]) == 1
    same_recording(tmp_path / "whole" / "run", tmp_path / "parts" / "run")
