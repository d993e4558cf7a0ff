"""Recording under the real Lightning."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ntkdyn as nd

lightning = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is of the extra test")
from ntkdyn.integrations.lightning import RecorderCallback  # noqa: E402

Build = Callable[..., Any]


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """A network in training; ``fail_at`` is the batch that raises."""

    def __init__(self, network: nn.Module, fail_at: int | None = None) -> None:
        super().__init__()
        self.network, self.fail_at, self.batches = network, fail_at, 0

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.batches += 1
        if self.batches == self.fail_at:
            raise ValueError("a bug of the user")
        inputs, targets = batch
        return nn.functional.cross_entropy(self.network(inputs), targets)

    def forward(self, inputs: Tensor) -> Any:
        return self.network(inputs)

    def test_step(self, batch: Any, index: int) -> None:
        self.network(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.network.parameters(), lr=1e-2)


def fit(module: Module, data: tuple[Tensor, Tensor], folder: Path, callbacks: list[Any], epochs: int = 2,
        checkpoint: Path | None = None, **options: Any) -> Any:  # fmt: skip
    torch.manual_seed(7)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", default_root_dir=folder, callbacks=callbacks,
            enable_model_summary=False, **settings,
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(*data), batch_size=8), ckpt_path=checkpoint)
    return trainer


def test_steps_are_applied_steps_and_weights_are_the_same(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any, weights: Build
) -> None:
    plain = Module(network())
    fit(plain, data, tmp_path, [], accumulate_grad_batches=2)
    module = Module(network())
    recorder = recorder_of(module.network, tmp_path / "run")
    trainer = fit(module, data, tmp_path, [RecorderCallback(recorder)], accumulate_grad_batches=2)
    expected, found = weights(plain), weights(module)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    run = nd.Run.open(tmp_path / "run")
    assert run.steps("ntk").tolist() == [0, 2, 4]
    assert run.manifest["status"] == "finished"
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_an_exception_leaves_no_hook_and_a_closed_recording(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any
) -> None:
    module = Module(network(), fail_at=6)
    callback = RecorderCallback(recorder_of(module.network, tmp_path / "run"))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="a bug of the user"):
        fit(module, data, tmp_path, [callback])
    optimizer = module.trainer.optimizers[0]
    assert not optimizer._optimizer_step_post_hooks
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    run = nd.Run.open(tmp_path / "run")
    assert (run.manifest["status"], run.steps("ntk").tolist()) == ("failed", [0, 2, 4])


def test_a_checkpoint_continues_the_recording(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any, same_recording: Build
) -> None:
    def training(folder: Path, epochs: int, checkpoint: Path | None, keep: bool) -> None:
        module = Module(network()[:2].append(nn.Linear(6, 3)))  # without dropout: Lightning restores no random state
        recorder = recorder_of(module.network, folder / "run")
        callbacks: list[Any] = [RecorderCallback(recorder)]
        if keep:
            callbacks.append(lightning.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1))
        fit(module, data, folder, callbacks, epochs, checkpoint, enable_checkpointing=keep)

    training(tmp_path / "whole", 3, None, keep=False)
    training(tmp_path / "parts", 2, None, keep=True)
    # From the first epoch's, so that the second epoch's snapshots are superseded.
    training(tmp_path / "parts", 3, tmp_path / "parts" / "epoch=0.ckpt", keep=False)
    same_recording(tmp_path / "whole" / "run", tmp_path / "parts" / "run")


@pytest.mark.parametrize("trainers", [1, 2])
def test_a_second_fit_goes_on_with_the_recording(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any, trainers: int
) -> None:
    module = Module(network())
    callback = RecorderCallback(recorder_of(module.network, tmp_path / "run"))
    trainer = fit(module, data, tmp_path, [callback])
    assert nd.Run.open(tmp_path / "run").manifest["status"] == "finished"
    if trainers == 2:
        fit(module, data, tmp_path, [callback], 1)
    else:
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, DataLoader(TensorDataset(*data), batch_size=8))
    run = nd.Run.open(tmp_path / "run")
    assert (run.manifest["status"], run.steps("ntk").tolist()) == ("finished", [0, 2, 4, 6, 8, 10, 12])
    assert [branch["after"] for branch in run.manifest["branches"]] == [8]
    assert run["learning_rate/sum"][-1] == pytest.approx(12 * 1e-2)


def test_a_fit_after_an_exception_goes_on_with_the_recording(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any
) -> None:
    module = Module(network(), fail_at=6)
    callback = RecorderCallback(recorder_of(module.network, tmp_path / "run"))
    with pytest.raises(ValueError, match="a bug of the user"):
        fit(module, data, tmp_path, [callback])
    fit(module, data, tmp_path, [callback], 1)
    run = nd.Run.open(tmp_path / "run")
    assert (run.manifest["status"], run.steps("ntk").tolist()) == ("finished", [0, 2, 4, 6, 8, 9])


def test_testing_a_checkpoint_continues_nothing(tmp_path: Path, network: Build, recorder_of: Build, data: Any) -> None:
    module = Module(network())
    recorder = recorder_of(module.network, tmp_path / "run")
    saver = lightning.callbacks.ModelCheckpoint(tmp_path)
    trainer = fit(module, data, tmp_path, [RecorderCallback(recorder), saver], enable_checkpointing=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.test(module, DataLoader(TensorDataset(*data), batch_size=8), ckpt_path="best", verbose=False)
    run = nd.Run.open(tmp_path / "run")
    assert (run.manifest["status"], run.steps("ntk").tolist()) == ("finished", [0, 2, 4, 6, 8])


def test_a_training_that_was_not_recorded_before_keeps_its_steps(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any
) -> None:
    fit(Module(network()), data, tmp_path, []).save_checkpoint(tmp_path / "plain.ckpt")
    module = Module(network())
    recorder = recorder_of(module.network, tmp_path / "run")
    fit(module, data, tmp_path, [RecorderCallback(recorder)], 3, tmp_path / "plain.ckpt")
    assert nd.Run.open(tmp_path / "run").steps("ntk").tolist() == [8, 10, 12]


def test_the_module_itself_and_two_recorders(tmp_path: Path, network: Build, recorder_of: Build, data: Any) -> None:
    class Trainers:
        """Which Trainer the network has that probes are shown."""

        name = "trainers"
        seen: list[Any] = []  # noqa: RUF012  # of this test only

        def fields(self, snapshot: nd.Snapshot) -> list[nd.Field]:
            return [nd.Field(name="one")]

        def measure(self, snapshot: nd.Snapshot) -> dict[str, float]:
            self.seen.append(snapshot.model.trainer)
            return {"one": 1.0}

    module = Module(network())
    whole = nd.Recorder(module, ["ntk", Trainers()], data[0][:5], path=tmp_path / "whole", schedule=nd.every(2))
    part = recorder_of(module.network, tmp_path / "part")
    trainer = fit(module, data, tmp_path, [RecorderCallback(whole), RecorderCallback(part)])
    # A copy would be one of all optimizers, data and loggers at each snapshot.
    assert len(Trainers.seen) == 5
    assert all(one is trainer for one in Trainers.seen)
    assert nd.Run.open(tmp_path / "whole").manifest["parameters"][0] == "network.0.weight"
    assert nd.Run.open(tmp_path / "part").steps("ntk").tolist() == [0, 2, 4, 6, 8]


SCRIPT = """
import os, signal, sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import pytorch_lightning as lightning
import ntkdyn as nd
from ntkdyn.integrations.lightning import RecorderCallback

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 6), nd.Gate(6), nn.Linear(6, 3))
    def training_step(self, batch, index):
        if index == 5:
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=0.1)

# Jobs in the background of a shell inherit that it is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.manual_seed(0)
x, y = torch.randn(400, 4), torch.randint(3, (400,))
module = Module()
recorder = nd.Recorder(module.network, ["ntk"], {"test": (x[:4], y[:4])}, path=sys.argv[1], schedule=nd.every(100))
trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                            enable_progress_bar=False, callbacks=[RecorderCallback(recorder)])
trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=4))
"""


# The exit codes are those that Lightning gives.
@pytest.mark.parametrize(
    ("name", "status"), [pytest.param("SIGINT", 1, marks=pytest.mark.slow), pytest.param("SIGTERM", 0)]
)
def test_signals_give_a_last_snapshot_and_a_clean_close(tmp_path: Path, name: str, status: int) -> None:
    command = [sys.executable, "-P", "-W", "ignore", "-c", SCRIPT, str(tmp_path / "run"), name]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path, env=os.environ
    )
    run = nd.Run.open(tmp_path / "run")
    assert run.manifest["status"] == "interrupted", ended.stderr
    assert run.steps("ntk")[0] == 0
    assert 5 <= run.steps("ntk")[-1] <= 7
    assert ended.returncode == status, ended.stderr
