"""What one configuration and seed of the experiment translation fix: sentences, network, batches, measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..adam import Adam
from ..clone import structural_clone
from ..datasets import SentencePairs, parallel_text
from ..errors import ConfigurationError
from ..experiment import RecorderFactory
from ..gates import learn_slopes, weights
from ..recorder import Recorder
from ..schedule import Schedule
from ..training_loop import Batches, TrainingLoop, linear_tail
from .decoding import bleu, greedy
from .networks import Transformer
from .networks.transformer import PADDING
from .sentences import Subwords, TokenPairs, as_tokens, chosen, trimmed
from .training import Objective, complexity, place
from .translation_config import TranslationConfig

_POSITIONS = 256
_AT_ONCE = 250  # sentence pairs of an evaluation
_TRAIN_LOSS_PAIRS = 1000


@dataclass(frozen=True)
class Text:
    """Sentence pairs as subwords that were learned on the training pairs alone, and the references as they stand."""

    subwords: Subwords
    train: TokenPairs
    validation: TokenPairs
    test: TokenPairs
    validation_references: tuple[str, ...]
    test_references: tuple[str, ...]
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class TranslationTraining:
    """One configuration and seed. Units: steps are applied optimizer steps."""

    # What ``at_switch`` and ``at_end`` measure.
    results: ClassVar[tuple[str, ...]] = (
        *("test_bleu", "validation_bleu", "test_accuracy", "test_loss", "validation_loss", "train_loss"),
        *("dense_bleu", "dense_accuracy", "dense_loss"),
    )
    config: TranslationConfig
    seed: int
    text: Text
    steps_per_epoch: int

    @classmethod
    def of(cls, config: TranslationConfig, seed: int) -> TranslationTraining:
        """Load the sentences and learn the subwords."""
        text = load_text(config)
        return cls(config, seed, text, steps_per_epoch(config))

    @property
    def last_step(self) -> int:
        """Steps of the run."""
        return self.config.total_epochs * self.steps_per_epoch

    def build(self) -> tuple[Transformer, torch.optim.Optimizer]:
        """Return the network at its initial weights, which belong to the seed alone, and Adam on all but the slopes."""
        config = self.config
        torch.manual_seed(self.seed)
        model = Transformer(
            len(self.text.subwords),
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            feedforward=config.feedforward,
            dropout=config.dropout,
            positions=_POSITIONS,
            granularity=config.granularity,
        )
        place(model, config)
        learn_slopes(model, False)
        parameters = list(weights(model).values())
        return model, Adam(parameters, learning_rate=config.learning_rate, weight_decay=config.weight_decay)

    def loop(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        first_step: int,
        last_step: int,
        epoch_data: Callable[[int], Batches],
        rate_factor: Callable[[int], float] = lambda step: 1.0,
        objective: Objective | None = None,
        after_step: Callable[[int], None] | None = None,
        recorder: Recorder | None = None,
        factory: RecorderFactory | None = None,
        state: Callable[[], Mapping[str, Any]] = dict,
    ) -> TrainingLoop:
        """Return the training; the learning rate rises over the first steps and falls over the last epochs."""
        config = self.config
        return TrainingLoop(
            model=model,
            optimizer=optimizer,
            epoch_data=epoch_data,
            batch_size=config.batch_size,
            steps_per_epoch=self.steps_per_epoch,
            first_step=first_step,
            last_step=last_step,
            seed=self.seed,
            loss=partial(token_loss, label_smoothing=config.label_smoothing),
            objective=objective,
            learning_rate=lambda step: self.rate(step) * rate_factor(step),
            after_step=after_step,
            recorder=recorder,
            factory=factory,
            state=state,
        )

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, …: a line up over the first steps, and one down to 0 over the last epochs."""
        config = self.config
        tail_steps = round(config.decay_share * config.epochs * self.steps_per_epoch)
        falling = linear_tail(config.learning_rate, total_steps=self.last_step, tail_steps=tail_steps)
        return falling(step) * min(1.0, (step + 1) / max(config.warmup_steps, 1))

    def epoch_data(self, epoch: int, *, data_order: int = 0) -> TokenPairs:
        """Return the training pairs of one epoch in batches of similar length."""
        return self.text.train.epoch(
            batch_size=self.config.batch_size, seed=self.seed, data_order=data_order, epoch=epoch
        )

    def recorder(
        self, factory: RecorderFactory, model: nn.Module, *, schedule: Schedule, probes: list[Any]
    ) -> Recorder:
        """Return the recorder, with fixed probe sets of training and test pairs.

        Outputs, and so kernels, are those of ``reference_log_probability``; the probe gates looks at all positions,
        those of padding among them.
        """
        config = self.config

        def probe(pairs: TokenPairs) -> tuple[tuple[Tensor, Tensor], None]:
            index = chosen(len(pairs), config.probe_pairs, split_seed=config.split_seed)
            source, target = (trimmed(part[index]).to(config.device) for part in (pairs.source, pairs.target))
            return (source, target), None

        return factory(
            model,
            sets={"train": probe(self.text.train), "test": probe(self.text.test)},
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.last_step,
            probes=probes,
            schedule=schedule,
            forward=reference_log_probability,
            checkpoint_steps=[epoch * self.steps_per_epoch for epoch in config.checkpoint_epochs],
            provenance=self.text.provenance,
        )

    def at_switch(self, model: nn.Module) -> dict[str, float]:
        """Return dense_bleu, dense_accuracy and dense_loss, on the test pairs."""
        text = self.text
        accuracy, loss = accuracy_and_loss(model, text.test)
        return {
            "dense_bleu": self.bleu(model, text.test, text.test_references),
            "dense_accuracy": accuracy,
            "dense_loss": loss,
        }

    def at_end(self, model: nn.Module) -> dict[str, float]:
        """Return what a finished network is measured by.

        test_bleu, validation_bleu: of greedy translations, in [0, 100]. test_accuracy: share of tokens that are the
        likeliest after the reference so far. test_loss, validation_loss, train_loss (of the first 1000 training pairs):
        nat per token, without label smoothing.
        """
        text = self.text
        accuracy, loss = accuracy_and_loss(model, text.test)
        beginning = TokenPairs(text.train.source[:_TRAIN_LOSS_PAIRS], text.train.target[:_TRAIN_LOSS_PAIRS])
        return {
            "test_bleu": self.bleu(model, text.test, text.test_references),
            "validation_bleu": self.bleu(model, text.validation, text.validation_references),
            "test_accuracy": accuracy,
            "test_loss": loss,
            "validation_loss": accuracy_and_loss(model, text.validation)[1],
            "train_loss": accuracy_and_loss(model, beginning)[1],
        }

    def complexity(self, model: nn.Module) -> dict[str, float]:
        """Return how nonlinear the network is; see ``training.complexity``."""
        return complexity(model, tuple(tokens.to(self.config.device) for tokens in self.text.train[:2][0]))

    def bleu(self, model: nn.Module, pairs: TokenPairs, references: tuple[str, ...]) -> float:
        """Return the BLEU of greedy translations; the model is not touched."""
        twin = cast(Transformer, structural_clone(model).eval())
        said = greedy(twin, pairs.source.to(self.config.device))
        return bleu(self.text.subwords.decode(said), references)


