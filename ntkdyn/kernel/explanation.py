"""Which way a kernel would be computed, layer by layer, and what that costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils.flop_counter import FlopCounterMode

from .contraction import pieces
from .costs import Cost, chosen_route, costs
from .plan import Plan
from .planning import planned, planned_side
from .precision import full_rate
from .problem import Problem, gradients, layer_of
from .shared import shared_gradient
from .tracing import run

# Samples and output directions by which gradients are found to be shared.
_FEW = 2
_FEW_DIRECTIONS = 8


@dataclass(frozen=True)
class ExplainedLayer:
    """One row: name of the layer, its parameters, the route, operations, bytes to and from memory, seconds."""

    layer: str
    parameters: tuple[str, ...]
    route: str
    flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Explanation:
    """What ``explain_ntk`` found; ``str()`` is the table.

    Attributes:
        layers: in the order of named_parameters(), with the passes through the network first.
        tile, groups, chunk: samples, groups of parameters and output directions that are treated at a time.
        gflops, gbytes: rates of this machine that the seconds rest on, per second, measured just before.
    """

    layers: tuple[ExplainedLayer, ...]
    tile: int
    groups: int
    chunk: int
    gflops: float
    gbytes: float

    @property
    def seconds(self) -> float:
        """Predicted time of the whole kernel."""
        return sum(row.seconds for row in self.layers)

    def __str__(self) -> str:
        head = ("layer", "route", "parameters", "GFLOP", "MB", "ms")
        rows = [
            (row.layer, row.route, ", ".join(row.parameters), *_numbers(row.flops, row.bytes, row.seconds))
            for row in self.layers
        ]
        total = ("total", "", "", *_numbers(self._sum("flops"), self._sum("bytes"), self.seconds))
        widths = [max(len(line[column]) for line in (head, *rows, total)) for column in range(len(head))]
        lines = [
            "  ".join(
                text.ljust(width) if column < 3 else text.rjust(width)
                for column, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (head, *rows, total)
        ]
        return "\n".join(
            [
                *lines,
                f"{self.tile} samples, {self.chunk} output directions and {self.groups} group(s) of parameters at a "
                f"time; times from {self.gflops:.0f} GFLOP/s and {self.gbytes:.0f} GB/s, measured now",
            ]
        )

    def _sum(self, name: str) -> float:
        return float(sum(getattr(row, name) for row in self.layers))


def _numbers(flops: float, moved: float, seconds: float) -> tuple[str, str, str]:
    return f"{flops / 1e9:.3g}", f"{moved / 1e6:.3g}", f"{1e3 * seconds:.3g}"


def explained(problem: Problem) -> Explanation:
    """Plan the kernel, and say what each step costs; nothing but a few samples is run."""
    plan = planned(problem)
    shared, passes = _shared_names(problem, plan), _passes(problem, plan)
    gflops, gbytes = _rates(str(plan.outputs.device), problem.dtype)

    def row(layer: str, names: tuple[str, ...], route: str, cost: Cost) -> ExplainedLayer:
        seconds = cost.flops / gflops / 1e9 + cost.bytes / gbytes / 1e9
        return ExplainedLayer(layer, names, route, cost.flops, cost.bytes, seconds)

    by_layer: dict[tuple[str, str], tuple[list[str], Cost]] = {}
    for name in problem.parameters:
        route, cost = _of_parameter(problem, plan, shared, passes, name)
        names, known = by_layer.setdefault((layer_of(name), route), ([], Cost(0.0, 0.0)))
        names.append(name.rpartition(".")[2])
        by_layer[layer_of(name), route] = names, Cost(known.flops + cost.flops, known.bytes + cost.bytes)
    found = [row(layer, tuple(names), route, cost) for (layer, route), (names, cost) in by_layer.items()]
    cost = Cost(passes.forward + passes.backward, passes.bytes)
    first = row("(passes)", (), f"1 forward, {passes.count} backward", cost)
    return Explanation((first, *found), plan.tile, len(plan.groups), plan.chunk, gflops, gbytes)


def _shared_names(problem: Problem, plan: Plan) -> frozenset[str]:
    """Parameters whose gradients all directions share, by a few samples and directions."""
    if problem.train_mode:
        return frozenset()
    samples, chosen = slice(0, min(_FEW, problem.sizes[0])), range(min(_FEW_DIRECTIONS, plan.chunk))
    side = planned_side(problem, plan, 0, samples, list(problem.parameters), chosen)
    if side is None:
        return frozenset()
    return frozenset(
        name
        for name, parts in pieces(side).items()
        if name not in side.rest and len(parts) == 1 and shared_gradient(*parts[0], side.size) is not None
    )


@dataclass(frozen=True)
class _Passes:
    """Number of backward passes to layers; operations of the forward pass, of these, and of those by plain autograd."""

    count: int
    forward: float
    backward: float
    autograd: float
    bytes: float


def _of_parameter(problem: Problem, plan: Plan, shared: frozenset[str], passes: _Passes, name: str) -> tuple[str, Cost]:
    extent = plan.extent(problem)
    size, size_2 = problem.sizes
    # Tiles on and above the diagonal, where there are several.
    tiles = -(-size // plan.tile) * -(-size_2 // plan.tile)
    if problem.inputs_2 is None and tiles > 1:
        tiles = (tiles + -(-size // plan.tile)) // 2
    times = tiles * -(-plan.seeds.count // plan.chunk)
    if plan.head is not None and name in plan.head.names.values():
        width = plan.head.weight.shape[1]
        positions = problem.outputs // len(plan.head.weight)
        pairs = float(size * size_2 * positions**2)
        return "last layer", Cost(2 * pairs * width, 8.0 * pairs)
    if name in plan.trace.rest:
        rows = float((size + (0 if problem.inputs_2 is None else size_2)) * plan.seeds.count)
        # Each row is a backward pass of one sample, to all such parameters at once.
        numbers = problem.parameters[name].numel()
        return "autograd", Cost(passes.autograd / len(plan.trace.rest), rows * numbers * problem.dtype.itemsize)
    if name not in plan.forms:
        return "none (zero)", Cost(0.0, 0.0)
    forms = plan.forms[name]
    if len({form.kind for form in forms}) > 1:
        rows_only = [costs(form, extent)["rows"] for form in forms]
        return "rows", Cost(times * sum(one.flops for one in rows_only), times * sum(one.bytes for one in rows_only))
    weight = f"{name.rpartition('.')[0]}.weight" if forms[0].bias else name
    if weight != name and len(plan.forms.get(weight, ())) == 1:
        route = _of_parameter(problem, plan, shared, passes, weight)[0]
        if route in ("gram", "shared gram"):
            return route, Cost(0.0, 0.0)  # Σ (a·b + 1)(g·h): with the weight
    route = chosen_route(forms[0], extent, problem.scales.get(name, 1.0), shared=name in shared)
    one = costs(forms[0], extent, shared=name in shared)[route]
    return route, Cost(times * len(forms) * one.flops, times * len(forms) * one.bytes)


def _passes(problem: Problem, plan: Plan) -> _Passes:
    """What passes through the network cost; operations are counted on a few samples."""
    few = plan.trace.samples
    with FlopCounterMode(display=False) as forward:
        found = run(problem, plan.trace.side, few, plan.trace)
    head = None if plan.head is None else plan.head.index
    target = plan.seeds.target(found)

    def backward(inputs: Sequence[Tensor | GradientEdge]) -> float:
        with FlopCounterMode(display=False) as counter:
            if inputs:
                gradients(target, inputs, plan.seeds.cotangent(target, 0))
        return float(plan.seeds.count * counter.get_total_flops())

    edges = [call.edge for index, (call, _) in enumerate(found.calls) if index != head]
    samples = problem.sizes[0] + (0 if problem.inputs_2 is None else problem.sizes[1])
    times = samples / len(range(problem.sizes[plan.trace.side])[few])
    held = sum(form.positions * form.d_out for forms in plan.forms.values() for form in forms if not form.bias)
    return _Passes(
        plan.seeds.count if edges else 0,
        times * forward.get_total_flops(),
        times * backward(edges),
        times * backward([problem.parameters[name] for name in plan.trace.rest]),
        4.0 * problem.dtype.itemsize * samples * plan.seeds.count * held,
    )


@cache
def _rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Measured 10⁹ operations and 10⁹ bytes a second: of a matrix product, and of a copy."""
    first = torch.ones(512, 512, device=device, dtype=dtype)
    source = torch.ones(2**22, device=device)
    target = torch.empty_like(source)

    def timed(work: Callable[[], object]) -> float:
        work()
        found = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            if first.is_cuda:
                torch.cuda.synchronize(device)
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    with full_rate():
        product = timed(lambda: first @ first)
    return 2 * 512**3 / product / 1e9, 2 * source.nbytes / timed(lambda: target.copy_(source)) / 1e9
