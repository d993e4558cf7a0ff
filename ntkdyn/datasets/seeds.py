"""Seeds of all random draws from data sets: a hash of what the caller names, never the global generator."""

from __future__ import annotations

import numpy as np
import torch

# First word of every seed, so that no two kinds of draws share a stream.
SPLIT, TEST_PAIRS, TRAIN_PAIRS, EPOCH, PROBE, SUBSET = range(6)


def stream_seed(*words: int) -> int:
    """Return a seed below 2^63 that belongs to these non-negative numbers alone (hashed by numpy's SeedSequence)."""
    # With their number in front: SeedSequence takes (0, 1) and (0, 1, 0) for the same.
    state = np.random.SeedSequence((len(words), *words)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def stream(*words: int) -> torch.Generator:
    """Return a generator of its own, seeded by these numbers."""
    return torch.Generator().manual_seed(stream_seed(*words))
