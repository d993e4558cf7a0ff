"""What one configuration and seed fix before training: data, network, optimizer, the stream of batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checkpoint import Checkpoint
from ..datasets import (
    Dataset,
    DigitPairs,
    Split,
    TrainingData,
    digit_pairs,
    named_data,
    probe_batch,
    stream_seed,
    subset,
)
from ..errors import ConfigurationError, TraceError
from ..experiment import Batches, RecorderFactory, adam, evaluate, fit, linear_tail
from ..gates import gates, nonlinear_units
from ..paths import path_lengths
from ..recorder import Recorder
from ..schedule import Schedule
from .networks import build_network, load_network
from .settings import DataSettings

_CALIBRATION_SAMPLES = 512
_SHIFT = 4  # pixels

# First word of every seed of this file, so that no two kinds of draws share a stream; datasets uses small numbers.
_AUGMENTATION, _RANDOM_LABELS = 101, 102

Objective = Callable[[int, Any, Tensor], Tensor]
"""Step before the update, inputs, targets -> loss; takes the place of the loss of the network's outputs."""


@dataclass(frozen=True)
class Training:
    """One configuration and seed. Units: steps are applied optimizer steps."""

    config: DataSettings
    seed: int
    data: TrainingData
    steps_per_epoch: int

    @classmethod
    def of(cls, config: DataSettings, seed: int) -> Training:
        """Load the data."""
        return cls(config, seed, load_data(config), steps_per_epoch(config))

    @property
    def last_step(self) -> int:
        return self.config.total_epochs * self.steps_per_epoch

    @property
    def calibration(self) -> Tensor:
        """Fixed training samples on which BatchNorm statistics are estimated anew."""
        return self.data.train.inputs[:_CALIBRATION_SAMPLES].to(self.config.device)

    def build(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the network at its initial weights, which belong to the seed alone, and its optimizer."""
        config, train = self.config, self.data.train
        # Not a check of the settings: a sweep is planned on any machine.
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigurationError("setting 'device': found 'cuda', expected 'cpu'; torch finds no such device here")
        torch.manual_seed(self.seed)
        example = train.inputs[: config.batch_size]
        if config.network is None:
            model = load_network(config.model or "", example, train.classes, granularity=config.granularity)
        else:
            if not train.inputs.is_floating_point():
                raise ConfigurationError(
                    f"data: found integer inputs, which network={config.network!r} cannot take; give "
                    "model=file.py:function"
                )
            model = build_network(
                config.network,
                example,
                train.classes,
                width=config.width,
                depth=config.depth,
                granularity=config.granularity,
                options=config.network_options,
            )
        # Drawn before it moves, so that every device begins with the same weights.
        model.to(config.device)
        learn_slopes(model, False)
        slopes = {id(gate.slope) for gate in gates(model).values()}
        weights = [parameter for parameter in model.parameters() if id(parameter) not in slopes]
        return model, self.optimizer(weights)

    def optimizer(self, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the configured optimizer; weight decay never acts on slopes, which are not among the weights."""
        config = self.config
        if config.optimizer == "adam":
            return adam(weights, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
        return torch.optim.SGD(
            weights, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )

    def fit(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        first_step: int,
        last_step: int,
        epoch_data: Callable[[int], Batches] | None = None,
        rate_factor: Callable[[int], float] = lambda step: 1.0,
        objective: Objective | None = None,
        after_step: Callable[[int], None] | None = None,
        recorder: Recorder | None = None,
        factory: RecorderFactory | None = None,
        state: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """Train on the stream of batches of the seed, or on ``epoch_data``; the rate falls over the last epochs."""
        config = self.config
        rate = linear_tail(
            config.learning_rate,
            total_steps=self.last_step,
            tail_steps=round(config.decay_share * config.epochs * self.steps_per_epoch),
        )
        fit(
            model,
            optimizer,
            epoch_data=epoch_data or self.epoch_data,
            batch_size=config.batch_size,
            steps_per_epoch=self.steps_per_epoch,
            first_step=first_step,
            last_step=last_step,
            seed=self.seed,
            objective=objective,
            learning_rate=lambda step: rate(step) * rate_factor(step),
            after_step=after_step,
            recorder=recorder,
            factory=factory,
            state=state,
        )

    def epoch_data(self, epoch: int, *, data_order: int = 0) -> Dataset:
        """Return the training samples of one epoch in their order, augmented."""
        samples = self.data.epoch(seed=self.seed, data_order=data_order, epoch=epoch)
        if self.config.augment == "none":
            return samples
        return Augmented(samples, stream_seed(_AUGMENTATION, self.seed, data_order, epoch))

    def with_labels(self, labels: str) -> Training:
        """Return the same training on the same inputs with "random" labels, or those of another rule on two digits.

        Each sample of a fixed set keeps its random label for good; digit pairs, which are fresh in every epoch, cannot.

        Raises: ConfigurationError: the data have no such rule, or it has more labels than the network outputs.
        """
        data = self.data
        if labels != "random":
            return replace(self, data=_other_rule(data, labels))
        if not isinstance(data, Split):
            return replace(self, data=_FreshRandomLabels(data))
        train = _with_random_labels(data.train, stream_seed(_RANDOM_LABELS, self.seed))
        return replace(self, data=replace(data, train=train))

    @property
    def results(self) -> tuple[str, ...]:
        """Names of what ``at_switch`` and ``at_end`` measure."""
        return ("test_accuracy", "test_loss", "train_loss", "dense_accuracy", "dense_loss")

    def at_switch(self, model: nn.Module) -> dict[str, float]:
        """Return dense_accuracy and dense_loss, on the test set."""
        accuracy, loss = self.evaluate(model, self.data.test)
        return {"dense_accuracy": accuracy, "dense_loss": loss}

    def at_end(self, model: nn.Module) -> dict[str, float]:
        """Return test_accuracy, test_loss and train_loss."""
        accuracy, loss = self.evaluate(model, self.data.test)
        return {
            "test_accuracy": accuracy,
            "test_loss": loss,
            "train_loss": self.evaluate(model, self.data.train)[1],
        }

    def complexity(self, model: nn.Module) -> dict[str, float]:
        """Return how nonlinear the network is; see ``complexity``."""
        return complexity(model, self.calibration[:2])

    def evaluate(self, model: nn.Module, data: Dataset) -> tuple[float, float]:
        """Return accuracy and mean loss, BatchNorm statistics estimated anew."""
        return evaluate(model, data, calibration=self.calibration)

    def _probe_set(self, data: Dataset) -> tuple[Tensor, Tensor]:
        inputs, targets = probe_batch(data, per_class=self.config.probe_per_class, seed=self.config.split_seed)
        return inputs.to(self.config.device), targets.to(self.config.device)

    def recorder(
        self,
        factory: RecorderFactory,
        model: nn.Module,
        *,
        schedule: Schedule,
        probes: list[Any],
    ) -> Recorder:
        """Return the recorder, with fixed class-balanced probe sets of training and test samples."""
        config = self.config
        epochs = [epoch * self.steps_per_epoch for epoch in config.checkpoint_epochs]
        return factory(
            model,
            sets={name: self._probe_set(part) for name, part in (("train", self.data.train), ("test", self.data.test))},
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.last_step,
            probes=probes,
            schedule=schedule,
            calibration=self.calibration,
            checkpoint_steps=epochs,
            provenance=self.data.provenance,
        )


class Augmented(Dataset):
    """Images shifted by up to 4 pixels, zeros coming in, half of them mirrored; drawn once an epoch.

    Source: He et al. 2015 (arXiv 1512.03385), section 4.2.
    """

    def __init__(self, images: Dataset, seed: int) -> None:
        super().__init__(images.inputs, images.targets, images.classes, images.name)
        if images.inputs.ndim != 4:
            raise ConfigurationError(
                f"augment: found samples of shape {list(images.inputs.shape[1:])}, expected images [channels, height, "
                "width]; set augment=none"
            )
        generator = torch.Generator().manual_seed(seed)
        shifts = torch.randint(2 * _SHIFT + 1, (2, len(images)), generator=generator)
        mirrored = torch.randint(2, (len(images),), generator=generator).bool()
        object.__setattr__(self, "_draws", (*shifts, mirrored))

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        images, targets = super().__getitem__(index)
        down, right, mirrored = (draw[index] for draw in self._draws)  # type: ignore[attr-defined]
        height, width = images.shape[2:]
        padded = functional.pad(images, (_SHIFT, _SHIFT, _SHIFT, _SHIFT))
        columns = torch.arange(width).expand(len(images), width)
        columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + right[:, None]
        rows = torch.arange(height) + down[:, None]
        # Advanced indices beside a slice come to the front.
        moved = padded[torch.arange(len(images))[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return moved.permute(0, 3, 1, 2).contiguous(), targets


def load_data(config: DataSettings) -> TrainingData:
    """Return the digit pairs of the configuration, a data set by name, or the user's data.

    Images of named data sets and folders are standardized: per channel, by mean and standard deviation of the training
    samples. An npz file is taken as it is.

    Raises: ConfigurationError, ShapeError, DamagedRecording: the data do not fit or are not what they should be.
    """
    if config.data is not None:
        return _loaded(config.data, _stamp(config.data), config.samples, config.test_samples, config.split_seed)
    # Fixed pairs of training digits for train loss and probes: as many as test pairs. None only beside `data`.
    count = config.test_pairs or 0
    return digit_pairs(
        config.task or "sum10",
        pairs=config.pairs or 0,
        test_pairs=count,
        train_pairs=count,
        split_seed=config.split_seed,
    )


def _stamp(data: str) -> tuple[int, int] | None:
    """Size and time of a file of that name: one that was written anew is read anew."""
    path = Path(data)
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None


# The steps of an epoch and every run of a process ask for the same data.
@lru_cache(maxsize=1)
def _loaded(
    data: str, stamp: tuple[int, int] | None, samples: int | None, test_samples: int | None, seed: int
) -> Split:
    split = named_data(data)
    if stamp is None:
        split = _standardized(split)
    return subset(split, samples=samples, test_samples=test_samples, seed=seed)


def _standardized(split: Split) -> Split:
    axes = (0, 2, 3)
    mean = split.train.inputs.mean(axes, keepdim=True)
    deviation = split.train.inputs.std(axes, keepdim=True).clamp_min(1e-6)
    train, test = (replace(part, inputs=(part.inputs - mean) / deviation) for part in (split.train, split.test))
    return replace(split, train=train, test=test)


@dataclass(frozen=True)
class _FreshRandomLabels:
    """Data whose epochs have labels drawn anew."""

    data: TrainingData

    @property
    def train(self) -> Dataset:
        return self.data.train

    @property
    def test(self) -> Dataset:
        return self.data.test

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.data.provenance

    def epoch(self, *, seed: int, data_order: int, epoch: int) -> Dataset:
        samples = self.data.epoch(seed=seed, data_order=data_order, epoch=epoch)
        return _with_random_labels(samples, stream_seed(_RANDOM_LABELS, seed, data_order, epoch))


def _with_random_labels(samples: Dataset, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(samples.classes, (len(samples),), generator=generator)
    return replace(samples, targets=targets)


def _other_rule(data: TrainingData, rule: str) -> TrainingData:
    if not isinstance(data, DigitPairs):
        raise ConfigurationError(f"labels_before: found {rule!r}, expected 'own' or 'random' with this data set")
    other = digit_pairs(rule, pairs=data.pairs, test_pairs=1, train_pairs=1)  # type: ignore[arg-type]
    if other.train.classes > data.train.classes:
        raise ConfigurationError(
            f"labels_before: found {rule!r} with {other.train.classes} labels, expected a rule with at most the "
            f"{data.train.classes} of task={data.task!r}, whose network has no more outputs"
        )
    return DigitPairs(other.task, data.pairs, data.digits, other.train, other.test)


def steps_per_epoch(config: DataSettings) -> int:
    """Return the batches of one epoch; an incomplete one is left out.

    Raises: ConfigurationError: there are fewer samples than one batch takes.
    """
    if config.data is None:
        samples = config.pairs or 0
    else:
        samples = config.samples or len(load_data(config).train)
    if samples < config.batch_size:
        raise ConfigurationError(
            f"data {config.data}: found {samples} training samples, expected at least batch_size={config.batch_size}; "
            "lower batch_size"
        )
    return samples // config.batch_size


def learn_slopes(model: nn.Module, learn: bool) -> None:
    """Let the loss reach the slopes, or not: gradients of slopes that do not learn would only cost time."""
    for gate in gates(model).values():
        gate.slope.requires_grad_(learn)


def restore(
    start: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, *, latest: int, setting_name: str
) -> int:
    """Go on from a trunk's checkpoint; return its step.

    Raises: ConfigurationError: it is of a later step than that from which the run differs from the trunk.
    """
    if start.step > latest:
        raise ConfigurationError(
            f"start: found a checkpoint of step {start.step}, expected step {latest} ({setting_name}) or earlier"
        )
    start.restore(model, optimizer)
    return start.step


def complexity(model: nn.Module, example: Any) -> dict[str, float]:
    """Return how nonlinear a network is: active units and path lengths; lengths are NaN where it cannot be traced.

    active_units, active_share; survivor_nonlinearity: mean |1 - slope| of the active units; weighted_units: their sum;
    napl, apl, weighted_napl: path lengths; effective_width: active units per unit of napl; parameters: slopes left out.
    """
    units = nonlinear_units(model)
    try:
        paths = path_lengths(model, example)
        lengths = {"napl": paths.normalized, "apl": paths.mean, "weighted_napl": paths.weighted}
    except TraceError:
        lengths = dict.fromkeys(("napl", "apl", "weighted_napl"), math.nan)
    active = units.active_total
    return {
        "active_units": float(active),
        "active_share": units.active_share,
        "survivor_nonlinearity": units.weighted_total / active if active else math.nan,
        "weighted_units": units.weighted_total,
        **lengths,
        "effective_width": active / lengths["napl"] if lengths["napl"] else math.nan,
        "parameters": float(weight_count(model)),
    }


def weight_count(model: nn.Module) -> int:
    """Return the number of parameters that are no slopes."""
    slopes = {id(gate.slope) for gate in gates(model).values()}
    return sum(part.numel() for part in model.parameters() if id(part) not in slopes)
