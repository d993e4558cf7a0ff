"""Data of the experiments: loaded by the settings, augmented, relabeled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..datasets import Dataset, DigitPairs, Split, TrainingData, digit_pairs, named_data, stream_seed, subset
from ..errors import ConfigurationError
from .settings import DataSettings

_SHIFT = 4  # pixels

# First word of every seed here, so that no two kinds of draws share a stream; datasets uses small numbers.
AUGMENTATION, RANDOM_LABELS, CALIBRATION = 101, 102, 103


class Augmented(Dataset):
    """Images shifted by up to 4 pixels, zeros coming in, half of them mirrored; drawn once an epoch.

    A slice is moved to ``device`` before it is shifted: on a CPU that takes a good part of a GPU's step. The same draws
    on every device.

    Source: He et al. 2015 (arXiv 1512.03385), section 4.2.
    """

    def __init__(self, images: Dataset, seed: int, device: str = "cpu") -> None:
        super().__init__(images.inputs, images.targets, images.classes, images.name)
        if images.inputs.ndim != 4:
            raise ConfigurationError(
                f"augment: found samples of shape {list(images.inputs.shape[1:])}, expected images [channels, height, "
                "width]; set augment=none"
            )
        generator = torch.Generator().manual_seed(seed)
        shifts = torch.randint(2 * _SHIFT + 1, (2, len(images)), generator=generator)
        mirrored = torch.randint(2, (len(images),), generator=generator).bool()
        object.__setattr__(self, "_draws", (*shifts, mirrored))
        object.__setattr__(self, "_device", device)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        images, targets = super().__getitem__(index)
        device = self._device  # type: ignore[attr-defined]
        images = images.to(device)
        down, right, mirrored = (draw[index].to(device) for draw in self._draws)  # type: ignore[attr-defined]
        height, width = images.shape[2:]
        padded = functional.pad(images, (_SHIFT, _SHIFT, _SHIFT, _SHIFT))
        columns = torch.arange(width, device=device).expand(len(images), width)
        columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + right[:, None]
        rows = torch.arange(height, device=device) + down[:, None]
        samples = torch.arange(len(images), device=device)
        # Advanced indices beside a slice come to the front.
        moved = padded[samples[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return moved.permute(0, 3, 1, 2).contiguous(), targets


def load_data(config: DataSettings) -> TrainingData:
    """Return the digit pairs of the configuration, a data set by name, or the user's data.

    Images of named data sets and folders are standardized: per channel, by mean and standard deviation of the training
    samples. An npz file is taken as it is.

    Raises: ConfigurationError, ShapeError, DamagedRecording: the data do not fit or are not what they should be.
    """
    if config.data is not None:
        return _loaded(config.data, _stamp(config.data), config.samples, config.test_samples, config.split_seed)
    # Fixed pairs of training digits for train loss and probes: as many as test pairs. None only beside `data`.
    count = config.test_pairs or 0
    return digit_pairs(
        config.task or "sum10",
        pairs=config.pairs or 0,
        test_pairs=count,
        train_pairs=count,
        split_seed=config.split_seed,
    )


def _stamp(data: str) -> tuple[int, int] | None:
    """Size and time of a file of that name: one that was written anew is read anew."""
    path = Path(data)
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None


# The steps of an epoch and every run of a process ask for the same data.
@lru_cache(maxsize=1)
def _loaded(
    data: str, stamp: tuple[int, int] | None, samples: int | None, test_samples: int | None, seed: int
) -> Split:
    split = named_data(data)
    if stamp is None:
        split = _standardized(split)
    return subset(split, samples=samples, test_samples=test_samples, seed=seed)


def _standardized(split: Split) -> Split:
    axes = (0, 2, 3)
    mean = split.train.inputs.mean(axes, keepdim=True)
    deviation = split.train.inputs.std(axes, keepdim=True).clamp_min(1e-6)
    train, test = (replace(part, inputs=(part.inputs - mean) / deviation) for part in (split.train, split.test))
    return replace(split, train=train, test=test)


@dataclass(frozen=True)
class _FreshRandomLabels:
    """Data whose epochs have labels drawn anew."""

    data: TrainingData

    @property
    def train(self) -> Dataset:
        return self.data.train

    @property
    def test(self) -> Dataset:
        return self.data.test

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.data.provenance

    def epoch(self, *, seed: int, data_order: int, epoch: int) -> Dataset:
        samples = self.data.epoch(seed=seed, data_order=data_order, epoch=epoch)
        return _with_random_labels(samples, stream_seed(RANDOM_LABELS, seed, data_order, epoch))


def _with_random_labels(samples: Dataset, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(samples.classes, (len(samples),), generator=generator)
    return replace(samples, targets=targets)


def relabeled(data: TrainingData, labels: str, seed: int) -> TrainingData:
    """Return the same inputs with "random" labels, or those of another rule on two digits.

    Each sample of a fixed set keeps its random label for good; digit pairs, which are fresh in every epoch, cannot.

    Raises: ConfigurationError: the data have no such rule, or it has more labels than the network outputs.
    """
    if labels != "random":
        return _other_rule(data, labels)
    if not isinstance(data, Split):
        return _FreshRandomLabels(data)
    return replace(data, train=_with_random_labels(data.train, stream_seed(RANDOM_LABELS, seed)))


def _other_rule(data: TrainingData, rule: str) -> TrainingData:
    if not isinstance(data, DigitPairs):
        raise ConfigurationError(f"labels_before: found {rule!r}, expected 'own' or 'random' with this data set")
    other = digit_pairs(rule, pairs=data.pairs, test_pairs=1, train_pairs=1)  # type: ignore[arg-type]
    if other.train.classes > data.train.classes:
        raise ConfigurationError(
            f"labels_before: found {rule!r} with {other.train.classes} labels, expected a rule with at most the "
            f"{data.train.classes} of task={data.task!r}, whose network has no more outputs"
        )
    return DigitPairs(other.task, data.pairs, data.digits, other.train, other.test)


def steps_per_epoch(config: DataSettings) -> int:
    """Return the batches of one epoch; an incomplete one is left out.

    Raises: ConfigurationError: there are fewer samples than one batch takes.
    """
    if config.data is None:
        samples = config.pairs or 0
    else:
        samples = config.samples or len(load_data(config).train)
    if samples < config.batch_size:
        raise ConfigurationError(
            f"data {config.data}: found {samples} training samples, expected at least batch_size={config.batch_size}; "
            "lower batch_size"
        )
    return samples // config.batch_size
