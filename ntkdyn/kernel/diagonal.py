"""Kernel of each sample with itself, without the kernel between samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from .accumulator import Combine
from .factors import Factors
from .plan import Head, Plan
from .planning import planned, planned_side, warn_of_unreached
from .precision import full_rate
from .problem import Problem
from .rows import Scale, whole_rows
from .sides import Side, Use

# Numbers in one intermediate; 16 MiB in float32.
_BLOCK = 2**22


def diagonal_blocks(problem: Problem) -> dict[str, Tensor]:
    """Θ(x_n, x_n) by key: [N] for a trace, [C, N] for each output, [N, C, C] for all pairs."""
    plan = planned(problem)
    warn_of_unreached(plan)
    found = _diagonal(problem, plan)
    if found is None:
        plan = planned(problem, uniform=False)
        found = _diagonal(problem, replace(plan, tile=problem.sizes[0]))
    return cast(dict[str, Tensor], found)


def _diagonal(problem: Problem, plan: Plan) -> dict[str, Tensor] | None:
    size, count = problem.sizes[0], plan.seeds.count
    shape = {"trace": (size,), "each": (count, size), "full": (size, count, count)}[plan.combine]
    result = {key: plan.outputs.new_zeros(shape, dtype=problem.dtype) for key in dict.fromkeys(problem.keys.values())}
    features: list[Tensor] = []
    # A pass through the network for each tile is all that tiles cost here.
    tile = plan.tile if plan.tile < size or problem.train_mode else min(size, max(plan.strip, 16))
    for samples in replace(plan, tile=tile).tiles(size):
        for start in range(0, count, plan.chunk):
            chosen = range(start, min(start + plan.chunk, count))
            side = planned_side(problem, plan, 0, samples, list(problem.parameters), chosen)
            if side is None:
                return None
            if side.head_input is not None and start == 0:
                features.append(side.head_input)
            for name, key in problem.keys.items():
                parts = [(use, role) for use in side.uses for role, used in use.call.names.items() if used == name]
                if parts or name in side.rest:
                    with full_rate():
                        found = _of_parameter(name, parts, side, problem.scales.get(name, 1.0), plan.combine)
                    if plan.combine == "each":
                        result[key][chosen.start : chosen.stop, samples] += found
                    else:
                        result[key][samples] += found
    if plan.head is not None:
        result = {key: _from_features(problem, plan.head, block) for key, block in result.items()}
        _add_head(problem, plan.head, result, torch.cat(features))
    return result


def _of_parameter(name: str, parts: Sequence[tuple[Use, str]], side: Side, scale: Scale, combine: Combine) -> Tensor:
    """[n], [K, n] or [n, K, K] of one parameter."""
    if len(parts) == 1 and name not in side.rest and not isinstance(scale, Tensor):
        factors = parts[0][0].contribution(parts[0][1], slice(0, side.size))
        if isinstance(factors, Factors) and _gram_is_cheaper(factors):
            return _gram(factors, combine) * scale
    pieces: list[Tensor] = []
    widest = parts[0][0].form(parts[0][1]).numbers if parts else side.rest[name].shape[-1]
    count = parts[0][0].count if parts else side.rest[name].shape[1]
    for start in range(0, side.size, max(1, _BLOCK // (widest * count))):
        samples = slice(start, min(start + max(1, _BLOCK // (widest * count)), side.size))
        rows = whole_rows(name, parts, side, scale, samples)
        if combine == "full":
            pieces.append(rows @ rows.mT)
        else:
            squares = rows.square().sum(2)
            pieces.append(squares.sum(1) if combine == "trace" else squares.T)
    return torch.cat(pieces, 1 if combine == "each" else 0)


def _gram_is_cheaper(factors: Factors) -> bool:
    positions, width = factors.left.shape[2:]
    d_in = factors.classes or (1 if factors.right is None else factors.right.shape[-1])
    return bool(positions**2 * (d_in + width) <= positions * width * d_in) or factors.classes > 0


def _gram(factors: Factors, combine: Combine) -> Tensor:
    left, right = factors.left, factors.right
    if right is None:
        features = left.new_ones(len(left), left.shape[2], left.shape[2])
    elif factors.classes:
        features = (right[:, :, None] == right[:, None]).to(left.dtype)
    else:
        features = right @ right.mT
    if combine == "full":
        # Σ_st F[s, t] (g[k, s] · g[l, t]) = (F g)ᵀ g, positions and features side by side.
        mixed = torch.einsum("nst,nktd->nksd", features, left)
        return mixed.flatten(2) @ left.flatten(2).mT
    each = (torch.einsum("nst,nktd->nksd", features, left) * left).sum((2, 3))
    return each.sum(1) if combine == "trace" else each.T


def _from_features(problem: Problem, head: Head, block: Tensor) -> Tensor:
    """Diagonal of the outputs from that of the last layer's input: W K Wᵀ."""
    if not head.from_features or problem.combine == "trace":
        return block
    weight = head.weight.to(problem.dtype)
    width = weight.shape[1]
    split = torch.unflatten(torch.unflatten(block, 2, (-1, width)), 1, (-1, width))  # [N, T, d, T, d]
    if problem.combine == "each":
        return torch.einsum("nijt,ci,cj->tcn", split.diagonal(dim1=1, dim2=3), weight, weight).flatten(0, 1)
    return torch.einsum("ntisj,ci,ej->ntcse", split, weight, weight).flatten(3, 4).flatten(1, 2)


def _add_head(problem: Problem, head: Head, result: dict[str, Tensor], inputs: Tensor) -> None:
    """Add the last layer's own kernel, (a_t · a_t' + 1) for each output channel with itself."""
    channels = len(head.weight)
    right = inputs.to(problem.dtype).reshape(len(inputs), -1, inputs.shape[-1])
    for role, name in head.names.items():
        scale = cast(float, problem.scales.get(name, 1.0))
        target = result[problem.keys[name]]
        products = right @ right.mT if role == "weight" else right.new_ones(len(right), right.shape[1], right.shape[1])
        own = products.diagonal(dim1=1, dim2=2) * scale
        if problem.combine == "trace":
            target += channels * own.sum(1)
        elif problem.combine == "each":
            torch.unflatten(target, 0, (-1, channels)).add_(own.T.unsqueeze(1))
        else:
            split = torch.unflatten(torch.unflatten(target, 2, (-1, channels)), 1, (-1, channels))
            split.diagonal(dim1=2, dim2=4).add_((products * scale).unsqueeze(-1))
