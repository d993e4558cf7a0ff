"""A file system that is really full: training ends with exit code 0 and its weights, what was committed is there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ntkdyn.store.reader import RunReader

TRAINING = """
import hashlib, sys, warnings
import torch
import ntkdyn as nd
from ntkdyn.recorder.recording import weights_digest
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
optimizer = torch.optim.Adam(model.parameters())
x = torch.randn(100, 6)
def train():
    for step in range(40):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
if len(sys.argv) > 1:
    recorder = nd.Recorder(model, ["ntk"], x, path=sys.argv[1])
    with recorder.attach(optimizer):
        train()
    recorder.close()
else:
    train()
print(weights_digest(model))
"""


COMMAND = [sys.executable, "-P", "-c", TRAINING]


@pytest.fixture(params=[100, 600])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of so many KiB; the recording needs about 1,000."""
    folder = tmp_path / "small"
    folder.mkdir()
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root mounts a file system")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def weights() -> str:
    """Digest of the weights without a recorder."""
    return subprocess.run(COMMAND, capture_output=True, text=True, check=True).stdout


def test_training_ends_as_without_a_recorder(small: Path, weights: str) -> None:
    recorded = subprocess.run([*COMMAND, str(small / "run")], capture_output=True, text=True, check=False)
    assert recorded.returncode == 0, recorded.stderr
    assert recorded.stdout == weights
    assert (
        recorded.stderr.count(
            "No space left on device; nothing committed before is lost; free disk space; training goes on"
        )
        == 1
    )
    assert recorded.stderr.count("could not be written; all that was committed before is kept") == 1
    steps = RunReader.open(small / "run").steps("ntk").tolist()
    named = recorded.stderr.split("run: step")[1].split(" could")[0].lstrip("s ").split(", ")
    assert sorted([*steps, *map(int, named)]) == list(range(41))
    kernels = RunReader.open(small / "run").read("ntk/kernel")
    assert np.isfinite(kernels).all()
    assert len(kernels) == len(steps) > 0
