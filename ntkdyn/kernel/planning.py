"""How a kernel will be computed: the last layer, seeds, forms of gradients; and the sides that are computed so."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional

from .accumulator import Combine
from .budget import graph_bytes, within_budget
from .factors import Form, call_forms
from .plan import Head, Plan
from .precision import full_rate
from .problem import Problem
from .sides import Seeds, Side, make_side, strip_length
from .tracing import Run, refuse_coupling, traced


def planned(problem: Problem, *, uniform: bool = True) -> Plan:
    """Run the network on a few samples and decide.

    Args:
        uniform: False for a network that does something else for other samples: no special last layer, no strips.

    Raises: ConfigurationError: max_memory is too small for one sample.
    """
    with graph_bytes(problem) as saved:
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
    return within_budget(problem, plan, example, saved[0] / len(example.outputs), divisible=divisible)


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
