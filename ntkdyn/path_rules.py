"""How each kind of node acts on paths: one rule per module class, function or tensor method.

A rule gets a `Call` and returns what the node's output carries: a `Track`, a tuple of them, or None where no path
goes through. It works out channel axes while tracing; the arithmetic itself is in `path_algebra`.
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

from .errors import TraceError
from .gates import Gate
from .path_algebra import Activation, Dense, Gather, Operation, Source, Sum


@dataclass(frozen=True)
class Track:
    """Paths that arrive at a tensor.

    index: operation whose state holds them.  shape: of the tensor.  channels: number of channels of the state.
    axis: where the channels lie; None where every element carries the same paths (network inputs, one channel).
    """

    index: int
    shape: tuple[int, ...]
    channels: int
    axis: int | None


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

    def error(self, found: str, remedy: str = "register a rule with ntkdyn.path_rules.path_rule") -> TraceError:
        return TraceError(f"path lengths: {self.where} {found}; {remedy}")

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.arguments[position] if len(self.arguments) > position else self.keywords.get(name, default)

    def tracks(self) -> list[Track]:
        """All operands that carry paths, in order."""
        found: list[Track] = []

        def collect(value: Any) -> Any:
            if isinstance(value, Track):
                found.append(value)
            return value

        map_aggregate((self.arguments, self.keywords), collect)
        return found

    def single(self) -> Track:
        """The only operand that carries paths, which must be the first argument."""
        tracks = self.tracks()
        first = self.argument(0, "input")
        if len(tracks) != 1 or first is not tracks[0]:
            raise self.error(f"has {len(tracks)} operands that depend on the network's input; expected the first alone")
        return tracks[0]

    def shape(self) -> tuple[int, ...]:
        if not isinstance(self.result, Tensor):
            raise self.error(f"returned {type(self.result).__name__}; expected one tensor")
        return tuple(self.result.shape)

    def emit(self, operation: Operation, operands: Sequence[Track], channels: int, axis: int | None) -> Track:
        return Track(self.program.add(operation, *operands), self.shape(), channels, axis)

    def along(self, track: Track, axis: int, size: int | None = None) -> Track:
        """The track with its channels on that axis; one that carries the same everywhere takes any axis."""
        size = track.shape[axis] if size is None else size
        if track.axis is None:
            index = self.program.add(Gather(np.zeros(size, dtype=np.intp)), track)
            return Track(index, track.shape, size, axis)
        if track.axis != axis:
            raise self.error(
                f"acts on axis {axis} of shape {track.shape} while the channels lie on axis {track.axis}",
                "move the channels there (transpose) or register a rule with ntkdyn.path_rules.path_rule",
            )
        return track


Rule: TypeAlias = Callable[[Call], Carried]
_MODULES: dict[type[nn.Module], Rule] = {}
_FUNCTIONS: dict[Any, Rule] = {}


def path_rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for module classes, functions, and tensor methods (by name).

    Raises: ValueError: a target has a rule already.
    """

    def register(rule: Rule) -> Rule:
        for target in targets:
            table = _MODULES if isinstance(target, type) else _FUNCTIONS
            if target in table:
                raise ValueError(f"path lengths: {target!r} has a rule already; one node has one rule")
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


# ---- one-to-one -----------------------------------------------------------------------------------------------------

_SAME_MODULES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.LPPool1d, nn.LPPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d,
    nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)  # fmt: skip
_SAME_FUNCTIONS = (
    functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d, functional.alpha_dropout, functional.feature_alpha_dropout,
    functional.batch_norm, functional.instance_norm, functional.layer_norm, functional.group_norm, functional.rms_norm, functional.local_response_norm, functional.normalize,
    functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d, functional.max_pool1d, functional.max_pool2d, functional.max_pool3d, functional.lp_pool1d, functional.lp_pool2d,
    functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d,
    functional.adaptive_max_pool1d, functional.adaptive_max_pool2d, functional.adaptive_max_pool3d,
    functional.softmax, functional.log_softmax, functional.softmin, functional.interpolate, torch.softmax, torch.log_softmax, "softmax", "log_softmax",
    operator.neg, torch.neg, "neg", torch.clone, "clone", "contiguous", "detach", torch.detach, "float", "double",
    "half", "bfloat16", "to", "type_as", "type", "cpu", "cuda", "requires_grad_",
)  # fmt: skip


@path_rule(*_SAME_MODULES, *dict.fromkeys(_SAME_FUNCTIONS))
def same(call: Call) -> Carried:
    """BatchNorm, pooling, dropout, softmax, casts: every channel to itself, no unit."""
    tracks = call.tracks()
    if not tracks:
        return None
    # `x.to(y)` and `x.type_as(y)` may name a second tensor, from which no value flows.
    track = tracks[0] if call.target in ("to", "type_as") else call.single()
    shape = call.shape()
    if track.axis is not None and (len(shape) != len(track.shape) or shape[track.axis] != track.channels):
        raise call.error(f"turned shape {track.shape} into {shape}; expected the {track.channels} channels to stay")
    return Track(track.index, shape, track.channels, track.axis)


