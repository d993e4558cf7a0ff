"""Data sets: split before pairing, label rules, streams, a user's npz, class-balanced probe batches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ntkdyn.datasets import Dataset, digit_pairs, digits, load_npz, probe_batch, stream_seed
from ntkdyn.errors import ConfigurationError, ShapeError


def rows(inputs: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in inputs}


def test_digits_are_all_of_sklearns_and_split_once() -> None:
    from sklearn.datasets import load_digits

    split = digits(split_seed=3)
    assert (len(split.train), len(split.test)) == (1347, 450)
    together = torch.cat([split.train.inputs, split.test.inputs])
    assert rows(together) == rows(torch.as_tensor(load_digits().data / 16, dtype=torch.float32))
    assert together.min() == 0
    assert together.max() == 1
    assert torch.equal(torch.bincount(torch.cat([split.train.targets, split.test.targets])),
                       torch.bincount(torch.as_tensor(load_digits().target)))  # fmt: skip


def test_digits_say_where_they_are_from() -> None:
    first, second = digits(split_seed=0).provenance, digit_pairs("sum", pairs=8, split_seed=1).provenance
    assert first == second
    assert (first["name"], first["partial"]) == ("digits", None)
    assert first["files"][0]["bytes"] == 1797 * (64 * 4 + 8)
    assert len(first["files"][0]["sha256"]) == 64


def test_split_depends_on_its_seed_alone() -> None:
    torch.manual_seed(0)
    first = digits(split_seed=1)
    torch.manual_seed(1)
    assert torch.equal(first.train.inputs, digits(split_seed=1).train.inputs)
    assert not torch.equal(first.train.inputs, digits(split_seed=2).train.inputs)


@pytest.mark.parametrize(
    ("task", "rule", "classes"),
    [
        ("first", lambda a, b: a, 10),
        ("parity", lambda a, b: (a + b) % 2, 2),
        ("sum", lambda a, b: a + b, 19),
        ("sum10", lambda a, b: (a + b) % 10, 10),
    ],
)
def test_labels_follow_the_rule_and_no_test_digit_is_trained_on(task: Any, rule: Any, classes: int) -> None:
    data = digit_pairs(task, pairs=300, test_pairs=200, train_pairs=100, split_seed=5)
    source = digits(split_seed=5)
    for pairs, part in (
        (data.epoch(seed=0, data_order=0, epoch=0), source.train),
        (data.train, source.train),
        (data.test, source.test),
    ):
        # Only digits of the right part; two equal images would have equal labels here.
        label = {row.numpy().tobytes(): int(target) for row, target in zip(part.inputs, part.targets, strict=True)}
        for row, target in zip(pairs.inputs, pairs.targets, strict=True):
            a, b = label[row[:64].numpy().tobytes()], label[row[64:].numpy().tobytes()]
            assert rule(a, b) == int(target)
        assert pairs.classes == classes
        assert pairs.inputs.shape[1] == 128
    assert (len(data.train), len(data.test), len(data.epoch(seed=0, data_order=0, epoch=0))) == (100, 200, 300)


def test_epochs_are_fresh_and_repeatable() -> None:
    data = digit_pairs("sum10", pairs=64)
    again = digit_pairs("sum10", pairs=64)
    words = [(seed, order, epoch) for seed in (0, 1) for order in (0, 1) for epoch in (0, 1)]
    drawn = [data.epoch(seed=s, data_order=o, epoch=e).inputs for s, o, e in words]
    for index, (seed, order, epoch) in enumerate(words):
        assert torch.equal(drawn[index], again.epoch(seed=seed, data_order=order, epoch=epoch).inputs)
        assert all(not torch.equal(drawn[index], other) for other in drawn[index + 1 :])
    assert torch.equal(data.test.inputs, again.test.inputs)


def test_the_global_generator_is_not_used() -> None:
    state = torch.get_rng_state()
    data = digit_pairs("first", pairs=16)
    data.epoch(seed=0, data_order=0, epoch=0)
    probe_batch(data.test, per_class=2)
    assert torch.equal(state, torch.get_rng_state())


def test_streams_differ_by_every_word() -> None:
    seeds = {stream_seed(*words) for words in [(0,), (1,), (0, 1), (1, 0), (1, 1), (0, 0, 1)]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_bad_pairs() -> None:
    with pytest.raises(ConfigurationError, match="found task='product', expected one of first, parity, sum, sum10"):
        digit_pairs("product")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="found test_pairs=0, expected at least 1"):
        digit_pairs("sum", test_pairs=0)


def test_probe_batch_is_balanced_without_replacement() -> None:
    targets = torch.tensor([0] * 30 + [1] * 5 + [2] * 9)[torch.randperm(44)]
    data = Dataset(torch.arange(44.0)[:, None], targets, 3)
    inputs, labels = probe_batch(data, per_class=5, seed=1)
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert len(inputs.unique()) == 15
    assert torch.equal(targets[inputs[:, 0].long()], labels)
    assert torch.equal(inputs, probe_batch(data, per_class=5, seed=1)[0])
    assert not torch.equal(inputs, probe_batch(data, per_class=5, seed=2)[0])


def test_probe_batch_takes_pairs_and_indexable_data() -> None:
    inputs, targets = torch.arange(12.0)[:, None], torch.arange(12) % 3
    from_pair = probe_batch((inputs, targets), per_class=2, seed=4)
    listed = probe_batch(list(zip(inputs, targets, strict=True)), per_class=2, seed=4)
    from_arrays = probe_batch((inputs.numpy(), targets.numpy()), per_class=2, seed=4)
    for other in (listed, from_arrays):
        assert torch.equal(from_pair[0], other[0])
        assert torch.equal(from_pair[1], other[1])


def test_bad_probe_batches() -> None:
    data = Dataset(torch.zeros(4, 1), torch.tensor([0, 0, 0, 2]), 3, "toy set")
    with pytest.raises(ShapeError, match=r"found 0 samples of class 1 in toy set, expected at least per_class=1"):
        probe_batch(data, per_class=1)
    with pytest.raises(ShapeError, match="found 1 samples of class 2"):
        probe_batch((data.inputs, data.targets), per_class=2)
    with pytest.raises(ConfigurationError, match="found per_class=0"):
        probe_batch(data, per_class=0)
    with pytest.raises(ShapeError, match=re.escape("expected integers [N]")):
        probe_batch((torch.zeros(3, 1), torch.zeros(3)), per_class=1)


def write(folder: Path, **changes: Any) -> Path:
    arrays: dict[str, Any] = {
        "x_train": np.linspace(0, 9, 24).reshape(8, 3),
        "y_train": np.arange(8) % 4,
        "x_test": np.ones((4, 3)),
        "y_test": np.array([0, 1, 2, 5], np.uint8),
    } | changes
    path = folder / "mine.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_npz_is_taken_as_it_is(tmp_path: Path) -> None:
    split = load_npz(write(tmp_path))
    assert torch.equal(split.train.inputs, torch.linspace(0, 9, 24, dtype=torch.float64).reshape(8, 3).float())
    assert split.train.classes == split.test.classes == 6
    assert split.test.targets.dtype == torch.int64
    epoch = split.epoch(seed=0, data_order=0, epoch=1)
    assert rows(epoch.inputs) == rows(split.train.inputs)
    assert not torch.equal(epoch.inputs, split.epoch(seed=0, data_order=0, epoch=2).inputs)


def test_npz_number_types(tmp_path: Path) -> None:
    images = load_npz(write(tmp_path, x_train=np.full((8, 3), 255, np.uint8), x_test=np.ones((4, 3), np.uint8)))
    assert images.train.inputs.dtype == torch.float32
    assert images.train.inputs.max() == 255
    tokens = load_npz(write(tmp_path, x_train=np.full((8, 3), 70000, np.int32), x_test=np.ones((4, 3), np.int32)))
    assert tokens.train.inputs.dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"y_test": None}, ConfigurationError, "missing y_test; found x_train, y_train, x_test, expected"),
        ({"x_train": np.full((8, 3), np.nan)}, ConfigurationError, "x_train: found NaN or infinity"),
        ({"x_train": np.array([["a"]] * 8)}, ConfigurationError, "x_train: found type <U1"),
        ({"x_train": np.array([[{}]] * 8)}, ConfigurationError, "not readable as npz without pickle"),
        ({"y_train": np.zeros(8)}, ConfigurationError, "y_train: found type float64, expected integer labels"),
        ({"y_train": np.arange(8) - 1}, ConfigurationError, "y_train: found label -1, expected labels from 0 on"),
        ({"y_train": np.zeros((8, 2), int)}, ShapeError, "y_train: found shape [8, 2], expected [samples]"),
        ({"y_train": np.zeros(7, int)}, ShapeError, "found 8 samples in x_train and 7 labels in y_train"),
        ({"x_test": np.ones((4, 2))}, ShapeError, "found samples of shape [3] (torch.float32) in x_train and [2]"),
        ({"x_test": np.ones((4, 3), int)}, ShapeError, "(torch.int64) in x_test, expected the same"),
        ({"x_train": np.ones(8)}, ShapeError, "x_train: found shape [8], expected [samples, ...]"),
        ({"x_test": np.ones((0, 3)), "y_test": np.ones(0, int)}, ShapeError, "x_test: found shape [0, 3]"),
    ],
)
def test_bad_npz(tmp_path: Path, changes: Any, error: type[Exception], message: str) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(error, match=re.escape(message)) as caught:
        load_npz(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no zip")
    np.save(tmp_path / "single.npy", np.ones(3))
    for name, message in (
        ("text.npz", "not readable"),
        ("single.npy", "found a single array, expected an npz file"),
    ):
        with pytest.raises(ConfigurationError, match=message) as caught:
            load_npz(tmp_path / name)
        assert "\n" not in str(caught.value)
