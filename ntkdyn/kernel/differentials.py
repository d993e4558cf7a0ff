"""Products with the Jacobian J [N·C, P] of the outputs and with its transpose, neither of which is ever formed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from ..clone import structural_clone
from ..errors import ConfigurationError, NondeterministicForward, UnsupportedLayer
from .problem import Problem, gradients

# How many roundings two results may be apart that are the same but for the order of their sums.
_ROUNDINGS = 200.0


@dataclass
class Part:
    """Some of the samples, whose graph is kept between products, or made anew for each.

    Attributes:
        problem: the problem with these samples only.
        hold: keep the graph; the parameters of the clone never change.
    """

    problem: Problem
    hold: bool
    _outputs: Tensor | None = field(default=None, init=False)
    _linear: tuple[Tensor, tuple[Tensor | None, ...]] | None = field(default=None, init=False)

    def outputs(self) -> Tensor:
        """Outputs [n, C] with their graph."""
        if self._outputs is not None:
            return self._outputs
        outputs = _run(self.problem)
        if self.hold:
            self._outputs = outputs
        return outputs

    def transposed_linear(self) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """A cotangent u [n, C] and Jᵀ u by parameter, with the graph that leads from one to the other."""
        if self._linear is not None:
            return self._linear
        outputs = self.outputs()
        cotangent = torch.zeros_like(outputs, requires_grad=True)
        leaves = list(self.problem.parameters.values())
        with torch.enable_grad():
            found = torch.autograd.grad(outputs, leaves, cotangent, create_graph=True, allow_unused=True)
        # The double backward pass goes from the cotangent on; detached, it would be taken for a constant.
        linear = (cotangent, tuple(one if one is not None and one.requires_grad else None for one in found))
        if self.hold:
            self._linear = linear
        return linear


class Way(Protocol):
    """One way to the product J w."""

    title: str

    def __call__(self, part: Part, tangents: Sequence[Tensor | None]) -> Tensor:
        """J w [n, C] for one tangent w per parameter; None stands for zeros."""
        ...


class DoubleBackward:
    """J w as the gradient of u -> <Jᵀ u, w>, which is linear in u: another backward pass, no forward one."""

    title = "double backward"

    def __call__(self, part: Part, tangents: Sequence[Tensor | None]) -> Tensor:
        """See Way."""
        cotangent, linear = part.transposed_linear()
        pairs = [(one, w) for one, w in zip(linear, tangents, strict=True) if one is not None and w is not None]
        if not pairs:
            return torch.zeros_like(cotangent).detach()
        ends, weights = [one for one, _ in pairs], [w for _, w in pairs]
        found = torch.autograd.grad(ends, cotangent, weights, retain_graph=part.hold, allow_unused=True)[0]
        return torch.zeros_like(cotangent).detach() if found is None else found


class ForwardMode:
    """J w by dual numbers: one forward pass on a copy of the network, and no graph."""

    title = "forward mode"

    def __init__(self, problem: Problem) -> None:
        # A copy, because tangents are given to parameters in place: that reaches closures and the flat weights of an
        # LSTM, which replacing the entries of the modules does not, but makes graphs through them worthless.
        self._clone = structural_clone(problem.model, share_parameters=False).requires_grad_(False)
        place = {id(leaf): position for position, leaf in enumerate(problem.model.parameters())}
        copies = list(self._clone.parameters())
        self._leaves = [copies[place[id(leaf)]] for leaf in problem.parameters.values()]

    def __call__(self, part: Part, tangents: Sequence[Tensor | None]) -> Tensor:
        """See Way."""
        return self.dual(part, tangents)[1]

    def dual(self, part: Part, tangents: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Outputs [n, C] and J w [n, C]."""
        anchor = torch.zeros((), requires_grad=True)
        problem = part.problem

        def forward(model: nn.Module, inputs: Any) -> Tensor:
            # Problem.run refuses outputs that no parameter can reach; here no parameter asks for a gradient.
            return problem.forward(model, inputs) + anchor

        with forward_ad.dual_level():
            for leaf, tangent in zip(self._leaves, tangents, strict=True):
                direction = torch.zeros_like(leaf) if tangent is None else tangent
                leaf.copy_(forward_ad.make_dual(leaf.clone(), direction))  # type: ignore[no-untyped-call]
            dual = _run(replace(problem, model=self._clone, forward=forward))
            outputs, product = forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]
            return outputs.detach(), torch.zeros_like(outputs).detach() if product is None else product.detach()


def _run(problem: Problem) -> Tensor:
    # The fused attention of torch 2.13 has neither a double backward nor a forward-mode derivative.
    with sdpa_kernel(SDPBackend.MATH):
        return problem.run(0)


def parts_of(problem: Problem, chunk: int) -> list[Part]:
    """The samples in parts of ``chunk``; one part keeps its graph."""
    size = problem.sizes[0]
    if chunk >= size:
        return [Part(problem, hold=True)]
    if problem.train_mode:
        names = ", ".join(map(repr, sorted(problem.train_mode)))
        raise ConfigurationError(
            f"train_mode allows {names}, with which samples depend on each other or are drawn anew; they cannot be "
            f"taken {chunk} of {size} at a time; leave out chunk= and max_memory="
        )
    starts = range(0, size, chunk)
    return [Part(_some(problem, slice(start, min(start + chunk, size))), hold=False) for start in starts]


