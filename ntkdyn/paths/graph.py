"""The traced graph of a network, and the path lengths that it gives for a state of the gates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..clone import unwrapped
from ..errors import ShapeError, TraceError, UnknownName
from ..gates import gates
from .algebra import (
    FLOATS,
    FRACTIONS,
    Activation,
    Arithmetic,
    Evaluation,
    GateMask,
    Operation,
    Product,
    State,
    path_counts,
)
from .rules import Node, Program, Track

Number = TypeVar("Number", float, Fraction)


@dataclass(frozen=True)
class PathLengths(Generic[Number]):
    """Lengths of the paths of a network; unit: active units per path. Numbers are floats, or fractions if exact.

    mean: APL = (1/|P|) sum_p len(p), every path with equal weight.
    normalized: NAPL = sum_p Pr(p) len(p), Pr by uniform choices walking back from the output.
    weighted: NAPL in which a unit that is not frozen counts |1 - slope|; an un-gated nonlinearity counts 1.
    distribution: probability of each length under the walk back, [longest + 1], sums to 1. The longest length
        is that of the graph, whatever is frozen. float64, or fractions in an array of objects.
    per_layer: gate name -> share of its units that are active, in [0, 1], in the order of the graph.
    paths: |P|, exactly; of little meaning by itself (flattening multiplies it by the pixels).
    path_counts: number of paths of each length, exactly, [longest + 1]; sums to |P|.
    active, total: gate name -> units that are not frozen, and all units; a gate that is called twice counts once.
    effective_width: active units / NAPL, channels per unit of length; NaN where nothing is active. Counts what NAPL
        counts: the units of every call of a gate, and un-gated ones.
    mean_active_width: mean number of active channels over layers with at least one active unit; NaN where none has.
    always_active: name -> kind of the un-gated nonlinearities on paths: GELU, an un-gated ReLU, products.
    uncounted: name -> kind of what is nonlinear and no unit: max-pooling, softmax, LayerNorm, attention, and
        nonlinearities on no path, as before the scores of attention.
    """

    mean: Number
    normalized: Number
    weighted: Number
    distribution: NDArray[Any]
    per_layer: Mapping[str, Number]
    paths: int
    path_counts: tuple[int, ...]
    active: Mapping[str, int]
    total: Mapping[str, int]
    effective_width: Number | float
    mean_active_width: Number | float
    always_active: Mapping[str, str]
    uncounted: Mapping[str, str]


@dataclass(frozen=True)
class PathGraph:
    """The graph of a network, traced once: holds no parameters, and gives path lengths for any state of the gates.

    operations, operands: what is computed, in order, and from which earlier results.  outputs: the results that leave
    the network.  gates: gate name -> channels, in the order of the graph.  always_active, uncounted: see PathLengths.
    paths: |P|, which is the same in every state of the gates.
    """

    operations: tuple[Operation, ...]
    operands: tuple[tuple[int, ...], ...]
    outputs: tuple[int, ...]
    gates: Mapping[str, int]
    always_active: Mapping[str, str]
    uncounted: Mapping[str, str]
    paths: int

    @overload
    def lengths(self, model: nn.Module, *, exact: Literal[False] = False) -> PathLengths[float]: ...

    @overload
    def lengths(self, model: nn.Module, *, exact: Literal[True]) -> PathLengths[Fraction]: ...

    def lengths(self, model: nn.Module, *, exact: bool = False) -> PathLengths[float] | PathLengths[Fraction]:
        """Path lengths of a network with this graph: the traced one, or a clone; only its gates are read.

        exact: all numbers as fractions, from the same formulas; a network of 50 layers takes seconds.

        Raises: UnknownName: a gate is missing.  ShapeError: a gate has another number of channels.
        """
        if exact:
            return self._lengths(model, FRACTIONS, Fraction)
        return self._lengths(model, FLOATS, float)

    def _lengths(self, model: nn.Module, arithmetic: Arithmetic, number: type[Number]) -> PathLengths[Number]:
        masks = self._masks(model, arithmetic)
        evaluation = Evaluation(masks, arithmetic, self.paths.bit_length())
        states: list[State] = []
        units: list[int] = []
        for operation, operands in zip(self.operations, self.operands, strict=True):
            given = [states[index] for index in operands]
            states.append(operation.apply(given, evaluation))
            if isinstance(operation, (Activation, Product)):
                units.append(operation.units(given, evaluation))
        ends = [states[index] for index in self.outputs]
        longest = max(end.lengths.shape[1] for end in ends)
        counts = path_counts(sum(end.paths.total() for end in ends), evaluation.slot)
        counts += (0,) * (longest - len(counts))
        reached = number(sum(int(end.paths.reached.sum()) for end in ends))
        distribution = np.zeros(longest, arithmetic.dtype)
        for end in ends:
            distribution[: end.lengths.shape[1]] += end.lengths.sum(axis=0) / reached
        expected = sum(end.expected.sum(axis=0) for end in ends) / reached
        normalized = number(expected[0])
        present = [count for count in units if count]
        active = {name: int(masks[name].active.sum()) for name in self.gates}
        return PathLengths(
            mean=number(Fraction(sum(length * count for length, count in enumerate(counts)), self.paths)),
            normalized=normalized,
            weighted=number(expected[1]),
            distribution=arithmetic.array(distribution),
            per_layer={name: number(active[name]) / number(total) for name, total in self.gates.items()},
            paths=self.paths,
            path_counts=counts,
            active=active,
            total=dict(self.gates),
            effective_width=number(sum(units)) / normalized if normalized else float("nan"),
            mean_active_width=number(sum(present)) / number(len(present)) if present else float("nan"),
            always_active=self.always_active,
            uncounted=self.uncounted,
        )

    def _masks(self, model: nn.Module, arithmetic: Arithmetic) -> dict[str, GateMask]:
        present = gates(unwrapped(model))
        masks = {}
        for name, channels in self.gates.items():
            if name not in present:
                raise UnknownName(
                    f"path lengths: the network has no gate '{name}' (it has {', '.join(present) or 'none'}); trace "
                    f"this network with trace_paths"
                )
            gate = present[name]
            if gate.channels != channels:
                raise ShapeError(
                    f"path lengths: gate '{name}' has {gate.channels} channels; the graph was traced with {channels}; "
                    f"trace this network with trace_paths"
                )
            active = np.broadcast_to(~gate.frozen.detach().cpu().numpy(), (channels,))
            slopes = arithmetic.array(gate.effective_slope.detach().cpu().double().numpy())
            masks[name] = GateMask(active, np.where(active, abs(1 - slopes), 0))
        return masks


def finished(program: Program, outputs: list[Track], network: nn.Module) -> PathGraph:
    """The graph of a walk, without anything that does not lead to an output.

    Raises: TraceError: nothing leads to an output.
    """
    if not outputs:
        where = f" (paths end at {program.ends[0]}, which makes weights or a mask)" if program.ends else ""
        raise TraceError(
            f"path lengths: no output depends on the network's input along a path{where}; expected one; check forward "
            f"and the example"
        )
    needed: set[int] = set()
    open_ends = [track.index for track in outputs]
    while open_ends:
        index = open_ends.pop()
        if index not in needed:
            needed.add(index)
            open_ends.extend(program.operands[index])
    kept = sorted(needed)
    place = {index: position for position, index in enumerate(kept)}
    operations = tuple(program.operations[index] for index in kept)
    operands = tuple(tuple(place[i] for i in program.operands[index]) for index in kept)
    ends = tuple(place[track.index] for track in outputs)
    present = gates(network)
    names = [operation.gate for operation in operations if isinstance(operation, Activation) and operation.gate]
    uncounted = dict(program.uncounted)
    for index, node in enumerate(program.nodes):
        if index not in needed and isinstance(program.operations[index], (Activation, Product)):
            uncounted[node.name] = node.kind
    return PathGraph(
        operations,
        operands,
        ends,
        gates={name: present[name].channels for name in names},
        always_active=_always_active([(program.operations[index], program.nodes[index]) for index in kept]),
        uncounted=uncounted,
        paths=_number_of_paths(operations, operands, ends, {name: present[name].channels for name in names}),
    )


def _always_active(placed: list[tuple[Operation, Node]]) -> dict[str, str]:
    """Kinds of the un-gated units by name, the second of a name with a number behind it."""
    found: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for operation, node in placed:
        if isinstance(operation, Product) or (isinstance(operation, Activation) and not operation.gate):
            number = seen[node.name]
            seen[node.name] += 1
            found[f"{node.name}_{number}" if number else node.name] = node.kind
    return found


def _number_of_paths(
    operations: tuple[Operation, ...],
    operands: tuple[tuple[int, ...], ...],
    outputs: tuple[int, ...],
    channels: Mapping[str, int],
) -> int:
    """|P|: the polynomials of the paths at z = 1."""
    masks = {name: GateMask(np.zeros(size, dtype=bool), np.zeros(size)) for name, size in channels.items()}
    states: list[State] = []
    for operation, given in zip(operations, operands, strict=True):
        states.append(operation.apply([states[index] for index in given], Evaluation(masks, FLOATS, 0)))
    return sum(states[index].paths.total() for index in outputs)
