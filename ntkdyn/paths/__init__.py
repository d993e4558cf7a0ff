"""Path lengths: how many active nonlinearities a path from input to output meets, exactly, on the traced graph.

Nodes of the graph are channels; kernel size and space are ignored, except that flattening makes every pixel of a
channel a feature of its own. The conventions, each with a test:

- A dense layer or convolution connects all channels of a group; BatchNorm, LayerNorm, pooling, dropout, softmax,
  means over space, casts and multiplication by a constant are one-to-one and no units.
- A Gate is active in a channel that is not frozen, however close to 1 its slope is. A nonlinearity that is no Gate
  (un-gated ReLU, GELU, SiLU, tanh, ...) is always active.
- Every `add` node is a choice between its branches with equal probability, per branch and not per edge. Sums of sums
  are not flattened: in `a + b + c`, that is `(a + b) + c`, c has probability 1/2. Adding a constant is no branch.
- A channel that zero padding or a concatenated constant made (option A shortcuts) has no predecessor there: at a sum
  it takes the other branch with probability 1.
- Attention passes its values on, each channel to itself; its weights are no path and softmax no unit.
- A node without a rule is refused by name, never guessed.
- Each output channel has equal weight.

Source: Mehmeti-Göpel and Disselhoff 2023 (arXiv 2211.17180) for the idea; formulas worked out here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn
from torch.fx.node import map_aggregate, map_arg

from ..call_sites import ROOT
from ..clone import structural_clone, unwrapped
from ..errors import NtkdynError, ShapeError, TraceError, UnknownName
from ..gates import gates
from . import attention as attention  # registers its rules
from . import shapes as shapes  # registers its rules
from .algebra import Activation, FloatArray, GateMask, Operation, Source, State
from .rules import Call, Carried, Program, Track, rule_for_function, rule_for_module


@dataclass(frozen=True)
class PathLengths:
    """Lengths of the paths of a network; unit: active nonlinearities per path.

    mean: APL = (1/|P|) sum_p len(p), every path with equal weight.
    normalized: NAPL = sum_p Pr(p) len(p), Pr by uniform choices walking back from the output.
    weighted: NAPL in which a unit that is not frozen counts |1 - slope|; an un-gated nonlinearity counts 1.
    distribution: probability of each length under the walk back, float64 [longest + 1], sums to 1. The longest length
        is that of the graph, whatever is frozen.
    per_layer: gate name -> share of its units that are active, in [0, 1], in the order of the graph.
    paths: |P|, exactly; of little meaning by itself (flattening multiplies it by the pixels).
    """

    mean: float
    normalized: float
    weighted: float
    distribution: FloatArray
    per_layer: Mapping[str, float]
    paths: int


@dataclass(frozen=True)
class PathGraph:
    """The graph of a network, traced once: holds no parameters, and gives path lengths for any state of the gates.

    operations, operands: what is computed, in order, and from which earlier results.  outputs: the results that leave
    the network.  gates: gate name -> channels, in the order of the graph.
    """

    operations: tuple[Operation, ...]
    operands: tuple[tuple[int, ...], ...]
    outputs: tuple[int, ...]
    gates: Mapping[str, int]

    def lengths(self, model: nn.Module) -> PathLengths:
        """Path lengths of a network with this graph: the traced one, or a clone; only its gates are read.

        Raises: UnknownName: a gate is missing.  ShapeError: a gate has another number of channels.
        """
        masks = self._masks(model)
        states: list[State] = []
        for operation, operands in zip(self.operations, self.operands, strict=True):
            states.append(operation.apply([states[index] for index in operands], masks))
        ends = [states[index] for index in self.outputs]
        count, total = sum(sum(end.count) for end in ends), sum(sum(end.total) for end in ends)
        reached = sum(int(end.reached.sum()) for end in ends)
        expected = sum((end.expected.sum(axis=0) for end in ends), np.zeros(2)) / reached
        distribution = np.zeros(max(end.lengths.shape[1] for end in ends))
        for end in ends:
            distribution[: end.lengths.shape[1]] += end.lengths.sum(axis=0) / reached
        return PathLengths(
            mean=float(Fraction(total, count)),
            normalized=float(expected[0]),
            weighted=float(expected[1]),
            distribution=distribution,
            per_layer={name: float(masks[name].active.mean()) for name in self.gates},
            paths=int(count),
        )

    def _masks(self, model: nn.Module) -> dict[str, GateMask]:
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
            distance = np.abs(1 - gate.effective_slope.detach().cpu().double().numpy())
            masks[name] = GateMask(active, np.where(active, distance, 0.0))
        return masks


def path_lengths(model: nn.Module, example: Any) -> PathLengths:
    """Mean, normalized and weighted path length of a network, and the distribution of lengths.

    Works on sequential and residual networks that torch.fx can trace; the network itself is not touched. For many
    states of the same network use `trace_paths` once.

    Args: model: the network.  example: a batch of inputs, a tensor or a tuple of them; only its shape matters.
    Returns: PathLengths; the module's page lists the conventions.
    Raises: TraceError: control flow that depends on values, or a node without a rule; the message names it.

    >>> path_lengths(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), torch.zeros(1, 3)).normalized
    1.0
    """
    return trace_paths(model, example).lengths(model)


def average_path_length(model: nn.Module, example: Any, normalized: bool = True) -> float:
    """NAPL of a network, or APL with normalized=False; active nonlinearities per path. See `path_lengths`."""
    lengths = path_lengths(model, example)
    return lengths.normalized if normalized else lengths.mean


def trace_paths(model: nn.Module, example: Any) -> PathGraph:
    """Trace the graph of a network for path lengths; args and errors as for `path_lengths`."""
    clone = structural_clone(model).eval()
    # A network that is one layer would be traced through; inside a container it stays one node.
    whole = rule_for_module(clone) is not None
    root = nn.Sequential(clone) if whole else clone
    given = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    # Copies: a first layer that works in place would write into the caller's example.
    inputs = tuple(value.detach().clone() if isinstance(value, Tensor) else value for value in given)
    tracer = _Tracer()
    try:
        graph = tracer.trace(root, concrete_args=_defaults_beyond(root, len(inputs)))
    except NtkdynError:
        raise
    except Exception as error:
        raise TraceError(
            f"path lengths: torch.fx cannot trace {type(model).__name__}: {_one_line(error)}; control flow must not "
            f"depend on values of tensors; take it out of forward, or measure the traceable part"
        ) from error
    walk = _Walk(root, graph, network=clone)
    devices = {tensor.device for tensor in inputs if isinstance(tensor, Tensor) and tensor.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices=[device.index for device in devices]):
        walk.run(*inputs)
    return walk.finished()


def _defaults_beyond(root: nn.Module, given: int) -> dict[str, Any] | None:
    """Optional arguments of forward that the example does not give, fixed at their defaults while tracing."""
    parameters = list(inspect.signature(root.forward).parameters.values())
    return {p.name: p.default for p in parameters[given:] if p.default is not inspect.Parameter.empty} or None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


class _Tracer(torch.fx.Tracer):
    """Tracer for which every module with a rule is one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return rule_for_module(m) is not None or super().is_leaf_module(m, module_qualified_name)


