"""The experiment translation: measures, branches equal to uninterrupted training, arms and controls."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import ntkdyn as nd
from ntkdyn.checkpoint import Checkpoint, load
from ntkdyn.configuration import configure
from ntkdyn.datasets import ParallelText, SentencePairs, stream_seed
from ntkdyn.errors import ConfigurationError
from ntkdyn.experiment import Experiment, run_experiment
from ntkdyn.experiments import arm as arms
from ntkdyn.experiments import translation_training
from ntkdyn.experiments.networks import Transformer
from ntkdyn.experiments.sentences import TokenPairs
from ntkdyn.experiments.translation import Translation
from ntkdyn.experiments.translation_config import TranslationConfig
from ntkdyn.experiments.translation_training import (
    TranslationTraining,
    accuracy_and_loss,
    load_text,
    reference_log_probability,
    token_loss,
)
from ntkdyn.results import Run
from ntkdyn.sweep import make_plan, packaged_plan

SMALL: dict[str, Any] = {
    "vocabulary": 40,
    "width": 8,
    "heads": 2,
    "depth": 1,
    "feedforward": 8,
    "epochs": 6,
    "batch_size": 16,
    "warmup_steps": 3,
    "latest_start": 2,
    "probe_pairs": 4,
    "remaining": 0.25,
    "decay_share": 0.25,
}
STEPS_PER_EPOCH = 3
UNITS = 2 * 8
LAST = 6 * STEPS_PER_EPOCH
WORDS = {"one": "ein", "dog": "Hund", "two": "zwei", "run": "laufen", "red": "rot", "in": "im", "snow": "Schnee"}


def some_text(*, unseen: str = "") -> ParallelText:
    """A language of seven words, and its translation word by word in reverse order."""
    generator = np.random.default_rng(0)

    def pairs(count: int, *further: str) -> SentencePairs:
        drawn = [generator.choice(list(WORDS), size=generator.integers(1, 7)).tolist() for _ in range(count)]
        return SentencePairs(
            tuple(" ".join([*words, *further]) for words in drawn),
            tuple(" ".join([*(WORDS[word] for word in reversed(words)), *further]) for words in drawn),
        )

    rest = unseen.split()
    return ParallelText(pairs(50), pairs(9, *rest), pairs(10, *rest), ("en", "de"), {"name": "seven words"})


@pytest.fixture(autouse=True, scope="module")
def text() -> Iterator[None]:
    """Let configurations without NTKDYN_DATA train on these sentences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(translation_training, "parallel_text", lambda name: some_text())
        forget()
        yield
    forget()


def forget() -> None:
    translation_training._load_text.cache_clear()
    translation_training._count.cache_clear()


