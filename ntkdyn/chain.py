"""Gradients of a plain chain of linear layers and gates: those of autograd, in two thirds of the time.

In a network of 64 units a layer the bookkeeping of autograd and of modules takes as long as the products themselves. A
chain is simple enough to be sent back by hand. Every number is the one that autograd would find, to the last bit but
the sign of zeros, so that weights are the same in every bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .gates import Gate

Loss = Callable[[Tensor, Tensor], Tensor]
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_aten = torch.ops.aten
_OF_A_GATE = ("slope", "frozen")
_threshold_backward = _aten.threshold_backward.default
_nll_loss_forward, _nll_loss_backward = _aten.nll_loss_forward.default, _aten.nll_loss_backward.default
_log_softmax_backward = _aten._log_softmax_backward_data.default
# Numbers that begin where a line of the cache does; also what fills whole registers.
WHOLE_LINES = 64
# Arguments of nll_loss as cross_entropy gives them: no weights of classes, the mean, the target that is left out.
_MEAN, _SUM, _IGNORED = 1, 2, -100


class _Linear:
    """Layer of one network, weight [out, in]."""

    _product = staticmethod(torch.mm)

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    @property
    def learns(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def __call__(self, values: Tensor) -> Tensor:
        return functional.linear(values, self.weight, self.bias)

    def send_back(self, upstream: Tensor, inputs: Tensor, *, on: bool) -> Tensor:
        if self.weight.requires_grad:
            self.weight.grad = self._product(upstream.mT, inputs)
        if self.bias is not None and self.bias.requires_grad:
            self.bias.grad = upstream.sum(-2)
        return self._product(upstream, self.weight) if on else upstream


class _StackedLinear(_Linear):
    """Layers of a stack, weight [networks, out, in]."""

    _product = staticmethod(torch.bmm)

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        # A stack stays where it is, and making a view takes a tenth as long as a product.
        self._transposed = weight.detach().mT
        self._rows = None if bias is None else bias.detach().unsqueeze(1)

    def __call__(self, values: Tensor) -> Tensor:
        if self._rows is None:
            return torch.bmm(values, self._transposed)
        return torch.baddbmm(self._rows, values, self._transposed)


class _Slopes:
    """Gate of one network, slope [channels or 1], or of a stack, [networks, 1, channels or 1]."""

    def __init__(self, slope: Tensor, frozen: Tensor) -> None:
        self.slope, self.frozen = slope, frozen
        self._effective = slope

    @property
    def learns(self) -> bool:
        return self.slope.requires_grad

    def look(self) -> None:
        """Take the slopes as they are now, for the next call."""
        self._effective = torch.where(self.frozen, 1.0, self.slope)

    def __call__(self, values: Tensor) -> Tensor:
        # The numbers of the gate, but for the sign of zeros, in a third of the time. Of torch's derivatives, which are
        # wrong at 0, none is taken.
        return torch._prelu_kernel(values, self._effective)

    def send_back(self, upstream: Tensor, inputs: Tensor, *, on: bool) -> Tensor:
        if self.learns:
            of_slope = inputs.clamp_max(0).mul_(upstream).sum_to_size(self._effective.shape)
            self._give(of_slope.masked_fill_(self.frozen, 0))
        if not on:
            return upstream
        positive: Tensor = _threshold_backward(upstream, inputs, 0)
        return positive.addcmul_(upstream - positive, self._effective)

    def _give(self, gradient: Tensor) -> None:
        self.slope.grad = gradient


class _StackedSlopes(_Slopes):
    """Slopes whose gradients the networks of the stack are given; who moves them knows nothing of the stack.

    Args: slope, frozen, effective: [networks, 1, channels or 1], parts of what ``_SlopesOfStack`` looks at.
    """

    def __init__(self, members: Sequence[_Slopes], slope: Tensor, frozen: Tensor, effective: Tensor) -> None:
        super().__init__(slope, frozen)
        self._members, self._effective = members, effective

    @property
    def learns(self) -> bool:
        return self._members[0].learns

    def _give(self, gradient: Tensor) -> None:
        for member, part in zip(self._members, gradient.squeeze(1), strict=True):
            member.slope.grad = part


class _SlopesOfStack:
    """All slopes of a stack side by side, which are looked at at once.

    Args: gates: for each gate of the chains its slopes, one for each chain, which become parts of these.
    """

    def __init__(self, gates: Sequence[Sequence[_Slopes]]) -> None:
        self._slope, self._frozen = (
            _side_by_side([[getattr(one, name) for one in same] for same in gates]) for name in _OF_A_GATE
        )
        self._one, self._effective = self._slope.new_ones(()), torch.empty_like(self._slope)
        counts = [same[0].slope.numel() for same in gates]
        kinds = [
            kind.split_with_sizes([_padded(count) for count in counts], 1)
            for kind in (self._slope, self._frozen, self._effective)
        ]
        self.layers = [
            _StackedSlopes(same, *(part[:, :count].unsqueeze(1) for part in parts))
            for same, count, *parts in zip(gates, counts, *kinds, strict=True)
        ]

    def look(self) -> None:
        torch.where(self._frozen, self._one, self._slope, out=self._effective)


class Chain:
    """A network of nn.Linear and Gate one after the other, as it stands; made by ``chain_of``."""

    def __init__(self, layers: Sequence[nn.Linear | Gate]) -> None:
        # Looked up once: reading an attribute of a module takes a tenth as long as a layer.
        self.layers: list[_Linear | _Slopes] = [
            _Slopes(one.slope, one.frozen) if isinstance(one, Gate) else _Linear(one.weight, one.bias) for one in layers
        ]
        self._slopes = [one for one in self.layers if isinstance(one, _Slopes)]

    def loss(self, inputs: Tensor, targets: Tensor, loss: Loss) -> tuple[Tensor, Callable[[], None]]:
        """Loss of the outputs, and what gives every parameter that learns its gradient.

        The gradients take the place of those that were there; the loss has no graph beyond the outputs.
        """
        outputs, seen = _forward(self._slopes, self.layers, inputs.flatten(1))
        value, gradient = _loss_and_gradient(outputs, targets, loss)
        return value, lambda: _send_back(self.layers, gradient(), seen)

    @property
    def tensors(self) -> list[list[Tensor | None]]:
        """Weight and bias, or slope and frozen, of each layer."""
        return [[one.weight, one.bias] if isinstance(one, _Linear) else [one.slope, one.frozen] for one in self.layers]


class Losses(NamedTuple):
    """Losses of a stack.

    finite: whether all of them are known to be finite; where not, look at each.  each: gives them one by one.
    send_back: gives every parameter that learns its gradient.
    """

    finite: bool
    each: Callable[[], list[Tensor]]
    send_back: Callable[[], None]


class StackedChain:
    """Chains of equal shape as one; their tensors become parts of its own until ``part``.

    What moves weights and slopes of a chain in place moves them here. Gradients of slopes come to the chains; those of
    the weights are on ``weights``.

    Args: chains: of layers of equal shapes, of which the same ones learn.
    """

    def __init__(self, chains: Sequence[Chain]) -> None:
        self._chains = list(chains)
        self._layers: list[_Linear | _Slopes] = []
        # Each with the tensors of the chains that are its parts.
        self.weights: list[tuple[Tensor, list[Tensor]]] = []
        columns = list(zip(*(chain.layers for chain in chains), strict=True))
        gates = [same for column in columns if (same := [one for one in column if isinstance(one, _Slopes)])]
        self._slopes = [_SlopesOfStack(gates)] if gates else []
        of_gates = iter(self._slopes[0].layers if gates else ())
        for column in columns:
            linear = [one for one in column if isinstance(one, _Linear)]
            if not linear:
                self._layers.append(next(of_gates))
                continue
            parts = [[one.weight for one in linear], [one.bias for one in linear if one.bias is not None]]
            both = [_stacked(one).requires_grad_(one[0].requires_grad) for one in parts if one]
            self._layers.append(_StackedLinear(both[0], both[1] if len(both) > 1 else None))
            self.weights += zip(both, parts, strict=False)

    def losses(self, inputs: Sequence[Tensor], targets: Sequence[Tensor], loss: Loss) -> Losses:
        """As ``Chain.loss``, for each chain its own inputs and targets."""
        outputs, seen = _forward(self._slopes, self._layers, torch.stack([one.flatten(1) for one in inputs]))
        finite, each, gradient = _losses_and_gradient(outputs, targets, loss)
        return Losses(finite, each, lambda: _send_back(self._layers, gradient(), seen))

    def part(self) -> None:
        """Give every chain tensors of its own again."""
        for chain in self._chains:
            for tensor in (one for layer in chain.tensors for one in layer if one is not None):
                tensor.data = tensor.data.clone()


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as one, of which they become parts, each aligned as a tensor of its own is."""
    stack = tensors[0].detach().new_empty(len(tensors), _padded(tensors[0].numel()))[:, : tensors[0].numel()]
    stack = stack.view(len(tensors), *tensors[0].shape)
    _settle(tensors, stack)
    return stack


