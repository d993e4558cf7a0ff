"""BackPACK's per-sample gradients, one backward pass per output, contracted layer by layer in its extension hook."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from kernel_cases import OUTPUTS, Case
from kernel_networks import read
from torch import Tensor

TOOLS = {"BackPACK": None}


def versions() -> dict[str, str]:
    """Versions for the report."""
    return {"backpack-for-pytorch": importlib.metadata.version("backpack-for-pytorch")}


def prepare(tool: str, case: Case, folder: Path, device: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The call, and what turns its result into an array of the case's shape."""
    network, x = read(case, folder, device)
    network = extend(network, use_converter=case.network in ("resnet20", "transformer"))
    parameters = list(network.parameters())

    def backward(output: int) -> None:
        logits = network(x)
        with backpack(BatchGrad()):
            logits[:, output].sum().backward(inputs=parameters)
        lacking = [name for name, parameter in network.named_parameters() if not hasattr(parameter, "grad_batch")]
        if lacking:
            raise NotImplementedError(f"no per-sample gradients of {lacking[0]}")

    def trace() -> Tensor:
        kernel = torch.zeros(case.shape(), device=x.device)
        for output in range(OUTPUTS):
            backward(output)
            for parameter in parameters:
                rows = parameter.grad_batch.flatten(1)
                kernel.addmm_(rows, rows.T)
                del parameter.grad_batch, parameter.grad
        return kernel

    def full() -> Tensor:
        rows: dict[Tensor, list[Tensor]] = {parameter: [] for parameter in parameters}
        for output in range(OUTPUTS):
            backward(output)
            for parameter in parameters:
                rows[parameter].append(parameter.grad_batch.flatten(1))
                del parameter.grad_batch, parameter.grad
        size = OUTPUTS * case.samples
        kernel = torch.zeros(size, size, device=x.device)
        for parameter in parameters:
            jacobian = torch.cat(rows.pop(parameter))
            kernel.addmm_(jacobian, jacobian.T)
        return kernel.view(OUTPUTS, case.samples, OUTPUTS, case.samples).permute(1, 3, 0, 2)

    return full if case.reduce == "full" else trace, lambda kernel: kernel.cpu().numpy()
