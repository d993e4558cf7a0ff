"""What each exact route to a contribution costs, in operations and in bytes, and which one is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .accumulator import Combine
from .factors import Form

Route = Literal["rows", "gram", "pairs", "shared rows", "shared gram"]

# Operations in the time that one byte takes to or from memory; between processors of today it hardly differs.
_OPERATIONS_PER_BYTE = 8.0

# Passes over the gradients in the time that it takes to see whether all directions share them.
_LOOKS = 20.0

# Samples from which half a product for each pair of directions takes less time than a whole one for many at once.
_MANY = 512


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
    """Sizes of one product: samples of both sides, directions, how these are combined, bytes of a number.

    ``by_direction`` is the layout of an ``Accumulator``. Where numbers are not ``on_cpu``, no route looks at them,
    because the host would wait.
    """

    sizes: tuple[int, int]
    count: int
    combine: Combine
    symmetric: bool
    itemsize: int
    by_direction: bool = False
    on_cpu: bool = True


def costs(form: Form, extent: Extent, *, shared: bool = False) -> dict[Route, Cost]:
    """Cost of each route that is exact for this form; with those of gradients that are ``Shared``, where these are."""
    size, size_2 = extent.sizes
    count = extent.count
    pairs = count**2 if extent.combine == "full" else count
    half = 0.5 if extent.symmetric else 1.0
    sides = size if extent.symmetric else size + size_2
    width, itemsize = form.numbers, extent.itemsize
    result = half * size * size_2 * (pairs if extent.combine != "trace" else 1)
    product = 2.0 * half * pairs * size * size_2 * width
    row_bytes = itemsize * (3.0 * sides * count * width + 2 * result)
    making = 2.0 * sides * count * form.products
    if form.positions == 0:
        return {"rows": Cost(making + product, row_bytes)}
    found: dict[Route, Cost] = {"rows": Cost(making + product, row_bytes)}
    squares = half * size * size_2 * form.positions**2
    features = 0 if form.bias or form.classes else form.d_in
    if form.classes and extent.on_cpu:
        # Pairs of equal tokens, were all tokens equally frequent.
        matching = max(1.0, squares / half / form.classes)
        found["pairs"] = Cost(2.0 * matching * pairs * form.d_out, 3.0 * itemsize * matching * count * form.d_out)
    elementwise = squares * (pairs if extent.combine != "trace" else 1)
    found["gram"] = Cost(2.0 * squares * (features + pairs * form.d_out), itemsize * (2 * elementwise + 2 * result))
    if shared and extent.on_cpu and not form.bias and not form.classes:
        found |= _shared_costs(form, extent, squares, features)
    return found


def _shared_costs(form: Form, extent: Extent, squares: float, features: float) -> dict[Route, Cost]:
    if extent.combine == "each":
        return {}
    size, size_2 = extent.sizes
    itemsize = extent.itemsize
    sides = size if extent.symmetric else size + size_2
    area = (0.5 if extent.symmetric else 1.0) * size * size_2
    sums = area * extent.count**2 if extent.combine == "full" else 0.0
    looking = _LOOKS * itemsize * float(sides * extent.count * form.positions * form.d_out)
    found: dict[Route, Cost] = {}
    if form.positions > 1:
        rows = Cost(2.0 * (sides * form.products + area * form.numbers), 3.0 * itemsize * sides * form.numbers)
        mixing = Cost(2.0 * sums * form.d_out, 2.0 * itemsize * (area * form.d_out + sums) if sums else 0.0)
        found["shared rows"] = Cost(rows.flops + mixing.flops, rows.bytes + mixing.bytes + looking)
    if extent.combine == "trace":
        found["shared gram"] = Cost(
            2.0 * squares * (features + form.d_out), 2.0 * itemsize * (squares + area) + looking
        )
    elif extent.by_direction and extent.symmetric and form.positions == 1 and size >= _MANY:
        # Pairs of directions and pairs of samples are symmetric each on their own.
        products = 2.0 * (squares * features + 0.5 * sums * form.d_out)
        found["shared gram"] = Cost(products, 4.0 * itemsize * sums + looking)
    return found


def chosen_route(form: Form, extent: Extent, scale: float | Tensor, *, shared: bool) -> Route:
    """The cheapest route; a metric with an entry for each weight leaves those that make rows."""
    found = costs(form, extent, shared=shared)
    if isinstance(scale, Tensor):
        found = {route: cost for route, cost in found.items() if route.endswith("rows")}
    return min(found, key=lambda route: found[route].units)
