"""What becomes of the outputs: along which directions in output space the kernel is taken, and how they combine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigurationError

NamedReduction = Literal["trace", "mean", "each", "full"]
NAMED: tuple[str, ...] = ("trace", "mean", "each", "full")


@dataclass(frozen=True)
class Projection:
    """Unbiased estimate of the trace from ``count`` random output directions: the cost of ``count`` outputs, not C.

    Θ̂(x, x') = 1/k Σ_i v_iᵀ Θ(x, x') v_i with independent signs v_i ∈ {−1, 1}^C, the same for every sample, so that
    the estimate is itself a kernel. E[v vᵀ] = 1 makes it unbiased; its variance is (2/k) Σ_{c≠c'} Θ_cc'² at x = x'.

    Args:
        count: number of directions k.
        seed: of NumPy's generator; the same directions whatever the device, and nothing else is drawn from it.

    Raises: ConfigurationError: a count below 1.
    Source: Hutchinson 1990 (10.1080/03610919008812866).
    """

    count: int
    seed: int

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ConfigurationError(f"Projection: count is {self.count!r}; expected a whole number, at least 1")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigurationError(f"Projection: seed is {self.seed!r}; expected a whole number, at least 0")


@dataclass(frozen=True)
class SummedOutputs:
    """Kernel of the sum of all outputs, Σ_cc' Θ_cc' [N1, N2]; not the trace Σ_c Θ_cc."""


Reduction = NamedReduction | Projection | SummedOutputs


def check_reduction(reduce: object) -> None:
    """Raise ConfigurationError for what is no reduction."""
    if not (isinstance(reduce, (Projection, SummedOutputs)) or (isinstance(reduce, str) and reduce in NAMED)):
        expected = ", ".join(map(repr, NAMED))
        raise ConfigurationError(
            f"reduce is {reduce!r}; expected one of {expected}, Projection(count, seed) or SummedOutputs()"
        )


def directions(reduce: Reduction, outputs: int, like: Tensor) -> Tensor | None:
    """Rows v_i [K, C] whose kernels v_iᵀ Θ v_i are wanted; None stands for the C unit vectors."""
    if isinstance(reduce, SummedOutputs):
        return like.new_ones(1, outputs)
    if isinstance(reduce, Projection):
        signs = np.random.default_rng(reduce.seed).integers(0, 2, (reduce.count, outputs)) * 2.0 - 1.0
        return torch.from_numpy(signs / np.sqrt(reduce.count)).to(like)
    return None
