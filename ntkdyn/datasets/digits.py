"""The real digits of scikit-learn, and pairs of them with label rules of rising difficulty."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigurationError
from .manifest import known_dataset
from .seeds import EPOCH, SPLIT, TEST_PAIRS, TRAIN_PAIRS, stream
from .split import Dataset, Split
from .verification import FileRecord

Task = Literal["first", "parity", "sum", "sum10"]

# The label rules on two digits a, b in rising difficulty, and the number of classes of each.
_RULES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "first": (lambda a, b: a, 10),
    "parity": (lambda a, b: (a + b) % 2, 2),
    "sum": (lambda a, b: a + b, 19),
    "sum10": (lambda a, b: (a + b) % 10, 10),
}
_DIGITS_TRAIN = 1347  # of 1797; the other 450 are test digits


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

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What a recording says of the digits that are paired, as that of a Split."""
        return self.digits.provenance

    def epoch(self, *, seed: int, data_order: int, epoch: int) -> Dataset:
        """Return ``pairs`` pairs of training digits, drawn with replacement for (seed, data_order, epoch)."""
        return _draw_pairs(self.digits.train, self.task, self.pairs, stream(EPOCH, seed, data_order, epoch))


def digits(*, split_seed: int = 0) -> Split:
    """Return scikit-learn's 1797 real 8x8 digits, 1347 for training and 450 for testing.

    Inputs are [N, 64] float32, the pixels 0-16 divided by 16, not standardized. The SHA-256 in ``provenance`` is that
    of all inputs, then all labels (int64), before they are split.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI repository; in sklearn.datasets.
    """
    known = known_dataset("digits")
    inputs, targets = _load()
    content = inputs.numpy().tobytes() + targets.numpy().tobytes()
    order = torch.randperm(len(targets), generator=stream(SPLIT, split_seed))
    train, test = order[:_DIGITS_TRAIN], order[_DIGITS_TRAIN:]
    return Split(
        Dataset(inputs[train], targets[train], 10, "training digits"),
        Dataset(inputs[test], targets[test], 10, "test digits"),
        {
            "name": known.name,
            "origin": known.origin,
            "license": known.license,
            "partial": None,
            "files": [FileRecord("digits", len(content), hashlib.sha256(content).hexdigest(), None).as_json()],
        },
    )


@lru_cache(maxsize=1)
def _load() -> tuple[Tensor, Tensor]:
    # The file alone: importing scikit-learn takes longer than a run.
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise ConfigurationError(
            "digits: found no scikit-learn, expected the package that holds them; pip install scikit-learn"
        )
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    return torch.as_tensor(table[:, :-1] / 16, dtype=torch.float32), torch.as_tensor(table[:, -1], dtype=torch.int64)


def digit_images(*, split_seed: int = 0) -> Split:
    """Return the digits of ``digits`` as images [N, 1, 8, 8]."""
    split = digits(split_seed=split_seed)
    names = known_dataset("digits").classes
    train, test = (
        replace(part, inputs=part.inputs.reshape(-1, 1, 8, 8), class_names=names) for part in (split.train, split.test)
    )
    return replace(split, train=train, test=test)


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
        train=_draw_pairs(split.train, task, train_pairs, stream(TRAIN_PAIRS, split_seed)),
        test=_draw_pairs(split.test, task, test_pairs, stream(TEST_PAIRS, split_seed)),
    )


def _draw_pairs(source: Dataset, task: Task, count: int, generator: torch.Generator) -> Dataset:
    drawn = torch.randint(len(source), (2, count), generator=generator)
    left, right = drawn
    rule, classes = _RULES[task]
    # Both digits of a pair at once: this is the larger part of what an epoch of data takes.
    inputs = source.inputs.index_select(0, drawn.T.flatten()).view(count, -1)
    return Dataset(inputs, rule(source.targets[left], source.targets[right]), classes, f"{task} of {source.name}")
