"""What one configuration and seed fix before training: data, network, optimizer, the stream of batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adam import Adam
from ..checkpoint import Checkpoint
from ..datasets import Dataset, TrainingData, probe_batch, stream_seed
from ..errors import ConfigurationError, MissingDevice, TraceError
from ..experiment import RecorderFactory, StagedExperiment
from ..gates import learn_slopes, nonlinear_units, weights
from ..paths import PathGraph, trace_paths
from ..recorder import Recorder
from ..schedule import Schedule
from ..training_loop import Batches, TrainingLoop, evaluate, linear_tail
from .networks import build_network, load_network
from .settings import DataSettings, TrainingSettings
from .training_data import AUGMENTATION, CALIBRATION, Augmented, load_data, relabeled, steps_per_epoch

_CALIBRATION_SAMPLES = 512
_GRAPHS: dict[tuple[object, ...], PathGraph] = {}  # of this process, by what they depend on
Objective = Callable[[int, Any, Tensor], Tensor]
"""Step before the update, inputs, targets -> loss; takes the place of the loss of the network's outputs."""


@dataclass(frozen=True)
class Training:
    """One configuration and seed. Units: steps are applied optimizer steps."""

    # What ``at_switch`` and ``at_end`` measure.
    results: ClassVar[tuple[str, ...]] = ("test_accuracy", "test_loss", "train_loss", "dense_accuracy", "dense_loss")
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
        # Drawn: a folder of images comes class by class.
        generator = torch.Generator().manual_seed(stream_seed(CALIBRATION, self.config.split_seed))
        drawn = torch.randperm(len(self.data.train), generator=generator)[:_CALIBRATION_SAMPLES]
        return self.data.train.inputs[drawn].to(self.config.device)

    def build(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the network at its initial weights, which belong to the seed alone, and its optimizer."""
        config, train = self.config, self.data.train
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
        place(model, config)
        learn_slopes(model, False)
        return model, self.optimizer(list(weights(model).values()))

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the configured optimizer; weight decay never acts on slopes, which are not given to it."""
        config = self.config
        if config.optimizer == "adam":
            return Adam(parameters, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
        return torch.optim.SGD(
            parameters, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )

    def loop(
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
        captured: bool = True,
    ) -> TrainingLoop:
        """Return the training on the stream of batches of the seed, or on ``epoch_data``.

        The learning rate falls over the last epochs. captured: the passes of a network by name may be replayed.
        """
        config = self.config
        rate = linear_tail(
            config.learning_rate,
            total_steps=self.last_step,
            tail_steps=round(config.decay_share * config.epochs * self.steps_per_epoch),
        )
        return TrainingLoop(
            model=model,
            optimizer=optimizer,
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
            # A network of the user's own may do in its forward pass what a graph does not repeat.
            captured=captured and config.network is not None,
        )

    def epoch_data(self, epoch: int, *, data_order: int = 0) -> Dataset:
        """Return the training samples of one epoch in their order, augmented."""
        samples = self.data.epoch(seed=self.seed, data_order=data_order, epoch=epoch)
        if self.config.augment == "none":
            return samples
        return Augmented(samples, stream_seed(AUGMENTATION, self.seed, data_order, epoch), self.config.device)

    def with_labels(self, labels: str) -> Training:
        """Return the same training on the same inputs with other labels; see ``relabeled``."""
        return replace(self, data=relabeled(self.data, labels, self.seed))

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
        return complexity(model, self.calibration[:2], self._traced)

    def _traced(self, model: nn.Module, example: Tensor) -> PathGraph:
        config = self.config
        if config.network is None:
            return trace_paths(model, example)
        # Of these networks the settings tell the graph; the runs of a sweep have one.
        options = sorted(config.network_options.items())
        settings = repr((config.network, config.width, config.depth, config.granularity, options))
        key = (settings, self.data.train.classes, example.shape, example.dtype)
        if key not in _GRAPHS:
            _GRAPHS[key] = trace_paths(model, example)
        return _GRAPHS[key]

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


class DataExperiment(StagedExperiment):
    """Base of the experiments on one of the data sets with one of the networks."""

    def trains_together(self, config: DataSettings) -> bool:
        """Whether the network is a chain that Adam trains on the CPU."""
        return config.network == "mlp" and config.optimizer == "adam" and config.device == "cpu"


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


def place(model: nn.Module, config: TrainingSettings) -> None:
    """Move a network to the device of its settings; drawn before, it begins with the same weights on every device.

    Raises: MissingDevice.
    """
    # Not a check of the settings: a sweep is planned on any machine.
    if config.device == "cuda" and not torch.cuda.is_available():
        raise MissingDevice("setting 'device': found 'cuda', expected 'cpu'; torch finds no such device here")
    model.to(config.device)


def complexity(
    model: nn.Module, example: Any, trace: Callable[[nn.Module, Any], PathGraph] = trace_paths
) -> dict[str, float]:
    """Return how nonlinear a network is: active units and path lengths; lengths are NaN where it cannot be traced.

    active_units, active_share; survivor_nonlinearity: mean |1 - slope| of the active units; weighted_units: their sum;
    napl, apl, weighted_napl: path lengths; effective_width: active units per unit of napl; parameters: slopes left out.

    Args: trace: gives the graph of the network, which may be known already.
    """
    units = nonlinear_units(model)
    try:
        paths = trace(model, example).lengths(model)
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
    return sum(part.numel() for part in weights(model).values())
