"""Engine "reference": plain autograd, one row of the Jacobian at a time; slow, obviously right."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem, gradients
from .tracing import check_independence


def blocks(problem: Problem) -> dict[str, Tensor]:
    """Blocks of the kernel by key, from the whole Jacobian; memory N·C·P."""
    jacobian_1 = _jacobian(problem, 0)
    jacobian_2 = jacobian_1 if problem.inputs_2 is None else _jacobian(problem, 1)
    result: dict[str, Tensor] = {}
    for name, key in problem.keys.items():
        scale = problem.scales.get(name, 1.0)
        scaled = jacobian_1[name].double() * (scale.flatten() if isinstance(scale, torch.Tensor) else scale)
        block = _product(scaled, jacobian_2[name].double(), problem.combine)
        result[key] = result[key] + block if key in result else block
    return {key: block.to(problem.dtype) for key, block in result.items()}


def _jacobian(problem: Problem, side: int) -> dict[str, Tensor]:
    # [N, K, P] per parameter, along K directions of the outputs; rows of the whole batch, so that a network with layers
    # that are allowed in training mode gets the Jacobian of the function that was asked for.
    outputs = problem.run(side)
    check_independence(problem, side, outputs)
    leaves = list(problem.parameters.values())
    rows: list[list[Tensor]] = [[] for _ in leaves]
    connected = False
    for seed in torch.eye(outputs.numel(), dtype=outputs.dtype, device=outputs.device):
        found = gradients(outputs, leaves, seed.view(outputs.shape))
        connected |= any(gradient is not None for gradient in found)
        for row, leaf, gradient in zip(rows, leaves, found, strict=True):
            row.append(torch.zeros_like(leaf).flatten() if gradient is None else gradient.flatten())
    if not connected:
        problem.refuse_foreign_outputs(outputs)
    shape = (*outputs.shape, -1)
    jacobian = {name: torch.stack(row).view(shape) for name, row in zip(problem.parameters, rows, strict=True)}
    directions = problem.directions(outputs.detach())
    if directions is None:
        return jacobian
    return {name: torch.einsum("kc,ncp->nkp", directions, rows) for name, rows in jacobian.items()}


def _product(jacobian_1: Tensor, jacobian_2: Tensor, reduce: str) -> Tensor:
    equation = {"trace": "ncp,mcp->nm", "each": "ncp,mcp->cnm", "full": "ncp,mdp->nmcd"}[reduce]
    return torch.einsum(equation, jacobian_1, jacobian_2)
