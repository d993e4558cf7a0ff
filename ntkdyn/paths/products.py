"""Rules for paths: products, quotients, selections, and matrix products.

A product of two values that carry paths is a choice between its factors with equal probability, as in a sum: the
derivative of a product is a sum over its factors. And it is a unit, always active, on either way: the other factor
multiplies what comes through, as a ReLU multiplies its input by 0 or 1. So squeeze-and-excitation, GLU and highway
layers need no notion of a main branch and a gate. Attention is the exception: see `attention`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .algebra import Dense, Gather, Product, Sum
from .layers import broadcast, merged
from .rules import Call, Carried, Node, Pathless, Track, named, path_rule
from .shapes import located, numbered, reduced, rerun

# ---- element by element ---------------------------------------------------------------------------------------------


@path_rule(operator.mul, operator.imul, *named("mul mul_ multiply"), pathless=True)
def product(call: Call) -> Carried:
    """Two tracks: a choice and a unit. By a constant or a parameter: one-to-one; by the number 0: nothing goes through.

    By a comparison of what carries paths: a unit, as x * (x > 0) is a ReLU.
    """
    tracks = call.operands()
    if not tracks:
        return call.without_path()
    if len(tracks) > 1:
        return merged(call, Product(), tracks)
    if call.weights():
        return call.unit(broadcast(call, tracks[0], call.shape()))
    # `x * 0` is how some shortcuts make empty channels; a parameter that happens to be 0 is a connection.
    if any(isinstance(factor, (int, float)) and factor == 0 for factor in call.arguments):
        return None
    return broadcast(call, tracks[0], call.shape())


@path_rule(operator.truediv, operator.itruediv, *named("div div_ divide true_divide"), pathless=True)
def quotient(call: Call) -> Carried:
    """a / b is a times 1 / b, and 1 / b a unit. One that rounds is refused, as rounding is."""
    tracks = call.operands()
    if not tracks:
        return call.without_path()
    if (rounding := call.constant(2, "rounding_mode")) is not None:
        raise call.error(f"rounds what carries paths (rounding_mode={rounding!r}), which has no rule for paths")
    divisor = call.argument(1, "other")
    if isinstance(divisor, Track):
        inverse = call.unit(divisor)
        if len(tracks) == 1:
            return broadcast(call, inverse, call.shape())
        return merged(call, Product(), [tracks[0], inverse])
    track = broadcast(call, tracks[0], call.shape())
    return call.unit(track) if call.weights() else track


@path_rule(*named("maximum minimum fmax fmin"), pathless=True)
def larger(call: Call) -> Carried:
    """The larger of two: a choice between those that carry paths, and a unit."""
    tracks = call.operands()
    return call.unit(merged(call, Sum(), tracks)) if tracks else call.without_path()


@path_rule(*named("max min"), pathless=True)
def extreme(call: Call) -> Carried:
    """The larger of two tensors, or the largest along an axis with its position."""
    if isinstance(call.constant(1, "other"), Tensor):
        return larger(call)
    if not call.operands():
        return call.without_path()
    call.program.note()
    if isinstance(call.result, Tensor):
        return reduced(call, call.shape())
    shape = tuple(call.result[0].shape)
    return reduced(call, shape), Pathless(False, shape)


@path_rule(torch.where, "where", pathless=True)
def selection(call: Call) -> Carried:
    """A choice between the tracks, and a unit where what carries paths decides."""
    tracks = call.operands()
    if not tracks:
        return call.without_path()
    chosen = merged(call, Sum(), tracks) if len(tracks) > 1 else broadcast(call, tracks[0], call.shape())
    return call.unit(chosen) if call.weights() else chosen


@path_rule(*named("masked_fill masked_fill_"), pathless=True)
def masked(call: Call) -> Carried:
    """One-to-one; a unit where what carries paths decides on the mask."""
    return selection(call)


@path_rule(nn.GLU, functional.glu, "glu")
def gated_linear_unit(call: Call) -> Carried:
    """a * sigmoid(b), a and b the halves of the channels: two units on the way through b, one through a."""
    track = call.single()
    module: Any = call.module
    axis = (call.argument(1, "dim", -1) if module is None else module.dim) % len(track.shape)
    track = call.along(track, axis)
    half = track.channels // 2
    first, second = (
        call.emit(Gather(np.arange(start, start + half)), [track], half, axis) for start in (0, half)
    )  # fmt: skip
    return call.emit(Product(), [first, call.unit(second)], half, axis)


# ---- matrices -------------------------------------------------------------------------------------------------------


@path_rule(operator.matmul, *named("matmul mm bmm mv"), pathless=True)
def matrix_product(call: Call) -> Carried:
    """By a constant matrix: a map between all channels. Two tracks: attention scores, which carry no path."""
    return _multiplied(call, _mixing_of_matrix)


@path_rule(torch.einsum, "einsum", pathless=True)
def contraction(call: Call) -> Carried:
    """As a matrix product, for the axes that the equation names."""
    return _multiplied(call, _mixing_of_equation)


@path_rule(*named("baddbmm addmm"), pathless=True)
def biased_matrix_product(call: Call) -> Carried:
    """A matrix product plus a constant."""
    bias, *factors = call.arguments
    if isinstance(bias, Track):
        raise call.error("adds a matrix product to what carries paths")
    concrete: tuple[tuple[Any, ...], dict[str, Any]] = (call.concrete[0][1:], {})
    return matrix_product(replace(call, arguments=tuple(factors), keywords={}, concrete=concrete, target=torch.matmul))


# Number of output channels; axis of the channels that they are made of, None if no channels are mixed; their own axis.
Mixing: TypeAlias = tuple[int, int | None, int | None]


def _multiplied(call: Call, mixing: Callable[[Call, Track], Mixing]) -> Carried:
    tracks = call.operands()
    if len(tracks) != 1:
        if len(tracks) > 1:
            call.program.note(Node(call.program.node.name, "attention scores"))
        return call.without_path()
    (track,) = tracks
    size, axis, position = mixing(call, track)
    channels_meet = axis is not None and (track.axis == axis or (track.axis is None and track.scattered is None))
    if channels_meet and axis is not None and not call.weights():
        track = call.along(track, axis)
        return call.emit(Dense(size), [track], size, position)
    positions = None if channels_meet and track.axis is not None else along_values(call, track)
    if positions is None:
        what = "weights that depend on the network's input" if call.weights() else "constants"
        raise call.error(f"mixes the channels of shape {track.shape} with {what}; expected it to mix positions only")
    return positions


def along_values(call: Call, track: Track) -> Track | None:
    """The track where a product mixes positions and no channels, None where it mixes channels.

    The node is run again on channel numbers and on their squares, other factors being 1: where no variance shows, all
    terms of a sum have one channel.
    """
    numbers = numbered([track])[0]
    counts, sums, squares = (rerun(call, [n], torch.ones) for n in ((numbers > 0).double(), numbers, numbers**2))
    if not torch.equal(squares * counts, sums**2):
        return None
    return located(call, torch.where(counts > 0, sums / counts.clamp_min(1), 0.0).round(), [track])


def _mixing_of_matrix(call: Call, track: Track) -> Mixing:
    left = isinstance(call.arguments[0], Track)
    matrix = call.concrete[0][1 if left else 0]
    last = len(call.shape()) - 1
    if left:
        size, position = (matrix.shape[-1], last) if matrix.dim() > 1 else (1, None)
        return size, len(track.shape) - 1, position
    size, position = (matrix.shape[-2], last - (len(track.shape) > 1)) if matrix.dim() > 1 else (1, None)
    return size, max(len(track.shape) - 2, 0), position


def _mixing_of_equation(call: Call, track: Track) -> Mixing:
    inputs, _, output = call.arguments[0].replace(" ", "").partition("->")
    operands = call.arguments[1] if isinstance(call.arguments[1], (list, tuple)) else call.arguments[1:]
    term = inputs.split(",")[next(i for i, operand in enumerate(operands) if isinstance(operand, Track))]
    gone = [axis for axis, label in enumerate(term) if label not in output]
    new = [place for place, label in enumerate(output) if label not in term]
    axis = track.axis if track.axis in gone else None
    if track.axis is None and len(gone) == 1:
        axis = gone[0]
    if "." in term or not output or len(new) > 1:
        return 1, None, None
    return (call.shape()[new[0]], axis, new[0]) if new else (1, axis, None)
