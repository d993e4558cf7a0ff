"""What the command line names, as what ``linearize`` takes: a network with its weights, and batches of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..conversion import gate_network
from ..datasets import named_data, subset
from ..errors import ConfigurationError
from ..gates import Granularity, gates
from ..model_file import build_own_network
from .batches import DatasetBatches, EpochBatches
from .weights import fit_weights, read_weights

_EXAMPLE_SAMPLES = 32
_TEST_BATCH = 512


@dataclass(frozen=True)
class Sources:
    """A gated network with the weights of a checkpoint, its batches, and what they are for report.json."""

    model: nn.Module
    train: EpochBatches
    test: DatasetBatches
    facts: Mapping[str, Any]


def open_sources(
    checkpoint: str | Path,
    *,
    model: str,
    data: str,
    data_dir: str | Path | None = None,
    samples: int | None = None,
    test_samples: int | None = None,
    batch_size: int = 128,
    granularity: Granularity = "channel",
    seed: int = 0,
    device: str = "cpu",
) -> Sources:
    """Load data, network and weights.

    Args:
        checkpoint: as in ``load_weights``.  model: ``file.py:function``, as in ``build_own_network``.
        data, data_dir: as in ``named_data``.
        samples, test_samples: as in ``subset``.

    Raises: the errors of these four; ConfigurationError: a device that is not there.
    """
    place = _device(device)
    # Before the data, which take longer.
    weights, digest = read_weights(checkpoint)
    split = named_data(data, data_dir=data_dir)
    split = subset(split, samples=samples, test_samples=test_samples, seed=seed)
    example = split.train.inputs[:_EXAMPLE_SAMPLES]
    network = build_own_network(model, example, split.train.classes, spare_outputs=True)
    gated = network if gates(network) else gate_network(network, example, granularity=granularity)
    fit_weights(gated, weights, f"checkpoint {checkpoint}")
    facts = {
        "checkpoint": {"path": str(checkpoint), "sha256": digest},
        "model": model,
        "granularity": granularity,
        "data": {
            "name": data,
            "train": len(split.train),
            "test": len(split.test),
            "classes": split.train.classes,
            "provenance": dict(split.provenance),
        },
        "batch_size": batch_size,
        "device": str(place),
    }
    return Sources(
        gated.to(place),
        EpochBatches(split, batch_size=batch_size, seed=seed),
        DatasetBatches(split.test, batch_size=max(batch_size, _TEST_BATCH)),
        facts,
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ConfigurationError(f"device {name!r}: cannot be used ({reason}); expected e.g. cpu or cuda") from error
    return device
