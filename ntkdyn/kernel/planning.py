"""How a kernel will be computed: the last layer, seeds, groups of parameters and tiles of samples within a budget."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigurationError
from .accumulator import Combine
from .contraction import NARROW
from .costs import Extent, chosen_route
from .factors import Form, call_forms, directions_together
from .precision import full_rate
from .problem import Problem
from .rows import part_numbers
from .sides import Seeds, Side, make_side, strip_length
from .tracing import Run, Trace, refuse_coupling, traced

# Bytes that the work may take where the caller sets no limit.
_BUDGET = 2**31
# Allocators keep more than is asked for.
_SAFETY = 1.25
_SCRATCH = 2**25
# Samples in whose passes calling the layers takes as long as computing them.
_SHORT = 2


@dataclass(frozen=True)
class Head:
    """A linear last layer, whose own kernel needs no backward pass.

    Attributes:
        index: among the calls that reach the outputs.
        weight: [channels, width], detached.
        names: role -> name of its wanted parameters.
        from_features: other layers are differentiated from its input, because that has fewer entries than the outputs.
    """

    index: int
    weight: Tensor
    names: Mapping[str, str]
    from_features: bool


@dataclass(frozen=True)
class Plan:
    """What the engine does.

    Attributes:
        combine: of the accumulated kernel; with a head from features all pairs of features may be needed.
        groups: names of parameters whose gradients are held at the same time.
        chunk: directions at a time; tile: samples at a time; strip: samples that run through the network together.
        forms: of each use of a parameter; absent for plain autograd.
        attends: the network has fused attention, whose blocks oneDNN's products make 60 times slower.
        outputs: of the few samples on which the trace was made, for comparison with all samples.
    """

    trace: Trace
    head: Head | None
    seeds: Seeds
    combine: Combine
    groups: Sequence[Sequence[str]]
    chunk: int
    tile: int
    strip: int
    forms: Mapping[str, Sequence[Form]]
    attends: bool
    outputs: Tensor

    @property
    def by_direction(self) -> bool:
        """Pairs of directions lie outside in memory: best for Hadamard products, where most of the work is these."""
        if self.combine != "full" or len(self.groups) > 1 or self.chunk < self.seeds.count:
            return False
        layers = [forms for forms in self.forms.values() if not forms[0].bias]
        return all(len(forms) == 1 and (forms[0].positions == 1 or forms[0].positions == 0) for forms in layers)

    def tiles(self, size: int) -> list[slice]:
        """Ranges of samples."""
        return [slice(start, min(start + self.tile, size)) for start in range(0, size, self.tile)]

    def extent(self, problem: Problem) -> Extent:
        """Sizes of a product of two whole tiles."""
        sizes = min(self.tile, problem.sizes[0]), min(self.tile, problem.sizes[1])
        symmetric = problem.inputs_2 is None and self.tile >= problem.sizes[0]
        by_direction = self.by_direction and self.tile >= max(problem.sizes)
        on_cpu = self.outputs.device.type == "cpu"
        return Extent(sizes, self.chunk, self.combine, symmetric, problem.dtype.itemsize, by_direction, on_cpu)


def planned(problem: Problem, *, uniform: bool = True) -> Plan:
    """Run the network on a few samples and decide.

    Args:
        uniform: False for a network that does something else for other samples: no special last layer, no strips.

    Raises: ConfigurationError: max_memory is too small for one sample.
    """
    with _saved_bytes(problem) as saved:
        example = traced(problem)
    head = _head(problem, example) if uniform else None
    seeds = _seeds(problem, example, head)
    combine: Combine = problem.combine
    if head is not None and head.from_features and combine == "each":
        combine = "full"
    forms: dict[str, list[Form]] = {}
    for index, (call, place) in enumerate(example.calls):
        if head is None or index != head.index:
            for role, one in call_forms(call, place).items():
                forms.setdefault(call.names[role], []).append(one)
    strip = strip_length(problem, example.calls) if uniform else max(problem.sizes)
    plan = Plan(
        trace=example.trace,
        head=head,
        seeds=seeds,
        combine=combine,
        groups=[list(problem.parameters)],
        chunk=seeds.count,
        tile=max(problem.sizes),
        strip=strip,
        forms=forms,
        attends=_attends(example.outputs),
        outputs=example.outputs.detach(),
    )
    divisible = uniform and not problem.train_mode
    return _within_budget(problem, plan, example, saved[0] / len(example.outputs), divisible=divisible)


def warn_of_unreached(plan: Plan) -> None:
    """Say which parameters have a zero kernel because nothing of them reaches the outputs."""
    if plan.trace.unreached:
        names = ", ".join(map(repr, plan.trace.unreached))
        warnings.warn(f"parameters {names} do not reach the outputs; their kernel is zero", stacklevel=5)


def planned_side(
    problem: Problem,
    plan: Plan,
    number: int,
    samples: slice,
    group: Sequence[str],
    chosen: range,
) -> Side | None:
    """Gradients of some samples for some parameters and directions; None as in ``make_side``."""
    # The symmetric kernel has one input, whichever side asks.
    number = 0 if problem.inputs_2 is None else number
    head = None if plan.head is None else plan.head.index
    with nullcontext() if plan.attends else full_rate():
        side = make_side(
            problem,
            number,
            samples,
            plan.trace,
            wanted=frozenset(group),
            seeds=plan.seeds,
            chosen=chosen,
            strip=plan.strip,
            head=head,
        )
    if side is not None and number == plan.trace.side:
        _compare_with_few(problem, plan, samples, side)
    return side


def _compare_with_few(problem: Problem, plan: Plan, samples: slice, side: Side) -> None:
    """Samples of the trial run must have the same outputs here."""
    places = range(problem.sizes[plan.trace.side])[plan.trace.samples]
    inside = [(position, place) for position, place in enumerate(places) if samples.start <= place < samples.stop]
    if not inside or side.outputs is None:
        return
    first, last = inside[0], inside[-1]
    alone = plan.outputs[first[0] : last[0] + 1]
    step = plan.trace.samples.step or 1
    together = side.outputs[first[1] - samples.start : last[1] - samples.start + 1 : step]
    refuse_coupling(problem, plan.trace.side, plan.trace.samples, alone, together)


def _head(problem: Problem, example: Run) -> Head | None:
    """The last layer, where the outputs are just what it gives and its parameters are used nowhere else."""
    outputs = example.outputs
    if problem.train_mode or outputs.grad_fn is None or problem.directions(outputs.detach()) is not None:
        return None
    last = outputs.grad_fn
    reshaped = last.next_functions[0] if last.name() in ("ViewBackward0", "UnsafeViewBackward0") else None
    for index, (call, place) in enumerate(example.calls):
        edge = (call.edge.node, call.edge.output_nr)
        if edge not in ((last, 0), reshaped) or call.rule.target is not functional.linear:
            continue
        names = set(call.names.values())
        elsewhere = {name for other, _ in example.calls if other is not call for name in other.names.values()}
        plain = not any(isinstance(problem.scales.get(name), Tensor) for name in names)
        if place.axis != 0 or place.fold != 1 or names & (elsewhere | set(example.trace.rest)) or not plain:
            return None
        weight: Tensor = call.arguments["weight"].detach()
        channels, width = weight.shape
        differentiable = call.arguments["input"].requires_grad
        smaller = width < channels if problem.combine == "trace" else 2 * width <= channels
        return Head(index, weight, dict(call.names), smaller and differentiable)
    return None


def _attends(outputs: Tensor) -> bool:
    """Whether a fused attention lies in the graph."""
    waiting, seen = [outputs.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if "ScaledDotProduct" in node.name():
                return True
            waiting += [one for one, _ in node.next_functions]
    return False


def _seeds(problem: Problem, example: Run, head: Head | None) -> Seeds:
    directions = problem.directions(example.outputs.detach())
    if directions is not None:
        return Seeds(len(directions), directions)
    if head is None or not head.from_features:
        return Seeds(problem.outputs)
    positions = problem.outputs // len(head.weight)
    if problem.combine != "trace":
        return Seeds(positions * head.weight.shape[1], head=head.index)
    # tr(W K Wᵀ) = tr(R K Rᵀ) with W = QR: as many seeds as features, whatever the number of outputs.
    triangle = torch.linalg.qr(head.weight.to(problem.dtype), mode="r").R
    return Seeds(positions * len(triangle), triangle.contiguous(), head.index)


@contextmanager
def _saved_bytes(problem: Problem) -> Iterator[list[float]]:
    """Bytes that a forward pass keeps for its backward pass, parameters not counted."""
    storages: dict[int, int] = {}
    own = {leaf.untyped_storage().data_ptr() for leaf in problem.model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def same(tensor: Any) -> Any:
        return tensor

    found = [0.0]
    if problem.max_memory is None:
        yield found
        return
    with torch.autograd.graph.saved_tensors_hooks(note, same):
        yield found
    found[0] = float(sum(storages.values()))


def _within_budget(problem: Problem, plan: Plan, example: Run, saved: float, *, divisible: bool) -> Plan:
    """Tiles, strips, groups and chunks that cost least among those that fit.

    Args:
        saved: bytes that the graph of one sample holds; 0 if they were not measured.
        divisible: the samples of a tile may run in strips.
    """
    itemsize = problem.dtype.itemsize
    head_index = None if plan.head is None else plan.head.index
    inputs: dict[str, float] = {}
    gradients: dict[str, float] = {}
    activations = 0.0
    waiting: list[tuple[Mapping[str, Form], float, float]] = []
    for index, (call, place) in enumerate(example.calls):
        if index != head_index:
            found = call_forms(call, place)
            kept = any(one.positions > 0 for one in found.values())
            share = len(call.names) * len(example.outputs)
            outputs = call.shape.numel() * itemsize / len(example.outputs)
            activations += outputs + call.input.numel() * call.input.element_size() / len(example.outputs)
            if not kept:
                windows = sum(one.products // one.d_out for one in found.values() if one.products) * itemsize
                waiting.append((found, outputs, windows))
            for role, name in call.names.items():
                numbers = call.shape.numel() / share if kept else found[role].numbers
                gradients[name] = gradients.get(name, 0) + numbers * itemsize
                inputs[name] = inputs.get(name, 0) + kept * call.input.numel() * call.input.element_size() / share
    # Without a measurement: what layers read, and as much again for what lies between them.
    graph = saved or 3.0 * activations
    budget = float(_BUDGET)
    if problem.max_memory is not None:
        budget = problem.max_memory / _SAFETY - _SCRATCH - _result_bytes(problem, plan) - _clone_bytes(problem)

    making = max((windows for _, _, windows in waiting), default=0)
    largest = max(gradients.values(), default=0)

    def memory(names: Sequence[str], tile: int, strip: int, chunk: int) -> float:
        sides = 1 if problem.inputs_2 is None and tile == whole else 2
        held = sum(inputs.get(name, 0) + chunk * gradients.get(name, 0) for name in names)
        extent = replace(plan, tile=tile, chunk=chunk).extent(problem)
        working = max((_working_numbers(problem, plan, name, extent, tile) for name in names), default=0)
        together = sum(directions_together(found, chunk) * numbers + windows for found, numbers, windows in waiting)
        passing = min(tile, strip) * (graph + together + 2 * making + 4 * largest)
        return sides * (tile * held + working * itemsize) + passing

    names = list(problem.parameters)
    whole = max(problem.sizes)
    if memory(names, whole, plan.strip, plan.chunk) <= budget:
        return plan
    best: tuple[float, Plan] | None = None
    least = float("inf")
    for tile in _halves(whole):
        count = -(-whole // tile)
        for chunk in [plan.chunk] if plan.combine == "full" else _halves(plan.chunk):
            for strip in _halves(min(tile, plan.strip)) if divisible else [tile]:
                least = min(least, max(memory([name], tile, strip, chunk) for name in names))
                groups = _packed(names, lambda group, t=tile, s=strip, c=chunk: memory(group, t, s, c) <= budget)
                if groups is not None:
                    passes = (plan.chunk + -(-plan.chunk // chunk)) * (1 + _SHORT / strip)
                    cost = tile * count * (count + 1) * len(groups) * passes
                    if best is None or cost < best[0]:
                        best = cost, replace(plan, groups=groups, tile=tile, strip=strip, chunk=chunk)
                    break
        if best is not None and problem.train_mode:
            break
    if best is not None:
        return best[1]
    if problem.max_memory is None:
        return replace(plan, tile=1, groups=[[name] for name in names])
    needed = (least + _SCRATCH + _result_bytes(problem, plan) + _clone_bytes(problem)) * _SAFETY
    raise ConfigurationError(
        f"max_memory is {problem.max_memory} bytes; this kernel needs at least {int(needed) + 1}: the result, a copy "
        f"of the network and one sample's rows; give that, or fewer samples, or reduce='trace'"
    )


def _halves(start: int) -> Iterator[int]:
    """A number, half of it, and so on to 1."""
    yield start
    while start > 1:
        start = -(-start // 2)
        yield start


def _working_numbers(problem: Problem, plan: Plan, name: str, extent: Extent, tile: int) -> int:
    """Numbers that the contraction of one parameter holds for one side."""
    forms, count = plan.forms.get(name, ()), extent.count
    # Rows as they are, and once more scaled, summed or side by side.
    rows = 2 * tile * count * problem.parameters[name].numel()
    if len({one.kind for one in forms}) != 1:
        return rows
    one, positions = forms[0], sum(form.positions for form in forms)
    if one.positions == 0:
        as_they_are = len(forms) == 1 and one.numbers >= NARROW and name not in problem.scales
        return 0 if as_they_are else rows
    needed = {
        "rows": rows if one.classes or one.bias else part_numbers(tile, count, one, positions),
        "shared rows": part_numbers(tile, 1, one, positions),
    }
    # Factors side by side, their inner products, and one block of products.
    gram = tile * positions * (count * one.d_out + one.d_in) + 2 * tile**2 + 2**21
    # Whether all directions share their gradients is seen later.
    routes = [chosen_route(one, extent, problem.scales.get(name, 1.0), shared=shared) for shared in (False, True)]
    return max(needed.get(route, gram) for route in routes)


def _packed(names: Sequence[str], fits: Any) -> list[list[str]] | None:
    groups: list[list[str]] = []
    for name in names:
        if not fits([name]):
            return None
        if groups and fits([*groups[-1], name]):
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _result_bytes(problem: Problem, plan: Plan) -> float:
    count = {"trace": 1, "each": plan.seeds.count, "full": plan.seeds.count**2}[plan.combine]
    return float(problem.sizes[0] * problem.sizes[1] * count * problem.dtype.itemsize * len(set(problem.keys.values())))


def _clone_bytes(problem: Problem) -> float:
    return float(sum(leaf.numel() * leaf.element_size() for leaf in problem.model.parameters()))
