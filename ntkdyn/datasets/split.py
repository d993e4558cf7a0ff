"""What an experiment trains on: a training and a test set, and the samples of an epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .seeds import EPOCH, stream


@dataclass(frozen=True)
class Dataset:
    """Inputs [N, ...] and integer labels [N] below ``classes``."""

    inputs: Tensor
    targets: Tensor
    classes: int
    name: str = "data set"

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

    def epoch(self, *, seed: int, data_order: int, epoch: int) -> Dataset:
        """Return the training samples of one epoch, shuffled; the same words give the same samples."""
        ...


@dataclass(frozen=True)
class Split:
    """A training and a test set; an epoch is the training set in a new order."""

    train: Dataset
    test: Dataset

    def epoch(self, *, seed: int, data_order: int, epoch: int) -> Dataset:
        """Return the training set in the order of (seed, data_order, epoch)."""
        order = torch.randperm(len(self.train), generator=stream(EPOCH, seed, data_order, epoch))
        inputs, targets = self.train[order]
        return Dataset(inputs, targets, self.train.classes, self.train.name)
