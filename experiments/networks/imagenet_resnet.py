"""Residual networks for ImageNet, ResNet-18 to ResNet-152, also with a stem for small images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn

from ...errors import ConfigurationError
from ...gates import Gate, Granularity
from .convolution import convolution, initialize
from .registry import Wanted, network

Stem = Literal["imagenet", "small"]


class ImageNetResNet(nn.Sequential):
    """ResNet-18 as it stands, with a Gate in the place of every ReLU; weights have the names of torchvision's.

    Stem, four stages of blocks with width, 2 width, 4 width and 8 width channels, each later stage at half the
    resolution, mean over the image, fc. A block is gate(last norm + shortcut(x)) of two 3x3 convolutions, or, as
    "bottleneck", of 1x1, 3x3 (with the stride) and 1x1 to four times the channels; where the shape changes the
    shortcut is a normalized 1x1 convolution. A state dict of torchvision's ResNet loads; gates keep their slopes.
    Weights are normal with variance 2 / inputs of the layer, biases 0 (torchvision: variance 2 / outputs).

    Args:
        inputs: channels of the images [N, inputs, height, width].
        outputs: number of outputs.
        blocks: blocks of each stage.
        width: channels of the stem and of the first stage.
        block: "basic" or "bottleneck".
        stem: "imagenet": 7x7 convolution at stride 2 and max-pooling at stride 2; "small": 3x3 convolution at stride 1
            and nothing else, for images of 32 pixels.
        granularity: of the gates, as in Gate.

    Max-pooling is nonlinear and no unit: a network with the stem "imagenet" whose gates are all linear is not affine.

    Raises: ConfigurationError: another block or stem.
    Source: He et al. 2015 (arXiv 1512.03385), table 1; torchvision for the place of the stride.
    """

    def __init__(
        self,
        inputs: int = 3,
        outputs: int = 1000,
        *,
        blocks: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        block: Literal["basic", "bottleneck"] = "basic",
        stem: Stem = "imagenet",
        granularity: Granularity = "channel",
    ) -> None:
        if block not in ("basic", "bottleneck"):
            raise ConfigurationError(f"ImageNetResNet: block is {block!r}; expected 'basic' or 'bottleneck'")
        if stem not in ("imagenet", "small"):
            raise ConfigurationError(f"ImageNetResNet: stem is {stem!r}; expected 'imagenet' or 'small'")
        gate, large = partial(Gate, granularity=granularity), stem == "imagenet"
        block_class = _Bottleneck if block == "bottleneck" else _BasicBlock
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv1"] = convolution(inputs, width, 2 if large else 1, kernel=7 if large else 3, plain=False)
        layers["bn1"] = nn.BatchNorm2d(width)
        layers["gate1"] = gate(width)
        if large:
            layers["maxpool"] = nn.MaxPool2d(3, stride=2, padding=1)
        size = width
        for number, count in enumerate(blocks):
            stage = nn.Sequential()
            for position in range(count):
                stride = 2 if number and not position else 1
                stage.append(block_class(size, width * 2**number, stride, gate=gate))
                size = block_class.expansion * width * 2**number
            layers[f"layer{number + 1}"] = stage
        layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(size, outputs)}
        super().__init__(layers)
        initialize(self)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the second gate comes after their sum."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, *, gate: Callable[[int], Gate]) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, width, stride, plain=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.gate1 = gate(width)
        self.conv2 = convolution(width, width, plain=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)
        self.gate2 = gate(width)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.gate1(self.bn1(self.conv1(inputs)))
        outputs: Tensor = self.gate2(self.bn2(self.conv2(hidden)) + self.downsample(inputs))
        return outputs


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the third gate comes after their sum."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, *, gate: Callable[[int], Gate]) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = convolution(inputs, width, kernel=1, plain=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.gate1 = gate(width)
        self.conv2 = convolution(width, width, stride, plain=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.gate2 = gate(width)
        self.conv3 = convolution(width, outputs, kernel=1, plain=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)
        self.gate3 = gate(outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.gate1(self.bn1(self.conv1(inputs)))
        hidden = self.gate2(self.bn2(self.conv2(hidden)))
        outputs: Tensor = self.gate3(self.bn3(self.conv3(hidden)) + self.downsample(inputs))
        return outputs


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    projection = convolution(inputs, outputs, stride, kernel=1, plain=False)
    return nn.Sequential(projection, nn.BatchNorm2d(outputs))


_BASIC = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
_BOTTLENECK = {14: (1, 1, 1, 1), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def _resnet(
    wanted: Wanted,
    block: Literal["basic", "bottleneck"],
    depths: Mapping[int, Sequence[int]],
    stem: Stem | None,
) -> nn.Module:
    channels, _, _ = wanted.images()
    if wanted.depth not in depths:
        raise wanted.error(f"depth={wanted.depth}", f"one of {', '.join(map(str, depths))}")
    return ImageNetResNet(
        channels,
        wanted.outputs,
        blocks=depths[wanted.depth],
        width=wanted.width,
        block=block,
        stem=stem or ("small" if wanted.small() else "imagenet"),
        granularity=wanted.granularity,
    )


@network("resnet18", width=64, depth=18)
def resnet18(wanted: Wanted, *, stem: Stem | None = None) -> nn.Module:
    """ResNet-18 or, by depth, 10 and 34; width: channels of the first stage. The stem fits the images (64 pixels)."""
    return _resnet(wanted, "basic", _BASIC, stem)


@network("resnet50", width=64, depth=50)
def resnet50(wanted: Wanted, *, stem: Stem | None = None) -> nn.Module:
    """ResNet-50 or, by depth, 14, 26, 101 and 152, of bottlenecks; width and stem as in resnet18."""
    return _resnet(wanted, "bottleneck", _BOTTLENECK, stem)