def config(**changes: Any) -> TranslationConfig:
    return configure(TranslationConfig, SMALL | changes)


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(equal(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


class Outcome:
    """Results, recording and final state of one run."""

    def __init__(self, path: Path, *, start: Checkpoint | None = None, steps: set[int] | None = None, **changes: Any):
        settings = config(**changes)
        last = settings.total_epochs * STEPS_PER_EPOCH
        self.results = run_experiment(
            Translation(),
            settings,
            seed=1,
            path=path,
            start=start,
            probes=["units"],
            checkpoint_steps=frozenset({last} | (steps or set())),
        )
        self.path = path
        self.end = load(path / "checkpoints" / str(last))

    def same_training(self, other: Outcome) -> bool:
        return equal(self.end.model, other.end.model) and equal(self.end.optimizer, other.end.optimizer)

    def frozen(self) -> Tensor:
        return torch.cat([value for name, value in self.end.model.items() if name.endswith("frozen")])


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Outcome(tmp_path_factory.mktemp("trunk"), intervention="none", steps={0, 3, 6})


@pytest.fixture(scope="module")
def branch(trunk: Outcome, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """Run an arm from the trunk's checkpoint that the experiment asks for; the same arm is run once."""
    made: dict[str, Outcome] = {}

    def run(**changes: Any) -> Outcome:
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            origin = Translation().trunk(config(**changes))
            assert origin is not None
            start = load(trunk.path / "checkpoints" / str(origin[1]))
            made[key] = Outcome(tmp_path_factory.mktemp("arm"), start=start, **changes)
        return made[key]

    return run


def test_it_is_an_experiment() -> None:
    assert isinstance(Translation(), Experiment)


# ---- what is trained and measured ------------------------------------------------------------------------------------


def test_subwords_know_training_sentences_only(monkeypatch: pytest.MonkeyPatch) -> None:
    known = load_text(config())
    forget()
    monkeypatch.setattr(translation_training, "parallel_text", lambda name: some_text(unseen="Qux qux qux Qux"))
    text = load_text(config())
    forget()
    assert text.subwords._tokenizer.to_str() == known.subwords._tokenizer.to_str()
    assert torch.equal(text.train.source, known.train.source)
    assert torch.equal(text.train.target, known.train.target)
    # Letters that no training sentence has are unknown in the others.
    assert not (text.train.source == 3).any()
    for part in (text.validation, text.test):
        assert (part.source == 3).any(dim=1).all()
        assert (part.target == 3).any(dim=1).all()
    assert text.test_references[0].endswith(" Qux qux qux Qux")


def test_chosen_pairs_alone_make_the_subwords() -> None:
    text = load_text(config(pairs=16, test_pairs=5))
    assert (len(text.train), len(text.validation), len(text.test)) == (16, 5, 5)
    assert len(text.test_references) == len(text.validation_references) == 5
    assert load_text(config(pairs=16, test_pairs=5, split_seed=1)).test_references != text.test_references


def by_hand(model: Transformer, pairs: TokenPairs) -> tuple[list[float], int]:
    """Log-probability of every token of every reference, and how many are the likeliest; sentence by sentence."""
    logs, right = [], 0
    for padded, further in zip(pairs.source, pairs.target, strict=True):
        source, target = padded[padded != 0], further[further != 0]
        logits = model(source[None], target[None, :-1])[0]
        for row, token in zip(logits, target[1:], strict=True):
            logs.append(float(row[token] - row.exp().sum().log()))
            right += int(row.argmax() == token)
    return logs, right


def test_measures_equal_their_formulas() -> None:
    training = TranslationTraining.of(config(), 0)
    model, _ = training.build()
    model.double()
    pairs = training.text.test
    model.eval()
    with torch.no_grad():
        logs, right = by_hand(model, pairs)
        inputs, targets = pairs[:]
        lengths = (targets != 0).sum(1)
        sentences = [float(np.mean(part)) for part in np.split(logs, lengths.cumsum(0)[:-1].tolist())]
        assert reference_log_probability(model, (pairs.source, pairs.target)).tolist() == pytest.approx(sentences)
        assert float(token_loss(model(*inputs), targets)) == pytest.approx(-np.mean(logs))
        logits = model(*inputs)[targets != 0]
        uniform = -logits.log_softmax(1).mean()
        smoothed = float(token_loss(model(*inputs), targets, label_smoothing=0.3))
    assert smoothed == pytest.approx(-0.7 * np.mean(logs) + 0.3 * float(uniform))
    model.train()
    accuracy, loss = accuracy_and_loss(model, pairs)
    assert model.training
    assert accuracy == right / len(logs)
    assert loss == pytest.approx(-np.mean(logs))


def test_the_learning_rate_rises_stays_and_falls() -> None:
    training = TranslationTraining.of(config(learning_rate=0.1, warmup_steps=4), 0)
    rates = [training.rate(step) for step in range(LAST)]
    # 18 steps, the last quarter of them (4) falling.
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[4:15] == pytest.approx([0.1] * 11)
    assert rates[15:] == pytest.approx([0.075, 0.05, 0.025])
    assert TranslationTraining.of(config(learning_rate=0.1, warmup_steps=0), 0).rate(0) == 0.1


def test_training_is_that_of_a_plain_loop(trunk: Outcome) -> None:
    training = TranslationTraining.of(config(intervention="none"), 1)
    model, _ = training.build()
    weights = [part for name, part in model.named_parameters() if not name.endswith("slope")]
    optimizer = torch.optim.Adam(weights, lr=1.0, fused=True)
    for step in range(LAST):
        epoch, batch = divmod(step, STEPS_PER_EPOCH)
        if batch == 0:
            torch.manual_seed(stream_seed(1, epoch))
        pairs = training.text.train.epoch(batch_size=16, seed=1, data_order=0, epoch=epoch)
        rows = slice(batch * 16, batch * 16 + 16)
        source, target = pairs.source[rows], pairs.target[rows]
        source, target = source[:, source.any(0)], target[:, target.any(0)]
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 3) * min(1.0, (LAST - step) / 4)
        optimizer.zero_grad()
        logits = model(source, target[:, :-1])
        functional.cross_entropy(logits.transpose(1, 2), target[:, 1:], ignore_index=0, label_smoothing=0.1).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        # Softmax does not see the biases of keys: their gradients are rounding, which Adam makes as large as any.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(value, trunk.end.model[name], rtol=1e-4, atol=1e-5)


# ---- trunks and arms -------------------------------------------------------------------------------------------------

ARMS: list[dict[str, Any]] = [
    {"start_epoch": 0},
    {"start_epoch": 2},
    {"start_epoch": 1, "survivors": "keep", "granularity": "channel"},
    {"start_epoch": 2, "mask": "random"},
    {"start_epoch": 1, "budget": "after-switch"},
    {"start_epoch": 2, "data_order": 2},
    {"intervention": "linear"},
]


@pytest.mark.parametrize("changes", ARMS, ids=str)
def test_a_branch_equals_training_without_interruption(
    changes: dict[str, Any], branch: Callable[..., Outcome], tmp_path: Path
) -> None:
    whole = Outcome(tmp_path, **changes)
    assert branch(**changes).same_training(whole)
    assert equal(
        {name: str(value) for name, value in branch(**changes).results.items()},
        {name: str(value) for name, value in whole.results.items()},
    )


def test_the_trunk_branched_at_its_own_step_is_the_trunk(branch: Callable[..., Outcome], trunk: Outcome) -> None:
    again = branch(start_epoch=2, intervention="none")
    assert again.same_training(trunk)
    assert again.results["test_loss"] == trunk.results["test_loss"]


def test_training_is_repeatable_and_seeded(trunk: Outcome, tmp_path: Path) -> None:
    torch.manual_seed(5)
    assert Outcome(tmp_path / "again", intervention="none").same_training(trunk)
    other = run_experiment(
        Translation(), config(intervention="none"), seed=2, path=tmp_path / "other", probes=["units"]
    )
    assert other["test_loss"] != trunk.results["test_loss"]


@pytest.mark.parametrize("changes", [arm for arm in ARMS if "intervention" not in arm], ids=str)
def test_exactly_the_asked_number_of_units_remains(changes: dict[str, Any], branch: Callable[..., Outcome]) -> None:
    arm = branch(**changes)
    assert arm.results["active_units"] == int((~arm.frozen()).sum()) == UNITS / 4
    assert arm.results["active_share"] == 0.25
    if changes.get("survivors", "common") == "common":
        assert arm.results["survivor_nonlinearity"] == 0.25
        assert arm.results["weighted_units"] == 1.0


def test_one_slope_a_layer(tmp_path: Path) -> None:
    arm = Outcome(tmp_path, granularity="layer", remaining=0.5)
    assert arm.results["active_units"] == UNITS / 2
    assert sorted(arm.frozen().tolist()) == [False, True]


def test_random_masks_belong_to_the_seed(branch: Callable[..., Outcome]) -> None:
    early, late = branch(start_epoch=0, mask="random"), branch(start_epoch=2, mask="random")
    assert torch.equal(early.frozen(), late.frozen())


def test_linear_feedforward_parts_have_no_path_length(branch: Callable[..., Outcome]) -> None:
    results = branch(intervention="linear").results
    assert results["active_units"] == results["napl"] == results["weighted_napl"] == 0


def test_another_order_of_data_parts_at_the_switch(branch: Callable[..., Outcome], trunk: Outcome) -> None:
    sibling = branch(start_epoch=2, intervention="none", data_order=1)
    assert sibling.results["dense_loss"] == branch(start_epoch=2).results["dense_loss"]
    assert not sibling.same_training(trunk)


def test_results_of_the_trunk(trunk: Outcome, branch: Callable[..., Outcome]) -> None:
    results = trunk.results
    assert set(results) == {
        "test_bleu", "validation_bleu", "test_accuracy", "test_loss", "validation_loss", "train_loss", "dense_bleu",
        "dense_accuracy", "dense_loss", "dense_weight_norm", "active_units", "active_share", "survivor_nonlinearity",
        "weighted_units", "napl", "apl", "weighted_napl", "effective_width", "parameters", "diverged",
    }  # fmt: skip
    assert results["active_units"] == UNITS
    # One layer each: (0 + 1/2) / 2 + 1/2.
    assert results["napl"] == 0.75
    assert results["diverged"] == 0
    assert results["dense_loss"] == branch(start_epoch=0).results["dense_loss"]
    assert results["test_loss"] < results["dense_loss"] - 0.5


def test_divergence_is_a_result_not_a_gap(tmp_path: Path) -> None:
    results = run_experiment(
        Translation(), config(learning_rate=1e30), seed=0, path=tmp_path, probes=["units", "outputs"]
    )
    assert results["diverged"] == 1
    assert math.isnan(results["test_bleu"])
    assert math.isnan(results["train_loss"])
    assert Run.open(tmp_path).manifest["status"] == "finished"


# ---- recording, resuming, configuring --------------------------------------------------------------------------------


def test_recorded_steps_kernels_and_outputs(tmp_path: Path) -> None:
    run_experiment(Translation(), config(start_epoch=1), seed=1, path=tmp_path / "arm",
                   checkpoint_steps=frozenset({LAST}))  # fmt: skip
    run = Run.open(tmp_path / "arm")
    assert run.steps("ntk/test").tolist() == [0, 3, 6, LAST]
    assert run.steps("units").tolist() == [0, 3, 6, 9, LAST]
    assert {"gates/test", "path_length", "outputs/train"} <= set(run.groups())
    training = TranslationTraining.of(config(start_epoch=1), 1)
    model, _ = training.build()
    model.load_state_dict(load(tmp_path / "arm" / "checkpoints" / str(LAST)).model)
    model.eval()
    numbers = sorted(name for name in run.names() if name.startswith("probe_sets/test"))
    assert len(numbers) >= 2
    text = training.text.test
    index = translation_training.chosen(len(text), 4, split_seed=0)
    probe = (text.source[index], text.target[index])
    np.testing.assert_allclose(
        run["outputs/test/logits"][-1][:, 0], reference_log_probability(model, probe).detach(), rtol=1e-5, atol=1e-6
    )
    weights = [name for name, _ in model.named_parameters() if not name.endswith("slope")]
    kernel = nd.empirical_ntk(model, probe, forward=reference_log_probability, parameters=weights)
    np.testing.assert_allclose(run["ntk/test/kernel"][-1], kernel, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"mask": "random"}], ids=str)
