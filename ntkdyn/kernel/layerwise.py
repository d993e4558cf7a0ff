"""Engine "layerwise": one backward pass per output for all samples, contracted layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from .accumulator import Accumulator
from .contraction import Contraction, inner_products
from .plan import Head, Plan
from .planning import planned, planned_side, warn_of_unreached
from .precision import full_rate
from .problem import Problem
from .rows import Workspace


def blocks(problem: Problem) -> dict[str, Tensor]:
    """Blocks of the kernel by key; exact for every network, whichever layers it is made of."""
    plan = planned(problem)
    warn_of_unreached(plan)
    found = _accumulated(problem, plan)
    if found is None:
        # Other samples take another way through the network: run them all at once, and look at that run.
        found = _accumulated(problem, planned(problem, uniform=False))
    return cast(dict[str, Tensor], found)


def _accumulated(problem: Problem, plan: Plan) -> dict[str, Tensor] | None:
    """None where the network does something else for some samples than for others."""
    symmetric = problem.inputs_2 is None
    result = {key: _zeros(problem, plan) for key in dict.fromkeys(problem.keys.values())}
    tiles, tiles_2 = plan.tiles(problem.sizes[0]), plan.tiles(problem.sizes[1])
    extent = plan.extent(problem)
    features: tuple[dict[int, Tensor | None], dict[int, Tensor | None]] = ({}, {})
    workspace = Workspace()
    for group in plan.groups:
        for start in range(0, plan.seeds.count, plan.chunk):
            chosen = range(start, min(start + plan.chunk, plan.seeds.count))
            for row, samples in enumerate(tiles):
                first = planned_side(problem, plan, 0, samples, group, chosen)
                if first is None:
                    return None
                features[0][row] = first.head_input
                columns = range(row, len(tiles)) if symmetric else range(len(tiles_2))
                for column in columns:
                    same = symmetric and column == row
                    others = tiles_2[column]
                    second = first if same else planned_side(problem, plan, 1, others, group, chosen)
                    if second is None:
                        return None
                    features[1][column] = second.head_input
                    targets = {
                        key: Accumulator(
                            plan.combine,
                            _part(plan, block, samples, others, chosen),
                            symmetric=same,
                            by_direction=extent.by_direction,
                        )
                        for key, block in result.items()
                    }
                    with full_rate():
                        named = {name: targets[problem.keys[name]] for name in group}
                        work = Contraction(first, second, named, problem.scales, extent, workspace)
                        work.add(group, release=not same or len(columns) == 1)
    if symmetric:
        for block in result.values():
            _mirror(plan, block, tiles, extent.by_direction)
    if plan.head is not None:
        inputs, inputs_2 = (torch.cat([one for one in found.values() if one is not None]) for found in features)
        result = {key: _from_features(problem, plan.head, block) for key, block in result.items()}
        _add_head(problem, plan.head, result, inputs, inputs if symmetric else inputs_2)
    return {key: block.permute(0, 2, 1, 3) for key, block in result.items()} if problem.combine == "full" else result


def _zeros(problem: Problem, plan: Plan) -> Tensor:
    size, size_2 = problem.sizes
    count = plan.seeds.count
    if plan.combine == "trace":
        return _new_zeros(problem, plan, size, size_2)
    if plan.combine == "each":
        return _new_zeros(problem, plan, count, size, size_2)
    if plan.extent(problem).by_direction:
        return _new_zeros(problem, plan, count, size, count, size_2).permute(1, 0, 3, 2)
    return _new_zeros(problem, plan, size, count, size_2, count)


def _new_zeros(problem: Problem, plan: Plan, *shape: int) -> Tensor:
    if plan.outputs.device.type != "cpu":
        return plan.outputs.new_zeros(shape, dtype=problem.dtype)
    # NumPy asks for pages of 2 MiB that are zero already: a large result takes a fifth of the time.
    dtype = torch.empty(0, dtype=problem.dtype).numpy().dtype
    return torch.from_numpy(np.zeros(shape, dtype))


def _part(plan: Plan, block: Tensor, samples: slice, others: slice, chosen: range) -> Tensor:
    if plan.combine == "trace":
        return block[samples, others]
    if plan.combine == "each":
        return block[chosen.start : chosen.stop, samples, others]
    return block[samples, :, others]


def _mirror(plan: Plan, block: Tensor, tiles: Sequence[slice], by_direction: bool) -> None:
    """Fill the lower triangle: within tiles on the diagonal, and tile by tile below it."""
    whole = range(plan.seeds.count)
    for row, samples in enumerate(tiles):
        part = _part(plan, block, samples, samples, whole)
        Accumulator(plan.combine, part, symmetric=True, by_direction=by_direction).finish()
        for others in tiles[row + 1 :]:
            upper = _part(plan, block, samples, others, whole)
            lower = _part(plan, block, others, samples, whole)
            lower.copy_(upper.permute(2, 3, 0, 1) if plan.combine == "full" else upper.mT)


def _from_features(problem: Problem, head: Head, block: Tensor) -> Tensor:
    """Kernel of the outputs from that of the last layer's input: W K Wᵀ."""
    if not head.from_features or problem.combine == "trace":
        return block
    weight = head.weight.to(problem.dtype)
    width = weight.shape[1]
    split = torch.unflatten(torch.unflatten(block, 3, (-1, width)), 1, (-1, width))
    if problem.combine == "each":
        own = split.diagonal(dim1=1, dim2=4)  # [N1, d, N2, d, T]
        return torch.einsum("nimjt,ci,cj->tcnm", own, weight, weight).flatten(0, 1)
    return torch.einsum("ntimsj,ci,ej->ntcmse", split, weight, weight).flatten(4, 5).flatten(1, 2)


def _add_head(problem: Problem, head: Head, result: dict[str, Tensor], inputs: Tensor, inputs_2: Tensor) -> None:
    """Add the last layer's own kernel, (a_t · b_t' + 1) for each output channel with itself."""
    channels = len(head.weight)
    right, right_2 = (one.to(problem.dtype).reshape(len(one), -1, one.shape[-1]) for one in (inputs, inputs_2))
    for role, name in head.names.items():
        scale = cast(float, problem.scales.get(name, 1.0))
        if role == "weight":
            features = inner_products(right, right_2).mul_(scale)
        else:
            features = right.new_full((len(right), right.shape[1], len(right_2), right_2.shape[1]), scale)
        Accumulator(problem.combine, result[problem.keys[name]], symmetric=False, by_direction=True).add_identity(
            features, channels
        )
