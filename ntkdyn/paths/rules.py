"""How each kind of node acts on paths: one rule per module class, function or tensor method.

Rules for layers are here, those for reshaping in `shapes`.

A rule gets a `Call` and returns what the node's output carries: a `Track`, a tuple of them, or None where no path
goes through. It works out channel axes while tracing; the arithmetic itself is in `algebra`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.node import map_aggregate
from torch.nn import functional

from ..errors import ConfigurationError, TraceError
from ..gates import Gate
from .algebra import Activation, Dense, Gather, Operation, Source, Sum


@dataclass(frozen=True)
class Track:
    """Paths that arrive at a tensor.

    index: operation whose state holds them.  shape: of the tensor.  channels: number of channels of the state.
    axis: where the channels lie; None where every element carries the same paths (network inputs, one channel).
    scattered: channel number of every element, counted from 1, where the channels lie on no single axis (between the
    two views of a channel shuffle); only reshaping accepts such a tensor.
    """

    index: int
    shape: tuple[int, ...]
    channels: int
    axis: int | None
    scattered: Tensor | None = field(default=None, compare=False)


Carried: TypeAlias = "Track | tuple[Track | None, ...] | None"


@dataclass
class Program:
    """Operations in the order of evaluation, each with the operations whose states it takes."""

    operations: list[Operation] = field(default_factory=list)
    operands: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, operation: Operation, *tracks: Track) -> int:
        self.operations.append(operation)
        self.operands.append(tuple(track.index for track in tracks))
        return len(self.operations) - 1


@dataclass
class Call:
    """One node while the graph is walked.

    where: node and function or module, for messages.  target: dotted name of the module, function, or method name.
    module: for modules.  arguments, keywords: as called, with a Track in place of every tensor that carries paths.
    concrete: the same with the real values.  result: what the node returned.
    """

    where: str
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
        return self.arguments[position] if len(self.arguments) > position else self.keywords.get(name, default)

    def operands(self) -> list[Track]:
        """All operands that carry paths, in order, scattered ones too."""
        found: list[Track] = []

        def collect(value: Any) -> Any:
            if isinstance(value, Track):
                found.append(value)
            return value

        map_aggregate((self.arguments, self.keywords), collect)
        return found

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

    def single(self) -> Track:
        """The only operand that carries paths, which must be the first argument."""
        first = self.argument(0, "input")
        count = len(self.tracks())
        if count != 1 or not isinstance(first, Track):
            raise self.error(f"has {count} operands that depend on the network's input; expected the first alone")
        return first

    def shape(self) -> tuple[int, ...]:
        if not isinstance(self.result, Tensor):
            raise self.error(f"returned {type(self.result).__name__}; expected one tensor")
        return tuple(self.result.shape)

    def emit(self, operation: Operation, operands: Sequence[Track], channels: int, axis: int | None) -> Track:
        return Track(self.program.add(operation, *operands), self.shape(), channels, axis)

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


Rule: TypeAlias = Callable[[Call], Carried]
_MODULES: dict[type[nn.Module], Rule] = {}
_FUNCTIONS: dict[Any, Rule] = {}


def path_rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for module classes, functions, and tensor methods (by name).

    Raises: ConfigurationError: a target has a rule already.
    """

    def register(rule: Rule) -> Rule:
        for target in targets:
            table = _MODULES if isinstance(target, type) else _FUNCTIONS
            if target in table:
                raise ConfigurationError(f"path lengths: {target!r} has a rule already; one node has one rule")
            table[target] = rule
        return rule

    return register


def rule_for_module(module: nn.Module) -> Rule | None:
    """Rule of the module's class, or of the base class whose forward it keeps."""
    for base in type(module).__mro__:
        if base in _MODULES and type(module).forward is base.forward:
            return _MODULES[base]
    return None


def rule_for_function(target: Any) -> Rule | None:
    """Rule of a function, or of a tensor method by name."""
    return _FUNCTIONS.get(target)


