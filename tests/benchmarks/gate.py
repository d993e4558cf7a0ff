"""Training time of a gated layer against nn.PReLU; prints Markdown rows. Goal: a gated layer at most 1.15.

Run: python tests/benchmarks/gate.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ntkdyn import Gate
from ntkdyn.processor import processor_name

ROUNDS = 60
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "gated linear 256 x 1024": (lambda: nn.Linear(1024, 1024), (256, 1024), 1024),
    "gated 3x3 convolution 32 x 64 x 32 x 32": (lambda: nn.Conv2d(64, 64, 3, padding=1), (32, 64, 32, 32), 64),
    "activation alone 256 x 1024": (nn.Identity, (256, 1024), 1024),
    "activation alone 32 x 64 x 32 x 32": (nn.Identity, (32, 64, 32, 32), 64),
}


def training_step(layer: nn.Module, inputs: Tensor) -> Callable[[], None]:
    """Forward and backward of one layer: gradients of input and slopes and weights."""

    def step() -> None:
        inputs.grad = None
        layer.zero_grad(set_to_none=True)
        layer(inputs).backward(upstream)

    upstream = torch.randn_like(inputs)
    return step


def milliseconds(steps: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """CPU milliseconds of each round; interleaved, so that all meet the same state of the machine."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(ROUNDS + 5):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if round_ >= 5:
                times[name].append(1e3 * (time.process_time() - start))
    return times


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| layer | Gate, CPU ms | nn.PReLU, CPU ms | ratio (goal 1.15) |")
    print("|---|---|---|---|")
    for name, (make, shape, channels) in LAYERS.items():
        inputs = torch.randn(shape, requires_grad=True)
        layer = make()
        activations = {
            "Gate": nn.Sequential(layer, Gate(channels, slope=0.25)),
            "PReLU": nn.Sequential(layer, nn.PReLU(channels)),
        }
        found = milliseconds({key: training_step(gated, inputs) for key, gated in activations.items()})
        gate, prelu = (statistics.median(found[key]) for key in activations)
        # Of each round: both halves of a round meet the same load of the machine.
        ratio = statistics.median(one / other for one, other in zip(*found.values(), strict=True))
        print(f"| {name}, float32 | {gate:.2f} | {prelu:.2f} | {ratio:.2f} |")
    print(
        f"\none thread of {processor_name()}, torch {torch.__version__}, CPU time, medians of {ROUNDS} interleaved "
        "rounds"
    )


if __name__ == "__main__":
    main()
