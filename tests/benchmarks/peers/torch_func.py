"""torch.func's two recipes for the empirical NTK, as in PyTorch's tutorial on neural tangent kernels."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_cases import Case
from kernel_networks import read
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

TOOLS = {"torch.func Jacobian": "jacobian", "torch.func products": "products"}
PAIRS = 256  # of samples at a time in the recipe by products
SAMPLES = 16  # at a time in the recipe by Jacobians: a fifth faster than all 64 on the CNN, as fast on the Transformer


def versions() -> dict[str, str]:
    """Versions for the report."""
    return {"torch": importlib.metadata.version("torch")}


def prepare(tool: str, case: Case, folder: Path, device: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The call, and what turns its result into an array of the case's shape."""
    network, x = read(case, folder, device)
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    recipe = by_jacobians if TOOLS[tool] == "jacobian" else by_products
    return lambda: recipe(network, parameters, x, case.reduce), lambda kernel: kernel.cpu().numpy()


def _single(network: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda parameters, x: functional_call(network, parameters, (x.unsqueeze(0),)).squeeze(0)


def by_jacobians(network: nn.Module, parameters: dict[str, Tensor], x: Tensor, reduce: str) -> Tensor:
    """Per-sample Jacobians of all parameters, contracted."""
    jacobians = vmap(jacrev(_single(network)), (None, 0), chunk_size=SAMPLES)(parameters, x)
    equation = "Naf,Mbf->NMab" if reduce == "full" else "Naf,Maf->NM"
    total: Tensor | None = None
    for jacobian in jacobians.values():
        flat = jacobian.flatten(2)
        block = torch.einsum(equation, flat, flat)
        total = block if total is None else total.add_(block)
    assert total is not None
    return total


def by_products(network: nn.Module, parameters: dict[str, Tensor], x: Tensor, reduce: str) -> Tensor:
    """One vector-Jacobian and one Jacobian-vector product for each pair of samples and output."""
    single = _single(network)

    def pair(x1: Tensor, x2: Tensor) -> Tensor:
        output, pull_back = vjp(lambda p: single(p, x1), parameters)

        def row(seed: Tensor) -> Tensor:
            return jvp(lambda p: single(p, x2), (parameters,), pull_back(seed))[1]

        block = vmap(row)(torch.eye(output.numel(), dtype=output.dtype, device=output.device))
        return block if reduce == "full" else block.trace()

    rows = max(1, PAIRS // len(x))
    return vmap(vmap(pair, (None, 0)), (0, None), chunk_size=rows)(x, x)