def _broadcast(call: Call, track: Track, shape: tuple[int, ...]) -> Track:
    """The track seen in a larger shape, by the rules of broadcasting: new axes in front, sizes 1 repeated."""
    if track.axis is None:
        return Track(track.index, shape, track.channels, None)
    axis = track.axis + len(shape) - len(track.shape)
    if shape[axis] == track.channels:
        return Track(track.index, shape, track.channels, axis)
    index = call.program.add(Gather(np.zeros(shape[axis], dtype=np.intp)), track)
    return Track(index, shape, shape[axis], axis)


@path_rule(operator.mul, operator.imul, operator.truediv, operator.itruediv, torch.mul, torch.div, "mul", "mul_",
           "div", "div_", torch.multiply, torch.divide)  # fmt: skip
def scale(call: Call) -> Carried:
    """Multiplication by a constant or a parameter: one-to-one."""
    tracks = call.tracks()
    if len(tracks) != 1 or (tracks[0] is not call.argument(0, "input") and "div" in str(call.target)):
        raise call.error(
            "multiplies or divides two values that depend on the network's input, which is no sum over paths",
        )
    return _broadcast(call, tracks[0], call.shape())


@path_rule(operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, torch.subtract, "add",
           "add_", "sub", "sub_")  # fmt: skip
def add(call: Call) -> Carried:
    """Sum of two branches, each chosen with probability 1/2; a constant or a parameter is no branch."""
    shape = call.shape()
    branches = [_broadcast(call, track, shape) for track in call.tracks()]
    if len(branches) == 1:
        return branches[0]
    axes = {branch.axis for branch in branches} - {None}
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


_ACTIVATION_MODULES = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
    nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
_ACTIVATION_FUNCTIONS = (
    functional.celu, functional.elu, functional.gelu, functional.hardshrink, functional.hardsigmoid, functional.hardswish, functional.hardtanh, functional.leaky_relu, functional.logsigmoid, functional.mish,
    functional.prelu, functional.relu, functional.relu_, functional.relu6, functional.rrelu, functional.selu, functional.silu, functional.sigmoid, functional.softplus, functional.softshrink, functional.softsign,
    functional.tanh, functional.tanhshrink, functional.threshold, torch.relu, torch.relu_, torch.prelu, torch.sigmoid, torch.tanh, torch.celu,
    torch.selu, torch.clamp, torch.clamp_min, torch.clamp_max, torch.abs, torch.sin, torch.cos, torch.exp, torch.erf,
    torch.square, torch.sqrt, torch.log, torch.pow, operator.pow, "relu", "relu_", "sigmoid", "sigmoid_", "tanh",
    "tanh_", "clamp", "clamp_", "clamp_min", "clamp_max", "abs", "sin", "cos", "exp", "square", "sqrt", "log", "pow",
)  # fmt: skip


@path_rule(*_ACTIVATION_MODULES, *dict.fromkeys(_ACTIVATION_FUNCTIONS))
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
    weight = call.module.weight if call.module is not None else call.concrete[0][1]
    return _dense(call, len(call.single().shape) - 1, weight.shape[1], weight.shape[0])


@path_rule(torch.matmul, operator.matmul, "matmul", torch.mm, "mm")
def matrix_product(call: Call) -> Carried:
    """Input times a constant matrix [n, m]."""
    track = call.single()
    matrix = call.concrete[0][1]
    if matrix.dim() != 2:
        raise call.error(f"multiplies with a constant of shape {tuple(matrix.shape)}; expected a matrix [n, m]")
    return _dense(call, len(track.shape) - 1, matrix.shape[0], matrix.shape[1])


@path_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def convolution(call: Call) -> Carried:
    module: Any = call.module
    axis = len(call.single().shape) - 1 - len(module.kernel_size)
    return _dense(call, axis, module.in_channels, module.out_channels, module.groups)


@path_rule(functional.conv1d, functional.conv2d, functional.conv3d)
def functional_convolution(call: Call) -> Carried:
    weight = call.concrete[0][1]
    groups = call.argument(6, "groups", 1)
    axis = len(call.single().shape) - 1 - (weight.dim() - 2)
    return _dense(call, axis, weight.shape[1] * groups, weight.shape[0], groups)


