"""What post-training takes from a user's loader: batches without end, a calibration batch, labels that fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ..datasets import Dataset, Split, stream_seed
from ..errors import ConfigurationError
from ..training_loop import has_classes

Batch = tuple[Any, Tensor]

_CALIBRATION_SAMPLES = 512
# First word of their seed; the data sets have small numbers, and experiments those from 101 on.
_CALIBRATION = 201


class EpochBatches:
    """Batches of a split's training set; each pass has a new order, that of (seed, number of the pass).

    A last batch that would be smaller is left out, unless it is the only one.
    """

    def __init__(self, split: Split, *, batch_size: int, seed: int) -> None:
        self._split = split
        self._size = min(batch_size, len(split.train))
        self._seed = seed
        self._passes = 0

    def __len__(self) -> int:
        return len(self._split.train) // self._size

    def __iter__(self) -> Iterator[Batch]:
        data = self._split.epoch(seed=self._seed, data_order=0, epoch=self._passes)
        self._passes += 1
        return (data[first * self._size : (first + 1) * self._size] for first in range(len(self)))


class DatasetBatches:
    """Batches of a data set, in its order."""

    def __init__(self, data: Dataset, *, batch_size: int) -> None:
        self._data = data
        self._size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._data) / self._size)

    def __iter__(self) -> Iterator[Batch]:
        return (self._data[first : first + self._size] for first in range(0, len(self._data), self._size))


def passing(loader: Iterable[Any], where: str, device: torch.device) -> Iterator[Batch]:
    """The batches of one pass, as (inputs, targets) on a device; inputs are any pytree of tensors.

    Raises: ConfigurationError: a batch is something else.
    """
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            parts = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise ConfigurationError(
                f"{where}: found a batch that is a {type(batch).__name__}{parts}, expected (inputs, targets) with a "
                "tensor of targets"
            )
        inputs, targets = batch
        if not targets.dim() or not len(targets):
            raise ConfigurationError(f"{where}: found targets of shape {list(targets.shape)}, expected [N, ...]")
        yield tree_map_only(Tensor, lambda leaf: leaf.to(device), inputs), targets.to(device)


def endless(loader: Iterable[Any], where: str, device: torch.device) -> Iterator[Batch]:
    """The batches of pass after pass.

    Raises: ConfigurationError: a pass has no batch.
    """
    number = 0
    while True:
        number += 1
        empty = True
        for batch in passing(loader, where, device):
            empty = False
            yield batch
        if empty:
            raise ConfigurationError(
                f"{where}: found no batch in pass {number}, expected a loader for any number of passes, as a "
                "DataLoader or a list; a generator has one"
            )


def steps_per_epoch(loader: Any, where: str) -> int:
    """Number of batches of a pass.

    Raises: ConfigurationError: the loader does not know it, or it is 0.
    """
    try:
        count = len(loader)
    except TypeError:
        raise ConfigurationError(
            f"{where}: found a {type(loader).__name__} without len(), expected a loader that knows its number of "
            "batches, as the ramp ends at a fixed step; give it __len__, or pass a list of batches"
        ) from None
    if count < 1:
        raise ConfigurationError(f"{where}: found no batch, expected at least one; lower the batch size")
    return count


def calibration_inputs(loader: Any, where: str, device: torch.device, *, seed: int) -> Any:
    """Inputs of 512 samples of a pass in one batch, drawn by the seed without replacement; all where there are fewer.

    A whole pass is gone through: that of a loader which does not shuffle may come class by class.
    """
    generator = torch.Generator().manual_seed(stream_seed(_CALIBRATION, seed))
    kept: Any = None
    # Each sample draws a number, and those with the smallest ones stay.
    numbers = torch.empty(0, dtype=torch.float64)
    for inputs, targets in islice(passing(loader, where, device), len(loader)):
        drawn = torch.cat([numbers, torch.rand(len(targets), generator=generator, dtype=torch.float64)])
        chosen = drawn.argsort()[:_CALIBRATION_SAMPLES]
        if kept is None:
            kept = _rows([inputs], chosen)
        elif int(chosen.max()) >= len(numbers):
            kept = _rows([kept, inputs], chosen)
        numbers = drawn[chosen]
    return kept


def _rows(parts: Sequence[Any], index: Tensor) -> Any:
    """Rows of several pytrees of tensors, of which one comes after the other."""
    return tree_map(lambda *leaves: torch.cat(leaves)[index.to(leaves[0].device)], *parts)


def first_samples(inputs: Any, count: int) -> Any:
    """The first samples of a pytree of tensors."""
    return tree_map(lambda leaf: leaf[:count], inputs)


def described(inputs: Any) -> str:
    """Shapes and types of a pytree of tensors."""
    return ", ".join(f"{list(leaf.shape)} {leaf.dtype}" for leaf in tree_leaves(inputs))


def class_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of class numbers.

    Raises: ConfigurationError: a label that is none of the outputs' classes, which a GPU would answer by ending the
        process; targets that are no class numbers.
    """
    if not has_classes(outputs, targets):
        raise ConfigurationError(
            f"loss: found targets {list(targets.shape)} {targets.dtype} for outputs {list(outputs.shape)}, expected "
            "class numbers [N] for outputs [N, C]; give loss= for other targets"
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= outputs.shape[1]:
        raise ConfigurationError(
            f"labels: found label {low if low < 0 else high}, expected 0 to {outputs.shape[1] - 1}, as the network has "
            f"{outputs.shape[1]} outputs; give a network with an output for each class"
        )
    return functional.cross_entropy(outputs, targets.long())