class _Walk(torch.fx.Interpreter):
    """Runs the graph on the example and follows the channels from node to node."""

    def __init__(self, root: nn.Module, graph: torch.fx.Graph, *, network: nn.Module) -> None:
        super().__init__(root, graph=graph)
        # With it, torch.fx appends its own lines to every message.
        self.extra_traceback = False
        self.network = network
        self.single = network is not root
        self.carried: dict[torch.fx.Node, Carried] = {}
        self.program = Program()
        self.outputs: list[Track] = []

    def run_node(self, n: torch.fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:
            raise TraceError(
                f"path lengths: {self._where(n)} fails on the example: {_one_line(error)}; give an example that the "
                f"network accepts"
            ) from error
        self.carried[n] = self._carried(n, result)
        if isinstance(result, Tensor):
            # After an in-place node, the earlier name of the tensor holds the new value too.
            for earlier, value in self.env.items():
                if value is result:
                    self.carried[earlier] = self.carried[n]
        return result

    def _carried(self, n: torch.fx.Node, result: Any) -> Carried:
        if n.op == "placeholder":
            if not isinstance(result, Tensor):
                return None
            return Track(self.program.add(Source(1)), tuple(result.shape), 1, None)
        if n.op == "get_attr":
            return None
        arguments, keywords = map_arg((n.args, n.kwargs), self._symbolic)
        call = self._call(n, tuple(arguments), dict(keywords), result)
        if n.op == "output":
            self.outputs = call.tracks()
            return None
        if not call.operands() or not _holds_tensor(result):
            return None
        module = call.module
        rule = rule_for_function(n.target) if module is None else rule_for_module(module)
        if rule is None:
            raise call.error("has no rule for paths")
        return rule(call)

    def _symbolic(self, n: torch.fx.Node) -> Any:
        carried = self.carried[n]
        if isinstance(carried, tuple):
            real = self.env[n]
            return tuple(real[i] if part is None else part for i, part in enumerate(carried))
        return self.env[n] if carried is None else carried

    def _call(self, n: torch.fx.Node, arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> Call:
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        target = n.target if module is None else self._name(str(n.target))
        concrete = map_arg((n.args, n.kwargs), lambda node: self.env[node])
        return Call(self._where(n), target, module, arguments, keywords, concrete, result, self.program)

    def _name(self, target: str) -> str:
        return ROOT if self.single else target

    def _where(self, n: torch.fx.Node) -> str:
        if n.op == "call_module":
            kind = type(self.fetch_attr(str(n.target))).__name__
            return f"layer '{self._name(str(n.target))}' ({kind})"
        if n.op == "call_function":
            target: Any = n.target
            return f"node '{n.name}' ({getattr(target, '__module__', None) or 'torch'}.{target.__name__})"
        return f"node '{n.name}' (Tensor.{n.target})" if n.op == "call_method" else f"node '{n.name}' ({n.op})"

    def finished(self) -> PathGraph:
        """The graph, without anything that does not lead to an output."""
        if not self.outputs:
            raise TraceError(
                "path lengths: no output depends on the network's input; expected one; check forward and the example"
            )
        operations, operands = self.program.operations, self.program.operands
        needed: set[int] = set()
        open_ends = [track.index for track in self.outputs]
        while open_ends:
            index = open_ends.pop()
            if index not in needed:
                needed.add(index)
                open_ends.extend(operands[index])
        kept = sorted(needed)
        place = {index: position for position, index in enumerate(kept)}
        present = gates(self.network)
        names = [
            operation.gate
            for operation in (operations[index] for index in kept)
            if isinstance(operation, Activation) and operation.gate is not None
        ]
        return PathGraph(
            tuple(operations[index] for index in kept),
            tuple(tuple(place[i] for i in operands[index]) for index in kept),
            tuple(place[track.index] for track in self.outputs),
            {name: present[name].channels for name in names},
        )


def _holds_tensor(value: Any) -> bool:
    found = False

    def look(part: Any) -> Any:
        nonlocal found
        found = found or isinstance(part, Tensor)
        return part

    map_aggregate(value, look)
    return found
