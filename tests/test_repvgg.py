"""RepVGG: sizes of A0 to A2, the fused network, path lengths of both graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ntkdyn as nd
from ntkdyn.errors import ConfigurationError
from ntkdyn.experiments.networks import RepVGG, build_network
from ntkdyn.gates import gates

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def count(model: nn.Module) -> int:
    """Parameters that a network with ReLUs has."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not name.endswith("slope"))


@pytest.mark.parametrize(
    ("width", "training", "fused"),
    # Millions in the README of Ding et al.'s code, for 1000 outputs.
    [(48, 9.11, 8.31), (64, 14.09, 12.79), (96, 28.21, 25.50)],
)
def test_parameters_of_repvgg(width: int, training: float, fused: float) -> None:
    with torch.device("meta"):
        model = build_network("repvgg", torch.zeros(1, 3, 224, 224), 1000, width=width)
    assert isinstance(model, RepVGG)
    assert count(model) / 1e6 == pytest.approx(training, abs=0.005)
    assert count(model.fused()) / 1e6 == pytest.approx(fused, abs=0.005)


def test_fused_repvgg_has_the_same_outputs() -> None:
    torch.manual_seed(0)
    model = RepVGG(3, 7, blocks=(2, 1, 2, 1), widths=(3, 4, 4, 6, 5)).double()
    images = IMAGES.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
        for gate in gates(model).values():
            gate.slope.uniform_(-0.2, 0.9)
            gate.freeze(torch.rand(gate.channels) < 0.3)
    for _ in range(3):
        model(images + torch.rand(()))
    model.eval()
    before = torch.get_rng_state()
    fused = model.fused()
    assert torch.equal(torch.get_rng_state(), before)
    assert not fused.training
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert sum(isinstance(module, nn.Conv2d) for module in fused.modules()) == 7
    with torch.no_grad():
        found, expected = fused(images), model(images)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-10
    assert list(gates(fused)) == list(gates(model))
    for name, gate in gates(model).items():
        assert torch.equal(gates(fused)[name].slope, gate.slope)
        assert torch.equal(gates(fused)[name].frozen, gate.frozen)
    # Copies: the one is not trained with the other.
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in fused.parameters()}
    assert not shared
    assert all(parameter.requires_grad for parameter in fused.parameters())


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_path_lengths_of_both_repvgg_graphs(stem: Any, granularity: Any) -> None:
    # T6: L - 1 - k, for A2's 23 layers 22, whether branches are fused or not.
    model = RepVGG(3, 5, widths=(2, 3, 4, 5, 6), stem=stem, granularity=granularity).eval()
    fused = model.fused()
    assert len(gates(model)) == len(gates(fused)) == 22
    for linear in range(3):
        for network in (model, fused):
            lengths = nd.path_lengths(network, IMAGES[:, :3])
            assert (lengths.mean, lengths.normalized) == (pytest.approx(22 - linear), pytest.approx(22 - linear))
            list(gates(network).values())[5 * linear].freeze()
    if granularity == "channel":
        for network in (model, fused):
            list(gates(network).values())[1].freeze(torch.tensor([True, False, False]))
            lengths = nd.path_lengths(network, IMAGES[:, :3])
            assert (lengths.mean, lengths.normalized) == (pytest.approx(19 - 1 / 3), pytest.approx(19 - 1 / 3))


@pytest.mark.parametrize(
    ("width", "widths"),
    [
        (48, [48, 48, 96, 192, 1280]),
        (64, [64, 64, 128, 256, 1280]),
        (96, [64, 96, 192, 384, 1408]),
        (3, [3, 3, 6, 12, 80]),
        (56, [56, 56, 112, 224, 1280]),
        (80, [64, 80, 160, 320, 1344]),
        (192, [64, 192, 384, 768, 2816]),
    ],
)
def test_widths_of_repvgg(width: int, widths: list[int]) -> None:
    with torch.device("meta"):
        model = build_network("repvgg", IMAGES, 5, width=width, depth=10)
    stages = [gate.channels for gate in gates(model).values()]
    assert stages == [widths[0], *[widths[1]] * 2, *[widths[2]] * 4, widths[3], widths[4]]


def test_repvgg_without_statistics() -> None:
    model = RepVGG(blocks=(1, 1, 1, 1), widths=(2, 2, 2, 2, 2))
    model.stage0[0].norm.running_mean = None
    with pytest.raises(
        ConfigurationError, match="RepVGG: a BatchNorm has no running statistics; expected some; nothing"
    ):
        model.fused()
