"""The user's own data, on a real data set: handwritten digits as a file of arrays."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from ntkdyn.configuration import configure
from ntkdyn.experiment import run_experiment
from ntkdyn.plugins import load_experiment
from ntkdyn.results import Run


def read_idx(path: Path, count: int) -> np.ndarray:
    """First samples of a file in IDX format: two zero bytes, type, number of axes, sizes, data."""
    with gzip.open(path) as file:
        content = file.read()
    axes = content[3]
    sizes = np.frombuffer(content, ">u4", axes, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(sizes)[:count]


def test_mnist_takes_the_place_of_the_digit_pairs(data_folder: Path, tmp_path: Path) -> None:
    folder = data_folder / "mnist"
    arrays = {}
    for part, prefix, count in (("train", "train", 2048), ("test", "t10k", 500)):
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", count)
        arrays[f"x_{part}"] = images[:, ::2, ::2].reshape(count, -1).astype(np.float32) / 255
        arrays[f"y_{part}"] = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", count).astype(np.int64)
    np.savez(tmp_path / "mnist.npz", **arrays)

    experiment = load_experiment("nonlinear-advantage")
    settings = {"data": str(tmp_path / "mnist.npz"), "width": 32, "depth": 2, "epochs": 8, "latest_start": 2}
    settings |= {"start_epoch": 2, "ramp_epochs": 2, "settle_epochs": 1, "probe_per_class": 3}
    results = run_experiment(experiment, configure(experiment.Config, settings), seed=0, path=tmp_path / "run")

    # Chance is 10 %; a linear classifier on as many samples gets about 85 %.
    assert results["test_accuracy"] > 0.7
    assert results["active_units"] == round(0.1 * 64)
    run = Run.open(tmp_path / "run")
    assert run["ntk/test/kernel"].shape[1:] == (30, 30)
    assert np.bincount(run.targets("test")).tolist() == [3] * 10