def named(names: str) -> list[Any]:
    """Everything of these names: classes of torch.nn, functions of torch and torch.nn.functional, tensor methods."""
    found: list[Any] = []
    for name in names.split():
        # Some names are something else elsewhere: torch.float is a type, torch.cpu a module.
        found += [part for owner in (nn, torch, functional) if callable(part := getattr(owner, name, None))]
        found += [name] if hasattr(Tensor, name) else []
    # relu_ and others are one object under two names.
    return list(dict.fromkeys(found))


# ---- one-to-one -----------------------------------------------------------------------------------------------------

_SAME = """
Identity Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout dropout dropout1d dropout2d dropout3d
alpha_dropout feature_alpha_dropout
BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d LayerNorm GroupNorm
RMSNorm LocalResponseNorm batch_norm instance_norm layer_norm group_norm rms_norm local_response_norm normalize
AvgPool1d AvgPool2d AvgPool3d MaxPool1d MaxPool2d MaxPool3d LPPool1d LPPool2d LPPool3d
AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d lp_pool1d lp_pool2d lp_pool3d
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
Softmax LogSoftmax Softmin Softmax2d softmax log_softmax softmin
Upsample UpsamplingNearest2d UpsamplingBilinear2d interpolate
ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d ReflectionPad2d ReflectionPad3d
ReplicationPad1d ReplicationPad2d ReplicationPad3d CircularPad1d CircularPad2d CircularPad3d
neg detach float double half bfloat16 to type cpu cuda
"""


@path_rule(operator.neg, *named(_SAME))
def same(call: Call) -> Carried:
    """BatchNorm, pooling, dropout, softmax, casts: every channel to itself, no unit."""
    track = call.single()
    shape = call.shape()
    if track.axis is not None and (len(shape) != len(track.shape) or shape[track.axis] != track.channels):
        raise call.error(f"turned shape {track.shape} into {shape}; expected the {track.channels} channels to stay")
    return Track(track.index, shape, track.channels, track.axis)


@path_rule(*named("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty"))
def constant(call: Call) -> Carried:
    """Only the shape comes from the input: no path."""
    return None


def _broadcast(call: Call, track: Track, shape: tuple[int, ...]) -> Track:
    """The track seen in a larger shape, by the rules of broadcasting: new axes in front, sizes 1 repeated."""
    if track.axis is None:
        return Track(track.index, shape, track.channels, None)
    axis = track.axis + len(shape) - len(track.shape)
    if shape[axis] == track.channels:
        return Track(track.index, shape, track.channels, axis)
    index = call.program.add(Gather(np.zeros(shape[axis], dtype=np.intp)), track)
    return Track(index, shape, shape[axis], axis)


@path_rule(
    operator.mul, operator.imul, operator.truediv, operator.itruediv, *named("mul mul_ multiply div div_ divide")
)
def scale(call: Call) -> Carried:
    """Multiplication by a constant or a parameter: one-to-one; by the number 0: nothing goes through."""
    tracks = call.tracks()
    first = call.argument(0, "input")
    divides = "div" in str(call.target)
    if len(tracks) != 1 or (divides and not isinstance(first, Track)):
        raise call.error(
            "divides by a value that depends on the network's input"
            if divides
            else "multiplies two values that depend on the network's input, which is no sum over paths"
        )
    # `x * 0` is how some shortcuts make empty channels; a parameter that happens to be 0 is a connection.
    if any(isinstance(factor, (int, float)) and factor == 0 for factor in call.arguments) and not divides:
        return None
    return _broadcast(call, tracks[0], call.shape())


@path_rule(operator.add, operator.iadd, operator.sub, operator.isub, *named("add add_ sub sub_ subtract"))
def add(call: Call) -> Carried:
    """Sum of two branches, each chosen with probability 1/2; a constant or a parameter is no branch."""
    shape = call.shape()
    branches = [_broadcast(call, track, shape) for track in call.tracks()]
    if len(branches) == 1:
        return branches[0]
    axes = {branch.axis for branch in branches if branch.axis is not None}
    if len(axes) > 1:
        raise call.error(f"adds branches with their channels on axes {sorted(axes)} of shape {shape}")
    if not axes:
        channels = max(branch.channels for branch in branches)
        return call.emit(Sum(), branches, channels, None)
    (axis,) = axes
    return call.emit(Sum(), [call.along(branch, axis) for branch in branches], shape[axis], axis)


