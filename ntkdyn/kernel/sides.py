"""Per-sample gradients of a range of samples: the network run in strips, and its output gradients call by call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .factors import Factors, Form, by_sample, call_forms, directions_together
from .interception import Call, Interception
from .problem import Problem, gradients
from .ranges import ranges
from .rules import Contribution, Site
from .tracing import Placement, Run, Trace, run, suppress_failure

# Bytes of one layer's output in a strip of samples: the backward passes of a strip then stay in a processor's cache.
_STRIP = 2**20
_LEAST_STRIP = 8


class Use:
    """One recognized call in the runs of a side.

    Where the rows of its parameters are smaller than its output gradients (norms, slopes, biases; convolutions with
    more positions than entries in a window), they are made as soon as the gradients of a strip of samples in a few
    directions are there. Else the gradients [N · F, K, ...] are kept, filled strip by strip. In memory the directions
    lie just before the features (channels, where these are innermost): all features of all directions at one position
    are then one row of a matrix.
    """

    def __init__(self, call: Call, place: Placement, size: int, count: int, dtype: torch.dtype) -> None:
        self.call = call
        self.place = place
        self._size, self._count, self._dtype = size, count, dtype
        self._forms = call_forms(call, place)
        self._at_once = all(one.positions == 0 for one in self._forms.values())
        self._together = directions_together(self._forms, count)
        self._rows: dict[str, Tensor] = {}
        self._inputs: list[Tensor] = []
        self._gradients = torch.empty(0)
        self._contributions: Mapping[str, Contribution] = {}

    def form(self, role: str) -> Form:
        """Sizes of what ``contribution`` gives."""
        return self._forms[role]

    def start_strip(self, call: Call) -> None:
        """Take the input of the next samples."""
        inputs = self.place.arrange(call.input)
        if self._at_once:
            self._contributions = call.rule.gradient(Site(input=inputs, arguments=call.arguments))
        else:
            self._inputs.append(inputs)

    def put(self, gradient: Tensor | None, samples: slice, position: int) -> None:
        """Take the output gradient of some samples in one direction; None stands for zero."""
        arranged = None if gradient is None else self.place.arrange(gradient)
        if not self._at_once:
            self._keep(arranged, samples, position, self._size, self._count)
            return
        if self._together == 1:
            self._zero_rows()
            if arranged is not None:
                self._make_rows(arranged.unsqueeze(0), samples, position)
            return
        size, slot = samples.stop - samples.start, position % self._together
        self._keep(arranged, slice(0, size), slot, size, self._together)
        if slot == self._together - 1 or position == self._count - 1:
            waiting = self._gradients[: size * self.place.fold, : slot + 1]
            self._make_rows(waiting.transpose(0, 1), samples, position - slot)

    def _keep(self, gradient: Tensor | None, samples: slice, position: int, size: int, count: int) -> None:
        """Copy a gradient into memory for ``size`` samples and ``count`` directions."""
        fold = self.place.fold
        if self._gradients.numel() == 0:
            self._gradients = self._empty(gradient, size * fold, count)
        rows = self._gradients[samples.start * fold : samples.stop * fold, position]
        if gradient is None:
            rows.zero_()
        else:
            rows.copy_(gradient)

    def _zero_rows(self) -> None:
        for role, one in self._forms.items():
            if role not in self._rows:
                shape = (self._size, self._count, one.numbers)
                self._rows[role] = self.call.input.new_zeros(shape, dtype=self._dtype)

    def _make_rows(self, gradients: Tensor, samples: slice, first: int) -> None:
        """Rows of some samples in consecutive directions, from their gradients [K, N · F, ...]."""
        chosen = slice(first, first + len(gradients))
        self._zero_rows()
        for role in self._forms:
            found = by_sample(self._contributions[role](gradients), self.place.fold, self._dtype)
            self._rows[role][samples, chosen] = found if isinstance(found, Tensor) else found.rows()

    def _empty(self, gradient: Tensor | None, size: int, count: int) -> Tensor:
        call = self.call
        shape = [length for axis, length in enumerate(call.shape) if axis != self.place.axis]
        like = torch.empty(0, device=call.input.device, dtype=self._dtype)
        if gradient is not None and gradient.dim() == 4 and gradient.is_contiguous(memory_format=torch.channels_last):
            channels, *space = shape
            return like.new_empty(size, *space, count, channels).movedim((-2, -1), (1, 2))
        if call.rule.leading(call.arguments) == len(call.shape) - 1:
            return like.new_empty(size, *shape[:-1], count, shape[-1]).movedim(-2, 1)
        return like.new_empty(size, count, *shape)

    def contribution(self, role: str, samples: slice) -> Factors | Tensor:
        """Gradients of one parameter for some samples of the side: factors, or rows [n, K, P]."""
        if self._at_once:
            return self._rows[role][samples]
        fold = self.place.fold
        rows = slice(samples.start * fold, samples.stop * fold)
        if len(self._inputs) > 1:
            self._inputs = [torch.cat(self._inputs)]
        site = Site(input=self._inputs[0][rows], arguments=self.call.arguments)
        found = self.call.rule.gradient(site)[role](self._gradients[rows].transpose(0, 1))
        return by_sample(found, fold, self._dtype)

    def new_rows(self, *shape: int) -> Tensor:
        """Uninitialized memory for rows of the Jacobian."""
        return torch.empty(shape, device=self.call.input.device, dtype=self._dtype)

    @property
    def count(self) -> int:
        """Number of directions K."""
        return self._count

    def finish(self) -> None:
        """Free what only the runs needed."""
        self._contributions = {}
        if self._at_once:
            self._gradients = torch.empty(0)

    def forget(self) -> None:
        """Free what the contraction no longer needs."""
        self._gradients, self._inputs, self._rows = torch.empty(0), [], {}


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


def strip_length(problem: Problem, calls: Sequence[tuple[Call, Placement]]) -> int:
    """How many samples to run together, so that the passes stay in the cache of a processor."""
    if problem.train_mode or not calls or calls[0][0].input.is_cuda:
        return max(problem.sizes)
    largest = max(call.shape.numel() // call.shape[place.axis] * place.fold for call, place in calls)
    return max(_LEAST_STRIP, _STRIP // (largest * problem.dtype.itemsize))


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
            side.uses = [Use(call, place, size, len(chosen), problem.dtype) for call, place in used]
        inside = slice(part.start - samples.start, part.stop - samples.start)
        _send_back(side.uses, found, [call for call, _ in used], inside, seeds, chosen)
        for name in (name for name in found.trace.rest if name in wanted):
            rows.setdefault(name, [])
        for name, values in _rest(problem, number, part, found, list(rows), seeds, chosen).items():
            rows[name].append(values)
    for use in side.uses:
        use.finish()
    side.outputs = torch.cat(outputs)
    side.head_input = torch.cat(features) if features else None
    side.rest = {name: torch.cat(values) for name, values in rows.items()}
    return side


def _send_back(
    uses: Sequence[Use], found: Run, calls: Sequence[Call], samples: slice, seeds: Seeds, chosen: range
) -> None:
    """Fill in the output gradients of the samples of one run."""
    if not calls:
        return
    target, edges = seeds.target(found), [call.edge for call in calls]
    for use, call in zip(uses, calls, strict=True):
        use.start_strip(call)
    for position, number in enumerate(chosen):
        for use, gradient in zip(uses, gradients(target, edges, seeds.cotangent(target, number)), strict=True):
            use.put(gradient, samples, position)


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
