"""How paths go through attention: along the values. The attention weights are no units and no path.

A head mixes positions, not channels, so only the projections of values and outputs are maps between channels. That
holds for cross attention too: queries come from one stream, values from the other, and paths go on from the other.
Attention written out by matrix products is followed by the rules in `products`: a product of two values that carry
paths makes scores, which carry none; scores times values are the values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .algebra import Dense
from .rules import Call, Carried, Node, Pathless, Track, path_rule
from .shapes import located, numbered


@path_rule(functional.scaled_dot_product_attention, "scaled_dot_product_attention", pathless=True)
def attention(call: Call) -> Carried:
    """softmax(q k^T) v: every channel of v to itself, at the positions of q."""
    value = call.argument(2, "value")
    if not isinstance(value, Track):
        raise call.error("has values that carry no path from the network's input")
    call.program.note(Node(call.program.node.name, "attention"))
    shape = call.shape()
    numbers = numbered([value])[0]
    if len(shape) > 2 and value.shape[-3] not in (1, shape[-3]):
        # Groups of heads of the queries share one head of the values.
        numbers = numbers.repeat_interleave(shape[-3] // value.shape[-3], dim=-3)
    if not torch.equal(numbers, numbers[..., :1, :].expand_as(numbers)):
        raise call.error(f"mixes axis {numbers.dim() - 2} of its values, along which the channels lie")
    return located(call, torch.broadcast_to(numbers[..., :1, :], shape).clone(), [value])


def projected(call: Call, value: Track, module: nn.MultiheadAttention, node: Node) -> Track:
    """The values' projection, then that of the outputs, both dense."""
    call.program.note(node)
    width = module.embed_dim
    inner = Track(call.program.add(Dense(width), value), value.shape, width, value.axis)
    return Track(call.program.add(Dense(width), inner), value.shape, width, value.axis)


@path_rule(nn.MultiheadAttention, pathless=True)
def multi_head_attention(call: Call) -> Carried:
    """Projection of the values, then of the outputs, both dense; returned with the weights, which carry no path."""
    call.tracks()
    module: Any = call.module
    value = call.argument(2, "value")
    if not isinstance(value, Track):
        raise call.error("has values that carry no path from the network's input")
    value = call.along(value, len(value.shape) - 1)
    result = projected(call, value, module, call.program.node)
    output, weights = call.result
    shape = tuple(output.shape)
    carried = None if weights is None else Pathless(False, tuple(weights.shape))
    return Track(result.index, shape, result.channels, len(shape) - 1), carried