def test_what_was_cut_off_ends_as_what_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    def run(path: Path, *, resume: bool = False) -> dict[str, float]:
        settings = config(start_epoch=1, checkpoint_epochs=[1, 2, 3], **changes)
        return dict(run_experiment(Translation(), settings, seed=1, path=path, resume=resume, probes=["units", "ntk"]))

    real = arms.Arm.after_step
    expected = run(tmp_path / "whole")
    # In the ramp and while survivors settle, each time from the checkpoint before.
    for step in (4, 8):

        def after_step(self: Any, now: int, last: int = step) -> None:
            real(self, now)
            if now == last:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(arms.Arm, "after_step", after_step)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "run", resume=step != 4)
    assert run(tmp_path / "run", resume=True) == expected
    found, whole = Run.open(tmp_path / "run"), Run.open(tmp_path / "whole")
    assert found.manifest["final_weights_sha256"] == whole.manifest["final_weights_sha256"]
    for name in whole.names():
        assert np.array_equal(found[name], whole[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 9}, "setting 'width': found 9, expected an even multiple of heads=2"),
        ({"pairs": 8}, "setting 'batch_size': found 16, expected at most pairs=8"),
        ({"test_pairs": 3}, "setting 'probe_pairs': found 4, expected at most test_pairs=3"),
        ({"budget": "after-switch", "start_epoch": 3}, "expected at most latest_start=2 with budget='after-switch'"),
        ({"mask": "random", "survivors": "keep"}, "setting 'survivors': found 'keep' with mask='random'"),
        ({"start_epoch": 5}, "setting 'start_epoch': found 5, expected at most 4"),
        ({"dropout": 1.0}, "setting 'dropout': found 1.0, expected less than 1"),
        ({"task": "sum10"}, "setting 'task' is unknown"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        config(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_few_pairs_for_a_batch_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="found 50 sentence pairs, expected at least batch_size=64"):
        Translation().trunk(config(batch_size=64, start_epoch=1))


def test_a_configuration_survives_its_dump() -> None:
    for settings in (TranslationConfig(), config(intervention="none", strength=1.0), config(remaining=3)):
        plain = json.loads(json.dumps(settings.model_dump(mode="json")))
        assert configure(TranslationConfig, plain) == settings


def test_arms_of_one_network_share_a_trunk() -> None:
    trunks = {Translation().trunk(config(**changes)) for changes in ARMS}
    assert len({trunk[0].model_dump_json() for trunk in trunks if trunk}) == 1
    assert {trunk[1] for trunk in trunks if trunk} == {0, 3, 6}
    assert Translation().trunk(config(intervention="none")) is None


def test_steps_of_a_run() -> None:
    assert Translation().steps(config(intervention="none")) == LAST
    assert Translation().steps(config(start_epoch=2)) == LAST - 6
    assert Translation().steps(config(intervention="none", start_epoch=2)) == LAST - 6
    # As many epochs after the switch as the arm of the latest start has.
    assert Translation().steps(config(start_epoch=1, budget="after-switch")) == LAST - 6


# ---- the packaged plans ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "seeds"), [("translation.toml", 3), ("translation_smoke.toml", 1)])
def test_packaged_plans(name: str, seeds: int) -> None:
    with packaged_plan(name) as file:
        plan = make_plan("translation", file=file, settings=["batch_size=16"])
    assert plan.seeds == tuple(range(seeds))
    trunks = {run.run.split("/")[1] for run in plan.runs if run.kind == "trunk"}
    assert len(trunks) == 1
    learned = [run.config for run in plan.runs if run.config["intervention"] == "linearize" and run.seed == 0]
    assert {arm["mask"] for arm in learned} == {"learned", "random"}
    assert "linear" in {run.config["intervention"] for run in plan.runs}
    starts = {arm["start_epoch"] for arm in learned if arm["mask"] == "learned" and arm["remaining"] == 0.1}
    late = {arm["remaining"] for arm in learned if arm["start_epoch"] == max(starts) and arm["mask"] == "learned"}
    assert len(starts) >= min(3, seeds + 1)
    assert len(late) >= 2
    assert name == "translation_smoke.toml" or plan.primary.measure == "test_bleu"
