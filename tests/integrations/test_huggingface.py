"""Recording under the real Trainer of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntkdyn as nd

transformers = pytest.importorskip("transformers", reason="transformers is of the extra test")
accelerate = pytest.importorskip("accelerate", reason="accelerate is of the extra test")
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
        report_to=[], disable_tqdm=True, logging_strategy="no", seed=7, **{"save_strategy": "no"} | options,
    )  # fmt: skip
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=samples, eval_dataset=samples, callbacks=callbacks
    )


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
    # The Trainer's rate falls linearly to 0 behind its 4 steps.
    np.testing.assert_allclose(run["learning_rate/value"], [1e-2, 0.75e-2, 0.25e-2], rtol=1e-12)
    np.testing.assert_allclose(run["learning_rate/sum"], [0, 1.75e-2, 2.5e-2], rtol=1e-12)


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


def test_a_second_training_goes_on_with_the_recording(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Classifier(network())
    with RecorderCallback(recorder_of(model.network, tmp_path / "run")) as callback:
        trainer = trainer_of(model, data, tmp_path, [callback], max_steps=4)
        trainer.train()
        assert nd.Run.open(tmp_path / "run").manifest["status"] == "finished"
        capsys.readouterr()
        trainer.train()
    assert "ntkdyn: ntk: " in (said := capsys.readouterr().err)
    assert "× 3 snapshots" in said  # of steps 4, 6 and 8
    run = nd.Run.open(tmp_path / "run")
    assert (run.manifest["status"], run.steps("ntk").tolist()) == ("finished", [0, 2, 4, 6, 8])
    assert [branch["after"] for branch in run.manifest["branches"]] == [4]


def test_a_checkpoint_takes_a_second_training_back(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any
) -> None:
    model = Classifier(network())
    with RecorderCallback(recorder_of(model.network, tmp_path / "run")) as callback:
        trainer = trainer_of(model, data, tmp_path, [callback], save_strategy="steps", save_steps=3)
        trainer.train()
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    run = nd.Run.open(tmp_path / "run")
    assert run.steps("ntk").tolist() == [0, 2, 4, 6, 8]
    assert [branch["after"] for branch in run.manifest["branches"]] == [3]


class Worsening(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Makes the first evaluation the best one."""

    def __init__(self) -> None:
        self.evaluations = 0

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.evaluations += 1
        given["metrics"]["eval_loss"] = float(self.evaluations)


@pytest.mark.parametrize("early", ["", "before", "behind"])
def test_the_last_snapshot_is_of_the_last_step_where_the_best_weights_are_loaded_at_the_end(
    tmp_path: Path, network: Build, data: Any, early: str
) -> None:
    model = Classifier(network())
    last: dict[str, Tensor] = {}

    class Keep(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            last.update({name: value.clone() for name, value in model.network.state_dict().items()})

    # A schedule in which neither last step is due, so that it is the end that records it.
    sets = {"test": (data[0][:5], data[1][:5])}
    recorder = nd.Recorder(model.network, ["outputs"], sets, path=tmp_path / "run", schedule=nd.every(5))
    stop = [transformers.EarlyStoppingCallback(early_stopping_patience=1)] if early else []
    with RecorderCallback(recorder) as callback:
        order = [Keep(), Worsening(), *(stop if early == "before" else []), callback, *stop[: early == "behind"]]
        trainer = trainer_of(
            model, data, tmp_path, order, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3,
            load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False,
        )  # fmt: skip
        trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    run = nd.Run.open(tmp_path / "run")
    assert run.steps("outputs").tolist() == ([0, 5, 6] if early else [0, 5, 8])
    model.network.load_state_dict(last)
    with torch.no_grad():
        expected = model.network.eval()(data[0][:5])
    np.testing.assert_allclose(run["outputs/test/logits"][-1], expected, rtol=1e-5, atol=1e-6)


def test_two_recorders_continue_each_its_own_run(tmp_path: Path, network: Build, recorder_of: Build, data: Any) -> None:
    def training(checkpoint: str | None) -> None:
        model = Classifier(network())
        one, other = (recorder_of(model.network, tmp_path / name) for name in ("one", "other"))
        with RecorderCallback(one) as first, RecorderCallback(other) as second:
            trainer_of(model, data, tmp_path, [first, second], save_strategy="steps", save_steps=3).train(
                resume_from_checkpoint=checkpoint
            )

    training(None)
    training(str(tmp_path / "checkpoint-3"))
    for name in ("one", "other"):
        run = nd.Run.open(tmp_path / name)
        assert (len(run.manifest["branches"]), run.steps("ntk").tolist()) == (1, [0, 2, 4, 6, 8])


def test_a_training_that_was_not_recorded_before_keeps_its_steps(
    tmp_path: Path, network: Build, recorder_of: Build, data: Any
) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(Classifier(network()), data, tmp_path, [], **options).train()
    model = Classifier(network())
    with RecorderCallback(recorder_of(model.network, tmp_path / "run")) as callback:
        trainer_of(model, data, tmp_path, [callback], **options).train(str(tmp_path / "checkpoint-3"))
    assert nd.Run.open(tmp_path / "run").steps("ntk").tolist() == [3, 4, 6, 8]


def test_a_loop_of_accelerate(tmp_path: Path, network: Build, recorder_of: Build, data: Any) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    recorder = recorder_of(wrapped, tmp_path / "run")
    with recorder.attach(optimizer):
        for _ in range(8):
            with accelerator.accumulate(wrapped):
                accelerator.backward(nn.functional.cross_entropy(wrapped(data[0]), data[1]))
                optimizer.step()
                optimizer.zero_grad()
    recorder.close()
    assert not optimizer.optimizer._optimizer_step_post_hooks
    assert nd.Run.open(tmp_path / "run").steps("ntk").tolist() == [0, 2, 4]
