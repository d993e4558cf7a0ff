"""Class-balanced subsets: as equal as the counts allow, by the seed alone, one inside the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ntkdyn.datasets import Dataset, Split, subset
from ntkdyn.errors import ConfigurationError


def split_of(counts: list[int]) -> Split:
    """A data set with so many samples of each class, shuffled; the inputs are the samples' numbers."""
    labels = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts)))
    data = Dataset(torch.arange(len(labels), dtype=torch.float32)[:, None], labels, len(counts), "toy set", ("a", "b"))
    return Split(data, data, {"name": "toy"})


def most_equal(counts: list[int], total: int) -> list[int]:
    """Sorted sizes by handing out one sample at a time to the class that has got the fewest and has some left."""
    got = [0] * len(counts)
    for _ in range(total):
        open_classes = [label for label in range(len(counts)) if got[label] < counts[label]]
        got[min(open_classes, key=lambda label: got[label])] += 1
    return sorted(got)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any), st.data(), st.integers(0, 3))
def test_as_equal_as_the_counts_allow(counts: list[int], data: st.DataObject, seed: int) -> None:
    split = split_of(counts)
    total = data.draw(st.integers(1, sum(counts)))
    drawn = subset(split, samples=total, seed=seed)
    sizes = torch.bincount(drawn.train.targets, minlength=len(counts)).tolist()
    assert sorted(sizes) == most_equal(counts, total)
    numbers = drawn.train.inputs[:, 0].long()
    assert numbers.tolist() == sorted(set(numbers.tolist())), "in the order of the data set, none twice"
    assert torch.equal(split.train.targets[numbers], drawn.train.targets)
    assert drawn.test is split.test
    if total > 1:
        smaller = subset(split, samples=total - 1, seed=seed).train.inputs[:, 0].long()
        assert set(smaller.tolist()) < set(numbers.tolist())


def test_by_the_seed_alone() -> None:
    split = split_of([40, 40, 40])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = subset(split, samples=30, test_samples=30, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    again = subset(split, samples=30, test_samples=30, seed=1)
    assert torch.equal(first.train.inputs, again.train.inputs)
    assert torch.equal(first.test.inputs, again.test.inputs)
    assert not torch.equal(first.train.inputs, first.test.inputs)
    assert not torch.equal(first.train.inputs, subset(split, samples=30, seed=2).train.inputs)


def test_the_rest_goes_to_other_classes_under_other_seeds() -> None:
    split = split_of([40, 40, 40])
    larger = {int(torch.bincount(subset(split, samples=31, seed=seed).train.targets).argmax()) for seed in range(20)}
    assert larger == {0, 1, 2}


def test_what_was_drawn_is_recorded() -> None:
    split = split_of([10, 10])
    assert subset(split) is split
    drawn = subset(split, test_samples=4, seed=7)
    assert drawn.provenance == {"name": "toy", "subset": {"samples": 20, "test_samples": 4, "seed": 7}}
    assert drawn.test.class_names == ("a", "b")
    assert split.provenance == {"name": "toy"}


@pytest.mark.parametrize("setting", ["samples", "test_samples"])
@pytest.mark.parametrize("count", [0, -1, 21])
def test_impossible_numbers(setting: str, count: int) -> None:
    with pytest.raises(ConfigurationError, match=f"^{setting}: found {count}, expected 1 to 20, the size of toy set$"):
        subset(split_of([10, 10]), **{setting: count})
