"""How paths go through the Transformer layers of torch.nn: residual blocks of attention and feed-forward parts."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..call_sites import ROOT, classify
from ..gates import Gate
from .algebra import Activation, Dense, Sum
from .attention import projected
from .layers import activation
from .rules import Call, Carried, Node, Track, path_rule, rule_for_module


@path_rule(nn.TransformerEncoderLayer, pathless=True)
def encoder_layer(call: Call) -> Carried:
    """x + attention(x), then x + feed-forward(x); LayerNorm before or after is one-to-one."""
    return _Layers(call).encoder_layer(_features(call, 0, "src"), call.module, _prefix(call))


@path_rule(nn.TransformerDecoderLayer, pathless=True)
def decoder_layer(call: Call) -> Carried:
    """x + attention(x), x + attention with values from the memory, x + feed-forward(x)."""
    target, memory = _features(call, 0, "tgt"), _features(call, 1, "memory")
    return _Layers(call).decoder_layer(target, memory, call.module, _prefix(call))


@path_rule(nn.TransformerEncoder, pathless=True)
def encoder(call: Call) -> Carried:
    """Encoder layers one after the other."""
    module: Any = call.module
    track = _features(call, 0, "src")
    for name, layer in module.layers.named_children():
        track = _Layers(call).encoder_layer(track, layer, f"{_prefix(call)}layers.{name}.")
    return _Layers(call).normalized(track, module, "norm", _prefix(call))


@path_rule(nn.TransformerDecoder, pathless=True)
def decoder(call: Call) -> Carried:
    """Decoder layers one after the other, each with the same memory."""
    module: Any = call.module
    track, memory = _features(call, 0, "tgt"), _features(call, 1, "memory")
    for name, layer in module.layers.named_children():
        track = _Layers(call).decoder_layer(track, memory, layer, f"{_prefix(call)}layers.{name}.")
    return _Layers(call).normalized(track, module, "norm", _prefix(call))


def _prefix(call: Call) -> str:
    return "" if call.target == ROOT else f"{call.target}."


def _features(call: Call, position: int, name: str) -> Track:
    """An argument that must carry paths, with its channels on the last axis."""
    call.tracks()
    track = call.argument(position, name)
    if not isinstance(track, Track):
        raise call.error(f"has an argument '{name}' that carries no path from the network's input")
    return call.along(track, len(track.shape) - 1)


class _Layers:
    """The parts of one call of such a layer."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def encoder_layer(self, track: Track, layer: Any, prefix: str) -> Track:
        self._check(layer, nn.TransformerEncoderLayer, prefix)
        track = self._attended(track, track, layer, "self_attn", prefix)
        return self._feed_forward(self.normalized(track, layer, "norm1", prefix), layer, "norm2", prefix)

    def decoder_layer(self, track: Track, memory: Track, layer: Any, prefix: str) -> Track:
        self._check(layer, nn.TransformerDecoderLayer, prefix)
        track = self._attended(track, track, layer, "self_attn", prefix)
        track = self._attended(self.normalized(track, layer, "norm1", prefix), memory, layer, "multihead_attn", prefix)
        return self._feed_forward(self.normalized(track, layer, "norm2", prefix), layer, "norm3", prefix)

    def normalized(self, track: Track, module: Any, name: str, prefix: str) -> Track:
        """The track itself; LayerNorm is listed as uncounted."""
        norm = getattr(module, name)
        if norm is not None:
            self.call.program.note(Node(f"{prefix}{name}", type(norm).__name__))
        return track

    def _check(self, layer: Any, kind: type[nn.Module], prefix: str) -> None:
        if type(layer) is not kind:
            name = prefix.removesuffix(".")
            raise self.call.error(f"holds '{name}' ({type(layer).__name__}), which has no rule for paths")

    def _after(self, index: int, track: Track, channels: int) -> Track:
        return Track(index, track.shape, channels, track.axis)

    def _attended(self, track: Track, values: Track, layer: Any, name: str, prefix: str) -> Track:
        node = Node(f"{prefix}{name}", "MultiheadAttention")
        branch = projected(self.call, values, getattr(layer, name), node)
        return self._after(self.call.program.add(Sum(), track, branch), track, track.channels)

    def _feed_forward(self, track: Track, layer: Any, norm: str, prefix: str) -> Track:
        add, function = self.call.program.add, layer.activation
        wide = self._after(add(Dense(layer.linear1.out_features), track), track, layer.linear1.out_features)
        gate = f"{prefix}activation" if isinstance(function, Gate) else None
        node = Node(f"{prefix}activation", self._kind(function))
        active = self._after(add(Activation(gate), wide, node=node), wide, wide.channels)
        narrow = self._after(add(Dense(track.channels), active), track, track.channels)
        total = self._after(add(Sum(), track, narrow), track, track.channels)
        return self.normalized(total, layer, norm, prefix)

    def _kind(self, function: Any) -> str:
        if isinstance(function, Gate) or rule_for_module(function) is activation:
            return type(function).__name__
        known = None if isinstance(function, nn.Module) else classify(getattr(function, "__name__", ""))
        if known is None or known[0] == "uncounted":
            raise self.call.error(f"has the activation {function!r}, which is no unit that is known")
        return known[1]
