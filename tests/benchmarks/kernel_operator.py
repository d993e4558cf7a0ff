"""Twenty largest eigenvalues of an MLP's kernel: dense and decomposed, against Lanczos on NTKOperator.

One row a fresh process, one thread, float32: CPU seconds, products, peak memory above that before, and the error
against the first row with as many samples. Not named operator.py: that would hide the module of the standard library
from every script in this folder. Run: python -P tests/benchmarks/kernel_operator.py [--large]
"""

from __future__ import annotations

import multiprocessing
import platform
import resource
import sys
import time
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch
from torch import nn

import ntkdyn as nd

COUNT = 20
SMALL = [
    ("dense, all eigenvalues", 512, {}),
    ("dense, scipy eigsh", 512, {}),
    ("operator, tolerance 1e-4", 512, {"tolerance": 1e-4}),
    ("operator, tolerance 1e-6", 512, {"tolerance": 1e-6}),
    ("operator, tolerance 1e-4, chunk 64", 512, {"tolerance": 1e-4, "chunk": 64}),
]
LARGE = [
    ("operator, tolerance 1e-4", 4096, {"tolerance": 1e-4}),
    ("operator, tolerance 1e-4, max_memory 128 MiB", 4096, {"tolerance": 1e-4, "max_memory": 2**27}),
]


class Counting(nd.NTKOperator):
    """Counts its products."""

    products = 0

    def _matvec(self, x: Any) -> Any:
        self.products += 1
        return super()._matvec(x)


def network(samples: int) -> tuple[nn.Module, torch.Tensor]:
    """MLP 784-512-512-512-10 with ReLU, and normal inputs."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for d_in, d_out in ((784, 512), (512, 512), (512, 512)):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10)), torch.randn(samples, 784)


def peak_bytes() -> int:
    """Most memory that this process has held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(case: tuple[str, int, dict[str, Any]]) -> tuple[np.ndarray[Any, Any], dict[str, float]]:
    """Eigenvalues of one row, and what they took."""
    title, samples, further = case
    torch.set_num_threads(1)
    model, x = network(samples)
    for chunk in (None, 2):  # what torch loads on its first call is no memory of ours
        nd.NTKOperator(model, x[:4], chunk=chunk).top(1)
    before, cpu, wall = peak_bytes(), time.process_time(), time.perf_counter()
    products = 0
    if title.startswith("dense"):
        full = nd.empirical_ntk(model, x, reduce="full")
        matrix = full.permute(0, 2, 1, 3).reshape(10 * samples, 10 * samples).numpy()
        if "eigsh" in title:
            values = scipy.sparse.linalg.eigsh(matrix, COUNT, v0=np.ones(len(matrix), "f4"), return_eigenvectors=False)
        else:
            values = scipy.linalg.eigvalsh(matrix.astype(np.float64))
        values = np.sort(values)[::-1][:COUNT]
    else:
        tolerance = further.pop("tolerance")
        operator = Counting(model, x, **further)
        values = operator.top(COUNT, tolerance=tolerance).values.numpy()
        products = operator.products
    return values, {
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "products": products,
        "peak": (peak_bytes() - before) / 2**20,
    }


def main() -> None:
    """Print a Markdown table."""
    print(f"{platform.machine()}, torch {torch.__version__}, MLP 784-512-512-512-10, {COUNT} eigenvalues\n")
    print("| N·C | way | CPU s | wall s | products | ms a product | peak MiB | largest error / λ_1 |")
    print("|---|---|---|---|---|---|---|---|")
    reference: dict[int, np.ndarray[Any, Any]] = {}
    for case in SMALL + (LARGE if "--large" in sys.argv else []):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            values, found = pool.apply(measure, (case,))
        exact = reference.setdefault(case[1], values)
        each = f"{1e3 * found['cpu'] / found['products']:.1f}" if found["products"] else ""
        print(
            f"| {10 * case[1]} | {case[0]} | {found['cpu']:.1f} | {found['wall']:.1f} | {found['products'] or ''} | "
            f"{each} | {found['peak']:.0f} | {np.abs(values - exact).max() / exact[0]:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
