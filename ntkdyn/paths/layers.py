"""Rules for paths: one-to-one layers, units, and maps between channels."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..gates import Gate
from .algebra import Activation, Dense, Gather, Source, Sum
from .rules import Call, Carried, Track, channel_numbers, class_with_rule, named, path_rule

# ---- one-to-one -----------------------------------------------------------------------------------------------------

_SAME = """
Identity Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout dropout dropout1d dropout2d dropout3d
alpha_dropout feature_alpha_dropout dropout_ feature_dropout
Upsample UpsamplingNearest2d UpsamplingBilinear2d interpolate upsample_nearest1d upsample_nearest2d upsample_nearest3d
upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
neg detach float double half bfloat16 to type type_as cpu cuda alias lift_fresh_copy _to_copy
"""
# These work along the last axes, as many as the name says.
_SPATIAL = """
AvgPool1d AvgPool2d AvgPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d
avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d ReflectionPad2d ReflectionPad3d
ReplicationPad1d ReplicationPad2d ReplicationPad3d CircularPad1d CircularPad2d CircularPad3d
"""
_SPATIAL_UNCOUNTED = """
MaxPool1d MaxPool2d MaxPool3d LPPool1d LPPool2d LPPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
max_pool1d max_pool2d max_pool3d lp_pool1d lp_pool2d lp_pool3d
adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
"""
# Nonlinear and no units: they compare, or divide by a statistic of, the very sample.
_UNCOUNTED = """
Softmax LogSoftmax Softmin Softmax2d softmax log_softmax softmin
LayerNorm GroupNorm RMSNorm LocalResponseNorm
layer_norm group_norm rms_norm instance_norm local_response_norm normalize
"""
_WITH_STATISTICS = """
BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d batch_norm
"""


@path_rule(operator.neg, *named(_SAME))
def same(call: Call) -> Carried:
    """Dropout, interpolation, casts: every channel to itself, no unit."""
    track = call.single(scattered=True)
    shape = call.shape()
    if track.scattered is not None:
        return broadcast(call, track, shape)
    if track.axis is not None and (len(shape) != len(track.shape) or shape[track.axis] != track.channels):
        raise call.error(f"turned shape {track.shape} into {shape}; expected the {track.channels} channels to stay")
    return Track(track.index, shape, track.channels, track.axis)


@path_rule(*named(_SPATIAL))
def spatial(call: Call) -> Carried:
    """Pooling and padding along space: every channel to itself, no unit; along the channels they would mix them."""
    track = call.single()
    carried = same(call)
    base = None if call.module is None else class_with_rule(call.module)
    axes = int((call.name if base is None else base.__name__)[-2])
    if track.axis is not None and track.channels > 1 and track.axis >= len(track.shape) - axes:
        raise call.error(
            f"pools or pads axis {track.axis} of shape {track.shape}, along which the channels lie",
            "move the channels in front of the axes of space (transpose)",
        )
    return carried


@path_rule(*named(_SPATIAL_UNCOUNTED))
def spatial_uncounted(call: Call) -> Carried:
    """Max-pooling: as other pooling, though nonlinear, and so listed."""
    call.program.note()
    return spatial(call)


@path_rule(*named(_UNCOUNTED))
def uncounted(call: Call) -> Carried:
    """Softmax, LayerNorm: one-to-one and no unit, though nonlinear, and so listed."""
    call.program.note()
    return same(call)


@path_rule(*named(_WITH_STATISTICS))
def normalization(call: Call) -> Carried:
    """BatchNorm: affine, and so linear, with running statistics; listed as uncounted with those of the batch."""
    module: Any = call.module
    of_batch = call.constant(5, "training") if module is None else module.running_mean is None
    return uncounted(call) if of_batch else same(call)


_CONSTANTS = """
zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty new_tensor
"""


@path_rule(*named(_CONSTANTS), pathless=True)
def constant(call: Call) -> Carried:
    """Only the shape comes from the input: no path."""
    return None


_COMPARISONS = """
eq ne not_equal lt less le less_equal gt greater ge greater_equal isnan isinf isfinite
logical_and logical_or logical_not logical_xor argmax argmin argsort
"""


@path_rule(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, *named(_COMPARISONS))
def comparison(call: Call) -> Carried:
    """A comparison is constant almost everywhere and carries no path; what it selects counts as a unit."""
    return call.without_path()


def broadcast(call: Call, track: Track, shape: tuple[int, ...]) -> Track:
    """The track seen in a larger shape, by the rules of broadcasting: new axes in front, sizes 1 repeated."""
    if track.scattered is not None:
        return Track(track.index, shape, track.channels, None, torch.broadcast_to(track.scattered, shape))
    if track.axis is None:
        return Track(track.index, shape, track.channels, None)
    axis = track.axis + len(shape) - len(track.shape)
    if shape[axis] == track.channels:
        return Track(track.index, shape, track.channels, axis)
    index = call.program.add(Gather(np.zeros(shape[axis], dtype=np.intp)), track)
    return Track(index, shape, shape[axis], axis)


def merged(call: Call, operation: Any, tracks: list[Track]) -> Track:
    """One operation on branches that are brought to the shape of the result."""
    shape = call.shape()
    branches = [broadcast(call, track, shape) for track in tracks]
    if any(branch.scattered is not None for branch in branches):
        return _merged_elements(call, operation, branches)
    axes = {branch.axis for branch in branches if branch.axis is not None}
    if len(axes) > 1:
        raise call.error(f"joins branches with their channels on axes {sorted(axes)} of shape {shape}")
    if not axes:
        return call.emit(operation, branches, max(branch.channels for branch in branches), None)
    (axis,) = axes
    return call.emit(operation, [call.along(branch, axis) for branch in branches], shape[axis], axis)


def _merged_elements(call: Call, operation: Any, branches: list[Track]) -> Track:
    """One operation element by element: every combination of channels that meets is a channel of the result."""
    numbers = torch.stack([channel_numbers(branch).flatten() for branch in branches]).numpy()
    met, place = np.unique(numbers.astype(np.intp), axis=1, return_inverse=True)
    gathered = [
        Track(call.program.add(Gather(row - 1), branch), branch.shape, len(row), None)
        for row, branch in zip(met, branches, strict=True)
    ]
    scattered = torch.from_numpy(place.reshape(call.shape()) + 1).double()
    return replace(call.emit(operation, gathered, met.shape[1], None), scattered=scattered)


@path_rule(operator.add, operator.iadd, operator.sub, operator.isub, *named("add add_ sub sub_ subtract rsub"))
def add(call: Call) -> Carried:
    """Sum of two branches, each chosen with probability 1/2; a constant or a parameter is no branch."""
    tracks = call.operands()
    return merged(call, Sum(), tracks) if len(tracks) > 1 else broadcast(call, tracks[0], call.shape())


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
celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid logsigmoid mish prelu relu relu6 rrelu
selu silu sigmoid softplus softshrink softsign tanh tanhshrink threshold
celu_ elu_ hardtanh_ leaky_relu_ mish_ relu_ rrelu_ selu_ sigmoid_ silu_ hardswish_ hardsigmoid_ tanh_ threshold_
clamp clamp_ clip clamp_min clamp_max clamp_min_ clamp_max_ abs abs_ square sqrt rsqrt pow exp expm1 log log1p log2
sin cos tan erf reciprocal sign exp_ log_ pow_ sqrt_ rsqrt_
"""


