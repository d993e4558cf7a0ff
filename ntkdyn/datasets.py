"""Data sets as tensors: real digits and pairs of them, a user's npz file, class-balanced probe batches.

All randomness comes from generators seeded by what the caller names; nothing touches the global generator.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigurationError, ShapeError

Task = Literal["first", "parity", "sum", "sum10"]

# The label rules on two digits a, b in rising difficulty, and the number of classes of each.
_RULES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "first": (lambda a, b: a, 10),
    "parity": (lambda a, b: (a + b) % 2, 2),
    "sum": (lambda a, b: a + b, 19),
    "sum10": (lambda a, b: (a + b) % 10, 10),
}
_DIGITS_TRAIN = 1347  # of 1797; the other 450 are test digits

# First word of every seed, so that no two kinds of draws share a stream.
_SPLIT, _TEST_PAIRS, _TRAIN_PAIRS, _EPOCH, _PROBE = range(5)


def stream_seed(*words: int) -> int:
    """Return a seed below 2^63 that belongs to these non-negative numbers alone (hashed by numpy's SeedSequence)."""
    # With their number in front: SeedSequence takes (0, 1) and (0, 1, 0) for the same.
    state = np.random.SeedSequence((len(words), *words)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def _generator(*words: int) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(*words))


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
        order = torch.randperm(len(self.train), generator=_generator(_EPOCH, seed, data_order, epoch))
        inputs, targets = self.train[order]
        return Dataset(inputs, targets, self.train.classes, self.train.name)


@dataclass(frozen=True)
class DigitPairs:
    """Two digits side by side, [N, 128]; an epoch is ``pairs`` freshly drawn pairs of training digits.

    ``train`` holds fixed pairs of training digits (for train losses and probes), ``test`` fixed pairs of test digits.
    """

    task: Task
    pairs: int
    digits: Split
    train: Dataset
    test: Dataset

    def epoch(self, *, seed: int, data_order: int, epoch: int) -> Dataset:
        """Return ``pairs`` pairs of training digits, drawn with replacement for (seed, data_order, epoch)."""
        return _draw_pairs(self.digits.train, self.task, self.pairs, _generator(_EPOCH, seed, data_order, epoch))


def digits(*, split_seed: int = 0) -> Split:
    """Return scikit-learn's 1797 real 8x8 digits, 1347 for training and 450 for testing.

    Inputs are [N, 64] float32, the pixels 0-16 divided by 16, not standardized.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI repository; in sklearn.datasets.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    inputs = torch.as_tensor(bunch.data / 16, dtype=torch.float32)
    targets = torch.as_tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(targets), generator=_generator(_SPLIT, split_seed))
    train, test = order[:_DIGITS_TRAIN], order[_DIGITS_TRAIN:]
    return Split(
        Dataset(inputs[train], targets[train], 10, "training digits"),
        Dataset(inputs[test], targets[test], 10, "test digits"),
    )


def digit_pairs(
    task: Task, *, pairs: int = 4096, test_pairs: int = 2000, train_pairs: int = 2000, split_seed: int = 0
) -> DigitPairs:
    """Return pairs of real digits, split before pairing: no digit is in a training and in a test pair.

    The label of digits a, b is a ("first"), (a+b) mod 2 ("parity"), a+b ("sum") or (a+b) mod 10 ("sum10"); inputs
    are the 64 pixels of a, then those of b, in [0, 1]. Split, ``train`` and ``test`` depend on split_seed alone.

    Raises: ConfigurationError: an unknown task or a count below 1.
    """
    if task not in _RULES:
        raise ConfigurationError(f"digit_pairs: found task={task!r}, expected one of {', '.join(get_args(Task))}")
    for name, count in (("pairs", pairs), ("test_pairs", test_pairs), ("train_pairs", train_pairs)):
        if count < 1:
            raise ConfigurationError(f"digit_pairs: found {name}={count}, expected at least 1")
    split = digits(split_seed=split_seed)
    return DigitPairs(
        task,
        pairs,
        split,
        train=_draw_pairs(split.train, task, train_pairs, _generator(_TRAIN_PAIRS, split_seed)),
        test=_draw_pairs(split.test, task, test_pairs, _generator(_TEST_PAIRS, split_seed)),
    )


def _draw_pairs(source: Dataset, task: Task, count: int, generator: torch.Generator) -> Dataset:
    left, right = torch.randint(len(source), (2, count), generator=generator)
    rule, classes = _RULES[task]
    inputs = torch.cat([source.inputs[left], source.inputs[right]], dim=1)
    return Dataset(inputs, rule(source.targets[left], source.targets[right]), classes, f"{task} of {source.name}")


def load_npz(path: str | Path) -> Split:
    """Load a user's arrays x_train, y_train, x_test, y_test from an npz file; nothing is rescaled.

    Floating and uint8 inputs become float32, other integers int64 (token ids). Labels are integers [N] from 0 on; the
    number of classes is the largest label + 1.

    Raises: ConfigurationError: the file cannot be read, an array is missing, is not finite or has the wrong type.
        ShapeError: sizes do not fit together.
    """
    path = Path(path)
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ConfigurationError(f"data {path}: found a single array, expected an npz file of {', '.join(names)}")
        with file:
            missing = [name for name in names if name not in file]
            if missing:
                raise ConfigurationError(
                    f"data {path}: missing {', '.join(missing)}; found {', '.join(file) or 'nothing'}, "
                    f"expected {', '.join(names)}"
                )
            arrays = {name: file[name] for name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, ConfigurationError):
            raise
        reason = " ".join(str(error).split())
        raise ConfigurationError(
            f"data {path}: not readable as npz without pickle ({reason}); use numpy.savez"
        ) from error
    inputs = {part: _inputs(arrays[f"x_{part}"], f"data {path}: x_{part}") for part in ("train", "test")}
    targets = {part: _labels(arrays[f"y_{part}"], f"data {path}: y_{part}") for part in ("train", "test")}
    for part in ("train", "test"):
        if len(inputs[part]) != len(targets[part]):
            raise ShapeError(
                f"data {path}: found {len(inputs[part])} samples in x_{part} and {len(targets[part])} labels in "
                f"y_{part}, expected as many"
            )
    if inputs["train"].shape[1:] != inputs["test"].shape[1:] or inputs["train"].dtype != inputs["test"].dtype:
        raise ShapeError(
            f"data {path}: found samples of shape {list(inputs['train'].shape[1:])} ({inputs['train'].dtype}) in "
            f"x_train and {list(inputs['test'].shape[1:])} ({inputs['test'].dtype}) in x_test, expected the same"
        )
    classes = 1 + max(int(labels.max()) for labels in targets.values())
    return Split(
        Dataset(inputs["train"], targets["train"], classes, f"{path.name} train"),
        Dataset(inputs["test"], targets["test"], classes, f"{path.name} test"),
    )


def _inputs(array: np.ndarray[Any, Any], where: str) -> Tensor:
    if array.ndim < 2 or 0 in array.shape:
        raise ShapeError(f"{where}: found shape {list(array.shape)}, expected [samples, ...] with nothing empty")
    if array.dtype.kind == "f" or array.dtype == np.uint8:
        if not np.isfinite(array).all():
            raise ConfigurationError(f"{where}: found NaN or infinity, expected finite numbers")
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if array.dtype.kind in "iu":
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
    raise ConfigurationError(f"{where}: found type {array.dtype}, expected floating or integer numbers")


def _labels(array: np.ndarray[Any, Any], where: str) -> Tensor:
    if array.dtype.kind not in "iu":
        raise ConfigurationError(f"{where}: found type {array.dtype}, expected integer labels")
    if array.ndim != 1 or not len(array):
        raise ShapeError(f"{where}: found shape {list(array.shape)}, expected [samples]")
    if array.min() < 0:
        raise ConfigurationError(f"{where}: found label {array.min()}, expected labels from 0 on")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))


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
    generator = _generator(_PROBE, seed)
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
