"""Arithmetic of path lengths: what one layer does to the paths that end in its channels.

Nodes of the graph are channels; kernel size and space are ignored. Every operation takes the states of its operands
and an evaluation (masks of the gates, kind of numbers) and returns a new state; nothing here knows torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[Any]


class Arithmetic(NamedTuple):
    """Kind of the numbers that probabilities are: float64, or fractions in arrays of objects."""

    dtype: Any
    number: Callable[[Any], Any]

    def array(self, values: ArrayLike) -> Numbers:
        """The values as numbers of this kind; floats become fractions exactly."""
        given = np.asarray(values)
        if self.dtype is not object:
            return given.astype(self.dtype)
        return np.asarray(np.frompyfunc(self.number, 1, 1)(given.astype(object)), dtype=object)


FLOATS = Arithmetic(np.float64, float)
FRACTIONS = Arithmetic(object, Fraction)


@dataclass(frozen=True)
class Paths:
    """A polynomial for each of C channels: n_0 + n_1 z + n_2 z^2 + ... at z = 2^slot, n_l paths of length l.

    values: Python integers.  kind: index of each channel's value, [C]. Behind a dense layer all channels have one.
    """

    # Whole polynomials in one Python integer each: one addition adds all lengths, and nothing overflows (a net of 54
    # layers has counts of 88 digits).
    values: tuple[int, ...]
    kind: NDArray[np.intp]

    @property
    def reached(self) -> NDArray[np.bool_]:
        """Channels that some input reaches, [C]."""
        return np.array([value != 0 for value in self.values], dtype=bool)[self.kind]

    def total(self) -> int:
        """Sum over channels."""
        counts = np.bincount(self.kind, minlength=len(self.values)).tolist()
        return sum(count * value for count, value in zip(counts, self.values, strict=True) if count)

    def summed(self, groups: int, repeat: int) -> Paths:
        """Sum over each of the equal blocks of channels, repeated."""
        sums = tuple(Paths(self.values, block).total() for block in self.kind.reshape(groups, -1))
        return Paths(sums, np.arange(groups).repeat(repeat))

    def lengthened(self, active: NDArray[np.bool_], slot: int) -> Paths:
        """Times z where active."""
        pairs, kind = np.unique(2 * self.kind + active, return_inverse=True)
        return Paths(tuple(self.values[pair // 2] << slot * (pair % 2) for pair in pairs.tolist()), kind)

    def plus(self, other: Paths) -> Paths:
        """Sum, channel by channel."""
        many = len(other.values)
        pairs, kind = np.unique(self.kind * many + other.kind, return_inverse=True)
        return Paths(tuple(self.values[pair // many] + other.values[pair % many] for pair in pairs.tolist()), kind)

    def beside(self, other: Paths) -> Paths:
        """Channels of both, end to end."""
        return Paths(self.values + other.values, np.concatenate([self.kind, other.kind + len(self.values)]))


_NOTHING = Paths((0,), np.zeros(1, dtype=np.intp))


@dataclass(frozen=True)
class State:
    """Paths from the inputs to each of C channels.

    paths: how many of which length; 0 marks a channel that no input reaches.
    expected: expected length under the walk back, [C, 2]: active units, and units weighted by |1 - slope|.
    lengths: probability of each length under the walk back, [C, longest + 1].
    """

    paths: Paths
    expected: Numbers
    lengths: Numbers


class GateMask(NamedTuple):
    """Units of one gate: which are active [C], and |1 - slope| of those [C] (0 where frozen)."""

    active: NDArray[np.bool_]
    weight: Numbers


@dataclass(frozen=True)
class Evaluation:
    """What a graph is evaluated with.

    masks: gate name -> its units.  arithmetic: kind of the probabilities.  slot: bits of one number of paths, more
    than the largest needs.
    """

    masks: Mapping[str, GateMask]
    arithmetic: Arithmetic
    slot: int


class Operation(Protocol):
    """One node of the graph."""

    def apply(self, operands: Sequence[State], evaluation: Evaluation) -> State: ...


@dataclass(frozen=True)
class Source:
    """Start of the walk: one path of length 0 in each channel."""

    channels: int

    def apply(self, operands: Sequence[State], evaluation: Evaluation) -> State:
        n, numbers = self.channels, evaluation.arithmetic
        return State(
            Paths((1,), np.zeros(n, dtype=np.intp)), np.zeros((n, 2), numbers.dtype), np.ones((n, 1), numbers.dtype)
        )


@dataclass(frozen=True)
class Dense:
    """Linear map or convolution: sums of paths, means of expectations over the connected channels.

    Inputs and outputs fall into `groups` equal blocks, connected one to one. An input channel that nothing reaches
    is no choice of the walk.
    """

    outputs: int
    groups: int = 1

    def apply(self, operands: Sequence[State], evaluation: Evaluation) -> State:
        (state,) = operands
        repeat = self.outputs // self.groups

        def averaged(values: Numbers) -> Numbers:
            means = values.reshape(self.groups, -1, values.shape[1]).sum(axis=1) / connected
            return np.broadcast_to(means[:, None], (self.groups, repeat, values.shape[1])).reshape(-1, values.shape[1])

        connected = _choices(evaluation, state.paths.reached.reshape(self.groups, -1).sum(axis=1))
        # Channels out of reach carry zeros already.
        return State(state.paths.summed(self.groups, repeat), averaged(state.expected), averaged(state.lengths))


@dataclass(frozen=True)
class Activation:
    """Units: one more on every path through an active channel. Without a gate all channels are active at weight 1."""

    gate: str | None = None

    def units(self, operands: Sequence[State], evaluation: Evaluation) -> int:
        """Number of active units here."""
        if self.gate:
            return int(evaluation.masks[self.gate].active.sum())
        return int(operands[0].paths.reached.sum())

    def apply(self, operands: Sequence[State], evaluation: Evaluation) -> State:
        (state,) = operands
        if self.gate:
            return _lengthened(state, evaluation.masks[self.gate], evaluation)
        return _lengthened(state, _everywhere(state.paths.reached), evaluation)


@dataclass(frozen=True)
class Sum:
    """Sum of k branches: sums of paths, means of expectations over the branches that reach the channel."""

    def apply(self, operands: Sequence[State], evaluation: Evaluation) -> State:
        width = max(state.lengths.shape[1] for state in operands)
        choices = _choices(evaluation, _reaching(operands))
        paths = operands[0].paths
        expected, lengths = operands[0].expected, _widened(operands[0].lengths, width)
        for state in operands[1:]:
            paths, expected = paths.plus(state.paths), expected + state.expected
            lengths = lengths + _widened(state.lengths, width)
        return State(paths, expected / choices, lengths / choices)


@dataclass(frozen=True)
class Product:
    """Product of branches: a choice between them, as in a sum, and one active unit where two or more reach.

    Where only one reaches, the others are constants, and a product with a constant is linear.
    """

    def units(self, operands: Sequence[State], evaluation: Evaluation) -> int:
        """Number of active units here."""
        return int((_reaching(operands) > 1).sum())

    def apply(self, operands: Sequence[State], evaluation: Evaluation) -> State:
        chosen = Sum().apply(operands, evaluation)
        return _lengthened(chosen, _everywhere(_reaching(operands) > 1), evaluation)


@dataclass(frozen=True)
class Gather:
    """Channels picked from the operands laid end to end; index -1 is a channel that no input reaches."""

    indices: NDArray[np.intp]

    def apply(self, operands: Sequence[State], evaluation: Evaluation) -> State:
        width, dtype = max(state.lengths.shape[1] for state in operands), evaluation.arithmetic.dtype
        # One row of zeros at the end, where index -1 points.
        paths = functools.reduce(Paths.beside, [*(state.paths for state in operands), _NOTHING])
        expected = np.concatenate([*(state.expected for state in operands), np.zeros((1, 2), dtype)])
        lengths = [*(_widened(state.lengths, width) for state in operands), np.zeros((1, width), dtype)]
        return State(
            Paths(paths.values, paths.kind[self.indices]), expected[self.indices], np.concatenate(lengths)[self.indices]
        )


def path_counts(paths: int, slot: int) -> tuple[int, ...]:
    """Number of paths of each length, from the polynomial of a `State`; as many entries as the longest needs."""
    counts = []
    while paths:
        counts.append(paths & ((1 << slot) - 1))
        paths >>= slot
    return tuple(counts)


def _lengthened(state: State, mask: GateMask, evaluation: Evaluation) -> State:
    """One more unit where the mask is active."""
    channels, longest = state.lengths.shape
    # Channels out of reach carry zeros already.
    added = np.stack([evaluation.arithmetic.array(mask.active), mask.weight], axis=1) * state.paths.reached[:, None]
    lengths = np.zeros((channels, longest + 1), state.lengths.dtype)
    lengths[mask.active, 1:] = state.lengths[mask.active]
    lengths[~mask.active, :-1] = state.lengths[~mask.active]
    return State(state.paths.lengthened(mask.active, evaluation.slot), state.expected + added, lengths)


def _everywhere(active: NDArray[np.bool_]) -> GateMask:
    return GateMask(active, active.astype(np.int64))


def _reaching(operands: Sequence[State]) -> NDArray[np.int64]:
    """How many of the operands reach each channel."""
    reached = [state.paths.reached for state in operands]
    return np.asarray(np.sum(reached, axis=0, dtype=np.int64))


def _choices(evaluation: Evaluation, counts: NDArray[np.int64]) -> Numbers:
    return evaluation.arithmetic.array(np.maximum(counts, 1))[:, None]


def _widened(lengths: Numbers, width: int) -> Numbers:
    if lengths.shape[1] == width:
        return lengths
    wide = np.zeros((len(lengths), width), lengths.dtype)
    wide[:, : lengths.shape[1]] = lengths
    return wide
