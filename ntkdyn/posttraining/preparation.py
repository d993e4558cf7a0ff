"""From a user's network, loaders and loss to a post-training that can begin; what does not fit is refused here."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..clone import structural_clone, unwrapped
from ..conversion import gate_network
from ..errors import ConfigurationError, NtkdynError
from ..gates import Granularity, gates
from ..kernel.problem import default_forward
from ..recorder.snapshots import checked_outputs, copied, has_running_norms, run_forward
from ..training_loop import Loss
from .batches import Batch, calibration_inputs, class_loss, described, endless, first_samples, steps_per_epoch
from .curve import Meter
from .settings import Settings, counts
from .training import PostTraining
from .weights import state_tensors

# Enough to gate a network and to look at its outputs.
_EXAMPLE_SAMPLES = 32


def prepare(
    model: nn.Module,
    train_loader: Iterable[Any],
    test_loader: Iterable[Any],
    *,
    loss: Loss | None,
    granularity: Granularity,
    settings: Settings,
) -> PostTraining:
    """Copy and gate the network, and lay out its training.

    Raises: ConfigurationError, ShapeError: settings, targets or batches do not fit.  ConversionError: a ReLU cannot be
        gated.
    """
    original = unwrapped(model)
    state = state_tensors(original)
    if not state:
        raise ConfigurationError(f"linearize: {type(original).__name__} has no weights, expected a trained network")
    device = next(iter(state.values())).device
    steps = steps_per_epoch(train_loader, "train_loader")
    inputs, _ = next(endless(train_loader, "train_loader", device))
    example = first_samples(inputs, _EXAMPLE_SAMPLES)
    run_forward(default_forward, structural_clone(original).eval(), copied(example), "train_loader")
    gated = copy.deepcopy(original) if gates(original) else gate_network(original, example, granularity=granularity)
    used = class_loss if loss is None else loss
    for name, loader in (("train_loader", train_loader), ("test_loader", test_loader)):
        _refuse_batch(gated, next(endless(loader, name, device)), used, name)
    calibration = None
    if has_running_norms(gated):
        calibration = calibration_inputs(train_loader, "train_loader", device, seed=settings.seed)
    return PostTraining(
        model=gated,
        settings=settings,
        counts=counts(gated, settings.targets),
        steps_per_epoch=steps,
        batches=endless(train_loader, "train_loader", device),
        loss=used,
        meter=Meter(gated, first_samples(example, 2), test_loader, loss=used, device=device),
        example=example,
        calibration=calibration,
    )


def _refuse_batch(model: nn.Module, batch: Batch, loss: Loss, where: str) -> None:
    """Refuse a batch on which the network or the loss fails, and a network that its clone is not equal to."""
    inputs, targets = batch
    model.eval()
    with torch.no_grad():
        cloned = run_forward(default_forward, structural_clone(model), copied(inputs), where)
        outputs = checked_outputs(cloned, len(targets))
        if not torch.allclose(outputs, default_forward(model, copied(inputs)), rtol=1e-4, atol=1e-6, equal_nan=True):
            raise ConfigurationError(
                f"linearize: the outputs of the {type(model).__name__} change when its hooks are taken off, or from "
                "call to call, expected the same; measurements are made without hooks; move what they do into forward"
            )
        try:
            value = loss(outputs, targets)
        except NtkdynError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"{where}: the loss fails on outputs {described(outputs)} and targets {described(targets)}: "
                f"{type(error).__name__}: {' '.join(str(error).split())}; expected loss(outputs, targets)"
            ) from error
    if not isinstance(value, Tensor) or value.dim():
        found = described(value) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigurationError(f"{where}: the loss returned {found}, expected a tensor of one number; take the mean")
