"""Slow formulas that are obviously right and share no code with the library."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def ntk_by_loop(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    reduce: str = "trace",
    per: str | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    parameters: Sequence[str] | None = None,
) -> Any:
    """Empirical NTK in float64: every sample alone through the network, every output alone through autograd."""
    return combined(full_by_loop(model, x1, x2, forward=forward, parameters=parameters), reduce, per)


def full_by_loop(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    parameters: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Full kernel [N, M, C, C] of each parameter, of which all others are made."""
    model = copy.deepcopy(model).double()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if parameters is not None:
        names = [name for name, _ in model.named_parameters() if any(fnmatch(name, one) for one in parameters)]
    leaves = {name: parameter.requires_grad_() for name, parameter in model.named_parameters() if name in names}
    rows_1 = _jacobian(model, leaves, x1, forward)
    rows_2 = rows_1 if x2 is None else _jacobian(model, leaves, x2, forward)
    kernels: dict[str, Tensor] = {}
    for name in names:
        first, second = rows_1[name], rows_2[name]
        kernels[name] = torch.zeros(len(first), len(second), first.shape[1], second.shape[1], dtype=torch.float64)
        for n, one in enumerate(first):
            for m, other in enumerate(second):
                kernels[name][n, m] = one @ other.T
    return kernels


def combined(full: dict[str, Tensor], reduce: str, per: str | None) -> Any:
    """Kernel out of the full ones of each parameter, in total or in blocks."""
    kernels: dict[str, Tensor] = {}
    for name, kernel in full.items():
        owner = name.rsplit(".", 1)[0] if "." in name else "<root>"
        key = {None: "", "parameter": name, "layer": owner}[per]
        kernels[key] = kernels.get(key, 0) + _reduced(kernel, reduce)
    return kernels[""] if per is None else kernels


def _jacobian(
    model: nn.Module, leaves: dict[str, nn.Parameter], inputs: Any, forward: Callable[..., Tensor] | None
) -> dict[str, Tensor]:
    tensors: list[Tensor] = []
    tree_map_only(Tensor, tensors.append, inputs)
    rows: dict[str, list[list[Tensor]]] = {name: [] for name in leaves}
    for n in range(len(tensors[0])):
        sample = tree_map_only(Tensor, lambda t, n=n: _double(t[n : n + 1].clone()), inputs)
        outputs = model(sample) if forward is None else forward(model, sample)
        outputs = getattr(outputs, "logits", outputs)
        for name in leaves:
            rows[name].append([])
        for value in outputs.flatten():
            found = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
            for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
                rows[name][-1].append((torch.zeros_like(leaf) if gradient is None else gradient).flatten())
    return {name: torch.stack([torch.stack(row) for row in found]) for name, found in rows.items()}


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _reduced(full: Tensor, reduce: str) -> Tensor:
    if reduce == "full":
        return full
    each = torch.stack([full[:, :, c, c] for c in range(full.shape[2])])
    return {"each": each, "trace": each.sum(0), "mean": each.mean(0)}[reduce]
