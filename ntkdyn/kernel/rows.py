"""Rows of the Jacobian, multiplied out from factors a part of the parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Protocol, cast

import torch
from torch import Tensor

from .factors import Factors, Form
from .ranges import ranges
from .sides import Side, Use

Scale = float | Tensor
Piece = tuple[Use, str]


class Source(Protocol):
    """What rows are made from: a ``Use``, or its gradient that all directions share."""

    @property
    def count(self) -> int:
        """Number of directions K."""

    def form(self, role: str) -> Form:
        """Sizes of what ``contribution`` gives."""

    def contribution(self, role: str, samples: slice) -> Factors | Tensor:
        """As in ``Use``."""

    def new_rows(self, *shape: int) -> Tensor:
        """As in ``Use``."""


# Numbers in one intermediate: 4 MiB in float32 stay in the cache.
_BLOCK = 2**20
# Numbers of the rows of one part; memory that is used again and again stays mapped and in the cache.
_PART = 2**23
# Numbers of right factors (windows of convolutions) that are kept from one part to the next.
_KEPT = 2**23


class Workspace:
    """Memory for rows that is used again by the next part and the next parameter."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def take(self, number: int, shape: Sequence[int], use: Source) -> Tensor:
        """A tensor with whatever values; number tells those apart that are needed at the same time."""
        wanted = torch.Size(shape).numel()
        held = self._held.get(number)
        if held is None or held.numel() < wanted:
            held = self._held[number] = use.new_rows(wanted)
        return held[:wanted].view(shape)


def rows_in_parts(
    size: int,
    first: Sequence[tuple[Source, str]],
    size_2: int,
    second: Sequence[tuple[Source, str]] | None,
    scale: Scale,
    workspace: Workspace,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows √s J of a parameter [d_out, d_in] whose uses are all factors, a range of d_out at a time.

    Args:
        size, size_2: samples of both sides.
        first, second: its uses there; second is None where it is the first.

    Yields: the range of d_out, and rows [N, K, p] of both sides, which the next part overwrites.
    """
    use, role = first[0]
    form = use.form(role)
    columns = list(ranges(slice(0, form.d_out), _columns(max(size, size_2), use.count, form)))
    parts = _Parts(size, first, scale, keep=len(columns) > 1)
    parts_2 = parts if second is None else _Parts(size_2, second, scale, keep=len(columns) > 1)
    for some in columns:
        rows = parts.rows(some, workspace, 0)
        yield some, rows, rows if parts_2 is parts else parts_2.rows(some, workspace, 1)


def _columns(size: int, count: int, form: Form) -> int:
    # Not too few at once: K times as many make one matrix product.
    return max(-(-64 // count), _PART // (size * count * form.d_in))


def part_numbers(size: int, count: int, form: Form, positions: int) -> int:
    """Numbers that are held for one side by ``rows_in_parts``: rows of a part, and right factors."""
    columns = min(form.d_out, _columns(size, count, form))
    rights = size * positions * form.d_in if columns < form.d_out else _BLOCK
    return size * count * columns * form.d_in + min(rights, _KEPT) + 2 * _BLOCK


class _Parts:
    """Rows of one side of a parameter, a range of d_out at a time."""

    def __init__(self, size: int, pieces: Sequence[tuple[Source, str]], scale: Scale, *, keep: bool) -> None:
        use, role = pieces[0]
        form = use.form(role)
        self._size, self._use = size, use
        self._d_in = form.d_in
        self._root = _as_matrix(scale, form).sqrt() if isinstance(scale, Tensor) else scale**0.5
        self._makers: list[tuple[slice, bool, Callable[[], Factors]]] = []
        for position, (use, role) in enumerate(pieces):
            form = use.form(role)
            # Windows of a convolution are as many times its input as the kernel is large: a few samples at a time.
            length = max(1, _BLOCK // (form.positions * form.d_in))
            kept = keep and size * form.positions * form.d_in <= _KEPT
            for samples in ranges(slice(0, size), length):
                make = partial(_factors, use, role, samples)
                self._makers.append((samples, position > 0, cache(make) if kept else make))

    def rows(self, columns: slice, workspace: Workspace, number: int) -> Tensor:
        """Rows √s J [N, K, p], summed over the uses."""
        shape = (self._size, self._use.count, columns.stop - columns.start, self._d_in)
        rows = workspace.take(number, shape, self._use)
        for samples, further, make in self._makers:
            make().multiply_out(columns, rows[samples], add=further)
        if isinstance(self._root, Tensor):
            rows *= self._root[columns]
        elif self._root != 1.0:
            rows *= self._root
        return rows.flatten(2)


def _as_matrix(scale: Tensor, form: Form) -> Tensor:
    """The metric of a parameter, [d_out, d_in]."""
    return scale.reshape(form.d_in, form.d_out).T if form.transposed else scale.reshape(form.d_out, form.d_in)


def _factors(use: Source, role: str, samples: slice) -> Factors:
    return cast(Factors, use.contribution(role, samples))


def whole_rows(name: str, pieces: Sequence[Piece], side: Side, scale: Scale, samples: slice) -> Tensor:
    """Rows √s J [n, K, P] of one parameter for some samples, all uses summed, whatever they are made of."""
    rows = side.rest[name][samples] if name in side.rest else None
    for use, role in pieces:
        one = _rows_of_use(use, role, samples)
        rows = one if rows is None else rows + one
    rows = cast(Tensor, rows)
    if isinstance(scale, Tensor):
        return rows * scale.flatten().sqrt()
    return rows if scale == 1.0 else rows * scale**0.5


def _rows_of_use(use: Use, role: str, samples: slice) -> Tensor:
    found = use.contribution(role, samples)
    return found.contiguous() if isinstance(found, Tensor) else found.rows()
