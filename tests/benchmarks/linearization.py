"""A user's network by post-training: an MLP on Fashion-MNIST, and what is left of its accuracy at a tenth of its ReLUs.

Run: NTKDYN_DATA=... python -P tests/benchmarks/linearization.py
"""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import ntkdyn as nd
from ntkdyn.datasets import Dataset, named_data


def loader(data: Dataset, *, shuffle: bool) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Batches of 128."""
    return DataLoader(TensorDataset(data.inputs, data.targets), batch_size=128, shuffle=shuffle)


def main() -> None:
    """Print a Markdown table: the dense network, the end of the ramp, and the end of the recovery."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    split = named_data("fashion-mnist")
    train, test = loader(split.train, shuffle=True), loader(split.test, shuffle=False)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(10):
        for inputs, targets in train:
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    begin = time.process_time()
    done = nd.linearize(model, train, test, target=0.1)
    seconds = time.process_time() - begin
    print("| phase | active units | NAPL | test accuracy, % |\n|---|---|---|---|")
    shown = {point.phase: point for point in done.curve}
    for phase, point in shown.items():
        print(f"| {phase} | {point.active_units} | {point.napl:.2f} | {100 * point.test_accuracy:.2f} |")
    print(f"\nseed 0, one run, {seconds:.0f} CPU s after the dense training")


if __name__ == "__main__":
    main()
