"""How paths go through attention: along the values. The attention weights are no units and no path.

A head mixes positions, not channels, so only the projections of values and outputs are maps between channels.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional

from ..call_sites import ROOT
from ..gates import Gate
from .algebra import Activation, Dense, Sum
from .rules import Call, Carried, Track, path_rule


@path_rule(functional.scaled_dot_product_attention)
def attention(call: Call) -> Carried:
    """softmax(q k^T) v: every channel of v to itself."""
    value, shape = call.argument(2, "value"), call.shape()
    if not isinstance(value, Track) or shape != value.shape:
        raise call.error(f"gives shape {shape}; expected that of its values, which must depend on the network's input")
    return value


def _projected(call: Call, value: Track, module: nn.MultiheadAttention) -> Track:
    width = module.embed_dim
    inner = Track(call.program.add(Dense(width), value), value.shape, width, value.axis)
    return Track(call.program.add(Dense(width), inner), value.shape, width, value.axis)


@path_rule(nn.MultiheadAttention)
def multi_head_attention(call: Call) -> Carried:
    """Projection of the values, then of the outputs, both dense; returned with the weights, which carry no path."""
    call.tracks()
    module: Any = call.module
    value = call.argument(2, "value")
    if not isinstance(value, Track):
        raise call.error("has values that do not depend on the network's input")
    value = call.along(value, len(value.shape) - 1)
    result = _projected(call, value, module)
    return Track(result.index, tuple(call.result[0].shape), result.channels, result.axis), None


@path_rule(nn.TransformerEncoderLayer)
def encoder_layer(call: Call) -> Carried:
    """x + attention(x), then x + feed-forward(x); LayerNorm before or after is one-to-one."""
    return _encoder_layer(call, call.single(), call.module, "" if call.target == ROOT else f"{call.target}.")


@path_rule(nn.TransformerEncoder)
def encoder(call: Call) -> Carried:
    """Encoder layers one after the other."""
    module: Any = call.module
    track = call.single()
    prefix = "" if call.target == ROOT else f"{call.target}."
    for name, layer in module.layers.named_children():
        track = _encoder_layer(call, track, layer, f"{prefix}layers.{name}.")
    return track


def _encoder_layer(call: Call, track: Track, layer: Any, prefix: str) -> Track:
    if type(layer) is not nn.TransformerEncoderLayer:
        raise call.error(f"holds '{prefix.removesuffix('.')}' ({type(layer).__name__}), which has no rule for paths")
    add = call.program.add
    track = call.along(track, len(track.shape) - 1)
    attended = _projected(call, track, layer.self_attn)
    total = add(Sum(), track, attended)

    def after(index: int, channels: int) -> Track:
        return Track(index, track.shape, channels, track.axis)

    before = after(total, track.channels)
    wide = after(add(Dense(layer.linear1.out_features), before), layer.linear1.out_features)
    gate = f"{prefix}activation" if isinstance(layer.activation, Gate) else None
    active = after(add(Activation(gate), wide), wide.channels)
    narrow = after(add(Dense(track.channels), active), track.channels)
    return after(add(Sum(), before, narrow), track.channels)