# ---- units ----------------------------------------------------------------------------------------------------------


@path_rule(Gate)
def gate(call: Call) -> Carried:
    """Active where not frozen, weighted by |1 - slope|."""
    module: Any = call.module
    track = call.single()
    dimensions = len(track.shape)
    # A sample without a batch axis has its channels in the only axis it has, as in Gate itself.
    axis = module.dim % dimensions if dimensions > 1 else 0
    track = call.along(track, axis)
    return call.emit(Activation(str(call.target)), [track], track.channels, axis)


_ACTIVATIONS = """
CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6 RReLU SELU SiLU
Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Threshold
celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish prelu relu relu6 rrelu selu silu
sigmoid softplus softshrink softsign tanh tanhshrink threshold
celu_ elu_ hardtanh_ leaky_relu_ relu_ rrelu_ selu_ sigmoid_ tanh_ threshold_
clamp clamp_ clip clamp_min clamp_max abs square sqrt rsqrt pow exp log sin cos tan erf reciprocal
"""


@path_rule(operator.pow, *named(_ACTIVATIONS))
def activation(call: Call) -> Carried:
    """A nonlinearity that is no gate: always active in every channel, at weight 1."""
    track = call.single()
    return call.emit(Activation(), [track], track.channels, track.axis)


# ---- maps between channels ------------------------------------------------------------------------------------------


def _dense(call: Call, axis: int, inputs: int, outputs: int, groups: int = 1) -> Track:
    track = call.along(call.single(), axis)
    if track.channels != inputs:
        raise call.error(f"expects {inputs} channels and got {track.channels}")
    # An output without channel axis (matrix times vector) is one channel.
    position = axis if len(call.shape()) == len(track.shape) else None
    return call.emit(Dense(outputs, groups), [track], outputs, position)


@path_rule(nn.Linear, functional.linear)
def linear(call: Call) -> Carried:
    axis = len(call.single().shape) - 1
    if call.module is None:
        outputs, inputs = call.concrete[0][1].shape
        return _dense(call, axis, inputs, outputs)
    module: Any = call.module
    return _dense(call, axis, module.in_features, module.out_features)


@path_rule(operator.matmul, *named("matmul mm"))
def matrix_product(call: Call) -> Carried:
    """Input times a constant matrix [n, m]."""
    track = call.single()
    matrix = call.concrete[0][1]
    if matrix.dim() != 2:
        raise call.error(f"multiplies with a constant of shape {tuple(matrix.shape)}; expected a matrix [n, m]")
    return _dense(call, len(track.shape) - 1, matrix.shape[0], matrix.shape[1])


@path_rule(*named("Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d"))
def convolution(call: Call) -> Carried:
    module: Any = call.module
    axis = len(call.single().shape) - 1 - len(module.kernel_size)
    return _dense(call, axis, module.in_channels, module.out_channels, module.groups)


@path_rule(*named("conv1d conv2d conv3d"))
def functional_convolution(call: Call) -> Carried:
    weight = call.concrete[0][1]
    groups = call.argument(6, "groups", 1)
    axis = len(call.single().shape) - 1 - (weight.dim() - 2)
    return _dense(call, axis, weight.shape[1] * groups, weight.shape[0], groups)


@path_rule(*named("conv_transpose1d conv_transpose2d conv_transpose3d"))
def functional_transposed_convolution(call: Call) -> Carried:
    weight = call.concrete[0][1]
    groups = call.argument(6, "groups", 1)
    axis = len(call.single().shape) - 1 - (weight.dim() - 2)
    return _dense(call, axis, weight.shape[0], weight.shape[1] * groups, groups)


@path_rule(nn.Embedding, functional.embedding)
def embedding(call: Call) -> Carried:
    """Tokens to features: the features are where paths start."""
    channels = call.shape()[-1]
    return call.emit(Source(channels), [], channels, len(call.shape()) - 1)
