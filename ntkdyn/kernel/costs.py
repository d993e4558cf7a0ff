"""What each exact route to a contribution costs, in operations and in bytes, and which one is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .accumulator import Combine
from .factors import Form

Route = Literal["rows", "gram", "pairs"]

# Operations in the time that one byte takes to or from memory; between processors of today it hardly differs.
_OPERATIONS_PER_BYTE = 8.0


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
    making = 2.0 * sides * count * form.products
    if form.positions == 0:
        return {"rows": Cost(making + product, row_bytes)}
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
