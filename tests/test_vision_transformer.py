"""The small vision transformer: its formula written out, its size, its initial weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkdyn.errors import ConfigurationError
from ntkdyn.experiments.networks import VisionTransformer
from ntkdyn.gates import gates

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def count(model: nn.Module) -> int:
    """Parameters that a network with ReLUs has."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not name.endswith("slope"))


def test_parameters_of_deit_ti() -> None:
    # 5.7 million in table 1 of Touvron et al.
    with torch.device("meta"):
        model = VisionTransformer(outputs=1000, size=(224, 224), patch=16, depth=12)
    assert count(model) == 5_717_416
    assert [gate.channels for gate in gates(model).values()] == [768] * 12


def test_vision_transformer_by_hand() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(3, 5, size=(16, 8), patch=4, width=6, depth=1, heads=2, expansion=3).double()
    images = IMAGES[..., :8].double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)

    def norm(x: Tensor, layer: Any) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    pixels = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(4, 8, 48)
    tokens = pixels @ model.patches.weight.flatten(1).T + model.patches.bias
    x = torch.cat([model.token.expand(4, 1, 6), tokens], 1) + model.positions
    block = model.blocks[0]
    normed = norm(x, block.norm1)
    heads = []
    for half in (slice(0, 3), slice(3, 6)):
        q, k, v = (getattr(block.attention, part)(normed)[..., half] for part in ("query", "key", "value"))
        heads.append(torch.softmax(q @ k.mT / 3**0.5, -1) @ v)
    x = x + block.attention.output(torch.cat(heads, -1))
    wide = block.wide(norm(x, block.norm2))
    x = x + block.narrow(wide.relu() + block.gate.slope * wide.clamp_max(0))
    expected = model.readout(norm(x, model.norm)[:, 0])
    assert torch.allclose(model(images), expected, rtol=1e-12, atol=1e-12)


def test_vision_transformer_without_token_reads_the_mean() -> None:
    model = VisionTransformer(3, 5, size=(16, 16), width=6, depth=1, heads=1, reading="mean")
    assert model.token is None
    assert model.positions.shape == (1, 16, 6)
    with torch.no_grad():
        model.positions.zero_()
    # Without positions the order of patches does not matter.
    swapped = torch.cat([IMAGES[..., 4:8], IMAGES[..., :4], IMAGES[..., 8:]], -1)
    assert torch.allclose(model(IMAGES), model(swapped), atol=1e-6)


def test_initial_weights_of_the_vision_transformer() -> None:
    torch.manual_seed(0)
    model = VisionTransformer()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name.endswith("slope"):
            assert not parameter.any()
        elif "norm" in name:
            assert bool((parameter == 1).all())
        elif name != "patches.weight" and parameter.numel() > 3000:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.patches.weight.detach().var() * 48) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (32, 30)}, "VisionTransformer: images are 32 x 30; expected sides that patch=4 divides"),
        ({"width": 1}, "VisionTransformer: width is 1; expected at least 2 features to normalize"),
        ({"width": 10}, "VisionTransformer: width is 10; expected a multiple of heads=3"),
    ],
)
def test_wrong_vision_transformers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        VisionTransformer(**options)
