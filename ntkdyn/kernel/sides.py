"""Per-sample gradients of a range of samples: the network run in strips, and its output gradients call by call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .interception import Call, Interception
from .problem import Problem, gradients
from .rules import Outer, Site
from .tracing import Placement, Run, Trace, run, suppress_failure

# Bytes of one layer's output in a strip of samples: the backward passes of a strip then stay in a processor's cache.
_STRIP = 2**20


@dataclass(frozen=True)
class Factors:
    """Per-sample gradients  J[n, k] = Σ_t left[n, k, t] ⊗ right[n, t]; right as in rules.Outer.

    Args:
        left: [N, K, T, d_out].
        right: [N, T, d_in], int64 [N, T] for one-hot rows of width ``classes``, or None for ones.
    """

    left: Tensor
    right: Tensor | None
    classes: int


@dataclass(frozen=True)
class Form:
    """What one sample's gradient of one parameter in one call is made of.

    Attributes:
        positions, d_out, d_in: of the factors; positions is 0 where the rule gives rows; d_in is 1 for a bias.
        classes: as in Factors.
        numbers: of one row of the Jacobian.
        bias: right is None.
    """

    positions: int
    d_out: int
    d_in: int
    classes: int
    numbers: int
    bias: bool


@dataclass
class Use:
    """One recognized call: its inputs, and its output gradients [N · F, K, ...] filled strip by strip."""

    call: Call
    place: Placement
    inputs: list[Tensor]
    gradients: Tensor

    def contribution(self, role: str, samples: slice) -> Factors | Tensor:
        """Gradients of one parameter for some samples of the side: factors, or rows [n, K, P]."""
        fold = self.place.fold
        rows = slice(samples.start * fold, samples.stop * fold)
        if len(self.inputs) > 1:
            self.inputs = [torch.cat(self.inputs)]
        site = Site(input=self.inputs[0][rows], arguments=self.call.arguments)
        found = self.call.rule.gradient(site)[role](self.gradients[rows].transpose(0, 1))
        return _by_sample(found, fold, self.gradients.dtype)

    def form(self, role: str) -> Form:
        """Sizes of what ``contribution`` gives."""
        return form(self.call, self.place, role)


def _by_sample(found: Outer | Tensor, fold: int, dtype: torch.dtype) -> Factors | Tensor:
    """From [K, N · F, ...] to [N, K, ...]."""
    if isinstance(found, Tensor):
        rows = torch.unflatten(found.to(dtype), 1, (-1, fold))
        return (rows.sum(2) if fold > 1 else rows.squeeze(2)).transpose(0, 1)
    left, right = found.left.to(dtype), found.right
    if fold > 1:
        left = left.reshape(len(left), -1, fold * left.shape[2], left.shape[3])
        right = None if right is None else right.reshape(-1, fold * right.shape[1], *right.shape[2:])
    if right is not None and not found.classes:
        right = right.to(dtype)
    return Factors(left.transpose(0, 1), right, found.classes)


def form(call: Call, place: Placement, role: str) -> Form:
    """Sizes of one sample's gradient, from the rule applied to a gradient of zeros."""
    inputs = place.arrange(call.input)[: place.fold]
    others = [size for axis, size in enumerate(call.shape) if axis != place.axis]
    dtype = inputs.dtype if inputs.is_floating_point() else torch.get_default_dtype()
    gradient = torch.zeros(1, place.fold, *others, device=inputs.device, dtype=dtype)
    site = Site(input=inputs, arguments=call.arguments)
    found = _by_sample(call.rule.gradient(site)[role](gradient), place.fold, gradient.dtype)
    if isinstance(found, Tensor):
        return Form(0, 0, 0, 0, int(found.shape[-1]), bias=False)
    positions, d_out = (int(size) for size in found.left.shape[2:])
    d_in = found.classes or (1 if found.right is None else int(found.right.shape[-1]))
    return Form(positions, d_out, d_in, found.classes, d_out * d_in, found.right is None)


class Seeds:
    """Which cotangents are sent back from the outputs, or from the input of the last layer.

    Args:
        count: their number K.
        rows: [R, w] for each of the K / R blocks of w entries of the target; or None for its unit vectors.
        head: position of the last layer among the calls, where its input is differentiated and not its output.
    """

    def __init__(self, count: int, rows: Tensor | None = None, head: int | None = None) -> None:
        self.count = count
        self.rows = rows
        self.head = head

    def target(self, run: Run) -> Tensor:
        """What is differentiated, [N, width] with its graph."""
        if self.head is None:
            return run.outputs
        features: Tensor = run.calls[self.head][0].arguments["input"]
        if features.dim() == 2:
            return features
        with torch.enable_grad():
            return features.reshape(len(features), -1)

    def cotangent(self, target: Tensor, number: int) -> Tensor:
        """One seed for all samples."""
        seed = torch.zeros_like(target)
        if self.rows is None:
            seed[:, number] = 1.0
            return seed
        block, row = divmod(number, len(self.rows))
        width = self.rows.shape[1]
        seed[:, block * width : (block + 1) * width] = self.rows[row]
        return seed


@dataclass
class Side:
    """A range of samples of one of the two inputs.

    Attributes:
        uses: calls that reach the outputs and use a wanted parameter.
        rest: names of wanted parameters with uses that no rule knows -> rows [N, K, P] by plain autograd.
        outputs: [N, C], without graph.
        head_input: input of the last layer [N, T, d], where that layer is treated by itself.
    """

    size: int
    uses: list[Use] = field(default_factory=list)
    rest: dict[str, Tensor] = field(default_factory=dict)
    outputs: Tensor | None = None
    head_input: Tensor | None = None


