"""The training of a network while its units become linear, target after target, measured on the way."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..adam import Adam
from ..errors import ConfigurationError, DivergedTraining
from ..gates import gates, learn_slopes
from ..kernel.problem import default_forward
from ..linearization import Linearizer
from ..progress import Progress, progress_bar
from ..recorder import Recorder
from ..recorder.snapshots import has_running_norms, reestimate
from ..training_loop import Loss, linear_tail
from .batches import Batch
from .curve import Meter, Phase, Point
from .settings import Settings, counts

# Of the cheap probes, in the epochs of a ramp, where most of the units go within a few steps.
_RECORDED_A_RAMP_EPOCH = 4


@dataclass
class PostTraining:
    """Walks a gated network down to the numbers of units in ``counts``.

    Args:
        steps_per_epoch: batches of a pass.  batches: training batches without end.  example: inputs of a few samples.
        calibration: inputs for the statistics of BatchNorm, which are those of this batch at the end of a target.
    Attributes: curve: all points so far.  step: applied steps so far.
    """

    model: nn.Module
    settings: Settings
    counts: Sequence[int]
    steps_per_epoch: int
    batches: Iterator[Batch]
    loss: Loss
    meter: Meter
    example: Any
    calibration: Any
    curve: list[Point] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        self._losses: list[float] = []
        # Here, so that settings it refuses are refused before anything is trained.
        self._owner = self._linearizer(self.counts[0])
        self._optimizer = self._make_optimizer()

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def stage_steps(self) -> int:
        """Steps that one target takes."""
        return self.settings.epochs * self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Steps of the whole."""
        return len(self.counts) * self.stage_steps

    def measure_dense(self) -> None:
        """Measure the network as it was given, with its own statistics of BatchNorm.

        Raises: ConfigurationError: its loss is not finite.
        """
        try:
            self.curve.append(self.meter.point(self.model, step=0, epoch=0.0, target=self._owner.active, phase="dense"))
        except DivergedTraining:
            raise ConfigurationError(
                "linearize: the loss of the network on the test batches is not finite before any training, expected a "
                "trained network; check the weights and the inputs"
            ) from None

    def train(self, recorder: Recorder | None, *, reached: Callable[[], None], progress: bool) -> None:
        """Train; ``reached`` is called at the end of each target, when the network is in evaluation mode.

        Raises: DivergedTraining: a loss or a slope is not finite.  ConfigurationError: a batch that does not fit.
        """
        optimizer = self._optimizer
        with ExitStack() as stack:
            # A hook of the optimizer, placed before the recorder's: snapshots must see the slopes that were moved.
            stack.callback(optimizer.register_step_post_hook(self._move_slopes).remove)
            if recorder is not None:
                stack.enter_context(recorder.attach(optimizer, total_steps=self.total_steps))
            bar = stack.enter_context(progress_bar(self.total_steps, what="steps", shown=progress))
            for number, count in enumerate(self.counts):
                if number:
                    self._owner = self._linearizer(self._reachable(count))
                self._reach(optimizer, bar)
                reached()

    def often(self) -> list[int]:
        """Steps at which probes that cost little may look: within the ramps, and at the end of each epoch."""
        apart = max(1, self.steps_per_epoch // _RECORDED_A_RAMP_EPOCH)
        starts = range(0, self.total_steps, self.stage_steps)
        ramp = range(0, self.settings.ramp_epochs * self.steps_per_epoch, apart)
        return sorted({start + step for start in starts for step in ramp} | set(self.epoch_ends()))

    def epoch_ends(self) -> list[int]:
        """Steps at which an epoch ends, and step 0."""
        return list(range(0, self.total_steps + 1, self.steps_per_epoch))

    def _linearizer(self, count: int) -> Linearizer:
        settings = self.settings
        return Linearizer(
            self.model,
            remaining=count,
            steps=settings.ramp_epochs * self.steps_per_epoch,
            strength=settings.strength,
            rule=settings.rule,
            survivors=settings.survivors,
            common_slope=settings.common_slope,
            settle_steps=settings.settling * self.steps_per_epoch,
        )

    def _reachable(self, count: int) -> int:
        """The count itself, or the nearest one to which the layer-wise gates that are left add up."""
        total = sum(gate.channels for gate in gates(self.model).values())
        found = counts(self.model, [count / total])[0]
        if found != count:
            warnings.warn(
                f"linearize: the layer-wise gates that are left cannot add up to {count} units; the target is {found}",
                RuntimeWarning,
                stacklevel=2,
            )
        return found

    def _make_optimizer(self) -> torch.optim.Optimizer:
        weights = [parameter for parameter in self._owner.weights() if parameter.requires_grad]
        if not weights:
            raise ConfigurationError(
                "linearize: found no weight with requires_grad, expected a network that can be trained; unfreeze layers"
            )
        settings = self.settings
        if settings.optimizer == "adam":
            return Adam(weights, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
        return torch.optim.SGD(
            weights, lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
        )

    def _move_slopes(self, *_: Any) -> None:
        if not self._owner.done:
            self._owner.step()

    def _reach(self, optimizer: torch.optim.Optimizer, bar: Progress) -> None:
        """Train to the end of one target."""
        settings, target = self.settings, self._owner.target
        ramp_steps = settings.ramp_epochs * self.steps_per_epoch
        settled = ramp_steps + settings.settling * self.steps_per_epoch
        rate = linear_tail(
            settings.learning_rate,
            total_steps=self.stage_steps,
            tail_steps=settings.recovery_epochs * self.steps_per_epoch,
        )
        levels = np.linspace(self._owner.active, target, settings.points + 1)[1:].tolist()
        learn_slopes(self.model, True)
        self.model.train()
        for call in range(1, self.stage_steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = rate(call - 1)
            self._train_on(next(self.batches), optimizer)
            bar.update()
            if call == ramp_steps:
                # Gradients of slopes that do not learn any more would only cost time.
                learn_slopes(self.model, False)
            active = self._owner.active if levels and call <= ramp_steps else math.inf
            passed = [level for level in levels if active <= level]
            levels = levels[len(passed) :]
            if call < self.stage_steps and (passed or call % self.steps_per_epoch == 0):
                phase: Phase = "ramp" if call <= ramp_steps else "settle" if call <= settled else "recovery"
                self._measure(phase, self.calibration)
        learn_slopes(self.model, True)
        self.model.eval()
        if has_running_norms(self.model):
            # What is saved is then what is measured here.
            reestimate(self.model, self.calibration, default_forward)
        self._measure("end", None)

    def _train_on(self, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
        inputs, targets = batch
        optimizer.zero_grad()
        value = self.loss(default_forward(self.model, inputs), targets)
        number = value.item()
        if not math.isfinite(number):
            raise DivergedTraining(
                f"training: found loss {number} at step {self.step}, expected a finite number; lower the learning rate"
            )
        value.backward()  # type: ignore[no-untyped-call]
        self.step += 1
        optimizer.step()
        self._losses.append(number)

    def _measure(self, phase: Phase, calibration: Any) -> None:
        point = self.meter.point(
            self.model,
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            target=self._owner.target,
            phase=phase,
            train_loss=math.fsum(self._losses) / len(self._losses),
            calibration=calibration,
        )
        self._losses.clear()
        self.curve.append(point)
