"""Where wanted parameters are used in a forward pass, and on which axis of each such call the samples lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import NondeterministicForward, UnsupportedLayer
from .determinism import differ, first_difference
from .interception import Call, Interception
from .problem import Problem, gradients

# Samples of the run on which the axes of samples are proven: a prime, because other axes of that length are rare.
_TRIAL = 5


@dataclass(frozen=True)
class Placement:
    """Samples lie on ``axis``, ``fold`` entries each; side by side, or (not sample_major) strided."""

    axis: int
    fold: int
    sample_major: bool

    def arrange(self, tensor: Tensor) -> Tensor:
        """Bring the samples to the front with all entries of a sample side by side: [N · F, ...]."""
        tensor = tensor.movedim(self.axis, 0)
        if self.sample_major or self.fold == 1:
            return tensor
        return tensor.reshape(self.fold, -1, *tensor.shape[1:]).transpose(0, 1).flatten(0, 1)


_NOWHERE = Placement(-1, 0, sample_major=False)


@dataclass(frozen=True)
class Trace:
    """What a run of the network has shown, for runs of any number of samples.

    Attributes:
        excluded: numbers of recognizable calls that are left to plain autograd; None means all.
        placements: one a recognized call; None where the call does not reach the outputs.
        rest: names of parameters with uses that no rule knows.
        unreached: names of parameters that do not reach the outputs.
        certain: no call could have had its samples on another axis as well.
        signature: what another run must equal for the same placements to hold.
        side, samples: of the run.
    """

    excluded: frozenset[int] | None
    placements: tuple[Placement | None, ...]
    rest: tuple[str, ...]
    unreached: tuple[str, ...]
    certain: bool
    signature: tuple[object, ...]
    side: int
    samples: slice


@dataclass(frozen=True)
class Run:
    """Outputs [N, C] of some samples with their graph; recognized calls that reach them, and all that were recorded."""

    outputs: Tensor
    calls: Sequence[tuple[Call, Placement]]
    trace: Trace
    recorded: Sequence[Call]


def traced(problem: Problem) -> Run:
    """Prove the placements, on a few samples where there are many; choose the memory format of images.

    Raises: NondeterministicForward: samples depend on each other, or the forward pass is random. For many samples
        this is left to whoever runs them all: refuse_coupling.
    """
    side = 0 if problem.sizes[0] >= problem.sizes[1] else 1
    size = problem.sizes[side]
    whole = slice(0, size)
    if problem.train_mode:
        return _prove(problem, side, whole)
    few = few_samples(size)
    samples = few if size > 2 * _TRIAL else whole
    found: Run | None = None
    if _gains_by_channels_last(problem):
        found = _with_channels_last(problem, side, samples)
    if found is None:
        with suppress_failure():
            found = _prove(problem, side, samples)
    if found is None or (samples is few and not found.trace.certain):
        found = _prove(problem, side, whole)
    if found.trace.samples == whole:
        check_independence(problem, side, found.outputs)
    return found


def _gains_by_channels_last(problem: Problem) -> bool:
    device = next(problem.model.parameters()).device
    return device.type == "cpu" and any(isinstance(module, nn.Conv2d) for module in problem.model.modules())


def _with_channels_last(problem: Problem, side: int, samples: slice) -> Run | None:
    """Put the channels of images innermost in memory, where the network gives the same outputs so.

    On processors, convolutions with few channels are then up to 3 times as fast (16 channels, 32 x 32: 100 against 32
    GFLOP/s). A network that reshapes its images by a view does not run so, and keeps its format.
    """
    with suppress_failure():
        expected = problem.run(side, samples=samples).detach()
        problem.channels_last = True
        problem.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        found = _prove(problem, side, samples)
        if not differ(found.outputs.detach(), expected):
            return found
    problem.channels_last = False
    problem.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return None


def check_independence(problem: Problem, side: int, outputs: Tensor) -> None:
    """Run a few samples by themselves and compare with the outputs [N, C] of all; see refuse_coupling."""
    few = few_samples(len(outputs))
    with suppress_failure():
        refuse_coupling(problem, side, few, problem.run(side, samples=few), outputs[few])


def few_samples(size: int) -> slice:
    """A few samples from first to last, or the first half of a few."""
    if size <= 2 * _TRIAL:
        return slice(0, (size + 1) // 2)
    step = (size - 1) // (_TRIAL - 1)
    return slice(0, (_TRIAL - 1) * step + 1, step)


@contextmanager
def suppress_failure() -> Iterator[None]:
    """Whatever a network raises that was made for another number of samples."""
    try:
        yield
    except (UnsupportedLayer, NondeterministicForward):
        raise
    except Exception:
        pass


def refuse_coupling(problem: Problem, side: int, few: slice, alone: Tensor, together: Tensor) -> None:
    """Raise NondeterministicForward where outputs of a few samples run by themselves are not theirs in a larger run."""
    alone = alone.detach()
    if problem.train_mode or not differ(alone, together.detach()):
        return

    def again(samples: slice) -> Callable[[], Tensor]:
        return lambda: problem.run(side, samples=samples)

    if differ(alone, again(few)().detach()):
        raise NondeterministicForward(
            f"{first_difference(problem.model, again(few), [again(few)])} gives other outputs on the same inputs when "
            "called again; the kernel needs one function of each sample; switch its randomness off in evaluation mode"
        )
    first = slice(0, min(16, problem.sizes[side]))
    layer = first_difference(problem.model, again(first), [again(slice(n, n + 1)) for n in range(first.stop)])
    raise NondeterministicForward(
        f"{layer} gives a sample outputs that depend on the other samples; the kernel needs one function of each "
        "sample; use running statistics there, or allow it by train_mode=[the layer's name]"
    )


def run(problem: Problem, side: int, samples: slice, trace: Trace) -> Run:
    """Run some samples; where the network then does something else than in the trace, prove the placements anew."""
    interception = Interception(problem, trace.excluded)
    with interception.modules():
        outputs = problem.run(side, interception, samples=samples)
    if _signature(interception.calls, trace.placements, len(outputs)) != trace.signature:
        return _prove(problem, side, samples)
    return _as_run(outputs, interception.calls, trace)


def _as_run(outputs: Tensor, calls: Sequence[Call], trace: Trace) -> Run:
    _refuse_changed_inputs(calls, trace)
    used = [(call, place) for call, place in zip(calls, trace.placements, strict=True) if place is not None]
    return Run(outputs, used, trace, calls)


def _signature(calls: Sequence[Call], placements: Sequence[Placement | None], size: int) -> tuple[object, ...]:
    if len(calls) != len(placements):
        return ()
    found: list[object] = []
    for call, place in zip(calls, placements, strict=True):
        shape: list[int] = list(call.shape)
        if place is not None and len(shape) > place.axis:
            # Of the axis of samples what does not depend on their number.
            shape[place.axis] = -shape[place.axis] // size if shape[place.axis] % size == 0 else 0
        found.append((call.number, id(call.rule), tuple(call.names.items()), tuple(shape) if place else None))
    return tuple(found)


def _refuse_changed_inputs(calls: Sequence[Call], trace: Trace) -> None:
    for call, place in zip(calls, trace.placements, strict=True):
        if place is not None and call.input._version != call.version:
            names = ", ".join(map(repr, call.names.values()))
            raise UnsupportedLayer(
                f"layer {call.layer!r} ({call.rule.target.__name__}): its input is changed in place after the call, "
                f"and the gradient of {names} needs it; remove the in-place operation"
            )


def _prove(problem: Problem, side: int, samples: slice) -> Run:
    """Run the network until every recognized call is one in which samples can be told apart."""
    excluded: frozenset[int] | None = None if problem.train_mode else frozenset()
    while True:
        interception = Interception(problem, excluded)
        with interception.modules():
            outputs = problem.run(side, interception, samples=samples)
        if interception.differentiates and excluded is not None:
            excluded = None
            continue
        calls = interception.calls
        found = _tell_samples_apart(problem, outputs, calls)
        lost = [call.number for call, one in zip(calls, found.placements, strict=True) if one == _NOWHERE]
        if lost:
            excluded = (excluded or frozenset()) | frozenset(lost)
            continue
        if not any(found.placements) and not found.rest:
            problem.refuse_foreign_outputs(outputs)
        signature = _signature(calls, found.placements, len(outputs))
        trace = replace(found, excluded=excluded, signature=signature, side=side, samples=samples)
        return _as_run(outputs, calls, trace)


def _tell_samples_apart(problem: Problem, outputs: Tensor, calls: Sequence[Call]) -> Trace:
    """Placement of each call that reaches the outputs, _NOWHERE where there is none.

    The shape alone does not tell: in [T, N, d] with T = N the first axis holds positions, and a layer that mixes
    samples has none. So the outputs of two disjoint sets of samples are differentiated, and each may reach only its
    own entries of the axis.
    """
    size = len(outputs)
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
    placements: list[Placement | None] = []
    used, certain = set(rest), True
    for call, gradient, gradient_2 in zip(calls, reached[: len(edges)], reached_2, strict=True):
        if gradient is None or gradient_2 is None:
            placements.append(None)
            continue
        used |= set(call.names.values())
        fitting = [
            candidate
            for candidate in _candidates(call, size)
            if not _by_sample(candidate.arrange(gradient), size)[member].any()
            and not _by_sample(candidate.arrange(gradient_2), size)[~member].any()
        ]
        placements.append(fitting[0] if fitting else _NOWHERE)
        certain &= len(fitting) == 1
    unreached = tuple(name for name in names if name not in used)
    return Trace(None, tuple(placements), tuple(rest), unreached, certain, (), 0, slice(0, size))


def _candidates(call: Call, size: int) -> Iterator[Placement]:
    for axis in range(call.rule.leading(call.arguments)):
        length = call.shape[axis]
        if length == size or (axis == 0 and length % size == 0):
            yield Placement(axis, length // size, sample_major=True)
            if length != size:
                yield Placement(axis, length // size, sample_major=False)


def _by_sample(tensor: Tensor, size: int) -> Tensor:
    return tensor.reshape(size, -1)