def _side_by_side(columns: Sequence[Sequence[Tensor]]) -> Tensor:
    """Rows of vectors as one tensor, of which they become parts, with room between them, each aligned."""
    widths = [_padded(column[0].numel()) for column in columns]
    stack = columns[0][0].detach().new_zeros(len(columns[0]), sum(widths))
    for column, part in zip(columns, stack.split_with_sizes(widths, 1), strict=True):
        _settle(column, part[:, : column[0].numel()])
    return stack


def _settle(tensors: Sequence[Tensor], parts: Tensor) -> None:
    for tensor, part in zip(tensors, parts, strict=True):
        part.copy_(tensor.detach())
        tensor.data = part


def _padded(count: int) -> int:
    return -(-count // WHOLE_LINES) * WHOLE_LINES


@torch.no_grad()
def _forward(
    slopes: Sequence[_Slopes | _SlopesOfStack], layers: Sequence[_Linear | _Slopes], values: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and the inputs of each layer."""
    for one in slopes:
        one.look()
    seen = []
    for layer in layers:
        seen.append(values)
        values = layer(values)
    return values, seen


@torch.no_grad()
def _send_back(layers: Sequence[_Linear | _Slopes], upstream: Tensor, seen: Sequence[Tensor]) -> None:
    # Nothing below asks for gradients.
    lowest = next((index for index, one in enumerate(layers) if one.learns), len(layers))
    for index in range(len(layers) - 1, lowest - 1, -1):
        upstream = layers[index].send_back(upstream, seen[index], on=index > lowest)


def _loss_and_gradient(outputs: Tensor, targets: Tensor, loss: Loss) -> tuple[Tensor, Callable[[], Tensor]]:
    """Loss, and what gives its gradient by the outputs; cross-entropy with class numbers is sent back by hand too."""
    if outputs.dim() == 2 and _have_class_numbers([targets], loss):
        logarithms = outputs.log_softmax(1)
        value, count = _nll_loss_forward(logarithms, targets, None, _MEAN, _IGNORED)
        return value, lambda: _of_means(logarithms, targets, count)
    outputs = outputs.requires_grad_()
    with torch.enable_grad():
        value = loss(outputs, targets)
    return value, lambda: torch.autograd.grad(value, outputs)[0]


def _losses_and_gradient(
    outputs: Tensor, targets: Sequence[Tensor], loss: Loss
) -> tuple[bool, Callable[[], list[Tensor]], Callable[[], Tensor]]:
    """``Losses`` of a stack's outputs, with what gives their gradient by the outputs in place of ``send_back``."""
    if outputs.dim() == 3 and _have_class_numbers(targets, loss):
        return _cross_entropies(outputs, targets)
    pairs = [_loss_and_gradient(*one, loss) for one in zip(outputs.unbind(), targets, strict=True)]
    values = [value for value, _ in pairs]
    finite = all(math.isfinite(value.item()) for value in values)
    return finite, lambda: values, lambda: torch.stack([gradient() for _, gradient in pairs])


def _have_class_numbers(targets: Sequence[Tensor], loss: Loss) -> bool:
    return loss is functional.cross_entropy and all(one.dim() == 1 and not one.is_floating_point() for one in targets)


def _cross_entropies(
    outputs: Tensor, targets: Sequence[Tensor]
) -> tuple[bool, Callable[[], list[Tensor]], Callable[[], Tensor]]:
    """``_losses_and_gradient`` of cross-entropy, outputs [networks, samples, classes]."""
    logarithms, labels = outputs.log_softmax(2), torch.cat(list(targets))
    # One sum for all networks: each by itself is looked at only where this is not finite.
    total, counted = _nll_loss_forward(logarithms.flatten(0, 1), labels, None, _SUM, _IGNORED)
    complete = counted.item() == len(labels)

    def one_by_one() -> list[tuple[Tensor, Tensor]]:
        of_each = zip(logarithms.unbind(), targets, strict=True)
        return [_nll_loss_forward(*one, None, _MEAN, _IGNORED) for one in of_each]

    def gradient() -> Tensor:
        if complete:
            return _of_means(logarithms, labels, counted / len(targets))
        of_each = zip(logarithms.unbind(), targets, one_by_one(), strict=True)
        parts = [_of_means(one, own, count) for one, own, (_, count) in of_each]
        return torch.stack(parts)

    # A network all of whose targets are left out has a loss that is not finite, but adds nothing to the sum.
    finite = complete and math.isfinite(total.item())
    return finite, lambda: [value for value, _ in one_by_one()], gradient


def _of_means(logarithms: Tensor, labels: Tensor, count: Tensor) -> Tensor:
    """Gradient by the outputs [..., samples, classes] of cross-entropies that are means over ``count`` samples each."""
    flat = logarithms.flatten(0, -2)
    upstream = _nll_loss_backward(count.reciprocal(), flat, labels, None, _SUM, _IGNORED, count).view_as(logarithms)
    sent: Tensor = _log_softmax_backward(upstream, logarithms, logarithms.dim() - 1, logarithms.dtype)
    return sent


def chain_of(model: nn.Module, inputs: Any) -> Chain | None:
    """The network as a chain, or None where it is anything else, or somebody watches its modules or parameters.

    A chain is an nn.Sequential of nn.Linear and Gate, each used once, with nn.Flatten in front or without; on the CPU.
    """
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward or not len(model):
        return None
    if not isinstance(inputs, Tensor) or inputs.requires_grad or not inputs.is_floating_point():
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    first, *others = model
    flattens = type(first) is nn.Flatten and (first.start_dim, first.end_dim) == (1, -1)
    layers = [one for one in (others if flattens else model) if type(one) is nn.Linear or type(one) is Gate]
    if len({id(one) for one in layers}) + flattens < len(model) or not layers:
        return None
    if inputs.dim() < 2 or (inputs.dim() > 2 and not flattens) or not _fit(layers, math.prod(inputs.shape[1:])):
        return None
    parameters = [parameter for one in layers for parameter in one.parameters()]
    kinds = {(one.dtype, one.device.type, type(one)) for one in parameters}
    tied = len({id(one) for one in parameters}) < len(parameters)
    if kinds != {(inputs.dtype, "cpu", nn.Parameter)} or tied or _watched([model, *model], parameters):
        return None
    return Chain(layers)


def _fit(layers: Sequence[nn.Linear | Gate], width: int) -> bool:
    for one in layers:
        if isinstance(one, Gate):
            if one.channels != width or one.dim not in (1, -1):
                return False
        elif one.in_features != width:
            return False
        else:
            width = one.out_features
    return True


def _watched(modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> bool:
    on_modules = any(getattr(one, hooks) for one in modules for hooks in _HOOKS)
    return on_modules or any(one._backward_hooks or one._post_accumulate_grad_hooks for one in parameters)
