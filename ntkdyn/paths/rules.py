"""What a rule for paths gets and gives, and the register of rules: by module class, function or tensor method.

A rule gets a `Call` and returns what the node's output carries: a `Track`, a `Pathless` value, a tuple of them, or
None where nothing depends on the input. It works out channel axes while the graph is walked; the arithmetic itself is
in `algebra`. Rules for layers are in `layers`, for reshaping in `shapes`, for products in `products`, for attention in
`attention` and `transformers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ConfigurationError, TraceError
from .algebra import Activation, Gather, Operation, Source


@dataclass(frozen=True)
class Track:
    """Paths that arrive at a tensor.

    index: operation whose state holds them.  shape: of the tensor.  channels: number of channels of the state.
    axis: where the channels lie; None where every element carries the same paths (network inputs, one channel).
    scattered: channel number of every element, counted from 1, where the channels lie on no single axis (between the
    two views of a channel shuffle, in the heads of attention); layers that mix channels accept no such tensor.
    """

    index: int
    shape: tuple[int, ...]
    channels: int
    axis: int | None
    scattered: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Pathless:
    """A tensor that depends on the network's input and carries no path.

    discrete: made from integers or booleans of the input alone (tokens, padding masks): paths start where an embedding,
    a linear layer or a convolution takes them, and in other places they are constants. Otherwise: attention weights,
    comparisons.
    shape: of the tensor.
    """

    discrete: bool
    shape: tuple[int, ...]


Carried: TypeAlias = "Track | Pathless | tuple[Track | Pathless | None, ...] | None"


class Node(NamedTuple):
    """A place in the network. name: dotted, of a module, or of its caller and a function.  kind: class or function."""

    name: str
    kind: str


@dataclass
class Program:
    """Operations in the order of evaluation, each with the operations whose states it takes, and its place.

    node: the place that is walked now.  uncounted: places that are nonlinear and no units, name -> kind.
    ends: nodes that paths reach and from which none goes on.
    """

    node: Node
    operations: list[Operation] = field(default_factory=list)
    operands: list[tuple[int, ...]] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    uncounted: dict[str, str] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)

    def add(self, operation: Operation, *tracks: Track, node: Node | None = None) -> int:
        self.operations.append(operation)
        self.operands.append(tuple(track.index for track in tracks))
        self.nodes.append(node or self.node)
        return len(self.operations) - 1

    def note(self, node: Node | None = None) -> None:
        """List a place, or the present one, as nonlinear and uncounted."""
        node = node or self.node
        self.uncounted[node.name] = node.kind


@dataclass
class Call:
    """One node while the graph is walked.

    where: node and function or module, for messages.  name: short name of the function, method or class.
    target: dotted name of the module, function, or method name.  module: for modules.
    arguments, keywords: as called, with what it carries in place of every tensor that depends on the input.
    concrete: the same with the real values.  result: what the node returned.
    """

    where: str
    name: str
    target: Any
    module: nn.Module | None
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    concrete: tuple[tuple[Any, ...], dict[str, Any]]
    result: Any
    program: Program

    def error(self, found: str, remedy: str = "register a rule with ntkdyn.paths.rules.path_rule") -> TraceError:
        return TraceError(f"path lengths: {self.where} {found}; {remedy}")

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """What an argument carries, given by position, by name, or by the name that NumPy has for it."""
        return _argument(self.arguments, self.keywords, position, name, default)

    def constant(self, position: int, name: str) -> Any:
        """Real value of an argument."""
        return _argument(*self.concrete, position, name, None)

    def operands(self) -> list[Track]:
        """All operands that carry paths, in order, scattered ones too."""
        return [value for value in _parts(self.arguments, self.keywords) if isinstance(value, Track)]

    def pathless(self) -> list[Pathless]:
        """All operands that depend on the input and carry no path, in order."""
        return [value for value in _parts(self.arguments, self.keywords) if isinstance(value, Pathless)]

    def weights(self) -> list[Pathless]:
        """Those operands without paths that are no constants: attention weights, comparisons."""
        return [value for value in self.pathless() if not value.discrete]

    def tracks(self) -> list[Track]:
        """All operands that carry paths, in order; each has its channels on one axis."""
        found = self.operands()
        for track in found:
            if track.scattered is not None:
                raise self.error(
                    f"takes shape {track.shape} in which the channels lie on no single axis",
                    "reshape so that the channels have an axis of their own",
                )
        return found

    def single(self, *, scattered: bool = False) -> Track:
        """The only operand that carries paths, which must be the first argument; scattered channels only if allowed.

        Paths start here where the first argument is made of integers of the input (images of bytes, one-hot tokens).
        """
        first = self.argument(0, "input")
        count = len(self.operands() if scattered else self.tracks())
        if count == 0 and isinstance(first, Pathless) and first.discrete:
            return Track(self.program.add(Source(1)), first.shape, 1, None)
        if count != 1 or self.weights() or not isinstance(first, Track):
            found = f"has {count + len(self.weights())} operands that depend on the network's input"
            raise self.error(f"{found}; expected the first alone")
        return first

    def shape(self) -> tuple[int, ...]:
        if not isinstance(self.result, Tensor):
            raise self.error(f"returned {type(self.result).__name__}; expected one tensor")
        return tuple(self.result.shape)

    def emit(self, operation: Operation, operands: Sequence[Track], channels: int, axis: int | None) -> Track:
        return Track(self.program.add(operation, *operands), self.shape(), channels, axis)

    def unit(self, track: Track) -> Track:
        """The track through units that are always active."""
        index = self.program.add(Activation(), track)
        return Track(index, track.shape, track.channels, track.axis, track.scattered)

    def without_path(self) -> Carried:
        """What the result carries where no path goes through."""
        return pathless_like(self.result, discrete=not self.operands() and not self.weights())

    def along(self, track: Track, axis: int) -> Track:
        """The track with its channels on that axis; one that carries the same everywhere takes any axis."""
        size = track.shape[axis]
        if track.axis is None:
            index = self.program.add(Gather(np.zeros(size, dtype=np.intp)), track)
            return Track(index, track.shape, size, axis)
        if track.axis != axis:
            raise self.error(
                f"acts on axis {axis} of shape {track.shape} while the channels lie on axis {track.axis}",
                "move the channels there (transpose) or register a rule with ntkdyn.paths.rules.path_rule",
            )
        return track


# Names that torch takes for these arguments beside its own.
_NUMPY_NAMES = {"input": ("x", "a", "x1"), "other": ("x2",), "dim": ("axis",), "keepdim": ("keepdims",)}


def _argument(given: tuple[Any, ...], keywords: dict[str, Any], position: int, name: str, default: Any) -> Any:
    if len(given) > position:
        return given[position]
    return next((keywords[key] for key in (name, *_NUMPY_NAMES.get(name, ())) if key in keywords), default)


def channel_numbers(track: Track) -> Tensor:
    """Channel number of every element, counted from 1, float64 of the track's shape; 0 where nothing arrives."""
    if track.scattered is not None:
        return track.scattered
    numbers = torch.arange(1, 1 + track.channels, dtype=torch.float64)
    if track.axis is not None:
        numbers = numbers.view(-1, *[1] * (len(track.shape) - 1 - track.axis))
    return numbers.expand(track.shape).clone()


