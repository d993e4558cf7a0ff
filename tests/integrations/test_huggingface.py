"""Recording under the real Trainer of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ntkdyn as nd

transformers = pytest.importorskip("transformers", reason="transformers is of the extra test")
pytest.importorskip("accelerate", reason="accelerate is of the extra test")
from ntkdyn.integrations.huggingface import RecorderCallback  # noqa: E402

Build = Callable[..., Any]


class Classifier(nn.Module):
    """A network with the signature that the Trainer wants; ``fail_at`` is the training batch that raises."""

    def __init__(self, network: nn.Module, fail_at: int | None = None) -> None:
        super().__init__()
        self.network, self.fail_at, self.batches = network, fail_at, 0

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.batches += 1
        if self.batches == self.fail_at:
            raise ValueError("a bug of the user")
        logits = self.network(inputs)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer_of(model: Classifier, data: Any, folder: Path, callbacks: list[Any], **options: Any) -> Any:
    samples = [{"inputs": x, "labels": y} for x, y in zip(*data, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True,
        report_to=[], disable_tqdm=True, logging_strategy="no", save_strategy="no", seed=7, **options,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=samples, callbacks=callbacks)


def test_steps_are_applied_steps_and_weights_are_the_same(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any, weights: Build
) -> None:
    plain = Classifier(network())
    trainer_of(plain, data, tmp_path, [], gradient_accumulation_steps=2).train()
    model = Classifier(network())
    with RecorderCallback(recorder_of(model.network, tmp_path / "run")) as callback:
        trainer_of(model, data, tmp_path, [callback], gradient_accumulation_steps=2).train()
    found = weights(model)
    assert all(torch.equal(value, found[name]) for name, value in weights(plain).items())
    run = nd.Run.open(tmp_path / "run")
    assert run.steps("ntk").tolist() == [0, 2, 4]
    assert run.manifest["status"] == "finished"


def test_an_exception_leaves_no_hook_and_a_closed_recording(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any
) -> None:
    model = Classifier(network(), fail_at=6)
    callback = RecorderCallback(recorder_of(model.network, tmp_path / "run"))
    trainer = trainer_of(model, data, tmp_path, [callback])
    with pytest.raises(ValueError, match="a bug of the user"), callback:
        trainer.train()
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks
    run = nd.Run.open(tmp_path / "run")
    assert (run.manifest["status"], run.steps("ntk").tolist()) == ("failed", [0, 2, 4])


def test_a_checkpoint_continues_the_recording(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any, same_recording: Build
) -> None:
    def training(folder: Path, checkpoint: Path | None) -> None:
        model = Classifier(network())
        with RecorderCallback(recorder_of(model.network, folder / "run")) as callback:
            trainer = trainer_of(model, data, folder, [callback], max_steps=8)
            trainer.args.save_strategy, trainer.args.save_steps = transformers.IntervalStrategy.STEPS, 3
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    training(tmp_path / "whole", None)
    training(tmp_path / "parts", None)
    training(tmp_path / "parts", tmp_path / "parts" / "checkpoint-3")
    assert len(nd.Run.open(tmp_path / "parts" / "run").manifest["branches"]) == 1
    same_recording(tmp_path / "whole" / "run", tmp_path / "parts" / "run")
