"""How long exact path lengths take on a gated MLP: tracing once, and counting again at each snapshot.

Run: python -P tests/benchmarks/paths.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from ntkdyn.gates import Gate
from ntkdyn.paths import path_lengths, trace_paths


def milliseconds(function: Callable[[], object]) -> float:
    """Median of 15 calls."""
    times = []
    for _ in range(15):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    """Print a Markdown table."""
    torch.set_num_threads(1)
    print("| network | path_lengths, ms | again on the traced graph, ms |\n|---|---|---|")
    for depth, width in ((6, 64), (50, 256)):
        layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), Gate(width))]
        model, example = nn.Sequential(*layers, nn.Linear(width, 10)), torch.zeros(2, width)
        graph = trace_paths(model, example)
        whole = milliseconds(lambda model=model, example=example: path_lengths(model, example))  # type: ignore[misc]
        again = milliseconds(lambda graph=graph, model=model: graph.lengths(model))  # type: ignore[misc]
        print(f"| MLP, depth {depth}, width {width} | {whole:.1f} | {again:.1f} |")


if __name__ == "__main__":
    main()
