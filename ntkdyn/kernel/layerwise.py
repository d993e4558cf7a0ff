"""Engine "layerwise": one backward pass per output for all samples, contracted layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import UnsupportedLayer
from .contraction import Factors, Jacobian, Rows, product
from .interception import Call, Interception
from .problem import Problem, gradients
from .rules import Contribution, Site

# Bytes of output gradients that are held at a time where outputs can be taken in sequence.
_HELD = 2**25
# The same where plain autograd fills in: there each part runs every sample through the network again.
_HELD_WITH_REST = 2**28

# From [.., N, ..] to samples first, and nothing else.
Arrangement = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Use:
    """One recognized call, ready to turn output gradients into per-sample gradients of its parameters."""

    call: Call
    arrange: Arrangement
    contributions: Mapping[str, Contribution]


@dataclass(frozen=True)
class _Side:
    """One run of the network: its outputs [N, C] with their graph, and where the wanted parameters were used."""

    outputs: Tensor
    uses: Sequence[_Use]
    rest: Sequence[str]
    excluded: frozenset[int] | None


def blocks(problem: Problem) -> dict[str, Tensor]:
    """Blocks of the kernel by key; exact for every network, whichever layers it is made of."""
    first = _prepare(problem, 0)
    second = first if problem.inputs_2 is None else _prepare(problem, 1)
    count = problem.outputs
    full = problem.combine == "full"
    size, size_2 = problem.sizes
    shape = {"trace": (size, size_2), "each": (count, size, size_2), "full": (count, size, count, size_2)}
    result = {
        key: first.outputs.new_zeros(shape[problem.combine], dtype=problem.dtype) for key in problem.keys.values()
    }
    chunk = count if full else _outputs_at_a_time(problem, (first, second))
    for start in range(0, count, chunk):
        chosen = range(start, min(start + chunk, count))
        jacobians = _jacobians(problem, 0, first, chosen)
        jacobians_2 = jacobians if second is first else _jacobians(problem, 1, second, chosen)
        for name, key in problem.keys.items():
            if name not in jacobians or name not in jacobians_2:
                continue
            jacobian = jacobians[name]()
            jacobian_2 = jacobian if second is first else jacobians_2[name]()
            block = product(jacobian, jacobian_2, full)
            if problem.combine == "trace":
                result[key] += block.sum(0)
            elif problem.combine == "each":
                result[key][start : start + len(chosen)] += block
            else:
                result[key] += block
    return {key: block.permute(1, 3, 0, 2) for key, block in result.items()} if full else result


def _outputs_at_a_time(problem: Problem, sides: tuple[_Side, _Side]) -> int:
    numbers = 1
    for side, size in zip(sides, problem.sizes, strict=True):
        for use in side.uses:
            parameters = sum(problem.parameters[name].numel() for name in use.call.names.values())
            numbers += max(use.call.shape.numel(), size * parameters if len(use.call.shape) > 2 else 0)
        numbers += size * sum(problem.parameters[name].numel() for name in side.rest)
    held = _HELD_WITH_REST if any(side.rest for side in sides) else _HELD
    return max(1, min(problem.outputs, held // (numbers * problem.dtype.itemsize)))


def _prepare(problem: Problem, side: int) -> _Side:
    """Run the network until every recognized call is one in which samples can be told apart."""
    size = problem.sizes[side]
    excluded: frozenset[int] | None = None if problem.train_mode else frozenset()
    while True:
        interception = Interception(problem, excluded)
        with interception.modules():
            outputs = problem.run(side, interception)
        if interception.differentiates and excluded is not None:
            excluded = None
            continue
        arrangements, rest = _tell_samples_apart(problem, outputs, interception.calls, size)
        lost = [call.number for call, arrangement in arrangements if arrangement is None]
        if lost:
            excluded = (excluded or frozenset()) | frozenset(lost)
            continue
        if not arrangements and not rest:
            problem.refuse_foreign_outputs(outputs)
        uses = [_use(call, arrange) for call, arrange in arrangements if arrange is not None]
        return _Side(outputs, uses, rest, excluded)


def _use(call: Call, arrange: Arrangement) -> _Use:
    if call.input._version != call.version:
        names = ", ".join(map(repr, call.names.values()))
        raise UnsupportedLayer(
            f"layer {call.layer!r} ({call.rule.target.__name__}): its input is changed in place after the call, and "
            f"the gradient of {names} needs it; remove the in-place operation"
        )
    site = Site(input=arrange(call.input), arguments=call.arguments)
    return _Use(call, arrange, call.rule.gradient(site))


def _tell_samples_apart(
    problem: Problem, outputs: Tensor, calls: Sequence[Call], size: int
) -> tuple[list[tuple[Call, Arrangement | None]], list[str]]:
    """Calls that reach the outputs, each with its axis of samples (None: it has none); parameters left in the graph.

    The shape alone does not tell: in [T, N, d] with T = N the first axis holds positions, and a layer that mixes
    samples has none. So the outputs of two disjoint sets of samples are differentiated, and each may reach only its
    own entries of the axis.
    """
    # Thue-Morse sequence: separates neighbors, halves and even from odd samples.
    member = torch.tensor([n.bit_count() % 2 == 1 for n in range(size)], device=outputs.device)
    # Generic weights, because outputs that sum to a constant (softmax) have no gradient of their sum.
    weights = torch.linspace(1.0, 2.0, outputs.shape[1] + 2, dtype=outputs.dtype, device=outputs.device)[1:-1].sqrt()
    names, leaves = list(problem.parameters), list(problem.parameters.values())
    edges = [call.edge for call in calls]
    seeds = [mask.to(outputs.dtype)[:, None] * weights for mask in (~member, member)]
    reached = gradients(outputs, [*edges, *leaves], seeds[0])
    rest = [name for name, gradient in zip(names, reached[len(edges) :], strict=True) if gradient is not None]
    reached_2 = gradients(outputs, edges, seeds[1]) if edges else ()
    found: list[tuple[Call, Arrangement | None]] = []
    for call, gradient, gradient_2 in zip(calls, reached[: len(edges)], reached_2, strict=True):
        if gradient is None or gradient_2 is None:
            continue
        fitting = (
            candidate
            for candidate in _candidates(call, size)
            if not _by_sample(candidate(gradient), size)[member].any()
            and not _by_sample(candidate(gradient_2), size)[~member].any()
        )
        found.append((call, next(fitting, None)))
    return found, rest


def _candidates(call: Call, size: int) -> Iterator[Arrangement]:
    for axis in range(call.rule.leading(call.arguments)):
        length = call.shape[axis]
        if length == size or (axis == 0 and length % size == 0):
            yield _arrangement(size, axis, length, sample_major=True)
            if length != size:
                yield _arrangement(size, axis, length, sample_major=False)


def _by_sample(tensor: Tensor, size: int) -> Tensor:
    return tensor.reshape(size, -1)


def _arrangement(size: int, axis: int, length: int, sample_major: bool) -> Arrangement:
    """Bring axis to the front with all entries of a sample side by side: [N · F, ...]."""

    def arrange(tensor: Tensor) -> Tensor:
        tensor = tensor.movedim(axis, 0)
        if sample_major or length == size:
            return tensor
        return tensor.reshape(length // size, size, *tensor.shape[1:]).transpose(0, 1).flatten(0, 1)

    return arrange


def _jacobians(problem: Problem, number: int, side: _Side, chosen: range) -> dict[str, Callable[[], Jacobian]]:
    """Per-sample gradients of the chosen outputs for every parameter that is used, made when asked for."""
    size = len(side.outputs)
    edges = [use.call.edge for use in side.uses]
    by_output: list[tuple[Tensor | None, ...]] = []
    for output in chosen:
        seed = torch.zeros_like(side.outputs)
        seed[:, output] = 1.0
        by_output.append(gradients(side.outputs, edges, seed) if edges else ())
    by_use = list(zip(*by_output, strict=True))
    pieces: dict[str, list[Callable[[], Jacobian]]] = {}
    for use, found in zip(side.uses, by_use, strict=True):
        if any(gradient is None for gradient in found):
            continue
        arranged = [use.arrange(gradient) for gradient in found if gradient is not None]
        for role, name in use.call.names.items():
            piece = partial(_stacked, use.contributions[role], arranged, size, problem.dtype)
            pieces.setdefault(name, []).append(piece)
    rest = _rest(problem, number, side, chosen)
    for name, rows in rest.items():
        pieces.setdefault(name, []).append(partial(_same, rows))
    return {name: partial(_together, made) for name, made in pieces.items()}


def _same(rows: Rows) -> Jacobian:
    return rows


def _stacked(contribution: Contribution, output_gradients: list[Tensor], size: int, dtype: torch.dtype) -> Jacobian:
    """Contributions [K, B = N · F, ...] as one Jacobian over N samples."""
    found = contribution(torch.stack(output_gradients))
    if isinstance(found, Tensor):
        rows = found.to(dtype)
        return Rows(rows.reshape(len(rows), size, -1, rows.shape[-1]).sum(2))
    left = found.left.to(dtype)
    if found.right is None:
        return Rows(left.reshape(len(left), size, -1, left.shape[-1]).sum(2))
    right = found.right if found.classes else found.right.to(dtype)
    left = left.reshape(len(left), size, -1, left.shape[-1])
    return Factors(left, right.reshape(size, -1, *right.shape[2:]), found.classes)


def _together(makers: list[Callable[[], Jacobian]]) -> Jacobian:
    """Several uses of one parameter: their gradients are summed before the product."""
    pieces = [make() for make in makers]
    if len(pieces) == 1:
        return pieces[0]
    factors = [piece for piece in pieces if isinstance(piece, Factors)]
    if len(factors) == len(pieces) and len({piece.classes for piece in factors}) == 1:
        left = torch.cat([piece.left for piece in factors], 2)
        return Factors(left, torch.cat([piece.right for piece in factors], 1), factors[0].classes)
    rows = [piece.rows() if isinstance(piece, Factors) else piece for piece in pieces]
    return Rows(torch.stack([row.values for row in rows]).sum(0))


def _rest(problem: Problem, number: int, side: _Side, chosen: range) -> dict[str, Rows]:
    """Rows of the Jacobian by plain autograd, for uses of parameters that no rule knows."""
    if not side.rest:
        return {}
    leaves = [problem.parameters[name] for name in side.rest]
    size = len(side.outputs)
    rows = [leaf.new_zeros(len(chosen), size, leaf.numel(), dtype=problem.dtype) for leaf in leaves]
    for sample in range(size):
        outputs, place = _alone(problem, number, side, sample)
        for position, output in enumerate(chosen):
            seed = torch.zeros_like(outputs)
            seed[place, output] = 1.0
            for row, gradient in zip(rows, gradients(outputs, leaves, seed), strict=True):
                if gradient is not None:
                    row[position, sample] = gradient.flatten()
    return {name: Rows(row) for name, row in zip(side.rest, rows, strict=True)}


def _alone(problem: Problem, number: int, side: _Side, sample: int) -> tuple[Tensor, int]:
    """Outputs whose backward pass gives the rows of one sample, and its place in them.

    Those of the sample run alone where they are the same, because a backward pass through all samples costs N times
    as much; else those of all samples: the network looks at other samples, or does not run with one.
    """
    if problem.train_mode:
        return side.outputs, sample
    interception = Interception(problem, side.excluded)
    try:
        with interception.modules():
            outputs = problem.run(number, interception, sample=sample)
    except Exception:  # whatever a network raises that was not made for one sample
        return side.outputs, sample
    together = side.outputs[sample]
    close = (outputs[0] - together).abs().max() <= 64 * torch.finfo(together.dtype).eps * together.abs().max()
    return (outputs, 0) if close else (side.outputs, sample)
