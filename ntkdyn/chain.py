"""Gradients of a plain chain of linear layers and gates: bit for bit those of autograd, in two thirds of the time.

In a network of 64 units a layer the bookkeeping of autograd and of modules takes as long as the products themselves. A
chain is simple enough to be sent back by hand; every operation is the one that autograd would do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .gates import Gate

Loss = Callable[[Tensor, Tensor], Tensor]
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_aten = torch.ops.aten
_threshold_backward = _aten.threshold_backward.default
_nll_loss_forward, _nll_loss_backward = _aten.nll_loss_forward.default, _aten.nll_loss_backward.default
_log_softmax_backward = _aten._log_softmax_backward_data.default
# Arguments of nll_loss as cross_entropy gives them: no weights of classes, the mean, the target that is left out.
_MEAN, _IGNORED = 1, -100


@dataclass(frozen=True)
class _Linear:
    weight: Tensor
    bias: Tensor | None

    @property
    def learns(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)


@dataclass(frozen=True)
class _Slopes:
    slope: Tensor
    frozen: Tensor

    @property
    def learns(self) -> bool:
        return self.slope.requires_grad


class Chain:
    """A network of nn.Linear and Gate one after the other, as it stands; made by ``chain_of``."""

    def __init__(self, layers: Sequence[nn.Linear | Gate]) -> None:
        # Looked up once: reading an attribute of a module takes a tenth as long as a layer.
        self._layers = [
            _Slopes(one.slope, one.frozen) if isinstance(one, Gate) else _Linear(one.weight, one.bias) for one in layers
        ]

    def loss(self, inputs: Tensor, targets: Tensor, loss: Loss) -> tuple[Tensor, Callable[[], None]]:
        """Loss of the outputs, and what gives every parameter that learns its gradient.

        The gradients take the place of those that were there; the loss has no graph beyond the outputs.
        """
        seen: list[Tensor] = []
        slopes: list[Tensor | None] = []
        with torch.no_grad():
            values = inputs.flatten(1)
            for layer in self._layers:
                seen.append(values)
                if isinstance(layer, _Linear):
                    slopes.append(None)
                    values = functional.linear(values, layer.weight, layer.bias)
                else:
                    slope = torch.where(layer.frozen, 1.0, layer.slope)
                    slopes.append(slope)
                    values = torch.relu(values).addcmul_(values.clamp_max(0), slope)
        value, gradient = _loss_and_gradient(values, targets, loss)
        return value, lambda: self._send_back(gradient(), seen, slopes)

    @torch.no_grad()
    def _send_back(self, upstream: Tensor, seen: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> None:
        # Nothing below asks for gradients.
        lowest = next((index for index, one in enumerate(self._layers) if one.learns), len(self._layers))
        for index in range(len(self._layers) - 1, lowest - 1, -1):
            layer, inputs, slope = self._layers[index], seen[index], slopes[index]
            if isinstance(layer, _Linear):
                if layer.weight.requires_grad:
                    layer.weight.grad = upstream.t().mm(inputs)
                if layer.bias is not None and layer.bias.requires_grad:
                    layer.bias.grad = upstream.sum(0)
                if index > lowest:
                    upstream = upstream.mm(layer.weight)
            elif slope is not None:
                if layer.slope.requires_grad:
                    of_slope = inputs.clamp_max(0).mul_(upstream).sum_to_size(slope.shape)
                    layer.slope.grad = of_slope.masked_fill_(layer.frozen, 0)
                if index > lowest:
                    positive = _threshold_backward(upstream, inputs, 0)
                    upstream = positive.addcmul_(upstream - positive, slope)


def _loss_and_gradient(outputs: Tensor, targets: Tensor, loss: Loss) -> tuple[Tensor, Callable[[], Tensor]]:
    """Loss, and what gives its gradient by the outputs; cross-entropy with class numbers is sent back by hand too."""
    if loss is not functional.cross_entropy or targets.is_floating_point() or (outputs.dim(), targets.dim()) != (2, 1):
        outputs = outputs.requires_grad_()
        with torch.enable_grad():
            value = loss(outputs, targets)
        return value, lambda: torch.autograd.grad(value, outputs)[0]
    logarithms = outputs.log_softmax(1)
    value, weight = _nll_loss_forward(logarithms, targets, None, _MEAN, _IGNORED)

    def gradient() -> Tensor:
        upstream = _nll_loss_backward(torch.ones_like(value), logarithms, targets, None, _MEAN, _IGNORED, weight)
        sent: Tensor = _log_softmax_backward(upstream, logarithms, 1, outputs.dtype)
        return sent

    return value, gradient


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
