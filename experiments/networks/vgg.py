"""VGG networks with BatchNorm."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import nn

from ...errors import ConfigurationError
from ...gates import Gate, Granularity
from .convolution import initialize
from .registry import Wanted, network

Head = Literal["pooled", "hidden"]
Pooling = Literal["max", "mean"]


class VGG(nn.Sequential):
    """VGG16 with BatchNorm, and with a Gate in the place of every ReLU; weights have the names of torchvision's.

    Five stages of 3x3 convolutions with width, 2 width, 4 width, 8 width and 8 width channels, 2x2 pooling after each;
    odd sides are rounded up, so that 28 pixels are enough. Weights are normal with variance 2 / inputs of the layer,
    biases 0 (torchvision: variance 2 / outputs).

    Args:
        inputs: channels of the images [N, inputs, height, width].
        outputs: number of outputs.
        blocks: convolutions of each stage; (1, 1, 2, 2, 2) is VGG11 or A, (2, 2, 2, 2, 2) VGG13 or B,
            (2, 2, 3, 3, 3) VGG16 or D, (2, 2, 4, 4, 4) VGG19 or E.
        width: channels of the first stage.
        head: "pooled": mean over the image and one linear layer, usual for small images; "hidden": the paper's, two
            hidden layers of 64 width units on 7 x 7 pixels, each with a Gate and dropout. A state dict of
            torchvision's VGG loads into the latter.
        pooling: "max", or "mean": max-pooling is nonlinear and no unit, so that a network of it whose gates are all
            linear is not affine.
        granularity: of the gates, as in Gate.

    Raises: ConfigurationError: another head or pooling.
    Source: Simonyan and Zisserman 2014 (arXiv 1409.1556), table 1; Ioffe and Szegedy 2015 (arXiv 1502.03167).
    """

    def __init__(
        self,
        inputs: int = 3,
        outputs: int = 10,
        *,
        blocks: Sequence[int] = (2, 2, 3, 3, 3),
        width: int = 64,
        head: Head = "pooled",
        pooling: Pooling = "max",
        granularity: Granularity = "channel",
    ) -> None:
        if head not in ("pooled", "hidden"):
            raise ConfigurationError(f"VGG: head is {head!r}; expected 'pooled' or 'hidden'")
        if pooling not in ("max", "mean"):
            raise ConfigurationError(f"VGG: pooling is {pooling!r}; expected 'max' or 'mean'")
        features, size = nn.Sequential(), inputs
        pool = nn.MaxPool2d if pooling == "max" else nn.AvgPool2d
        for number, count in enumerate(blocks):
            channels = width * 2 ** min(number, 3)
            for _ in range(count):
                features.append(nn.Conv2d(size, channels, 3, padding=1))
                features.append(nn.BatchNorm2d(channels))
                features.append(Gate(channels, granularity=granularity))
                size = channels
            features.append(pool(2, ceil_mode=True))
        layers: OrderedDict[str, nn.Module] = OrderedDict(features=features)
        layers["avgpool"] = nn.AdaptiveAvgPool2d(7 if head == "hidden" else 1)
        layers["flatten"] = nn.Flatten()
        layers["classifier"] = nn.Linear(size, outputs)
        if head == "hidden":
            layers["classifier"] = _hidden_layers(size, outputs, 64 * width, granularity)
        super().__init__(layers)
        initialize(self)


def _hidden_layers(channels: int, outputs: int, hidden: int, granularity: Granularity) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(49 * channels, hidden),
        Gate(hidden, granularity=granularity),
        nn.Dropout(),
        nn.Linear(hidden, hidden),
        Gate(hidden, granularity=granularity),
        nn.Dropout(),
        nn.Linear(hidden, outputs),
    )


_BLOCKS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


@network("vgg", width=64, depth=16)
def vgg(wanted: Wanted, *, head: Head = "pooled", pooling: Pooling = "max") -> nn.Module:
    """VGG with BatchNorm; width: channels of the first stage, depth: 11, 13, 16 or 19.

    The depth is the paper's and counts three linear layers at the end; with head "pooled" there is one.
    """
    channels, _, _ = wanted.images()
    if wanted.depth not in _BLOCKS:
        raise wanted.error(f"depth={wanted.depth}", f"one of {', '.join(map(str, _BLOCKS))}")
    return VGG(
        channels,
        wanted.outputs,
        blocks=_BLOCKS[wanted.depth],
        width=wanted.width,
        head=head,
        pooling=pooling,
        granularity=wanted.granularity,
    )
