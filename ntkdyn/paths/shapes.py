"""How paths go through reshaping, slicing, padding, concatenation and reductions."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .algebra import Dense, Gather
from .rules import Call, Carried, Track, named, path_rule

_SHAPES = """
Flatten Unflatten PixelShuffle PixelUnshuffle ChannelShuffle pixel_shuffle pixel_unshuffle channel_shuffle pad
flatten unflatten reshape view permute transpose t swapaxes swapdims movedim moveaxis squeeze unsqueeze narrow select
flip roll cat concat concatenate stack chunk split tensor_split unbind index_select repeat_interleave
contiguous clone expand repeat tile broadcast_to view_as expand_as reshape_as
"""


_SHAPE_ATTRIBUTES = ("T", "mT", "data")


@path_rule(operator.getitem, getattr, *named(_SHAPES))
def rearrange(call: Call) -> Carried:
    """Reshape, permute, slice, pad, cat, split: the node is run once more on tensors that hold channel numbers."""
    if call.target is operator.getitem and isinstance(call.arguments[0], tuple):
        picked = call.arguments[0][call.arguments[1]]
        return picked if isinstance(picked, Track) else None
    if call.target is getattr and call.arguments[1] not in _SHAPE_ATTRIBUTES:
        raise call.error(f"reads the attribute '{call.arguments[1]}', which has no rule for paths")
    return _follow(call)


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


def _follow(call: Call) -> Carried:
    tracks = call.operands()
    axes = {track.axis for track in tracks if track.axis is not None}
    if len(tracks) > 1 and len(axes) == 1:
        # A raw input beside a layer's output: its channels lie where the others have theirs.
        (axis,) = axes
        tracks = [track if track.scattered is not None else call.along(track, axis) for track in tracks]
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
    result = _run(call, arguments, keywords)
    if isinstance(result, Tensor):
        return _located(call, result, tracks)
    return tuple(_located(call, part, tracks) for part in result)


def _numbered(tracks: Sequence[Track]) -> list[Tensor]:
    """Tensors of the tracks' shapes that hold the channel's number, counted from 1 through all tracks."""
    numbered: list[Tensor] = []
    starts: dict[int, int] = {}
    start = 1
    for track in tracks:
        # The same channels twice (a tensor beside itself) have the same numbers.
        first = starts.setdefault(track.index, start)
        if track.scattered is None:
            numbers = torch.arange(first, first + track.channels, dtype=torch.float64)
            if track.axis is not None:
                numbers = numbers.view(-1, *[1] * (len(track.shape) - 1 - track.axis))
            numbered.append(numbers.expand(track.shape).clone())
        else:
            numbered.append(torch.where(track.scattered > 0, track.scattered + (first - 1), 0.0))
        start += track.channels
    return numbered


def _located(call: Call, numbers: Tensor, tracks: Sequence[Track]) -> Track | None:
    """Find the axis along which the channel numbers lie; 0 stands for padding and constants."""
    shape = tuple(numbers.shape)
    if not numbers.numel() or not numbers.any():
        return None
    if numbers.min() == numbers.max():
        return _everywhere(call, numbers, tracks)
    fits: list[tuple[bool, int, Tensor]] = []
    for axis in range(numbers.dim()):
        rows = numbers.movedim(axis, 0).reshape(shape[axis], -1)
        largest = rows.amax(dim=1)
        smallest = torch.where(rows > 0, rows, largest[:, None]).amin(dim=1)
        if torch.equal(smallest, largest) and bool((largest > 0).any()):
            fits.append((bool((rows != largest[:, None]).any()), axis, largest))
    if not fits:
        present, positions = np.unique(numbers[numbers > 0].numpy(), return_inverse=True)
        scattered = torch.zeros(shape, dtype=torch.float64)
        scattered[numbers > 0] = torch.from_numpy(positions).double() + 1
        index = call.program.add(Gather(present.astype(np.intp) - 1), *tracks)
        return Track(index, shape, len(present), None, scattered)
    # Padding along space leaves zeros inside a channel: an axis without them wins.
    padded, axis, values = min(fits, key=lambda fit: fit[:2])
    if padded and len(fits) > 1:
        # One channel with padding around it: any axis would do.
        return _everywhere(call, numbers, tracks)
    indices = values.to(torch.int64).numpy() - 1
    return Track(call.program.add(Gather(indices), *tracks), shape, len(indices), axis)


def _everywhere(call: Call, numbers: Tensor, tracks: Sequence[Track]) -> Track:
    index = call.program.add(Gather(np.array([int(numbers.max()) - 1])), *tracks)
    return Track(index, tuple(numbers.shape), 1, None)


@path_rule(*named("mean sum amax"))
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
