"""The training loop that experiments share, the same bit for bit when it goes on from a checkpoint; evaluation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from . import checkpoint
from .captured_step import CapturedStep
from .chain import Chain, chain_of
from .clone import structural_clone
from .datasets import Dataset, stream_seed
from .errors import ConfigurationError, DivergedTraining, StorageError
from .experiment import RecorderFactory
from .kernel.problem import default_forward
from .progress import progress_bar
from .recorder import Recorder
from .recorder.snapshots import has_running_norms, reestimate

Loss = Callable[[Tensor, Tensor], Tensor]


class Batches(Protocol):
    """Samples of one epoch in their order; a slice gives inputs, any pytree that the network takes, and targets."""

    def __getitem__(self, index: slice, /) -> tuple[Any, Tensor]: ...


def linear_tail(base: float, *, total_steps: int, tail_steps: int) -> Callable[[int], float]:
    """Return the learning rate of step s = 0, 1, …: ``base``, falling linearly to 0 over the last ``tail_steps``.

    >>> rate = linear_tail(1.0, total_steps=10, tail_steps=4)
    >>> [rate(step) for step in (0, 5, 6, 7, 8, 9)]
    [1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    return lambda step: base * min(1.0, (total_steps - step) / max(tail_steps, 1))


@dataclass(kw_only=True)
class TrainingLoop:
    """One training, described: ``run`` does it; starting from a checkpoint equals never having stopped, bit for bit.

    Attributes:
        epoch_data: epoch number -> its samples in their order; batch k of the epoch is the k-th slice.
        objective: step before the update, inputs, targets -> what is minimized, in place of the loss of the outputs.
        learning_rate: step before the update -> rate, set in all parameter groups.
        after_step: called with the number of applied steps after each update and before the recorder looks.
        recorder: attached for the time of training.
        factory: where checkpoints go and which steps get one, and whether a progress bar is shown.
        state: what the experiment needs beside model and optimizer to go on from a checkpoint; it finds it again under
            ``factory.resumed.extra["experiment"]``.
        captured: on a CUDA device, replay forward and backward pass as one graph; see ``CapturedStep`` for what network
            and ``loss`` may then do. An objective, which depends on the step, is not captured.
        seed: torch's generator is seeded by (seed, epoch) at the start of every epoch, for Dropout and the like.
        step: applied steps so far.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    epoch_data: Callable[[int], Batches]
    batch_size: int
    steps_per_epoch: int
    last_step: int
    first_step: int = 0
    seed: int = 0
    loss: Loss = functional.cross_entropy
    objective: Callable[[int, Any, Tensor], Tensor] | None = None
    learning_rate: Callable[[int], float] | None = None
    after_step: Callable[[int], None] | None = None
    recorder: Recorder | None = None
    factory: RecorderFactory | None = None
    state: Callable[[], Mapping[str, Any]] = dict
    captured: bool = False

    def __post_init__(self) -> None:
        self.step = self.first_step
        self.chain: Chain | None = None
        self._replay: CapturedStep | None = None
        self._data: Batches | None = None
        self._device = _device(self.model)
        self._saved_steps = frozenset() if self.factory is None else self.factory.checkpoint_steps
        self._trial = None if self.factory is None else self.factory.trial

    def run(self) -> None:
        """Train from ``first_step`` to ``last_step``.

        Raises: DivergedTraining: the loss is not finite; the optimizer did not take that step.
        """
        with self.begun():
            while self.step < self.last_step:
                self.advance()

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Recorder and hooks in place, for ``advance``."""
        with ExitStack() as stack:
            # A hook of the optimizer, placed before the recorder's: snapshots must see what after_step did to the
            # slopes.
            stack.callback(self.optimizer.register_step_post_hook(self._stepped).remove)
            if self.recorder is not None:
                stack.enter_context(
                    self.recorder.attach(self.optimizer, first_step=self.first_step, total_steps=self.last_step)
                )
            shown = self.factory is not None and self.factory.progress
            self._bar = stack.enter_context(
                progress_bar(self.last_step, what="steps", done=self.first_step, shown=shown)
            )
            self._save()
            self.model.train()
            yield
            self._bar.update(self.last_step - self._bar.n)

    def advance(self, batch: tuple[Any, Tensor] | None = None) -> None:
        """Take one step, with the batch that has been drawn for it, if any.  Raises: DivergedTraining."""
        inputs, targets = batch or self.batch()
        self.optimizer.zero_grad()
        backward: Callable[[], Any]
        if self.chain is not None:
            value, backward = self.chain.loss(inputs, targets, self.loss)
        elif self.captured and self.objective is None and self._device.type == "cuda":
            value, backward = self._replayed(inputs, targets), lambda: None
        else:
            if self.objective is None:
                value = self._passed(inputs, targets)
            else:
                value = self.objective(self.step, inputs, targets)
            backward = value.backward
        self.check(value.item())
        backward()
        self.apply()

    def _passed(self, inputs: Any, targets: Tensor) -> Tensor:
        return self.loss(default_forward(self.model, inputs), targets)

    def _replayed(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self._replay is None or not self._replay.fits(inputs, targets):
            self._replay = None  # gives its memory to the next one
            self._replay = CapturedStep(self.model, self._passed, inputs, targets)
        return self._replay(inputs, targets)

    def batch(self) -> tuple[Any, Tensor]:
        """Inputs and targets of the next step, for which generator and learning rate are set."""
        epoch, batch = divmod(self.step, self.steps_per_epoch)
        data, begins = self._data, batch == 0 or self._data is None
        if data is None or batch == 0:
            data = self._data = self.epoch_data(epoch)
            self._bar.update(self.step - self._bar.n)
        if batch == 0:
            _seed(stream_seed(self.seed, epoch), self._device)
        if self.learning_rate is not None:
            rate = self.learning_rate(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        inputs, targets = data[batch * self.batch_size : (batch + 1) * self.batch_size]
        inputs = _moved(inputs, self._device)
        if begins and self.objective is None:
            self.chain = chain_of(self.model, inputs)
        return inputs, targets.to(self._device)

    def check(self, loss: float) -> None:
        """Raises: DivergedTraining: the loss of the next step is not finite."""
        if not math.isfinite(loss):
            raise DivergedTraining(
                f"training: found loss {loss} at step {self.step}, expected a finite number; lower the learning rate"
            )

    def apply(self) -> None:
        """Let the optimizer take the step, and save it where it is to be saved."""
        self.optimizer.step()
        self.applied()

    def applied(self) -> None:
        """Save the step that was taken, where it is to be saved."""
        self._save()
        if self._trial is not None:
            self._trial.stepped(self.recorder)

    def _stepped(self, *_: Any) -> None:
        self.step += 1
        if self.after_step is not None:
            self.after_step(self.step)

    def _save(self) -> None:
        factory = self.factory
        # The first one of a run that goes on is the one that it goes on from.
        if factory is None or self.step not in self._saved_steps or (self.step == self.first_step and factory.resumed):
            return
        extra = {
            "recorder": None if self.recorder is None else self.recorder.state_dict(),
            "experiment": dict(self.state()),
        }
        try:
            checkpoint.save(factory.path / "checkpoints", self.step, self.model, self.optimizer, extra)
        except StorageError as error:
            warnings.warn(f"{error}; training goes on without this checkpoint", RuntimeWarning, stacklevel=4)


def evaluate(
    model: nn.Module,
    data: Dataset,
    *,
    loss: Loss = functional.cross_entropy,
    calibration: Tensor | None = None,
    batch_size: int = 2048,
) -> tuple[float, float]:
    """Return accuracy (share of right predictions) and mean loss in evaluation mode; the model is not touched.

    ``calibration`` re-estimates the statistics of BatchNorm on that batch first, on a clone.
    """
    device = _device(model)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(data), batch_size):
            inputs, targets = data[first : first + batch_size]
            yield inputs.to(device), targets.to(device)

    return evaluate_batches(model, batches(), loss=loss, calibration=calibration)


def evaluate_batches(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    *,
    loss: Loss = functional.cross_entropy,
    calibration: Any = None,
) -> tuple[float, float]:
    """Return accuracy and mean loss over batches (inputs, targets), as ``evaluate``.

    The accuracy is the arg max over axis 1, over all positions where there are further axes, and NaN where the targets
    are no class numbers of such outputs.

    Raises: ConfigurationError: there is no batch.
    """
    twin = structural_clone(model)
    twin.eval()
    if calibration is not None and has_running_norms(twin):
        reestimate(twin, calibration, default_forward)
    right, positions, samples, total = 0, 0, 0, 0.0
    with torch.no_grad():
        for inputs, targets in batches:
            outputs = default_forward(twin, inputs)
            if has_classes(outputs, targets):
                right += int((outputs.argmax(dim=1) == targets).sum())
                positions += targets.numel()
            total += float(loss(outputs, targets)) * len(targets)
            samples += len(targets)
    if not samples:
        raise ConfigurationError("evaluation: found no batch, expected at least one")
    return right / positions if positions else math.nan, total / samples


def has_classes(outputs: Tensor, targets: Tensor) -> bool:
    """Whether targets [N, ...] are class numbers of outputs [N, C, ...]."""
    if targets.is_floating_point() or outputs.dim() < 2 or outputs.shape[1] < 2:
        return False
    return targets.shape == outputs.shape[:1] + outputs.shape[2:]


def _seed(seed: int, device: torch.device) -> None:
    # torch.manual_seed writes down the stack of calls for each kind of device that is not there yet: a millisecond.
    (torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed)(seed)


def _moved(inputs: Any, device: torch.device) -> Any:
    # Taking a tree apart takes longer than a layer.
    return (
        inputs.to(device) if isinstance(inputs, Tensor) else tree_map_only(Tensor, lambda one: one.to(device), inputs)
    )


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
