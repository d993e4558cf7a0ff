"""How paths go through reshaping, slicing, padding, concatenation and reductions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .algebra import Dense, Gather
from .rules import Call, Carried, Track, channel_numbers, named, path_rule

_SHAPES = """
Flatten Unflatten PixelShuffle PixelUnshuffle ChannelShuffle pixel_shuffle pixel_unshuffle channel_shuffle pad
flatten unflatten reshape view _unsafe_view permute transpose t swapaxes swapdims movedim moveaxis squeeze unsqueeze
narrow select slice index flip roll cat concat concatenate stack hstack vstack chunk split split_with_sizes tensor_split
unbind index_select repeat_interleave contiguous clone expand repeat tile broadcast_to view_as expand_as reshape_as
constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
replication_pad1d replication_pad2d replication_pad3d
mT numpy_T
"""


# An axis keeps its place in all others if its neighbors keep their sizes.
_REORDERING = """
reshape view _unsafe_view view_as reshape_as permute transpose t swapaxes swapdims movedim moveaxis flatten unflatten
Flatten Unflatten getattr mT numpy_T
"""
_SHAPE_ATTRIBUTES = ("T", "mT", "data")


@path_rule(operator.getitem, getattr, *named(_SHAPES))
def rearrange(call: Call) -> Carried:
    """Reshape, permute, slice, pad, cat, split: the node is run once more on tensors that hold channel numbers."""
    if call.target is getattr and call.arguments[1] not in _SHAPE_ATTRIBUTES:
        raise call.error(f"reads the attribute '{call.arguments[1]}', which has no rule for paths")
    tracks = call.operands()
    axes = {track.axis for track in tracks if track.axis is not None}
    if len(tracks) > 1 and len(axes) == 1:
        # A raw input beside a layer's output: its channels lie where the others have theirs.
        (axis,) = axes
        tracks = [track if track.scattered is not None else call.along(track, axis) for track in tracks]
    result = rerun(call, numbered(tracks), torch.zeros)
    if isinstance(result, Tensor):
        return located(call, result, tracks)
    return tuple(located(call, part, tracks) for part in result)


def rerun(call: Call, operands: Sequence[Tensor], others: Callable[[tuple[int, ...]], Tensor]) -> Any:
    """The node once more on other tensors: the given ones where paths arrive, `others(shape)` for other real ones."""
    waiting = iter(operands)

    def substitute(symbolic: Any, concrete: Any) -> Any:
        if isinstance(symbolic, Track):
            return next(waiting)
        if isinstance(symbolic, (list, tuple)):
            return type(symbolic)(substitute(a, b) for a, b in zip(symbolic, concrete, strict=True))
        if isinstance(concrete, Tensor) and concrete.is_floating_point():
            return others(tuple(concrete.shape)).double()
        return concrete.cpu() if isinstance(concrete, Tensor) else concrete

    arguments = tuple(substitute(a, b) for a, b in zip(call.arguments, call.concrete[0], strict=True))
    keywords = {name: substitute(value, call.concrete[1][name]) for name, value in call.keywords.items()}
    if call.name in ("pad", "constant_pad_nd"):
        # Channel numbers have no sensible padding but "nothing"; reflected and repeated ones are real channels.
        given = 2 if call.name == "constant_pad_nd" else 3
        arguments, keywords = arguments[:given], {**keywords, "value": 0.0}
    if call.module is not None:
        return call.module(*arguments, **keywords)
    if isinstance(call.target, str):
        return getattr(arguments[0], call.target)(*arguments[1:], **keywords)
    return call.target(*arguments, **keywords)


def numbered(tracks: Sequence[Track]) -> list[Tensor]:
    """Tensors of the tracks' shapes that hold the channel's number, counted from 1 through all tracks."""
    numbered: list[Tensor] = []
    starts: dict[int, int] = {}
    start = 1
    for track in tracks:
        # The same channels twice (a tensor beside itself) have the same numbers.
        first = starts.setdefault(track.index, start)
        numbers = channel_numbers(track)
        numbered.append(torch.where(numbers > 0, numbers + (first - 1), 0.0))
        start += track.channels
    return numbered


def located(call: Call, numbers: Tensor, tracks: Sequence[Track]) -> Track | None:
    """Find the axis along which the channel numbers lie; 0 stands for padding and constants."""
    shape = tuple(numbers.shape)
    if not numbers.numel() or not numbers.any():
        return None
    if numbers.min() == numbers.max():
        kept = _kept_axis(call, shape, tracks)
        return _everywhere(call, numbers, tracks) if kept is None else _filled(call, numbers, tracks, kept)
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


def _kept_axis(call: Call, shape: tuple[int, ...], tracks: Sequence[Track]) -> int | None:
    """Axis of the channels where one channel fills the result, and only that axis can have grown."""
    axes = {track.axis for track in tracks}
    axis = tracks[0].axis
    if len(axes) != 1 or axis is None or call.name in _REORDERING.split() or axis >= len(shape):
        return None
    others = shape[:axis] + shape[axis + 1 :]
    same = all(track.shape[:axis] + track.shape[axis + 1 :] == others for track in tracks)
    return axis if same else None


def _filled(call: Call, numbers: Tensor, tracks: Sequence[Track], axis: int) -> Track:
    """One channel everywhere, in as many copies as this axis has elements."""
    indices = np.full(numbers.shape[axis], int(numbers.max()) - 1)
    return Track(call.program.add(Gather(indices), *tracks), tuple(numbers.shape), len(indices), axis)


def _everywhere(call: Call, numbers: Tensor, tracks: Sequence[Track]) -> Track:
    index = call.program.add(Gather(np.array([int(numbers.max()) - 1])), *tracks)
    return Track(index, tuple(numbers.shape), 1, None)


@path_rule(*named("mean sum"))
def reduction(call: Call) -> Carried:
    """Mean or sum over space is one-to-one; over the channel axis it is a map to one channel."""
    return reduced(call, call.shape())


@path_rule(*named("amax amin"))
def extremum(call: Call) -> Carried:
    """Maximum over an axis: as a mean, nonlinear and uncounted like max-pooling."""
    call.program.note()
    return reduced(call, call.shape())


def reduced(call: Call, shape: tuple[int, ...]) -> Track:
    """The first argument after a reduction of the axes that the second one names; shape: of the result."""
    track = call.single()
    dims = call.argument(1, "dim")
    dimensions = max(len(track.shape), 1)
    # No axis at all, as in x.sum(()), stands for all of them.
    axes = [dims] if isinstance(dims, int) else list(dims or range(dimensions))
    gone = {axis % dimensions for axis in axes}
    if track.axis is None:
        return Track(track.index, shape, track.channels, None)
    if track.axis in gone:
        return Track(call.program.add(Dense(1), track), shape, 1, None)
    kept = len(shape) == dimensions
    axis = track.axis if kept else track.axis - sum(other < track.axis for other in gone)
    return Track(track.index, shape, track.channels, axis)
