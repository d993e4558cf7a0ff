"""Class-balanced draws from a data set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError, ShapeError
from .seeds import PROBE, SUBSET, stream
from .split import Dataset, Split


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


def subset(split: Split, *, samples: int | None = None, test_samples: int | None = None, seed: int = 0) -> Split:
    """Draw class-balanced subsets of a training and a test set without replacement; None takes the whole set.

    Classes get as many samples as each other, as far as they have them; a rest that cannot be shared goes one sample a
    class to classes that the seed chooses. Samples stay in the order of the data set, and of two subsets by one seed
    the smaller one is part of the larger one.

    Raises: ConfigurationError: a number below 1, or larger than the set.
    """
    if samples is None and test_samples is None:
        return split
    train = _balanced(split.train, samples, "samples", seed)
    test = _balanced(split.test, test_samples, "test_samples", seed)
    drawn = {"samples": len(train), "test_samples": len(test), "seed": seed}
    return replace(split, train=train, test=test, provenance={**split.provenance, "subset": drawn})


def _balanced(data: Dataset, count: int | None, setting: str, seed: int) -> Dataset:
    if count is None:
        return data
    if not 1 <= count <= len(data):
        raise ConfigurationError(f"{setting}: found {count}, expected 1 to {len(data)}, the size of {data.name}")
    part = int(setting == "test_samples")
    members = [(data.targets == label).nonzero().flatten() for label in range(data.classes)]
    favor = torch.randperm(data.classes, generator=stream(SUBSET, seed, part)).tolist()
    chosen = []
    left = count
    # From the smallest class on, each takes an equal share of what is left: what one lacks the later ones share.
    for place, label in enumerate(sorted(range(data.classes), key=lambda label: (len(members[label]), favor[label]))):
        share = min(len(members[label]), left // (data.classes - place))
        left -= share
        order = torch.randperm(len(members[label]), generator=stream(SUBSET, seed, part, label))
        chosen.append(members[label][order[:share]])
    index = torch.cat(chosen).sort().values
    inputs, targets = data[index]
    return replace(data, inputs=inputs, targets=targets)
