"""Families of networks: sizes of the papers, gates by name, equality with networks that were gated afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ntkdyn as nd
from ntkdyn.errors import ConfigurationError
from ntkdyn.experiments.networks import (
    VGG,
    GatedMLP,
    GatedResNet,
    ImageNetResNet,
    PlainNet,
    RepVGG,
    build_network,
)
from ntkdyn.gates import Gate, gates

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def count(model: nn.Module) -> int:
    """Parameters that a network with ReLUs has."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not name.endswith("slope"))


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        # By hand: convolutions, BatchNorm, readout.
        (lambda: GatedMLP(10, 3, width=7, depth=2), 10 * 7 + 7 + 7 * 7 + 7 + 7 * 3 + 3),
        (PlainNet, 269_722),
        (lambda: PlainNet(blocks=9), 853_018),
        (lambda: GatedResNet(preactivation=True), 269_722 - 2 * 16 - 2 * 32 - 2 * 64 + 2 * 16 + 2 * 32 + 2 * 64),
        (lambda: GatedResNet(preactivation=True, shortcut="convolution"), 269_722 + 512 + 2048),
        # torchvision's, loaded from whose state dicts all four kinds gave the same outputs bit for bit.
        (ImageNetResNet, 11_689_512),
        (lambda: ImageNetResNet(blocks=(3, 4, 6, 3)), 21_797_672),
        (lambda: ImageNetResNet(blocks=(3, 4, 6, 3), block="bottleneck"), 25_557_032),
        (lambda: ImageNetResNet(blocks=(3, 4, 23, 3), block="bottleneck"), 44_549_160),
        (lambda: ImageNetResNet(blocks=(3, 8, 36, 3), block="bottleneck"), 60_192_808),
        (lambda: ImageNetResNet(stem="small"), 11_689_512 - 3 * 64 * (49 - 9)),
        (lambda: VGG(outputs=1000, blocks=(1, 1, 2, 2, 2), head="hidden"), 132_868_840),
        (lambda: VGG(outputs=1000, blocks=(2, 2, 2, 2, 2), head="hidden"), 133_053_736),
        (lambda: VGG(outputs=1000, head="hidden"), 138_365_992),
        (lambda: VGG(outputs=1000, blocks=(2, 2, 4, 4, 4), head="hidden"), 143_678_248),
    ],
)
def test_parameters(build: Callable[[], nn.Module], parameters: int) -> None:
    with torch.device("meta"):
        model = build()
    assert count(model) == parameters
    units = sum(gate.channels for gate in gates(model).values())
    assert sum(p.numel() for p in model.parameters()) == parameters + units


@pytest.mark.parametrize(
    ("options", "layers", "parameters"),
    [
        ({}, 20, 269_722),
        ({"blocks": 9}, 56, 853_018),
        ({"shortcut": "convolution"}, 20, 269_722 + 512 + 64 + 2048 + 128),
        ({"widths": (16, 16, 16)}, 20, 42_682),
        ({"normalization": "none"}, 20, 269_722 - 688),
    ],
)
def test_sizes(options: dict[str, Any], layers: int, parameters: int) -> None:
    # 0.27 and 0.85 million in table 6 of He et al.; ResNet20 by hand: convolutions 432 + 13,824 + 50,688 + 202,752,
    # normalization 1,376, readout 650.
    model = GatedResNet(**options)
    assert count(model) == parameters
    weights = [name for name, _ in model.named_parameters() if "conv" in name or name.startswith("readout")]
    assert len([name for name in weights if name.endswith("weight")]) == layers
    assert model(IMAGES).shape == (4, 10)


def test_sizes_of_inputs_and_outputs() -> None:
    model = GatedResNet(1, 7, blocks=1, widths=(2, 5), granularity="layer")
    assert model(IMAGES[:, :1]).shape == (4, 7)
    assert {gate.slope.numel() for gate in gates(model).values()} == {1}


def test_gates_are_named_by_their_place() -> None:
    found = gates(GatedResNet())
    blocks = [f"stages.{stage}.{block}.gate{n}" for stage in range(3) for block in range(3) for n in (1, 2)]
    assert list(found) == ["gate", *blocks]
    assert [gate.channels for gate in found.values()] == [16] * 7 + [32] * 6 + [64] * 6
    assert all(not gate.slope.any() for gate in found.values())
    assert nd.nonlinear_units(GatedResNet(), IMAGES).always_active == {}


