"""What a kernel snapshot costs beside training: share of an epoch of 50,000 synthetic images 3 x 32 x 32.

Training steps and snapshots of the gated ResNet20 are timed in one run, interleaved, and scaled to an epoch. CPU
seconds of all threads; on another device wall seconds. The kernel is that of the recorder: over weights and biases,
in evaluation mode, on a clone. Prints Markdown. Run: python tests/benchmarks/snapshots.py [--threads 2] [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional

import ntkdyn as nd
from ntkdyn.experiments.networks import GatedResNet
from ntkdyn.processor import processor_name

IMAGES = 50_000
NETWORKS: Mapping[str, tuple[int, ...]] = {
    "gated ResNet20, widths 16-32-64": (16, 32, 64),
    "gated 20-layer ResNet, width 16": (16, 16, 16),
}
KERNELS: Mapping[str, tuple[nd.kernel.Reduction, float]] = {
    "exact trace": ("trace", 3.0),
    "one projection": (nd.Projection(1, seed=0), 0.5),
    "summed outputs": (nd.SummedOutputs(), 0.5),
}


def processor(device: torch.device) -> str:
    """Model name, where the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """CPU seconds of all threads; wall seconds where the work is done elsewhere."""
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.accelerator.synchronize(device)
    start = time.perf_counter()
    work()
    torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def measure(widths: tuple[int, ...], options: argparse.Namespace) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of each training step and of each snapshot by kind, the latter spread evenly over the former."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = GatedResNet(widths=widths).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, labels = torch.randn(options.batch, 3, 32, 32, device=device), torch.randint(10, (options.batch,))
    labels, probes = labels.to(device), torch.randn(options.probes, 3, 32, 32, device=device)
    parameters = [name for name, _ in model.named_parameters() if not name.endswith(".slope")]

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def snapshot(reduce: nd.kernel.Reduction) -> Callable[[], object]:
        return lambda: nd.empirical_ntk(model.eval(), probes, reduce=reduce, parameters=parameters)

    steps: list[float] = []
    found: dict[str, list[float]] = {name: [] for name in KERNELS}
    warm, every = 3, max(1, options.steps // options.snapshots)
    for number in range(-warm, options.steps):
        model.train()
        taken = seconds(step, device)
        if number >= 0:
            steps.append(taken)
        if number == -1 or (number >= 0 and number % every == every - 1):
            for name, (reduce, _) in KERNELS.items():
                taken = seconds(snapshot(reduce), device)
                if number >= 0:
                    found[name].append(taken)
    return steps, found


def count(model: nn.Module) -> int:
    """All parameters, slopes included."""
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Print one row a network and kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=50, help="training steps (default 50)")
    parser.add_argument("--snapshots", type=int, default=5, help="of each kind (default 5)")
    parser.add_argument("--batch", type=int, default=128, help="images a training step (default 128)")
    parser.add_argument("--probes", type=int, default=128, help="images of the kernel (default 128)")
    parser.add_argument("--only", type=int, choices=range(len(NETWORKS)), help="number of the only network")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"| network | parameters | epoch, s | kernel of {options.probes} | snapshot, s | share, % | goal, % |")
    print("|---|---|---|---|---|---|---|")
    chosen = list(NETWORKS.items())
    for network, widths in chosen if options.only is None else [chosen[options.only]]:
        steps, found = measure(widths, options)
        epoch = statistics.median(steps) * IMAGES / options.batch
        for name, (_, goal) in KERNELS.items():
            cost = statistics.median(found[name])
            print(
                f"| {network} | {count(GatedResNet(widths=widths)):,} | {epoch:.4g} | {name} | {cost:.3g} | "
                f"{100 * cost / epoch:.2f} | {goal} |",
                flush=True,
            )
    device = torch.device(options.device)
    kind = f"CPU seconds, {options.threads} threads" if device.type == "cpu" else "wall seconds"
    print(
        f"\n{processor(device)}, torch {torch.__version__}, {kind}; medians of {options.steps} training steps of "
        f"{options.batch} images and of {options.snapshots} snapshots each"
    )


if __name__ == "__main__":
    main()
