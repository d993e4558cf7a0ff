"""What an experiment trains on: a training and a test set, and the samples of an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .seeds import EPOCH, stream


@dataclass(frozen=True)
class Dataset:
    """Inputs [N, ...] and integer labels [N] below ``classes``, whose names are given where they are known."""

    inputs: Tensor
    targets: Tensor
    classes: int
    name: str = "data set"
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


class TrainingData(Protocol):
    """What an experiment trains on: fixed train and test samples, and the batches of an epoch."""

    @property
    def train(self) -> Dataset: ...

    @property
    def test(self) -> Dataset: ...

    @property
    def provenance(self) -> Mapping[str, Any]: ...

    def epoch(self, *, seed: int, data_order: int, epoch: int) -> Dataset:
        """Return the training samples of one epoch, shuffled; the same words give the same samples."""
        ...


@dataclass(frozen=True)
class Split:
    """A training and a test set; an epoch is the training set in a new order.

    ``provenance`` says in plain JSON what was loaded: name, license, files with their SHA-256, how they were verified,
    and what part of the data set it is where it is not the whole. It holds no path of this machine.
    """

    train: Dataset
    test: Dataset
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def epoch(self, *, seed: int, data_order: int, epoch: int) -> Dataset:
        """Return the training set in the order of (seed, data_order, epoch)."""
        order = torch.randperm(len(self.train), generator=stream(EPOCH, seed, data_order, epoch))
        inputs, targets = self.train[order]
        return replace(self.train, inputs=inputs, targets=targets)
