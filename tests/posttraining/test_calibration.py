"""The samples on which BatchNorm statistics are estimated: a draw, not the beginning of a data set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ntkdyn as nd
from ntkdyn.posttraining.batches import calibration_inputs

CPU = torch.device("cpu")


def drawn(loader: Any, seed: int = 0) -> Any:
    return calibration_inputs(loader, "train_loader", CPU, seed=seed)


def by_class(samples: int, classes: int) -> TensorDataset:
    """Samples whose input is their number, class by class, as a folder of images comes."""
    return TensorDataset(torch.arange(samples), torch.arange(samples) * classes // samples)


@pytest.mark.parametrize(("size", "samples"), [(50, 2000), (7, 2000), (900, 2000), (64, 513)])
def test_samples_are_drawn_from_all_classes(size: int, samples: int) -> None:
    data = by_class(samples, 4)
    found = drawn(DataLoader(data, batch_size=size))
    assert found.shape == (512,)
    assert len(set(found.tolist())) == 512
    counts = torch.bincount(data.tensors[1][found], minlength=4)
    # 128 are expected, with a standard deviation of 8.5 (hypergeometric).
    assert (counts - 128).abs().max() < 40
    assert torch.equal(found, drawn(list(DataLoader(data, batch_size=size))))
    assert not torch.equal(found, drawn(DataLoader(data, batch_size=size), seed=1))


def test_each_sample_is_as_likely() -> None:
    data = by_class(1024, 4)
    loader = list(DataLoader(data, batch_size=100))
    times = torch.stack([torch.bincount(drawn(loader, seed), minlength=1024) for seed in range(200)]).sum(0).double()
    # Each is drawn with 1/2: 100 times of 200, with a standard deviation of 7.1; so is each hundred, with one of 71.
    assert (times - 100).abs().max() < 5 * 7.1
    assert (times[:1000].reshape(10, 100).mean(1) - 100).abs().max() < 3


def test_all_samples_where_there_are_fewer_and_any_tree() -> None:
    found = drawn(DataLoader(by_class(300, 3), batch_size=64))
    assert sorted(found.tolist()) == list(range(300))
    tree = [({"a": x, "b": [10 * x]}, y) for x, y in DataLoader(by_class(2000, 4), batch_size=100)]
    found = drawn(tree)
    assert torch.equal(found["b"][0], 10 * found["a"])
    assert len(set(found["a"].tolist())) == 512


def test_a_loader_without_end_is_left_after_its_length() -> None:
    class Endless:
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Any:
            while True:
                yield torch.zeros(10, 2), torch.zeros(10)

    assert drawn(Endless()).shape == (30, 2)


def test_statistics_of_batchnorm_are_not_those_of_the_first_class() -> None:
    """The first 512 samples of a data set that comes class by class are of one class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1800) * 3 // 1800
    inputs = torch.randn(1800, 4, generator=generator) + 10 * labels[:, None]
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=100)
    model(inputs)
    done = nd.linearize(model.eval(), loader, loader, target=4, ramp_epochs=1, recovery_epochs=1)
    # The mean of 512 draws: 10 with a standard deviation of 0.36 less a part for drawing without replacement.
    torch.testing.assert_close(done.model[0].running_mean, inputs.mean(0), rtol=0, atol=1.2)
    torch.testing.assert_close(done.model[0].running_var, inputs.var(0), rtol=0.1, atol=0)