def ungated(model: nn.Module) -> nn.Module:
    """The same network with a ReLU for every Gate."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Gate):
            owner, _, attribute = name.rpartition(".")
            setattr(twin.get_submodule(owner), attribute, nn.ReLU())
    return twin


@pytest.mark.parametrize("options", [{}, {"shortcut": "convolution"}, {"normalization": "none"}])
def test_equals_a_network_that_was_gated_afterwards(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = GatedResNet(blocks=1, widths=(4, 6, 8), **options).eval()
    plain = ungated(model)
    converted = nd.gate_network(plain, IMAGES)
    assert list(gates(converted)) == list(gates(model))
    assert torch.equal(model(IMAGES), plain(IMAGES))
    with torch.no_grad():
        for first, second in zip(gates(model).values(), gates(converted).values(), strict=True):
            first.slope.uniform_(-0.2, 1.2)
            second.slope.copy_(first.slope)
    assert torch.equal(model(IMAGES), converted(IMAGES))
    assert not torch.equal(model(IMAGES), plain(IMAGES))


def test_shortcut_without_parameters() -> None:
    block = GatedResNet(blocks=1, widths=(4, 6)).stages[1][0]
    x = torch.randn(2, 4, 5, 5)
    found: Tensor = block.shortcut(x)
    assert torch.equal(found[:, :4], x[:, :, [0, 2, 4]][..., [0, 2, 4]])
    assert found.shape == (2, 6, 3, 3)
    assert not found[:, 4:].any()


def test_path_lengths() -> None:
    # The first gate, then per block one gate on one of two branches and one gate behind them.
    model = GatedResNet(widths=(4, 4, 4))
    assert nd.average_path_length(model, IMAGES, normalized=True) == pytest.approx(1 + 9 * 1.5)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = GatedResNet()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            fan = module.weight[0].numel()
            assert float(module.weight.detach().var() * fan) == pytest.approx(2, rel=0.1)
    assert not model.readout.bias.any()


@pytest.mark.parametrize("option", ["shortcut", "normalization"])
def test_wrong_settings(option: str) -> None:
    with pytest.raises(ConfigurationError, match=f"GatedResNet: {option} is 'C'; expected"):
        GatedResNet(**{option: "C"})  # type: ignore[arg-type]


# ---- preactivation, ImageNet, VGG -----------------------------------------------------------------------------------


def test_preactivated_blocks() -> None:
    model = GatedResNet(blocks=1, widths=(4, 6), preactivation=True)
    assert [name for name, _ in model.named_children()] == [
        "conv",
        "stages",
        "norm",
        "gate",
        "pool",
        "flatten",
        "readout",
    ]
    assert [gate.channels for gate in gates(model).values()] == [4, 4, 4, 6, 6]
    # Without branches nothing but the shortcut is left, which is not activated.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "conv2" in name:
                parameter.zero_()
    model.eval()
    hidden = model.conv(IMAGES)
    shortened = torch.cat([hidden[:, :, ::2, ::2], torch.zeros(4, 2, 8, 8)], 1)
    assert torch.equal(model.stages(hidden), shortened)
    projected = GatedResNet(blocks=1, widths=(4, 6), preactivation=True, shortcut="convolution")
    assert isinstance(projected.stages[1][0].shortcut, nn.Conv2d)


def test_names_of_torchvision() -> None:
    """torchvision 0.28's own state dicts load strictly; its names are written down here."""

    def names(model: nn.Module) -> set[str]:
        # Gates are known by "frozen"; ReLUs have no state.
        own = {f"{name}.{key}" for name in gates(model) for key in ("slope", "frozen")}
        return {key for key in model.state_dict() if key not in own and not key.endswith("num_batches_tracked")}

    norm = ("weight", "bias", "running_mean", "running_var")
    for block, convolutions in (("basic", 2), ("bottleneck", 3)):
        expected = {"conv1.weight", *(f"bn1.{key}" for key in norm), "fc.weight", "fc.bias"}
        for stage in range(1, 5):
            for number in range(1, convolutions + 1):
                expected |= {f"layer{stage}.0.conv{number}.weight"} | {
                    f"layer{stage}.0.bn{number}.{key}" for key in norm
                }
            if stage > 1 or block == "bottleneck":
                expected |= {f"layer{stage}.0.downsample.0.weight"} | {f"layer{stage}.0.downsample.1.{k}" for k in norm}
        assert names(ImageNetResNet(blocks=(1, 1, 1, 1), width=2, block=block)) == expected  # type: ignore[arg-type]
    expected = {f"classifier.{place}.{key}" for place in (0, 3, 6) for key in ("weight", "bias")}
    for place in (0, 4, 8, 11, 15, 18, 22, 25):
        expected |= {f"features.{place}.weight", f"features.{place}.bias"} | {f"features.{place + 1}.{k}" for k in norm}
    assert names(VGG(blocks=(1, 1, 2, 2, 2), width=1, head="hidden")) == expected


@pytest.mark.parametrize(("side", "stem"), [(32, "small"), (63, "small"), (64, "imagenet"), (96, "imagenet")])
def test_stems_fit_the_images(side: int, stem: str) -> None:
    images = torch.zeros(2, 3, side, side)
    network = build_network("resnet18", images, 5, width=2)
    assert hasattr(network, "maxpool") == (stem == "imagenet")
    last = nn.Sequential(*list(network)[:-3])(images)
    assert last.shape[2:] == ((-(-side // 8),) * 2 if stem == "small" else (-(-side // 32),) * 2)
    layers = build_network("repvgg", images, 5, width=2)
    assert nn.Sequential(*list(layers)[:-3])(images).shape[2:] == last.shape[2:]
    patches = build_network("vit", images[:, :, : side // 16 * 16, : side // 16 * 16], 5, width=4, depth=1)
    assert patches.patches.kernel_size == ((4, 4) if stem == "small" else (16, 16))


@pytest.mark.parametrize("side", [1, 5, 28, 32, 45])
@pytest.mark.parametrize("head", ["pooled", "hidden"])
def test_vgg_takes_images_of_any_side(side: int, head: Any) -> None:
    model = VGG(1, 4, blocks=(1, 1, 1, 1, 1), width=2, head=head, pooling="mean").eval()
    assert model(torch.randn(2, 1, side, side)).shape == (2, 4)
    assert model.features(torch.randn(2, 1, side, side)).shape == (2, 16, *(-(-side // 32),) * 2)


@pytest.mark.parametrize("family", [PlainNet, ImageNetResNet, VGG, RepVGG])
def test_initial_weights_of_other_families(family: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = family()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight.numel() > 9000:
            assert float(module.weight.detach().var() * module.weight[0].numel()) == pytest.approx(2, rel=0.1)
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) and module.bias is not None:
            assert not module.bias.any()


def test_another_block_of_imagenet() -> None:
    with pytest.raises(ConfigurationError, match="ImageNetResNet: block is 'wide'; expected 'basic' or 'bottleneck'"):
        ImageNetResNet(block="wide")  # type: ignore[arg-type]