def _parts(*values: Any) -> list[Any]:
    found: list[Any] = []

    def collect(value: Any) -> None:
        if isinstance(value, (tuple, list, dict)):
            for part in value.values() if isinstance(value, dict) else value:
                collect(part)
        else:
            found.append(value)

    collect(values)
    return found


def pathless_like(result: Any, *, discrete: bool) -> Carried:
    """Every tensor of a result as one that carries no path."""
    if isinstance(result, Tensor):
        return Pathless(discrete, tuple(result.shape))
    if isinstance(result, (tuple, list)):
        parts = (pathless_like(part, discrete=discrete) for part in result)
        return tuple(part if isinstance(part, Pathless) else None for part in parts)
    return None


Rule: TypeAlias = Callable[[Call], Carried]
_MODULES: dict[type[nn.Module], Rule] = {}
_FUNCTIONS: dict[Any, Rule] = {}
_TAKING_PATHLESS: set[Rule] = set()


def path_rule(*targets: Any, pathless: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for module classes, functions, and tensor methods and ATen operators (by name).

    pathless: the rule deals with operands that depend on the input and carry no path. For other rules a node that has
    no other operands carries none on, and one that has both is refused.

    Raises: ConfigurationError: a target has a rule already.
    """

    def register(rule: Rule) -> Rule:
        for target in targets:
            table = _MODULES if isinstance(target, type) else _FUNCTIONS
            if target in table:
                raise ConfigurationError(f"path lengths: {target!r} has a rule already; one node has one rule")
            table[target] = rule
        if pathless:
            _TAKING_PATHLESS.add(rule)
        return rule

    return register


def takes_pathless(rule: Rule) -> bool:
    """Whether the rule deals with operands that carry no path."""
    return rule in _TAKING_PATHLESS


def class_with_rule(module: nn.Module) -> type[nn.Module] | None:
    """The module's class, or the base class whose forward it keeps, where it has a rule."""
    bases = (base for base in type(module).__mro__ if base in _MODULES)
    return next((base for base in bases if type(module).forward is base.forward), None)


def rule_for_module(module: nn.Module) -> Rule | None:
    """Rule of the module's class, or of the base class whose forward it keeps."""
    base = class_with_rule(module)
    return None if base is None else _MODULES[base]


def rule_for_function(target: Any) -> Rule | None:
    """Rule of a function, or by its name of a tensor method or an ATen operator."""
    if getattr(target, "namespace", None) == "aten":
        target = target.overloadpacket.__name__
    return _FUNCTIONS.get(target)


def named(names: str) -> list[Any]:
    """Everything of these names: classes of torch.nn, functions of torch and of its functional part, methods."""
    found: list[Any] = []
    for name in names.split():
        # Some names are something else elsewhere: torch.float is a type, torch.cpu a module.
        found += [part for owner in (nn, torch, functional) if callable(part := getattr(owner, name, None))]
        found += [name] if not hasattr(nn, name) else []
    # relu_ and others are one object under two names.
    return list(dict.fromkeys(found))