def ranges(samples: slice, length: int) -> Iterator[slice]:
    """Consecutive ranges of at most ``length``."""
    for start in range(samples.start, samples.stop, length):
        yield slice(start, min(start + length, samples.stop))


def strip_length(problem: Problem, calls: Sequence[tuple[Call, Placement]]) -> int:
    """How many samples to run together, so that the passes stay in the cache of a processor."""
    if problem.train_mode or not calls or calls[0][0].input.is_cuda:
        return max(problem.sizes)
    largest = max(call.shape.numel() // call.shape[place.axis] * place.fold for call, place in calls)
    return max(8, _STRIP // (largest * problem.dtype.itemsize))


def make_side(
    problem: Problem,
    number: int,
    samples: slice,
    trace: Trace,
    *,
    wanted: frozenset[str],
    seeds: Seeds,
    chosen: range,
    strip: int,
    head: int | None,
) -> Side | None:
    """Run some samples forward and, for each chosen seed, backward.

    Args:
        wanted: names of parameters whose gradients are asked for.
        strip: number of samples that are run together.
        head: position of the last layer among the calls, whose gradients are not asked for.

    Returns: None where the network does something else for some strips than for others; then one strip is needed.
    """
    size = samples.stop - samples.start
    side = Side(size)
    outputs: list[Tensor] = []
    features: list[Tensor] = []
    rows: dict[str, list[Tensor]] = {}
    for part in ranges(samples, strip):
        found = run(problem, number, part, trace)
        if found.trace is not trace and (size > strip or head is not None):
            return None
        outputs.append(found.outputs.detach())
        if head is not None:
            features.append(found.calls[head][0].input)
        used = [
            (call, place)
            for index, (call, place) in enumerate(found.calls)
            if index != head and not wanted.isdisjoint(call.names.values())
        ]
        if not side.uses:
            side.uses = [_empty_use(problem, call, place, size, len(chosen)) for call, place in used]
        for use, (call, place) in zip(side.uses, used, strict=True):
            use.inputs.append(place.arrange(call.input))
        _send_back(side.uses, found, [call for call, _ in used], part.start - samples.start, seeds, chosen)
        for name in (name for name in found.trace.rest if name in wanted):
            rows.setdefault(name, [])
        for name, values in _rest(problem, number, part, found, list(rows), seeds, chosen).items():
            rows[name].append(values)
    side.outputs = torch.cat(outputs)
    side.head_input = torch.cat(features) if features else None
    side.rest = {name: torch.cat(values) for name, values in rows.items()}
    return side


def _empty_use(problem: Problem, call: Call, place: Placement, size: int, count: int) -> Use:
    others = [length for axis, length in enumerate(call.shape) if axis != place.axis]
    shape = (size * place.fold, count, *others)
    return Use(call, place, [], call.input.new_empty(shape, dtype=problem.dtype))


def _send_back(uses: Sequence[Use], found: Run, calls: Sequence[Call], start: int, seeds: Seeds, chosen: range) -> None:
    if not calls:
        return
    target, edges = seeds.target(found), [call.edge for call in calls]
    for position, number in enumerate(chosen):
        for use, gradient in zip(uses, gradients(target, edges, seeds.cotangent(target, number)), strict=True):
            fold = use.place.fold
            rows = use.gradients[start * fold : (start + len(target)) * fold, position]
            if gradient is None:
                rows.zero_()
            else:
                rows.copy_(use.place.arrange(gradient))


def _rest(
    problem: Problem, number: int, part: slice, found: Run, names: Sequence[str], seeds: Seeds, chosen: range
) -> dict[str, Tensor]:
    """Rows [N, K, P] of the Jacobian by plain autograd, for uses of parameters that no rule knows."""
    if not names:
        return {}
    leaves = [problem.parameters[name] for name in names]
    size = len(found.outputs)
    rows = [leaf.new_zeros(size, len(chosen), leaf.numel(), dtype=problem.dtype) for leaf in leaves]
    for sample in range(size):
        target, place = _alone(problem, number, part, found, seeds, sample)
        for position, seed in enumerate(chosen):
            cotangent = torch.zeros_like(target)
            cotangent[place] = seeds.cotangent(target[place : place + 1], seed)[0]
            for row, gradient in zip(rows, gradients(target, leaves, cotangent), strict=True):
                if gradient is not None:
                    row[sample, position] = gradient.flatten()
    return dict(zip(names, rows, strict=True))


def _alone(problem: Problem, number: int, part: slice, found: Run, seeds: Seeds, sample: int) -> tuple[Tensor, int]:
    """What is differentiated for the rows of one sample, and the place of the sample in it.

    That of the sample run alone where it runs alone, because a backward pass through all samples costs N times as
    much.
    """
    together = seeds.target(found)
    if problem.train_mode or len(together) == 1:
        return together, sample
    interception = Interception(problem, found.trace.excluded)
    with suppress_failure():
        start = part.start + sample
        with interception.modules():
            outputs = problem.run(number, interception, samples=slice(start, start + 1))
        if [call.number for call in interception.calls] == [call.number for call in found.recorded]:
            calls = [
                (call, place)
                for call, place in zip(interception.calls, found.trace.placements, strict=True)
                if place is not None
            ]
            return seeds.target(Run(outputs, calls, found.trace, interception.calls)), 0
    return together, sample
