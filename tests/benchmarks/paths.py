"""How long exact path lengths take: tracing once, counting again at each snapshot, and once in fractions.

Run: python -P tests/benchmarks/paths.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ntkdyn.experiments.networks import GatedResNet
from ntkdyn.gates import Gate, gates
from ntkdyn.paths import trace_paths


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


class Exported(nn.Module):
    """A network that decides on a shape, so that torch.export has to trace it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x if x.shape[0] > 1 else x + 1)


def main() -> None:
    """Print a Markdown table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    multilayer = [
        (f"MLP, depth {depth}, width {width}", nn.Sequential(
            *[layer for _ in range(depth) for layer in (nn.Linear(width, width), Gate(width))], nn.Linear(width, 10)
        ), torch.zeros(2, width))
        for depth, width in ((6, 64), (50, 256))
    ]  # fmt: skip
    images = torch.zeros(1, 3, 32, 32)
    residual = [(f"ResNet{6 * blocks + 2}", GatedResNet(blocks=blocks), images) for blocks in (3, 9, 18)]
    exported = [("ResNet20 by torch.export", Exported(GatedResNet()), images)]
    print("| network | tracing, ms | path lengths on the traced graph, ms | in fractions, ms |\n|---|---|---|---|")
    for name, model, example in [*multilayer, *residual, *exported]:
        for gate in gates(model).values():
            gate.freeze(torch.rand(gate.channels) < 0.5)
        graph = trace_paths(model, example)
        times = (
            milliseconds(lambda model=model, example=example: trace_paths(model, example), 5),  # type: ignore[misc]
            milliseconds(lambda graph=graph, model=model: graph.lengths(model), 15),  # type: ignore[misc]
            milliseconds(lambda graph=graph, model=model: graph.lengths(model, exact=True), 1),  # type: ignore[misc]
        )
        print(f"| {name} | {times[0]:.0f} | {times[1]:.1f} | {times[2]:.0f} |")


if __name__ == "__main__":
    main()
