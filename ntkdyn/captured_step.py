"""Forward and backward pass of a training step as one CUDA graph, which launches all their kernels at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

_WARM_UPS = 3  # libraries choose and allocate in the first passes, which a graph must not hold


class CapturedStep:
    """Loss of a network on a batch and its gradients, replayed on every further batch of the same shape.

    The replay reads parameters, buffers and slopes where they were at the capture: they may change in place only. It
    runs no Python: the network has no hooks and no branches by value. Gradients take the place of the earlier ones.

    Args:
        model: on a CUDA device; its buffers and random numbers are as before afterwards, its gradients forgotten.
        passed: inputs, targets -> loss.
        inputs, targets: a batch, of which shapes and types count.

    Source: CUDA graphs by torch.cuda.graph; a ResNet56 is a thousand kernels a step, each shorter than its launch.
    """

    def __init__(
        self, model: nn.Module, passed: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, targets: Tensor
    ) -> None:
        self._inputs, self._targets = inputs.clone(), targets.clone()
        self._model, self._training = model, model.training
        self._parameters = list(model.parameters())
        self._learning = [parameter.requires_grad for parameter in self._parameters]
        self._tensors = [*self._parameters, *model.buffers()]
        self._places = list(map(Tensor.data_ptr, self._tensors))
        device = inputs.device
        before = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            with torch.cuda.device(device), torch.random.fork_rng([device]):
                aside = _stream(device)
                aside.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(aside):
                    for _ in range(_WARM_UPS):
                        self._forget()
                        passed(self._inputs, self._targets).backward()  # type: ignore[no-untyped-call]
                torch.cuda.current_stream(device).wait_stream(aside)
                self._forget()
                self._graph = torch.cuda.CUDAGraph()
                # Other threads may use the device meanwhile.
                with torch.cuda.graph(self._graph, stream=aside, capture_error_mode="thread_local"):
                    value = passed(self._inputs, self._targets)
                    value.backward()  # type: ignore[no-untyped-call]
        finally:
            with torch.no_grad():
                for buffer, kept in before:
                    buffer.copy_(kept)
        self._value = value.detach()
        self._gradients = [parameter.grad for parameter in self._parameters]
        self._forget()

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def fits(self, inputs: Tensor, targets: Tensor) -> bool:
        """Whether the batch has the captured shapes, and the network is where and in the mode in which it was."""
        alike = all(
            one.shape == other.shape and one.dtype == other.dtype
            for one, other in ((inputs, self._inputs), (targets, self._targets))
        )
        return (
            alike
            and self._model.training == self._training
            and [parameter.requires_grad for parameter in self._parameters] == self._learning
            and list(map(Tensor.data_ptr, self._tensors)) == self._places
        )

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a batch, overwritten by the next call; leaves its gradients at the parameters."""
        self._inputs.copy_(inputs)
        self._targets.copy_(targets)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._value


# One for each device: cuBLAS keeps room for every stream that it ever met.
@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
