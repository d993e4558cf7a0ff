"""Class-balanced draws from a data set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError, ShapeError
from .seeds import PROBE, stream
from .split import Dataset


def probe_batch(dataset: Any, *, per_class: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw a class-balanced batch without replacement, sorted by class: inputs [C * per_class, ...] and labels.

    Args: dataset: a Dataset, a pair (inputs, labels), or anything with len() whose items are (input, label). Items
        are taken as they are: pass a data set without augmentation.
    Raises: ConfigurationError: per_class is below 1. ShapeError: a class has too few samples.
    """
    if per_class < 1:
        raise ConfigurationError(f"probe_batch: found per_class={per_class}, expected at least 1")
    if isinstance(dataset, tuple):
        inputs, targets = (torch.as_tensor(part) for part in dataset)
        classes, name = None, "the data set"
    elif isinstance(dataset, Dataset):
        inputs, targets, classes, name = dataset.inputs, dataset.targets, dataset.classes, dataset.name
    else:
        inputs, classes, name = None, None, type(dataset).__name__
        labels = getattr(dataset, "targets", None)
        labels = [int(dataset[index][1]) for index in range(len(dataset))] if labels is None else labels
        targets = torch.as_tensor(labels)
    if targets.ndim != 1 or targets.is_floating_point():
        raise ShapeError(
            f"probe_batch: found labels of shape {list(targets.shape)} ({targets.dtype}), expected integers [N]"
        )
    generator = stream(PROBE, seed)
    chosen = []
    for label in range(classes) if classes is not None else torch.unique(targets).tolist():
        members = (targets == label).nonzero().flatten()
        if len(members) < per_class:
            raise ShapeError(
                f"probe_batch: found {len(members)} samples of class {label} in {name}, expected at least "
                f"per_class={per_class}; lower per_class"
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    index = torch.cat(chosen)
    if inputs is None:
        return torch.stack([torch.as_tensor(dataset[position][0]) for position in index.tolist()]), targets[index]
    return inputs[index], targets[index]