def refuse_coupled_samples(problem: Problem, chunk: int) -> None:
    """Raise NondeterministicForward where the first samples have other outputs in parts than together."""
    count = min(problem.sizes[0], max(2, chunk))
    together, first, second = (
        _run(_some(problem, chosen)).detach()
        for chosen in (slice(0, count), slice(0, count // 2), slice(count // 2, count))
    )
    apart = torch.cat([first, second])
    # Other shapes are added up in another order.
    if not _close(apart, together):
        raise NondeterministicForward(
            f"the outputs of {count} samples differ between one pass and two; the forward pass is random, or samples "
            f"depend on each other; leave out chunk= and max_memory="
        )


def _some(problem: Problem, chosen: slice) -> Problem:
    count = chosen.stop - chosen.start
    inputs = tree_map_only(Tensor, lambda tensor: tensor[chosen], problem.inputs)
    return replace(problem, inputs=inputs, sizes=(count, count))


def _close(found: Tensor, expected: Tensor) -> bool:
    difference = (found - expected).abs().max()
    return bool(difference <= _ROUNDINGS * torch.finfo(expected.dtype).eps * expected.abs().max())


def saved_bytes(problem: Problem) -> int:
    """Bytes that the graph of one sample keeps, parameters left out; measured on the first samples."""
    count = problem.sizes[0] if problem.train_mode else min(problem.sizes[0], 4)
    parameters = {tensor.untyped_storage().data_ptr() for tensor in problem.model.parameters()}
    parameters |= {tensor.untyped_storage().data_ptr() for tensor in problem.model.buffers()}
    storages: dict[int, Tensor] = {}  # held, so that no address comes twice

    def note(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            storages[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = _run(_some(problem, slice(0, count)))
    total = outputs.nbytes + sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    return -(-total // count)


def chosen_way(problem: Problem, part: Part) -> Way:
    """The fastest way that agrees with plain autograd on <u, J w> = <Jᵀ u, w>, every parameter counted alike.

    With the graph kept, two backward passes cost less than a forward one with dual numbers (one core, float32,
    milliseconds: MLP n = 512 17.5 against 38.7, Transformer n = 64 14 against 19), but not through convolutions, whose
    double backward is slow (CNN n = 64 95 against 61, ResNet20 359 against 314); and without it dual numbers need no
    graph at all. Products of several columns at once by vmap were slower than one by one except in tiny networks.
    """
    makers: list[Callable[[], DoubleBackward | ForwardMode]] = [DoubleBackward, partial(ForwardMode, problem)]
    if any(parameter.dim() > 2 for parameter in problem.model.parameters()) or not part.hold:
        makers.reverse()
    if problem.train_mode:  # a second pass would be another draw
        makers = [DoubleBackward]
    outputs = part.outputs()
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype).to(outputs.device)
    transposed = gradients(outputs, list(problem.parameters.values()), cotangent)
    if all(gradient is None for gradient in transposed):
        problem.refuse_foreign_outputs(outputs)
    largest = max((float(g.double().norm()) for g in transposed if g is not None), default=0.0) or 1.0
    # Below this share of the largest, a gradient may be rounding alone: the bias before a BatchNorm in training mode.
    least = torch.finfo(outputs.dtype).eps ** 0.5 * largest
    tangents = [None if g is None else _tangent(g, least, generator) for g in transposed]
    expected = sum(
        float((g.double() * w.double()).sum())
        for g, w in zip(transposed, tangents, strict=True)
        if g is not None and w is not None
    )
    size = largest * sum(float(w.double().norm()) for w in tangents if w is not None)
    reasons = []
    for make in makers:
        way = make()
        try:
            again, product = (
                way.dual(part, tangents) if isinstance(way, ForwardMode) else (outputs.detach(), way(part, tangents))
            )
        except Exception as error:  # whatever torch raises where an operation has no such derivative
            reasons.append(f"{way.title}: {(str(error) or type(error).__name__).splitlines()[0]}")
            continue
        if not _close(again, outputs.detach()):
            reasons.append(f"{way.title}: a second pass has other outputs")
            continue
        summands = cotangent.double() * product.double()
        slack = _ROUNDINGS * torch.finfo(outputs.dtype).eps * (float(summands.norm()) + size)
        if abs(float(summands.sum()) - expected) <= slack:
            return way
        reasons.append(f"{way.title}: <u, J w> = {float(summands.sum()):.6g}, but <Jᵀ u, w> = {expected:.6g}")
    raise UnsupportedLayer(
        f"no product with the Jacobian of {type(problem.model).__name__} is exact ({'; '.join(reasons)}); "
        f"use empirical_ntk(reduce='full'), which needs plain backward passes only"
    )


def _tangent(gradient: Tensor, least: float, generator: torch.Generator) -> Tensor:
    """A tangent w with <gradient, w> = 1; a shorter one for a gradient below ``least``, a random one for none."""
    direction = gradient.double()
    if not gradient.any():
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64).to(gradient.device)
    length = float(direction.norm()) * max(float(gradient.double().norm()), least)
    return (direction / length).to(gradient.dtype)
