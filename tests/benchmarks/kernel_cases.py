"""The cases of the kernel's benchmark: which network, how many samples, which reduction, which goal.

Loads no framework, because the worker of a peer in jax must not hold torch as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OUTPUTS = 10


@dataclass(frozen=True)
class Case:
    """One row of the table: the empirical NTK of one network with 10 outputs on one batch, in float32.

    Attributes:
        goal: ratio to the fastest peer, on a processor where ntkdyn's products run at twice its peers' rate.
        share: of the peak at which that ratio is reached there; what counts on other processors.
    """

    name: str
    title: str
    network: str
    samples: int
    reduce: str
    goal: float | None = None
    share: float | None = None
    settings: Mapping[str, int] = field(default_factory=dict)
    activation: str = "relu"

    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel: [N, N], full [N, N, C, C]."""
        pair = (self.samples, self.samples)
        return pair if self.reduce == "trace" else (*pair, OUTPUTS, OUTPUTS)

    def as_json(self) -> dict[str, Any]:
        """The case for a worker."""
        return {**self.__dict__, "settings": dict(self.settings)}


def mlp(
    samples: int,
    reduce: str,
    goal: float | None = None,
    share: float | None = None,
    *,
    width: int = 512,
    depth: int = 3,
) -> Case:
    """MLP 784-width-…-width-10 with ``depth`` hidden layers."""
    title = f"MLP 784-{'-'.join([str(width)] * depth)}-10, n={samples}, {reduce}"
    return Case(f"mlp-{samples}-{reduce}", title, "mlp", samples, reduce, goal, share, {"width": width, "depth": depth})


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        mlp(256, "full", 5, 0.84),
        mlp(256, "trace", 2.5, 0.65),
        mlp(1024, "full", 8, 0.78),
        mlp(1024, "trace", 3.5, 0.69),
        Case("cnn-full", "8-layer CNN 3x32x32, widths 16-32-64, n=64, full", "cnn", 64, "full", 3, 0.63),
        Case("cnn-trace", "8-layer CNN 3x32x32, widths 16-32-64, n=64, trace", "cnn", 64, "trace", 3, 0.50),
        Case("resnet20-full", "ResNet20, BatchNorm in evaluation mode, n=64, full", "resnet20", 64, "full", 2.5, 0.59),
        Case("transformer-full", "Transformer block d=128 T=16 vocabulary 1000, n=64, full", "transformer", 64, "full",
             5, 0.65),
        Case("transformer-trace", "Transformer block, same, trace", "transformer", 64, "trace", 4.5, 0.48),
        Case("tiny", "MLP 784-32-32-10, n=16, full (a trial of the benchmark itself)", "mlp", 16, "full",
             settings={"width": 32, "depth": 2}),
    )
}  # fmt: skip
GOALS = tuple(name for name in CASES if name != "tiny")
