"""The recording of a post-training, by probes that cost little."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..recorder import Recorder, Watch
from ..schedule import at_steps
from ..training_loop import Loss
from .batches import endless, first_samples
from .training import PostTraining

_SAMPLES = 100


def make_recorder(
    training: PostTraining, path: Path, test_loader: Iterable[Any], *, loss: Loss | None, manifest: Mapping[str, Any]
) -> Recorder:
    """Recorder of units and path lengths, often in the ramps, and of gates and outputs on a test batch each epoch."""
    # A DataLoader draws from the global generator: training must be the same without a recording.
    with torch.random.fork_rng(devices=[]):
        inputs, targets = next(endless(test_loader, "test_loader", training.device))
    often, epochs = at_steps(training.often()), at_steps(training.epoch_ends())
    # Where the graph cannot be traced, the report says why.
    cheap = ["units"] if training.meter.untraceable else ["units", "path-length"]
    return Recorder(
        training.model,
        [
            *(Watch(name, schedule=often) for name in cheap),
            *(Watch(name, schedule=epochs) for name in ("gates", "outputs")),
        ],
        {"test": (first_samples(inputs, _SAMPLES), targets[:_SAMPLES])},
        path=path,
        loss=None if loss is None else _by_sample(loss),
        steps_per_epoch=training.steps_per_epoch,
        calibration=training.calibration,
        manifest=manifest,
    )


def _by_sample(loss: Loss) -> Loss:
    """The user's loss of a batch, taken of each sample by itself: [N]."""

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        singles = range(len(targets))
        return torch.stack([loss(outputs[i : i + 1], targets[i : i + 1]) for i in singles])

    return losses
