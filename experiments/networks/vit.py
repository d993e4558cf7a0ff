"""Small vision transformers."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ConfigurationError
from ...gates import Gate, Granularity
from .registry import Wanted, network

Reading = Literal["token", "mean"]


class VisionTransformer(nn.Module):
    """Transformer on patches of images, with a Gate in the place of every GELU.

    Patches are embedded linearly and given learned positions; ``depth`` blocks follow, each
    x + attention(norm1(x)), then x + narrow(gate(wide(norm2(x)))); norm, reading, readout. Softmax and LayerNorm stay,
    so that the network is not affine when all gates are linear. Gates start as ReLUs.

    Weights are normal with standard deviation 0.02, cut off at 2, those of the patches with variance 1 / inputs;
    positions and token as the former; biases 0.

    Args:
        inputs: channels of the images [N, inputs, height, width].
        outputs: number of outputs.
        size: height and width of the images.
        patch: side of a patch in pixels; divides both.
        width: features of a patch.
        depth: blocks.
        heads: of the attention; divides width.
        expansion: hidden features of a block's feed-forward part, and so units, per feature.
        reading: "token": the outputs are read from a learned class token in front of the patches; "mean": from the
            mean over patches.
        granularity: of the gates, as in Gate.

    Raises: ConfigurationError: sides that patch does not divide, a width of 1 or one that heads do not divide, another
        reading.
    Source: Dosovitskiy et al. 2020 (arXiv 2010.11929); Touvron et al. 2020 (arXiv 2012.12877) for the initialization.
    """

    def __init__(
        self,
        inputs: int = 3,
        outputs: int = 10,
        *,
        size: tuple[int, int] = (32, 32),
        patch: int = 4,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        expansion: int = 4,
        reading: Reading = "token",
        granularity: Granularity = "channel",
    ) -> None:
        super().__init__()
        if reading not in ("token", "mean"):
            raise ConfigurationError(f"VisionTransformer: reading is {reading!r}; expected 'token' or 'mean'")
        if size[0] % patch or size[1] % patch:
            raise ConfigurationError(
                f"VisionTransformer: images are {size[0]} x {size[1]}; expected sides that patch={patch} divides"
            )
        if width < 2:
            # LayerNorm makes a constant of a single feature.
            raise ConfigurationError(f"VisionTransformer: width is {width}; expected at least 2 features to normalize")
        if width % heads:
            raise ConfigurationError(f"VisionTransformer: width is {width}; expected a multiple of heads={heads}")
        self.patches = nn.Conv2d(inputs, width, patch, stride=patch)
        tokens = size[0] // patch * (size[1] // patch) + (reading == "token")
        self.token = nn.Parameter(torch.empty(1, 1, width)) if reading == "token" else None
        self.positions = nn.Parameter(torch.empty(1, tokens, width))
        self.blocks = nn.Sequential(
            *(_Block(width, heads, expansion * width, granularity=granularity) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, outputs)
        self._initialize()

    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            if name in ("token", "positions") or (name.endswith("weight") and parameter.dim() == 2):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.normal_(self.patches.weight, std=1 / math.sqrt(self.patches.weight[0].numel()))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.patches(images).flatten(2).transpose(1, 2)
        if self.token is not None:
            hidden = torch.cat([self.token.expand(hidden.shape[0], -1, -1), hidden], dim=1)
        hidden = self.norm(self.blocks(hidden + self.positions))
        outputs: Tensor = self.readout(hidden.mean(1) if self.token is None else hidden[:, 0])
        return outputs


class _Block(nn.Module):
    """Attention beside a shortcut, then a hidden layer beside a shortcut; LayerNorm in front of each."""

    def __init__(self, width: int, heads: int, hidden: int, *, granularity: Granularity) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.wide = nn.Linear(width, hidden)
        self.gate = Gate(hidden, dim=-1, granularity=granularity)
        self.narrow = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        outputs: Tensor = tokens + self.narrow(self.gate(self.wide(self.norm2(tokens))))
        return outputs


class _Attention(nn.Module):
    """Self-attention with scaled dot products, [N, tokens, width] to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        outputs: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return outputs


@network("vit", width=192, depth=6)
def vit(wanted: Wanted, *, patch: int | None = None, heads: int | None = None, reading: Reading = "token") -> nn.Module:
    """Small vision transformer; width: features of a patch, depth: blocks.

    Patches have 4 pixels on a side, or 16 in images of at least 64; heads have 64 features, and there is at least 1.
    """
    channels, *size = wanted.images()
    patch = wanted.positive("patch", (4 if wanted.small() else 16) if patch is None else patch)
    heads = wanted.positive("heads", max(1, wanted.width // 64) if heads is None else heads)
    if size[0] % patch or size[1] % patch:
        raise wanted.error(f"images of {size[0]} x {size[1]} pixels", f"sides that are multiples of patch={patch}")
    if wanted.width % heads:
        raise wanted.error(f"width={wanted.width}", f"a multiple of heads={heads}")
    return VisionTransformer(
        channels,
        wanted.outputs,
        size=(size[0], size[1]),
        patch=patch,
        width=wanted.width,
        depth=wanted.depth,
        heads=heads,
        reading=reading,
        granularity=wanted.granularity,
    )
