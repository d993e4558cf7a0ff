"""Arithmetic of path lengths: what one layer does to the paths that end in its channels.

Nodes of the graph are channels; kernel size and space are ignored. Every operation takes the states of its operands
and the masks of the gates and returns a new state; nothing here knows torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class State:
    """Paths from the inputs to each of C channels.

    count: number of paths, Python integers [C]; 0 marks a channel that no input reaches.
    total: summed lengths of those paths, Python integers [C].
    expected: expected length under the walk back, [C, 2]: active units, and units weighted by |1 - slope|.
    lengths: probability of each length under the walk back, [C, longest + 1].
    """

    # Python integers: the count of a net of 54 layers has 88 digits, and more layers pass the range of float64.
    count: NDArray[Any]
    total: NDArray[Any]
    expected: FloatArray
    lengths: FloatArray

    @property
    def reached(self) -> NDArray[np.bool_]:
        """Channels that some input reaches, [C]."""
        return np.asarray(self.count != 0, dtype=bool)


class GateMask(NamedTuple):
    """Units of one gate: which are active [C], and |1 - slope| of those [C] (0 where frozen)."""

    active: NDArray[np.bool_]
    weight: FloatArray


class Operation(Protocol):
    """One node of the graph."""

    def apply(self, operands: Sequence[State], masks: Mapping[str, GateMask]) -> State: ...


@dataclass(frozen=True)
class Source:
    """Start of the walk: one path of length 0 in each channel."""

    channels: int

    def apply(self, operands: Sequence[State], masks: Mapping[str, GateMask]) -> State:
        n = self.channels
        return State(_integers([1] * n), _integers([0] * n), np.zeros((n, 2)), np.ones((n, 1)))


@dataclass(frozen=True)
class Dense:
    """Linear map or convolution: c'_j = sum c, t'_j = sum t, e'_j = mean e over the connected channels.

    Inputs and outputs fall into `groups` equal blocks, connected one to one. An input channel that nothing reaches
    is no choice of the walk.
    """

    outputs: int
    groups: int = 1

    def apply(self, operands: Sequence[State], masks: Mapping[str, GateMask]) -> State:
        (state,) = operands
        repeat = self.outputs // self.groups

        def summed(values: NDArray[Any]) -> NDArray[Any]:
            return np.asarray(values.reshape(self.groups, -1, *values.shape[1:]).sum(axis=1))

        reached = state.reached.astype(np.float64)
        connected = np.maximum(summed(reached), 1.0)[:, None]
        # Channels out of reach carry zeros already.
        return State(
            summed(state.count).repeat(repeat),
            summed(state.total).repeat(repeat),
            (summed(state.expected) / connected).repeat(repeat, axis=0),
            (summed(state.lengths) / connected).repeat(repeat, axis=0),
        )


@dataclass(frozen=True)
class Activation:
    """Units: one more on every path through an active channel. Without a gate all channels are active at weight 1."""

    gate: str | None = None

    def apply(self, operands: Sequence[State], masks: Mapping[str, GateMask]) -> State:
        (state,) = operands
        channels = len(state.count)
        mask = masks[self.gate] if self.gate else GateMask(np.ones(channels, dtype=bool), np.ones(channels))
        added = np.stack([mask.active, mask.weight], axis=1) * state.reached[:, None]
        lengths = np.zeros((channels, state.lengths.shape[1] + 1))
        lengths[:, 1:] = state.lengths * mask.active[:, None]
        lengths[:, :-1] += state.lengths * ~mask.active[:, None]
        total = state.total + np.where(mask.active, state.count, 0)
        return State(state.count, total, state.expected + added, lengths)


@dataclass(frozen=True)
class Sum:
    """Sum of k branches: c = sum c_b, t = sum t_b, e = mean e_b over the branches that reach the channel."""

    def apply(self, operands: Sequence[State], masks: Mapping[str, GateMask]) -> State:
        width = max(state.lengths.shape[1] for state in operands)
        choices = np.maximum(np.sum([state.reached for state in operands], axis=0, dtype=np.float64), 1.0)[:, None]
        count, total = operands[0].count, operands[0].total
        for state in operands[1:]:
            count, total = count + state.count, total + state.total
        expected = np.sum([state.expected for state in operands], axis=0) / choices
        lengths = np.sum([_widened(state.lengths, width) for state in operands], axis=0) / choices
        return State(count, total, expected, lengths)


@dataclass(frozen=True)
class Gather:
    """Channels picked from the operands laid end to end; index -1 is a channel that no input reaches."""

    indices: NDArray[np.intp]

    def apply(self, operands: Sequence[State], masks: Mapping[str, GateMask]) -> State:
        width = max(state.lengths.shape[1] for state in operands)
        # One row of zeros at the end, where index -1 points.
        nothing = _integers([0])
        return State(
            np.concatenate([*(state.count for state in operands), nothing])[self.indices],
            np.concatenate([*(state.total for state in operands), nothing])[self.indices],
            np.concatenate([*(state.expected for state in operands), np.zeros((1, 2))])[self.indices],
            np.concatenate([*(_widened(state.lengths, width) for state in operands), np.zeros((1, width))])[
                self.indices
            ],
        )


def _integers(values: list[int]) -> NDArray[Any]:
    return np.array(values, dtype=object)


def _widened(lengths: FloatArray, width: int) -> FloatArray:
    return np.pad(lengths, ((0, 0), (0, width - lengths.shape[1])))
