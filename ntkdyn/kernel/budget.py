"""Tiles of samples, strips, groups of parameters and chunks of directions that keep a kernel within its memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .contraction import NARROW
from .costs import Extent, chosen_route
from .factors import Form, call_forms, directions_together
from .plan import Plan
from .problem import Problem
from .rows import part_numbers
from .tracing import Run

# Bytes that the work may take where the caller sets no limit.
_BUDGET = 2**31
# Allocators keep more than is asked for.
_SAFETY = 1.25
_SCRATCH = 2**25
# Samples in whose passes calling the layers takes as long as computing them.
_SHORT = 2


@contextmanager
def graph_bytes(problem: Problem) -> Iterator[list[float]]:
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


def within_budget(problem: Problem, plan: Plan, example: Run, saved: float, *, divisible: bool) -> Plan:
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
