"""The training loop that experiments share, the same bit for bit when it goes on from a checkpoint; evaluation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from . import checkpoint
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


def adam(parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float = 0.0) -> torch.optim.Adam:
    """Return Adam in one fused kernel.

    Measured with torch 2.13 on one CPU thread, 26,000 weights in 14 tensors, batch 128: a training step takes 0.58 ms
    fused, 0.76 ms foreach and 0.78 ms tensor by tensor.
    """
    return torch.optim.Adam(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)


def linear_tail(base: float, *, total_steps: int, tail_steps: int) -> Callable[[int], float]:
    """Return the learning rate of step s = 0, 1, …: ``base``, falling linearly to 0 over the last ``tail_steps``.

    >>> rate = linear_tail(1.0, total_steps=10, tail_steps=4)
    >>> [rate(step) for step in (0, 5, 6, 7, 8, 9)]
    [1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    return lambda step: base * min(1.0, (total_steps - step) / max(tail_steps, 1))


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    epoch_data: Callable[[int], Batches],
    batch_size: int,
    steps_per_epoch: int,
    last_step: int,
    first_step: int = 0,
    seed: int = 0,
    loss: Loss = functional.cross_entropy,
    objective: Callable[[int, Any, Tensor], Tensor] | None = None,
    learning_rate: Callable[[int], float] | None = None,
    after_step: Callable[[int], None] | None = None,
    recorder: Recorder | None = None,
    factory: RecorderFactory | None = None,
    state: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Train from ``first_step`` to ``last_step``; starting from a checkpoint equals never having stopped, bit for bit.

    Args:
        epoch_data: epoch number -> its samples in their order; batch k of the epoch is the k-th slice.
        objective: step before the update, inputs, targets -> what is minimized, in place of the loss of the outputs.
        learning_rate: step before the update -> rate, set in all parameter groups.
        after_step: called with the number of applied steps after each update and before the recorder looks.
        recorder: attached for the time of training.
        factory: where checkpoints go and which steps get one, and whether a progress bar is shown.
        state: what the experiment needs beside model and optimizer to go on from a checkpoint; it finds it again under
            ``factory.resumed.extra["experiment"]``.
        seed: torch's generator is seeded by (seed, epoch) at the start of every epoch, for Dropout and the like.

    Raises: DivergedTraining: the loss is not finite; the optimizer did not take that step.
    """
    folder = None if factory is None else factory.path / "checkpoints"
    saved_steps = frozenset() if factory is None else factory.checkpoint_steps
    trial = None if factory is None else factory.trial
    step = first_step
    device = _device(model)

    def save() -> None:
        # The first one of a run that goes on is the one that it goes on from.
        if folder is None or step not in saved_steps or (step == first_step and factory and factory.resumed):
            return
        extra = {"recorder": None if recorder is None else recorder.state_dict(), "experiment": dict(state())}
        try:
            checkpoint.save(folder, step, model, optimizer, extra)
        except StorageError as error:
            warnings.warn(f"{error}; training goes on without this checkpoint", RuntimeWarning, stacklevel=3)

    def stepped(*_: Any) -> None:
        nonlocal step
        step += 1
        if after_step is not None:
            after_step(step)

    with ExitStack() as stack:
        # A hook of the optimizer, placed before the recorder's: snapshots must see what after_step did to the slopes.
        stack.callback(optimizer.register_step_post_hook(stepped).remove)
        if recorder is not None:
            stack.enter_context(recorder.attach(optimizer, first_step=first_step, total_steps=last_step))
        bar = stack.enter_context(
            progress_bar(last_step, what="steps", done=first_step, shown=factory is not None and factory.progress)
        )
        save()
        model.train()
        data: Batches | None = None
        chain: Chain | None = None
        backward: Callable[[], Any]
        while step < last_step:
            epoch, batch = divmod(step, steps_per_epoch)
            if data is None or batch == 0:
                data = epoch_data(epoch)
                bar.update(step - bar.n)
            if batch == 0:
                torch.manual_seed(stream_seed(seed, epoch))
            if learning_rate is not None:
                rate = learning_rate(step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
            samples = data[batch * batch_size : (batch + 1) * batch_size]
            inputs, targets = _moved(samples[0], device), samples[1].to(device)
            if objective is None and (batch == 0 or step == first_step):
                chain = chain_of(model, inputs)
            optimizer.zero_grad()
            if objective is not None:
                value = objective(step, inputs, targets)
                backward = value.backward
            elif chain is not None:
                value, backward = chain.loss(inputs, targets, loss)
            else:
                value = loss(default_forward(model, inputs), targets)
                backward = value.backward
            if not math.isfinite(value.item()):
                raise DivergedTraining(
                    f"training: found loss {value.item()} at step {step}, expected a finite number; "
                    "lower the learning rate"
                )
            backward()
            optimizer.step()
            save()
            if trial is not None:
                trial.stepped(recorder)
        bar.update(last_step - bar.n)


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


def _moved(inputs: Any, device: torch.device) -> Any:
    # Taking a tree apart takes longer than a layer.
    return (
        inputs.to(device) if isinstance(inputs, Tensor) else tree_map_only(Tensor, lambda one: one.to(device), inputs)
    )


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