@path_rule(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
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


# ---- shapes ---------------------------------------------------------------------------------------------------------

_SHAPE_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
_SHAPE_FUNCTIONS = (
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.t, torch.swapaxes, torch.swapdims,
    torch.movedim, torch.moveaxis, torch.squeeze, torch.unsqueeze, torch.unflatten, torch.narrow, torch.select,
    torch.flip, torch.roll, torch.cat, torch.concat, torch.concatenate, torch.stack, torch.chunk, torch.split,
    torch.tensor_split, torch.unbind, torch.index_select, torch.repeat_interleave, torch.tile, torch.broadcast_to,
    operator.getitem, functional.pixel_shuffle, functional.pixel_unshuffle, functional.channel_shuffle, functional.pad,
    "flatten", "reshape", "view", "permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis",
    "squeeze", "unsqueeze", "unflatten", "narrow", "select", "flip", "roll", "chunk", "split", "tensor_split",
    "unbind", "index_select", "repeat_interleave", "expand", "repeat", "tile", "view_as", "expand_as", "reshape_as",
)  # fmt: skip


@path_rule(*_SHAPE_MODULES, *dict.fromkeys(_SHAPE_FUNCTIONS))
def rearrange(call: Call) -> Carried:
    """Reshape, permute, slice, pad, cat, split: the node is run once more on tensors that hold channel numbers."""
    if call.target is operator.getitem and isinstance(call.arguments[0], tuple):
        picked: Carried = call.arguments[0][call.arguments[1]]
        return picked
    return _follow(call, lambda arguments, keywords: _run(call, arguments, keywords))


def _run(call: Call, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    if call.target is functional.pad:
        # Channel numbers have no sensible padding but "nothing"; reflected and repeated ones are real channels.
        keywords = {**keywords, "value": 0.0}
        arguments = arguments[:3]
    if call.module is not None:
        return call.module(*arguments, **keywords)
    if isinstance(call.target, str):
        return getattr(arguments[0], call.target)(*arguments[1:], **keywords)
    return call.target(*arguments, **keywords)


def _follow(call: Call, run: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> Carried:
    tracks = call.tracks()
    axes = {track.axis for track in tracks} - {None}
    if len(tracks) > 1 and len(axes) == 1:
        # A raw input beside a layer's output: its channels lie where the others have theirs.
        (axis,) = axes
        tracks = [call.along(track, axis) for track in tracks]
    numbered = iter(_numbered(tracks))

    def substitute(symbolic: Any, concrete: Any) -> Any:
        if isinstance(symbolic, Track):
            return next(numbered)
        if isinstance(symbolic, (list, tuple)):
            return type(symbolic)(substitute(a, b) for a, b in zip(symbolic, concrete, strict=True))
        if isinstance(concrete, Tensor) and concrete.is_floating_point():
            return torch.zeros(concrete.shape)
        return concrete

    arguments = tuple(substitute(a, b) for a, b in zip(call.arguments, call.concrete[0], strict=True))
    keywords = {name: substitute(value, call.concrete[1][name]) for name, value in call.keywords.items()}
    result = run(arguments, keywords)
    if isinstance(result, Tensor):
        return _located(call, result, tracks)
    return tuple(_located(call, part, tracks) for part in result)


def _numbered(tracks: Sequence[Track]) -> list[Tensor]:
    """Tensors of the tracks' shapes that hold the channel's number, counted from 1 through all tracks."""
    numbered, start = [], 1
    for track in tracks:
        numbers = torch.arange(start, start + track.channels, dtype=torch.float64)
        if track.axis is not None:
            numbers = numbers.view(-1, *[1] * (len(track.shape) - 1 - track.axis))
        numbered.append(numbers.expand(track.shape).clone())
        start += track.channels
    return numbered


def _located(call: Call, numbers: Tensor, tracks: Sequence[Track]) -> Track:
    """Find the axis along which the channel numbers lie; 0 stands for padding and constants."""
    shape = tuple(numbers.shape)
    if numbers.numel() and bool((numbers == numbers.flatten()[0]).all()) and numbers.flatten()[0] > 0:
        indices = np.array([int(numbers.flatten()[0]) - 1])
        return Track(call.program.add(Gather(indices), *tracks), shape, 1, None)
    fits: list[tuple[bool, int, Tensor]] = []
    for axis in range(numbers.dim()):
        rows = numbers.movedim(axis, 0).reshape(shape[axis], -1)
        largest = rows.amax(dim=1)
        smallest = torch.where(rows > 0, rows, largest[:, None]).amin(dim=1)
        if torch.equal(smallest, largest) and bool((largest > 0).any()):
            fits.append((bool((rows != largest[:, None]).any()), axis, largest))
    if not fits:
        raise call.error(
            f"gives shape {shape} in which the channels lie on no single axis",
            "keep the channels on an axis of their own",
        )
    # Padding along space leaves zeros inside a channel: an axis without them wins.
    padded, axis, values = min(fits, key=lambda fit: fit[:2])
    if padded and len(fits) > 1:
        # One channel with padding around it: any axis would do.
        return Track(call.program.add(Gather(np.array([int(numbers.max()) - 1])), *tracks), shape, 1, None)
    indices = values.to(torch.int64).numpy() - 1
    return Track(call.program.add(Gather(indices), *tracks), shape, len(indices), axis)


@path_rule(torch.mean, "mean", torch.sum, "sum", torch.amax, "amax")
def reduction(call: Call) -> Carried:
    """Mean, sum or maximum over space is one-to-one; over the channel axis it is a map to one channel."""
    track = call.single()
    dims = call.argument(1, "dim")
    dimensions = len(track.shape)
    axes = range(dimensions) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    reduced = {axis % dimensions for axis in axes}
    shape = call.shape()
    if track.axis is None:
        return Track(track.index, shape, track.channels, None)
    if track.axis in reduced:
        return call.emit(Dense(1), [track], 1, None)
    kept = len(shape) == dimensions
    axis = track.axis if kept else track.axis - sum(other < track.axis for other in reduced)
    return Track(track.index, shape, track.channels, axis)