def token_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of all tokens that are no padding; nat per token."""
    return functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=PADDING, label_smoothing=label_smoothing
    )


def reference_log_probability(model: nn.Module, inputs: tuple[Tensor, Tensor]) -> Tensor:
    """Mean log-probability of a reference's tokens, given source and the reference so far, [N]; nat per token."""
    source, target = inputs
    following = target[:, 1:]
    chosen = model(source, target[:, :-1]).log_softmax(dim=2).gather(2, following[:, :, None]).squeeze(2)
    present = (following != PADDING).to(chosen.dtype)
    mean: Tensor = (chosen * present).sum(dim=1) / present.sum(dim=1)
    return mean


@torch.no_grad()
def accuracy_and_loss(model: nn.Module, pairs: TokenPairs) -> tuple[float, float]:
    """Share of tokens that are the likeliest after the reference so far, and nat per token; leaves the model alone."""
    twin = structural_clone(model).eval()
    device = next(model.parameters()).device
    right, total, tokens = 0, 0.0, 0
    for first in range(0, len(pairs), _AT_ONCE):
        (source, target), targets = pairs[first : first + _AT_ONCE]
        targets = targets.to(device)
        logits = twin(source.to(device), target.to(device))
        present = targets != PADDING
        count = int(present.sum())
        right += int(((logits.argmax(dim=2) == targets) & present).sum())
        total += float(token_loss(logits, targets)) * count
        tokens += count
    return right / tokens, total / tokens


def load_text(config: TranslationConfig) -> Text:
    """Return the sentence pairs of a configuration; the subwords are learned on its training pairs alone.

    Raises: ConfigurationError: packages are missing, or there are fewer pairs than asked for.
    """
    return _load_text(config.data, config.pairs, config.test_pairs, config.vocabulary, config.split_seed)


@lru_cache(maxsize=1)
def _load_text(data: str, pairs: int | None, test_pairs: int | None, vocabulary: int, split_seed: int) -> Text:
    text = parallel_text(data)
    train = _part(text.train, pairs, split_seed)
    validation, test = (_part(part, test_pairs, split_seed) for part in (text.validation, text.test))
    subwords = Subwords(
        (sentence for pair in zip(train.sources, train.targets, strict=True) for sentence in pair), size=vocabulary
    )
    return Text(
        subwords,
        train=as_tokens(subwords, train, longest=_POSITIONS),
        validation=as_tokens(subwords, validation, longest=_POSITIONS),
        test=as_tokens(subwords, test, longest=_POSITIONS),
        validation_references=validation.targets,
        test_references=test.targets,
        provenance=text.provenance,
    )


def _part(pairs: SentencePairs, wanted: int | None, split_seed: int) -> SentencePairs:
    if wanted is None:
        return pairs
    index = chosen(len(pairs), wanted, split_seed=split_seed)
    return SentencePairs(tuple(pairs.sources[i] for i in index), tuple(pairs.targets[i] for i in index))


@lru_cache(maxsize=1)
def _count(data: str) -> int:
    return len(parallel_text(data).train)


def steps_per_epoch(config: TranslationConfig) -> int:
    """Return the batches of one epoch; an incomplete one is left out.

    Raises: ConfigurationError: there are fewer pairs than one batch takes.
    """
    pairs = config.pairs or _count(config.data)
    if pairs < config.batch_size:
        raise ConfigurationError(
            f"data {config.data}: found {pairs} sentence pairs, expected at least batch_size={config.batch_size}; "
            "lower batch_size"
        )
    return pairs // config.batch_size
