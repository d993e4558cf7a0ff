"""A full kernel larger than memory: computed in tiles on disk, read back, checked; by 1, 2, ... processes.

An MLP 784-512-512-512-10 on 4000 synthetic samples, reduce="full", float32: a matrix of 40,000 × 40,000, 6.4 GB. Needs
4 GB of disk for a while, in the folder for temporary files (TMPDIR). Peaks of memory are those of the operating system.

Run: python -P tests/benchmarks/sharded.py --processes 1 2
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import ntkdyn as nd

MIB = 2**20


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--tile", type=int, default=500)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--outputs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def problem(options: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor]:
    """The network and its inputs, the same in every process."""
    torch.manual_seed(0)
    widths = [784, options.width, options.width, options.width]
    layers: list[torch.nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [torch.nn.Linear(d_in, d_out), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(options.width, options.outputs))
    return model, torch.randn(options.samples, 784)


def peak() -> int:
    """Largest resident memory of this process so far, bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: over an exec it keeps the peak of the process that was forked.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def work(options: argparse.Namespace) -> None:
    """One process of several: compute its tiles, write down what they cost."""
    dist.init_process_group("gloo")
    model, x = problem(options)
    before, wall, cpu = peak(), time.perf_counter(), time.process_time()
    sink = nd.TileWriter(options.worker / "kernel")
    count = nd.sharded_ntk(model, x, sink=sink, tile=options.tile, reduce="full", progress=True)
    cost = {
        "tiles": count,
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "before": before,
        "peak": peak(),
    }
    (options.worker / f"rank-{dist.get_rank()}.json").write_text(json.dumps(cost))
    dist.destroy_process_group()


def rows_equal(kernel: nd.TiledKernel, options: argparse.Namespace) -> tuple[bool, float]:
    """Random rows read from disk: bitwise against tiles computed here; relative error against float64 autograd."""
    model, x = problem(options)
    generator = np.random.default_rng(0)
    size, equal, worst = options.tile, True, 0.0
    for row, column in generator.choice(options.samples, (3, 2)).tolist():
        first, second = sorted((row // size, column // size))
        rows, columns = (slice(block * size, (block + 1) * size) for block in (first, second))
        tile = nd.empirical_ntk(model, x[rows], None if first == second else x[columns], reduce="full").numpy()
        if row // size == first:
            expected = tile[row - rows.start]
        else:  # below the diagonal
            expected = tile[:, row - columns.start].transpose(0, 2, 1)
        block = slice(column // size * size, column // size * size + size)
        equal &= np.array_equal(kernel[row, block], expected)
        exact = nd.empirical_ntk(
            model, x[row : row + 1], x[column : column + 1], reduce="full", engine="reference", dtype=torch.float64
        ).numpy()[0, 0]
        worst = max(worst, np.linalg.norm(kernel[row, column] - exact) / np.linalg.norm(exact))
    return equal, worst


def measured(options: argparse.Namespace, processes: int) -> tuple[str, str]:
    """A Markdown row, but for its last column, and a digest of all tiles."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), __file__]
        command += ["--worker", name, "--samples", str(options.samples), "--tile", str(options.tile)]
        command += ["--width", str(options.width), "--outputs", str(options.outputs)]
        # torchrun leaves its logs in the folder for temporary files.
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TMPDIR": name}
        subprocess.run([sys.executable, *command], env=environment, check=True)
        costs = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]

        kernel = nd.TiledKernel.open(folder / "kernel")
        files = sorted((folder / "kernel" / "tiles").iterdir())
        stored = sum(file.stat().st_size for file in files)
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.read_bytes())
        equal, error = rows_equal(kernel, options)
        start = time.perf_counter()
        # One pass over the disk; positive, as it must be.
        vector = np.random.default_rng(1).standard_normal(kernel.matrix_shape[0]).astype("f4")
        positive = float(vector @ (kernel @ vector)) > 0
        product = time.perf_counter() - start
    dense = np.prod(kernel.shape) * kernel.dtype.itemsize
    row = (
        f"| {kernel.matrix_shape[0]:,} | {processes} × {options.threads} | {len(files)} of {options.tile} samples "
        f"| {max(cost['wall'] for cost in costs):.1f} | {sum(cost['cpu'] for cost in costs):.1f} "
        f"| {stored / MIB:.0f} ({100 * stored / dense:.0f} %) "
        f"| {max(cost['peak'] for cost in costs) / MIB:.0f} ({max(cost['before'] for cost in costs) / MIB:.0f}) "
        f"| {product:.1f} | {peak() / MIB:.0f} | {error:.0e} | {'equal' if equal and positive else 'DIFFERENT'}"
    )
    return row, digest.hexdigest()


def main() -> None:
    """Print a Markdown row for each number of processes."""
    options = parsed()
    torch.set_num_threads(options.threads)
    if options.worker is not None:
        work(options)
        return
    needed = 4 * (options.samples * options.outputs) ** 2
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < needed:
        sys.exit(f"{tempfile.gettempdir()}: found {free} bytes free, expected {needed}; set TMPDIR")
    print(
        "| n·C | processes × threads | tiles | s | CPU s | MiB on disk (of dense) | peak MiB of a process (before) "
        "| s for a product from disk | peak MiB, reading | error against float64 | rows, bitwise | tiles, bitwise |\n"
        f"|{'---|' * 12}"
    )
    first = ""
    for processes in options.processes:
        row, digest = measured(options, processes)
        first = first or digest
        print(f"{row} | {'equal' if digest == first else 'DIFFERENT'} |", flush=True)
    print(f"\ntorch {torch.__version__}")


if __name__ == "__main__":
    main()
