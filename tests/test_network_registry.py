"""Networks by name: defaults, ones of one's own, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ntkdyn.errors import ConfigurationError, UnknownName
from ntkdyn.experiments.networks import NETWORKS, Wanted, build_network, network

IMAGES = torch.zeros(2, 3, 32, 32)


def test_defaults_are_data() -> None:
    assert {name: (entry.width, entry.depth) for name, entry in NETWORKS.items()} == {
        "mlp": (64, 6), "plain": (16, 20), "resnet": (16, 20), "resnet-preactivation": (16, 20),
        "resnet18": (64, 18), "resnet50": (64, 50), "vgg": (64, 16), "repvgg": (48, 23), "vit": (192, 6),
    }  # fmt: skip
    assert NETWORKS["resnet"].options == {"shortcut": "identity", "normalization": "batch"}
    assert all("width" in entry.description for entry in NETWORKS.values())


def test_a_network_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkdyn.experiments.networks.registry._NETWORKS", own := {})
    monkeypatch.setattr("ntkdyn.experiments.networks.registry.NETWORKS", own)

    @network("flat", width=3, depth=1)
    def flat(wanted: Wanted, *, bias: bool = True) -> nn.Module:
        """Linear; width and depth count nothing."""
        return nn.Linear(wanted.features(), wanted.outputs, bias=bias)

    x = torch.zeros(2, 5)
    model = build_network("flat", x, 4, options={"bias": False})
    assert isinstance(model, nn.Linear)
    assert model.bias is None
    with pytest.raises(ConfigurationError, match=r"network 'flat' is registered twice: .*flat and .*flat; rename one"):
        network("flat", width=3, depth=1)(flat)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet", {"depth": 21}, "network 'resnet': found depth=21, expected 6n + 2 layers (8, 14, 20, ..., 56, ...)"),
        ("plain", {"depth": 2}, "network 'plain': found depth=2, expected 6n + 2 layers (8, 14, 20, ..., 56, ...)"),
        ("resnet-preactivation", {"depth": 9}, "network 'resnet-preactivation': found depth=9, expected 6n + 2"),
        ("resnet18", {"depth": 50}, "network 'resnet18': found depth=50, expected one of 10, 18, 34"),
        ("resnet50", {"depth": 18}, "network 'resnet50': found depth=18, expected one of 14, 26, 50, 101, 152"),
        ("vgg", {"depth": 12}, "network 'vgg': found depth=12, expected one of 11, 13, 16, 19"),
        ("repvgg", {"depth": 9}, "network 'repvgg': found depth=9, expected at least 10: 9 layers and a third stage"),
        ("mlp", {"depth": 0}, "network 'mlp': found depth=0, expected a whole number of at least 1"),
        ("mlp", {"width": 0}, "network 'mlp': found width=0, expected a whole number of at least 1"),
        ("mlp", {"width": 2.5}, "network 'mlp': found width=2.5, expected a whole number of at least 1"),
        ("mlp", {"granularity": "pixel"}, "Gate: granularity is 'pixel'; expected 'channel' or 'layer'"),
        ("vit", {"width": 200}, "network 'vit': found width=200, expected a multiple of heads=3"),
        ("vit", {"options": {"heads": 0}}, "network 'vit': found heads=0, expected a whole number of at least 1"),
        ("vit", {"options": {"patch": 5}},
         "network 'vit': found images of 32 x 32 pixels, expected sides that are multiples of patch=5"),
        ("vit", {"options": {"reading": "x"}}, "VisionTransformer: reading is 'x'; expected 'token' or 'mean'"),
        ("vgg", {"options": {"head": "x"}}, "VGG: head is 'x'; expected 'pooled' or 'hidden'"),
        ("vgg", {"options": {"pooling": "x"}}, "VGG: pooling is 'x'; expected 'max' or 'mean'"),
        ("resnet18", {"options": {"stem": "x"}}, "ImageNetResNet: stem is 'x'; expected 'imagenet' or 'small'"),
        ("repvgg", {"options": {"stem": "x"}}, "RepVGG: stem is 'x'; expected 'imagenet' or 'small'"),
        ("plain", {"options": {"normalization": "x"}}, "PlainNet: normalization is 'x'; expected 'batch' or 'none'"),
        ("resnet", {"options": {"stem": "small"}},
         "network 'resnet': found option 'stem', expected one of shortcut, normalization"),
        ("mlp", {"options": {"stem": "small"}}, "network 'mlp': found option 'stem', expected none"),
        ("resnet", {"example": torch.zeros(2, 64)},
         "network 'resnet': found inputs of shape [2, 64], expected images [samples, channels, height, width]; flat "
         "inputs fit network 'mlp'"),
        ("vit", {"example": torch.zeros(3, 32, 32)}, "network 'vit': found inputs of shape [3, 32, 32], expected"),
        ("mlp", {"example": torch.zeros(2)},
         "network 'mlp': found inputs of shape [2], expected [samples, features or further axes]"),
        ("mlp", {"example": torch.zeros(2, 3, dtype=torch.int64)},
         "network 'mlp': found inputs of type int64, expected floating point"),
        ("mlp", {"outputs": 0}, "network 'mlp': found outputs=0, expected a whole number of at least 1"),
    ],
)  # fmt: skip
def test_refusals(name: str, settings: dict[str, Any], message: str) -> None:
    arguments = {"example": IMAGES, "outputs": 10} | settings
    with pytest.raises(ConfigurationError) as error:
        build_network(name, arguments.pop("example"), arguments.pop("outputs"), **arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_unknown_names() -> None:
    with pytest.raises(
        UnknownName,
        match=r"^network 'resnet20' is unknown, expected one of mlp, plain, .*; did you mean 'resnet\w*'\?$",
    ):
        build_network("resnet20", IMAGES, 10)
    with pytest.raises(UnknownName, match=r"^network '' is unknown, expected one of [\w, -]+$"):
        build_network("", IMAGES, 10)