@path_rule(operator.pow, operator.ipow, operator.abs, *named(_ACTIVATIONS))
def activation(call: Call) -> Carried:
    """A nonlinearity that is no gate: always active in every channel, at weight 1."""
    return call.unit(call.single(scattered=True))


# ---- maps between channels ------------------------------------------------------------------------------------------


def dense(call: Call, axis: int, inputs: int, outputs: int, groups: int = 1) -> Track:
    """The first argument through a map between all channels of each group, which lie on that axis from the end."""
    track = call.single()
    axis += len(track.shape)
    track = call.along(track, axis)
    if track.channels != inputs:
        raise call.error(f"expects {inputs} channels and got {track.channels}")
    # An output without channel axis (matrix times vector) is one channel.
    position = axis if len(call.shape()) == len(track.shape) else None
    return call.emit(Dense(outputs, groups), [track], outputs, position)


@path_rule(nn.Linear, functional.linear, "linear", pathless=True)
def linear(call: Call) -> Carried:
    """All input features to all output features."""
    if call.module is None:
        weight = call.constant(1, "weight")
        return dense(call, -1, weight.shape[-1], weight.shape[0] if weight.dim() > 1 else 1)
    module: Any = call.module
    return dense(call, -1, module.in_features, module.out_features)


@path_rule(*named("Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d"), pathless=True)
def convolution(call: Call) -> Carried:
    """All input channels of a group to all its output channels."""
    module: Any = call.module
    return dense(call, -1 - len(module.kernel_size), module.in_channels, module.out_channels, module.groups)


@path_rule(*named("conv1d conv2d conv3d"), pathless=True)
def functional_convolution(call: Call) -> Carried:
    """As the module, from the shape of the weight [outputs, inputs / groups, ...]."""
    weight, groups = call.constant(1, "weight"), call.argument(6, "groups", 1)
    return dense(call, 1 - weight.dim(), weight.shape[1] * groups, weight.shape[0], groups)


@path_rule(*named("conv_transpose1d conv_transpose2d conv_transpose3d"), pathless=True)
def functional_transposed_convolution(call: Call) -> Carried:
    """As the module, from the shape of the weight [inputs, outputs / groups, ...]."""
    weight, groups = call.constant(1, "weight"), call.argument(6, "groups", 1)
    return dense(call, 1 - weight.dim(), weight.shape[0], weight.shape[1] * groups, groups)


@path_rule(nn.Embedding, nn.EmbeddingBag, functional.embedding, "embedding", pathless=True)
def embedding(call: Call) -> Carried:
    """Tokens to features: the features are where paths start."""
    if call.operands() or call.weights():
        raise call.error("looks up what layers before it computed, where paths would end and start again")
    channels = call.shape()[-1]
    return call.emit(Source(channels), [], channels, len(call.shape()) - 1)
