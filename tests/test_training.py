"""What experiments share: augmentation, data by name, optimizers, complexity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ntkdyn.adam import Adam
from ntkdyn.configuration import configure
from ntkdyn.datasets import Dataset
from ntkdyn.errors import ConfigurationError, MissingDevice
from ntkdyn.experiments.settings import DataSettings
from ntkdyn.experiments.training import Training, complexity
from ntkdyn.experiments.training_data import Augmented, load_data
from ntkdyn.gates import gates
from ntkdyn.paths import path_lengths


def images(count: int = 200, channels: int = 2, size: int = 9) -> Dataset:
    inputs = torch.arange(1, count * channels * size * size + 1, dtype=torch.float32)
    return Dataset(inputs.reshape(count, channels, size, size), torch.arange(count) % 5, 5)


def test_augmented_images_are_shifted_and_mirrored() -> None:
    plain = images()
    moved = Augmented(plain, seed=3)
    inputs, targets = moved[:200]
    assert inputs.shape == plain.inputs.shape
    assert torch.equal(targets, plain.targets)
    padded = torch.nn.functional.pad(plain.inputs, (4, 4, 4, 4))
    seen = set()
    for number in range(200):
        found = [
            (down, right, mirrored)
            for down in range(9)
            for right in range(9)
            for mirrored in (False, True)
            if torch.equal(
                inputs[number],
                _crop(padded[number] if not mirrored else torch.nn.functional.pad(
                    plain.inputs[number].flip(2), (4, 4, 4, 4)), down, right, 9, mirrored),
            )
        ]  # fmt: skip
        assert len(found) == 1, number
        seen.add(found[0])
    # Every shift in both directions, and both mirrorings, come up.
    assert {down for down, _, _ in seen} == {right for _, right, _ in seen} == set(range(9))
    assert {mirrored for _, _, mirrored in seen} == {False, True}


def _crop(padded: torch.Tensor, down: int, right: int, size: int, mirrored: bool) -> torch.Tensor:
    # A mirrored image is shifted before it is mirrored: to the other side.
    right = 8 - right if mirrored else right
    return padded[:, down : down + size, right : right + size]


def test_a_batch_is_augmented_as_in_the_whole_epoch() -> None:
    moved = Augmented(images(), seed=3)
    whole, _ = moved[:200]
    part, targets = moved[64:96]
    assert torch.equal(part, whole[64:96])
    assert torch.equal(targets, moved.targets[64:96])
    assert not torch.equal(whole, Augmented(images(), seed=4)[:200][0])
    with pytest.raises(ConfigurationError, match=r"augment: found samples of shape \[3\], expected images"):
        Augmented(Dataset(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), 2), seed=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_are_augmented_alike_on_cuda() -> None:
    there, targets = Augmented(images(), 3, "cuda")[64:96]
    assert there.is_cuda
    here, expected = Augmented(images(), 3)[64:96]
    assert torch.equal(there.cpu(), here)
    assert torch.equal(targets.cpu(), expected)


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    np.savez(
        tmp_path / "own.npz",
        x_train=generator.normal(size=(120, 3, 12, 12)).astype(np.float32),
        y_train=np.arange(120) % 4,
        x_test=generator.normal(size=(40, 3, 12, 12)).astype(np.float32),
        y_test=np.arange(40) % 4,
    )
    return {
        "data": str(tmp_path / "own.npz"),
        "batch_size": 16,
        "epochs": 2,
        "network": "resnet",
        "width": 2,
        "depth": 8,
    }


def training(settings: dict[str, Any], seed: int = 0) -> Training:
    return Training.of(configure(DataSettings, settings), seed)


def test_epochs_differ_in_order_and_augmentation_and_repeat(own: dict[str, Any]) -> None:
    one, two = training(own | {"augment": "flip-crop"}), training(own | {"augment": "flip-crop"})
    assert torch.equal(one.epoch_data(1)[:16][0], two.epoch_data(1)[:16][0])
    assert not torch.equal(one.epoch_data(1)[:16][0], one.epoch_data(2)[:16][0])
    assert not torch.equal(one.epoch_data(1)[:16][0], one.epoch_data(1, data_order=1)[:16][0])
    assert one.steps_per_epoch == 7
    assert one.last_step == 14


def test_statistics_are_estimated_on_a_draw(tmp_path: Path) -> None:
    # A folder of images, or a user's file, may come class by class.
    labels = np.repeat(np.arange(3), 600)
    np.savez(
        tmp_path / "sorted.npz", x_train=labels[:, None].astype(np.float32), y_train=labels,
        x_test=labels[::9, None].astype(np.float32), y_test=labels[::9],
    )  # fmt: skip
    settings = {"data": str(tmp_path / "sorted.npz"), "width": 2, "depth": 1}
    drawn = training(settings).calibration.flatten()
    assert torch.bincount(drawn.long()).min() > 100
    assert torch.equal(drawn, training(settings, seed=1).calibration.flatten())


def test_random_labels_of_a_fixed_set_stay(own: dict[str, Any]) -> None:
    plain = training(own)
    random = plain.with_labels("random")

    def by_image(part: Training, epoch: int) -> dict[float, int]:
        samples = part.epoch_data(epoch)
        return {float(image.sum()): int(label) for image, label in zip(samples.inputs, samples.targets, strict=True)}

    assert by_image(random, 0) == by_image(random, 1)
    assert by_image(random, 0) != by_image(plain, 0)
    assert by_image(random, 0) != by_image(training(own, seed=1).with_labels("random"), 0)
    assert torch.equal(random.data.test.targets, plain.data.test.targets)
    with pytest.raises(ConfigurationError, match="labels_before: found 'parity', expected 'own' or 'random'"):
        plain.with_labels("parity")


def test_optimizers_own_the_weights_alone(own: dict[str, Any]) -> None:
    for name, kind in (("adam", Adam), ("sgd", torch.optim.SGD)):
        model, optimizer = training(own | {"optimizer": name, "weight_decay": 0.01, "momentum": 0.5}).build()
        assert type(optimizer) is kind
        assert optimizer.param_groups[0]["weight_decay"] == 0.01
        owned = {id(part) for group in optimizer.param_groups for part in group["params"]}
        assert owned == {id(part) for part_name, part in model.named_parameters() if not part_name.endswith("slope")}
        if name == "sgd":
            assert optimizer.param_groups[0]["momentum"] == 0.5
    # Momentum means nothing to Adam: two equal runs have one configuration.
    assert configure(DataSettings, {"momentum": 0.5}) == DataSettings()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_device_that_is_not_there(own: dict[str, Any]) -> None:
    there = training(own | {"device": "cuda"})
    with pytest.raises(MissingDevice, match="setting 'device': found 'cuda', expected 'cpu'; torch finds no such"):
        there.build()


def test_complexity_of_a_network(own: dict[str, Any]) -> None:
    model, _ = training(own).build()
    numbers = complexity(model, torch.zeros(2, 3, 12, 12))
    # Option A and post-activation, 3 stages of one block: widths 2, 4, 8; stem, then two gates a block.
    assert numbers["active_units"] == 2 + 2 * (2 + 4 + 8)
    assert numbers["active_share"] == 1
    assert numbers["effective_width"] == numbers["active_units"] / numbers["napl"]
    slopes = sum(part.numel() for name, part in model.named_parameters() if name.endswith("slope"))
    assert numbers["parameters"] == sum(part.numel() for part in model.parameters()) - slopes


def test_real_images_are_standardized(data_folder: Path) -> None:
    settings = configure(
        DataSettings, {"data": "fashion-mnist", "samples": 500, "test_samples": 100, "network": "resnet", "depth": 8}
    )
    data = load_data(settings)
    assert data.train.inputs.shape == (500, 1, 28, 28)
    assert torch.bincount(data.train.targets).tolist() == [50] * 10
    assert len(data.test) == 100
    assert abs(float(data.train.inputs.mean())) < 0.1
    assert float(data.train.inputs.std()) == pytest.approx(1, abs=0.1)


def test_each_kind_of_network_has_its_own_graph(own: dict[str, Any]) -> None:
    for options in ({}, {"depth": 14}, {"network": "plain"}, {"granularity": "layer"}, {"width": 3}, {}):
        one = training(own | options)
        model, _ = one.build()
        for gate in list(gates(model).values())[:2]:
            gate.freeze()
        expected = path_lengths(model, one.calibration[:2])
        for _ in range(2):
            found = one.complexity(model)
            assert (found["napl"], found["apl"]) == (expected.normalized, expected.mean), options
