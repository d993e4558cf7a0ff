"""Products of per-sample gradients, leaf by leaf: J₁ diag(s) J₂ᵀ added to a tile, by the cheapest exact route."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .accumulator import Accumulator, Combine
from .sides import Factors, Form, Side, Use, ranges

Route = Literal["rows", "gram", "pairs"]
Scale = float | Tensor

# Operations in the time that one byte takes to or from memory; between processors of today it hardly differs.
_OPERATIONS_PER_BYTE = 8.0
# Numbers in one intermediate: 4 MiB in float32 stay in the cache.
_BLOCK = 2**20
# Narrow Jacobians (norms, slopes, biases) are put side by side until a product is worth its pass over the result.
_NARROW = 1024


@dataclass(frozen=True)
class Cost:
    """Of one route: operations, and bytes to and from memory."""

    flops: float
    bytes: float

    @property
    def units(self) -> float:
        """What routes are compared by; a fixed exchange rate, so that the choice is the same on every run."""
        return self.flops + _OPERATIONS_PER_BYTE * self.bytes


@dataclass(frozen=True)
class Extent:
    """Sizes of one product: samples of both sides, directions, how these are combined, bytes of a number."""

    sizes: tuple[int, int]
    count: int
    combine: Combine
    symmetric: bool
    itemsize: int


def costs(form: Form, extent: Extent) -> dict[Route, Cost]:
    """Cost of each route that is exact for this form."""
    size, size_2 = extent.sizes
    count = extent.count
    pairs = count**2 if extent.combine == "full" else count
    half = 0.55 if extent.symmetric else 1.0
    sides = size if extent.symmetric else size + size_2
    width, itemsize = form.numbers, extent.itemsize
    result = half * size * size_2 * (pairs if extent.combine != "trace" else 1)
    product = 2.0 * half * pairs * size * size_2 * width
    row_bytes = itemsize * (3.0 * sides * count * width + 2 * result)
    if form.positions == 0:
        return {"rows": Cost(product, row_bytes)}
    making = 0.0 if form.classes or form.bias else 2.0 * sides * count * form.positions * width
    found: dict[Route, Cost] = {"rows": Cost(making + product, row_bytes)}
    squares = half * size * size_2 * form.positions**2
    features = 0 if form.bias else form.d_in
    if form.classes:
        # Pairs of equal tokens, were all tokens equally frequent.
        matching = max(1.0, squares / half / form.classes)
        found["pairs"] = Cost(2.0 * matching * pairs * form.d_out, 3.0 * itemsize * matching * count * form.d_out)
        features = 0
    elementwise = squares * (pairs if extent.combine != "trace" else 1)
    found["gram"] = Cost(2.0 * squares * (features + pairs * form.d_out), itemsize * (2 * elementwise + 2 * result))
    return found


def cheapest(form: Form, extent: Extent) -> Route:
    """The route that is taken."""
    found = costs(form, extent)
    return min(found, key=lambda route: found[route].units)


Piece = tuple[Use, str]


def pieces(side: Side) -> dict[str, list[Piece]]:
    """Uses of each parameter, with the role that it has there."""
    found: dict[str, list[Piece]] = {}
    for use in side.uses:
        for role, name in use.call.names.items():
            found.setdefault(name, []).append((use, role))
    return found


def contract(
    first: Side,
    second: Side,
    names: Sequence[str],
    accumulators: Mapping[str, Accumulator],
    scales: Mapping[str, Scale],
    *,
    extent: Extent,
    release: bool,
) -> None:
    """Add the contribution of each named parameter to its accumulator.

    Args:
        first, second: sides; the same object for a symmetric tile.
        accumulators: by name of the parameter; several may share one.
        release: forget the output gradients of ``second`` (and of ``first`` where they are the same) on the way.
    """
    found, found_2 = pieces(first), pieces(second)
    narrow: dict[int, tuple[Accumulator, list[Tensor], list[Tensor]]] = {}
    done: set[str] = set()
    remaining = {id(use): len(use.call.names) for use in second.uses}
    for name in names:
        target, scale = accumulators[name], scales.get(name, 1.0)
        if name not in done and (name in found or name in first.rest) and (name in found_2 or name in second.rest):
            parts, parts_2 = found.get(name, []), found_2.get(name, [])
            route: Route = "rows"
            recognized = name not in first.rest and name not in second.rest
            form = _common_form(parts, parts_2) if recognized and not isinstance(scale, Tensor) else None
            if form is not None:
                route = cheapest(form, extent)
            if route == "rows":
                width = _width(name, parts, first)
                rows = _rows(name, parts, first, scale)
                rows_2 = rows if second is first else _rows(name, parts_2, second, scale)
                if width < _NARROW:
                    _, held, held_2 = narrow.setdefault(id(target), (target, [], []))
                    held.append(rows)
                    held_2.append(rows_2)
                    if sum(one.shape[-1] for one in held) >= _NARROW:
                        _flush(*narrow.pop(id(target)))
                else:
                    target.add_rows(rows, rows_2)
                del rows, rows_2
            else:
                assert form is not None
                partner = _bias_of(parts, found, found_2, accumulators, target, scales)
                factors = _factors(parts, first)
                factors_2 = factors if second is first else _factors(parts_2, second)
                extra = 0.0
                if partner is not None:
                    bias_scale = scales.get(partner, 1.0)
                    assert not isinstance(bias_scale, Tensor)
                    extra = bias_scale
                    done.add(partner)
                assert not isinstance(scale, Tensor)
                if route == "pairs":
                    _add_pairs(target, factors, factors_2, scale)
                else:
                    _add_gram(target, factors, factors_2, scale, extra)
                del factors, factors_2
        if release:
            for use, _ in found_2.get(name, []):
                remaining[id(use)] -= 1
                if remaining[id(use)] == 0:
                    use.gradients, use.inputs = use.gradients.new_empty(0), []
    for entry in narrow.values():
        _flush(*entry)


def _flush(target: Accumulator, rows: list[Tensor], rows_2: list[Tensor]) -> None:
    joined = torch.cat(rows, 2) if len(rows) > 1 else rows[0]
    same = all(one is other for one, other in zip(rows, rows_2, strict=True))
    target.add_rows(joined, joined if same else torch.cat(rows_2, 2))


def _width(name: str, parts: Sequence[Piece], side: Side) -> int:
    return parts[0][0].form(parts[0][1]).numbers if parts else int(side.rest[name].shape[-1])


def _common_form(parts: Sequence[Piece], parts_2: Sequence[Piece]) -> Form | None:
    """The form of the sum over all uses; None where it is no one sum of outer products."""
    forms = [use.form(role) for use, role in (*parts, *parts_2)]
    kinds = {(form.d_out, form.d_in, form.classes, form.bias, form.positions > 0) for form in forms}
    if len(kinds) != 1 or forms[0].positions == 0:
        return forms[0] if len(parts) == len(parts_2) == 1 and forms[0].positions == 0 else None
    positions = max(sum(form.positions for form in forms[: len(parts)]), sum(f.positions for f in forms[len(parts) :]))
    one = forms[0]
    return Form(positions, one.d_out, one.d_in, one.classes, one.numbers, one.bias)


def _bias_of(
    parts: Sequence[Piece],
    found: Mapping[str, Sequence[Piece]],
    found_2: Mapping[str, Sequence[Piece]],
    accumulators: Mapping[str, Accumulator],
    target: Accumulator,
    scales: Mapping[str, Scale],
) -> str | None:
    """Name of the bias that is used where the weight is, once, and added to the same kernel: Σ (a·b + 1)(g·h)."""
    if len(parts) != 1 or parts[0][1] != "weight":
        return None
    use = parts[0][0]
    name = use.call.names.get("bias")
    if name is None or len(found[name]) != 1 or len(found_2.get(name, [])) != 1 or accumulators[name] is not target:
        return None
    if isinstance(scales.get(name, 1.0), Tensor) or not use.form("bias").bias or use.form("weight").classes:
        return None
    return name


def _factors(parts: Sequence[Piece], side: Side) -> Factors:
    """All uses of a parameter as one sum over the positions of all."""
    found = [use.contribution(role, slice(0, side.size)) for use, role in parts]
    factors = [one for one in found if isinstance(one, Factors)]
    if len(factors) == 1:
        return factors[0]
    rights = [one.right for one in factors if one.right is not None]
    right = torch.cat(rights, 1) if rights else None
    return Factors(torch.cat([one.left for one in factors], 2), right, factors[0].classes)


def _rows(name: str, parts: Sequence[Piece], side: Side, scale: Scale) -> Tensor:
    """Rows √s J [N, K, P] of one parameter, all uses summed."""
    rows = side.rest.get(name)
    fresh = False
    for use, role in parts:
        rows, fresh = _add_use(rows, use, role, side.size), True
    assert rows is not None
    if isinstance(scale, Tensor):
        root = scale.flatten().sqrt()
        return rows.mul_(root) if fresh else rows * root
    if scale != 1.0:
        return rows.mul_(scale**0.5) if fresh else rows * scale**0.5
    return rows


def _add_use(rows: Tensor | None, use: Use, role: str, size: int) -> Tensor:
    form = use.form(role)
    # Windows of a convolution are as many times its input as the kernel is large: a few samples at a time.
    length = max(1, _BLOCK // max(1, form.positions * form.d_in)) if form.positions and not form.classes else size
    result: Tensor | None = None
    for samples in ranges(slice(0, size), length):
        found = use.contribution(role, samples)
        if isinstance(found, Tensor) or found.right is None:
            values = found if isinstance(found, Tensor) else found.left.sum(2)
            if length >= size and rows is None:
                return values.contiguous()
            values = values.flatten(2)
        else:
            values = None
        if result is None:
            count = use.gradients.shape[1]
            result = use.gradients.new_empty(size, count, form.numbers)
        if values is not None:
            result[samples] = values
        else:
            assert isinstance(found, Factors)
            _multiply_out(found, result[samples])
    assert result is not None
    return result if rows is None else result.add_(rows)


def _multiply_out(factors: Factors, target: Tensor) -> None:
    """Write Σ_t left ⊗ right into [n, K, P]."""
    left, right = factors.left, factors.right
    assert right is not None
    size, count, positions, width = left.shape
    if factors.classes:
        target.zero_()
        index = right.view(size, 1, positions, 1).expand_as(left)
        target.view(size, count, factors.classes, width).scatter_add_(2, index, left)
    elif positions == 1:
        torch.mul(left.transpose(2, 3), right.unsqueeze(1), out=target.view(size, count, width, -1))
    else:
        out = target.view(size, count * width, right.shape[-1])
        torch.bmm(left.transpose(2, 3).reshape(size, count * width, positions), right, out=out)


def _add_gram(target: Accumulator, first: Factors, second: Factors, scale: float, extra: float) -> None:
    """Add Σ_st (s a_s·b_t + extra)(g_s · h_t): inner products over positions, never a row of the Jacobian."""
    if first.left.shape[2] == second.left.shape[2] == 1:
        features = _scaled(first, second, slice(0, len(first.left)), 0, scale, extra)
        target.add_hadamard(first.left[:, :, 0], second.left[:, :, 0], features[:, 0, :, 0])
        return
    target.add_positions(first.left, second.left, lambda rows, start: _scaled(first, second, rows, start, scale, extra))


# F [n, s, m, t] of some samples of the first side, and of those from start of the second.
def _scaled(first: Factors, second: Factors, rows: slice, start: int, scale: float, extra: float) -> Tensor:
    right = None if first.right is None else first.right[rows]
    right_2 = None if second.right is None else second.right[start:]
    if right is None or right_2 is None:
        shape = (first.left[rows].shape[0], first.left.shape[2], len(second.left) - start, second.left.shape[2])
        return first.left.new_full(shape, scale + extra)
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
    assert first.right is not None
    assert second.right is not None
    positions, positions_2 = first.right.shape[1], second.right.shape[1]
    matches = (first.right.reshape(-1, 1) == second.right.reshape(1, -1)).nonzero()
    left = first.left.transpose(1, 2).flatten(0, 1)
    left_2 = second.left.transpose(1, 2).flatten(0, 1)
    for chosen in ranges(slice(0, len(matches)), max(1, _BLOCK // left[0].numel())):
        place, place_2 = matches[chosen].unbind(1)
        target.add_at(place // positions, place_2 // positions_2, left[place] * scale, left_2[place_2])
