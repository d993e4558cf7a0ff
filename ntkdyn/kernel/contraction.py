"""Products of per-sample gradients, parameter by parameter: J₁ diag(s) J₂ᵀ added to a tile, by the cheapest route."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from .accumulator import Accumulator
from .costs import Extent, Route, chosen_route
from .factors import Factors, Form
from .ranges import ranges
from .rows import Piece, Scale, Source, Workspace, rows_in_parts, whole_rows
from .shared import Shared, shared_gradient, summed
from .sides import Side

# Numbers in one intermediate: 4 MiB in float32 stay in the cache.
_BLOCK = 2**20
# Narrow Jacobians (norms, slopes, biases) are put side by side until a product is worth its pass over the result.
NARROW = 1024


def pieces(side: Side) -> dict[str, list[Piece]]:
    """Uses of each parameter, with the role that it has there."""
    found: dict[str, list[Piece]] = {}
    for use in side.uses:
        for role, name in use.call.names.items():
            found.setdefault(name, []).append((use, role))
    return found


class Contraction:
    """Adds the contributions of parameters to tiles.

    Args:
        first, second: sides of the tile; the same object for a symmetric one.
        accumulators: by name of the parameter; several may share one.
        scales: the metric by name of the parameter.
        extent: sizes by which routes are chosen.
    """

    def __init__(
        self,
        first: Side,
        second: Side,
        accumulators: Mapping[str, Accumulator],
        scales: Mapping[str, Scale],
        extent: Extent,
        workspace: Workspace,
    ) -> None:
        self._first, self._second = first, second
        self._pieces = pieces(first)
        self._pieces_2 = self._pieces if second is first else pieces(second)
        self._accumulators = accumulators
        self._scales = scales
        self._extent = extent
        self._workspace = workspace
        self._narrow: dict[int, tuple[Accumulator, list[Tensor], list[Tensor]]] = {}
        self._done: set[str] = set()

    def add(self, names: Sequence[str], *, release: bool) -> None:
        """Add all named parameters.

        Args:
            release: forget the output gradients of ``second`` (and of ``first`` where they are the same) on the way.
        """
        waiting = {id(use): len(use.call.names) for use in self._second.uses}
        for name in names:
            if name not in self._done and self._is_used(name):
                self._add(name)
                self._done.add(name)
            if release:
                for use, _ in self._pieces_2.get(name, []):
                    waiting[id(use)] -= 1
                    if waiting[id(use)] == 0:
                        use.forget()
        for entry in self._narrow.values():
            _flush(*entry)

    def _is_used(self, name: str) -> bool:
        sides = ((self._first, self._pieces), (self._second, self._pieces_2))
        return all(name in found or name in side.rest for side, found in sides)

    def _add(self, name: str) -> None:
        target, scale = self._accumulators[name], self._scales.get(name, 1.0)
        parts, parts_2 = self._pieces.get(name, []), self._pieces_2.get(name, [])
        recognized = name not in self._first.rest and name not in self._second.rest
        form = _common_form(parts, parts_2) if recognized else None
        if form is None:
            self._add_narrow(target, *self._whole_rows(name, scale))
            return
        route = chosen_route(form, self._extent, scale, shared=True)
        shared, shared_2 = self._shared(parts, parts_2) if route.startswith("shared") else (None, None)
        if shared is None:
            route = chosen_route(form, self._extent, scale, shared=False)
        if route == "rows" and (form.bias or form.classes):
            self._add_narrow(target, *self._whole_rows(name, scale))
        elif route == "rows":
            for _, rows, rows_2 in self._rows_in_parts(parts, parts_2, scale):
                target.add_rows(rows, rows_2)
        elif shared is not None and shared_2 is not None:
            self._add_shared(name, shared, shared_2, route)
        else:
            number = cast(float, scale)
            factors = _factors(parts, self._first)
            factors_2 = factors if self._second is self._first else _factors(parts_2, self._second)
            if route == "pairs":
                _add_pairs(target, factors, factors_2, number)
            else:
                _add_gram(target, factors, factors_2, number, self._take_bias(name, parts))

    def _rows_in_parts(
        self, parts: Sequence[tuple[Source, str]], parts_2: Sequence[tuple[Source, str]], scale: Scale
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        size, size_2 = self._first.size, self._second.size
        second = None if self._second is self._first else parts_2
        return rows_in_parts(size, parts, size_2, second, scale, self._workspace)

    def _shared(self, parts: Sequence[Piece], parts_2: Sequence[Piece]) -> tuple[Shared | None, Shared | None]:
        """Gradients of both sides that all directions share, for a parameter with one use."""
        if len(parts) != 1 or len(parts_2) != 1:
            return None, None
        shared = shared_gradient(*parts[0], self._first.size)
        if shared is None or self._second is self._first:
            return shared, shared
        shared_2 = shared_gradient(*parts_2[0], self._second.size)
        return (None, None) if shared_2 is None else (shared, shared_2)

    def _add_shared(self, name: str, first: Shared, second: Shared, route: Route) -> None:
        target, scale, parts = self._accumulators[name], self._scales.get(name, 1.0), self._pieces[name]
        role = parts[0][1]
        trace = target.combine == "trace"
        one, two = summed(first, second) if trace else (first, second)
        if route == "shared rows":
            for columns, rows, rows_2 in self._rows_in_parts([(one, role)], [(two, role)], scale):
                if trace:
                    target.add_rows(rows, rows_2)
                else:
                    directions, directions_2 = first.directions[:, columns], second.directions[:, columns]
                    channels, channels_2 = (found.view(len(found), directions.shape[1], -1) for found in (rows, rows_2))
                    target.add_channels(channels, channels_2, directions, directions_2)
            return
        factors = one.contribution(role, slice(0, self._first.size))
        factors_2 = factors if two is one else two.contribution(role, slice(0, self._second.size))
        number, extra = cast(float, scale), self._take_bias(name, parts)
        if trace:
            _add_gram(target, factors, factors_2, number, extra)
        else:
            # This route has one position and the same samples on both sides: see its cost.
            features = _scaled(factors, factors, slice(None), slice(None), number, extra)[:, 0, :, 0]
            target.add_shared_hadamard(first.directions, first.gradient[:, 0], features)

    def _whole_rows(self, name: str, scale: Scale) -> tuple[Tensor, Tensor]:
        first, second = self._first, self._second
        rows = whole_rows(name, self._pieces.get(name, []), first, scale, slice(0, first.size))
        if second is first:
            return rows, rows
        return rows, whole_rows(name, self._pieces_2.get(name, []), second, scale, slice(0, second.size))

    def _add_narrow(self, target: Accumulator, rows: Tensor, rows_2: Tensor) -> None:
        if rows.shape[-1] >= NARROW:
            target.add_rows(rows, rows_2)
            return
        entry = self._narrow.setdefault(id(target), (target, [], []))
        entry[1].append(rows)
        entry[2].append(rows_2)
        if sum(one.shape[-1] for one in entry[1]) >= NARROW:
            _flush(*self._narrow.pop(id(target)))

    def _take_bias(self, name: str, parts: Sequence[Piece]) -> float:
        """Scale of the bias that is used with this weight, only there, and added to the same kernel; else 0.

        Σ (a·b + 1)(g·h) then gives both at once.
        """
        if len(parts) != 1 or parts[0][1] != "weight":
            return 0.0
        use = parts[0][0]
        bias = use.call.names.get("bias")
        if bias is None or bias in self._done:
            return 0.0
        if len(self._pieces[bias]) != 1 or len(self._pieces_2.get(bias, [])) != 1:
            return 0.0
        scale = self._scales.get(bias, 1.0)
        apart = self._accumulators.get(bias) is not self._accumulators[name]
        if apart or isinstance(scale, Tensor) or not use.form("bias").bias or use.form("weight").classes:
            return 0.0
        if bias in self._first.rest or bias in self._second.rest:
            return 0.0
        self._done.add(bias)
        return scale


def _flush(target: Accumulator, rows: list[Tensor], rows_2: list[Tensor]) -> None:
    joined = torch.cat(rows, 2) if len(rows) > 1 else rows[0]
    same = all(one is other for one, other in zip(rows, rows_2, strict=True))
    target.add_rows(joined, joined if same else torch.cat(rows_2, 2))


def _common_form(parts: Sequence[Piece], parts_2: Sequence[Piece]) -> Form | None:
    """The form of the sum over all uses; None where it is no one sum of outer products."""
    forms = [use.form(role) for use, role in (*parts, *parts_2)]
    if len({form.kind for form in forms}) != 1 or forms[0].positions == 0:
        return None
    positions = max(sum(form.positions for form in forms[: len(parts)]), sum(f.positions for f in forms[len(parts) :]))
    return replace(forms[0], positions=positions)


def _factors(parts: Sequence[Piece], side: Side) -> Factors:
    """All uses of a parameter as one sum over the positions of all."""
    found = [use.contribution(role, slice(0, side.size)) for use, role in parts]
    factors = [one for one in found if isinstance(one, Factors)]
    if len(factors) == 1:
        return factors[0]
    rights = [one.right for one in factors if one.right is not None]
    right = torch.cat(rights, 1) if rights else None
    return replace(factors[0], left=torch.cat([one.left for one in factors], 2), right=right)


def _add_gram(target: Accumulator, first: Factors, second: Factors, scale: float, extra: float) -> None:
    """Add Σ_st (s a_s·b_t + extra)(g_s · h_t): inner products over positions, never a row of the Jacobian."""
    if first.left.shape[2] == second.left.shape[2] == 1:
        whole = _scaled(first, second, slice(None), slice(None), scale, extra)
        target.add_hadamard(first.left[:, :, 0], second.left[:, :, 0], whole[:, 0, :, 0])
        return

    def features(rows: slice, others: slice) -> Tensor:
        return _scaled(first, second, rows, others, scale, extra)

    target.add_positions(first.left, second.left, features)


# F [n, s, m, t] of ranges of samples of both sides.
def _scaled(first: Factors, second: Factors, rows: slice, others: slice, scale: float, extra: float) -> Tensor:
    right = None if first.right is None else first.right[rows]
    right_2 = None if second.right is None else second.right[others]
    if right is None or right_2 is None:
        left, left_2 = first.left[rows], second.left[others]
        return left.new_full((len(left), left.shape[2], len(left_2), left_2.shape[2]), scale + extra)
    if first.classes:
        features = (right[:, :, None, None] == right_2).to(first.left.dtype)
    else:
        features = inner_products(right, right_2)
    if scale != 1.0:
        features *= scale
    return features.add_(extra) if extra else features


def inner_products(right: Tensor, right_2: Tensor) -> Tensor:
    """a_s · b_t for all samples and positions, [N1, T1, N2, T2]."""
    products = right.flatten(0, 1) @ right_2.flatten(0, 1).T
    return products.view(*right.shape[:2], *right_2.shape[:2])


def _add_pairs(target: Accumulator, first: Factors, second: Factors, scale: float) -> None:
    """Add the products of matching tokens only."""
    tokens, tokens_2 = cast(Tensor, first.right), cast(Tensor, second.right)
    positions, positions_2 = tokens.shape[1], tokens_2.shape[1]
    matches = (tokens.reshape(-1, 1) == tokens_2.reshape(1, -1)).nonzero()
    left = first.left.transpose(1, 2).flatten(0, 1)
    left_2 = second.left.transpose(1, 2).flatten(0, 1)
    for chosen in ranges(slice(0, len(matches)), max(1, _BLOCK // left[0].numel())):
        place, place_2 = matches[chosen].unbind(1)
        target.add_at(place // positions, place_2 // positions_2, left[place] * scale, left_2[place_2])
