"""A kernel larger than the memory that it may take: recorded in bands, and a part of it read back.

Memory is what the process takes at its peak beyond what it has before, as Linux counts it.
Run: python -P tests/benchmarks/large_snapshot.py [--samples 2000] [--max-memory 512]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import ntkdyn as nd
from ntkdyn.processor import processor_name

OUTPUTS = 10
MIB = 2**20


def status(entry: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry))


@contextlib.contextmanager
def measured(what: str, size: float) -> Iterator[None]:
    """Print a row: what was done, its size, processor seconds and memory."""
    Path("/proc/self/clear_refs").write_text("5")
    before, started = status("VmRSS"), time.process_time()
    yield
    seconds, peak = time.process_time() - started, status("VmHWM") - before
    print(f"| {what} | {size / MIB:.4g} | {seconds:.1f} | {peak / MIB:.0f} |")


def main() -> None:
    """Print the table, after a comparison of the part with the kernel of its samples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--max-memory", type=int, default=512, help="MiB that the probe may take")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, OUTPUTS))
    inputs = torch.randn(options.samples, 64)
    nd.empirical_ntk(model, inputs[:4], reduce="full")  # what libraries load at their first use
    probe = f"ntk:reduce=full,max_memory={options.max_memory * MIB}"
    size = options.samples**2 * OUTPUTS**2 * 4
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run"
        recorder = nd.Recorder(model, [probe], inputs, path=path)
        print(f"| max_memory = {options.max_memory} MiB | MiB | CPU, s | memory at the peak, MiB |\n|---|---|---|---|")
        with measured("snapshot, committed as one", size), contextlib.redirect_stderr(io.StringIO()):
            recorder.record()
        recorder.close()
        run = nd.Run.open(path, trusted=True)
        rows = min(3, options.samples)
        with measured("three rows of it, read back", rows * size / options.samples):
            part = run.lazy("ntk/kernel")[0, -rows:]
        expected = nd.empirical_ntk(model, inputs[-rows:], inputs, reduce="full")
        error = (torch.from_numpy(part) - expected).abs().max() / expected.abs().max()
    print(f"\nlargest error of the part {error:.1e}; {processor_name()}, torch", end=" ")
    print(f"{torch.__version__}, 1 thread")


if __name__ == "__main__":
    main()
