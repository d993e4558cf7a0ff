"""Residual networks for small images, activated before or after the sum."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn

from ...errors import ConfigurationError
from ...gates import Gate, Granularity
from .convolution import PaddedIdentity, convolution, initialize, norm
from .registry import Wanted, network

Shortcut = Literal["identity", "convolution"]
Normalization = Literal["batch", "none"]


class GatedResNet(nn.Sequential):
    """Residual network for small images with a Gate in the place of every ReLU; ResNet20 as it stands.

    A 3x3 convolution, one stage of ``blocks`` blocks per width, each later stage at half the resolution of the one
    before, mean over the image, readout: 2 * blocks * len(widths) + 2 layers. A block is

        gate2(norm2(conv2(gate1(norm1(conv1(x))))) + shortcut(x))      or, with preactivation,
        conv2(gate2(norm2(conv1(gate1(norm1(x)))))) + shortcut(x).

    With preactivation the first convolution is followed by no gate of its own, and norm and gate come after the last
    block. Weights are normal with variance 2 / inputs of the layer, biases 0.

    Args:
        inputs: channels of the images [N, inputs, height, width].
        outputs: number of outputs.
        blocks: blocks per stage; 3 is ResNet20, 9 is ResNet56.
        widths: channels of each stage.
        shortcut: "identity" fills missing channels with zeros and takes every second pixel, without parameters (option
            A, He et al.'s choice for CIFAR; Mehmeti-Göpel and Disselhoff name none); "convolution" takes a 1x1
            convolution where the shape changes (option B), normalized unless preactivation is on.
        preactivation: the sum itself is not activated. Shortcuts take x and not gate1(norm1(x)), also where the shape
            changes, so that a path over all of them meets the last gate only.
        normalization: "batch", or "none": biases instead.
        granularity: of the gates, as in Gate.

    Raises: ConfigurationError: another shortcut or normalization.
    Source: He et al. 2015 (arXiv 1512.03385), section 4.2; He et al. 2016 (arXiv 1603.05027) for preactivation;
        2211.17180 for its gates.
    """

    def __init__(
        self,
        inputs: int = 3,
        outputs: int = 10,
        *,
        blocks: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        shortcut: Shortcut = "identity",
        preactivation: bool = False,
        normalization: Normalization = "batch",
        granularity: Granularity = "channel",
    ) -> None:
        if shortcut not in ("identity", "convolution"):
            raise ConfigurationError(f"GatedResNet: shortcut is {shortcut!r}; expected 'identity' or 'convolution'")
        if normalization not in ("batch", "none"):
            raise ConfigurationError(f"GatedResNet: normalization is {normalization!r}; expected 'batch' or 'none'")
        plain, gate = normalization == "none", partial(Gate, granularity=granularity)
        block_class = _PreactivationBlock if preactivation else _Block
        stages, size = nn.Sequential(), widths[0]
        for number, width in enumerate(widths):
            stage = nn.Sequential()
            for block in range(blocks):
                stride = 2 if number and not block else 1
                projected = shortcut == "convolution"
                stage.append(block_class(size, width, stride, projected=projected, plain=plain, gate=gate))
                size = width
            stages.append(stage)
        layers: OrderedDict[str, nn.Module] = OrderedDict(conv=convolution(inputs, widths[0], plain=plain))
        if not preactivation:
            layers |= {"norm": norm(widths[0], plain=plain), "gate": gate(widths[0])}
        layers["stages"] = stages
        if preactivation:
            layers |= {"norm": norm(size, plain=plain), "gate": gate(size)}
        layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "readout": nn.Linear(size, outputs)}
        super().__init__(layers)
        initialize(self)


class _Block(nn.Module):
    """Two convolutions beside a shortcut; the second gate comes after their sum."""

    def __init__(
        self, inputs: int, width: int, stride: int, *, projected: bool, plain: bool, gate: Callable[[int], Gate]
    ) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, width, stride, plain=plain)
        self.norm1 = norm(width, plain=plain)
        self.gate1 = gate(width)
        self.conv2 = convolution(width, width, plain=plain)
        self.norm2 = norm(width, plain=plain)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            projection = convolution(inputs, width, stride, kernel=1, plain=plain)
            normalized = nn.Sequential(projection, norm(width, plain=plain))
            self.shortcut = normalized if projected else PaddedIdentity(width - inputs, stride)
        self.gate2 = gate(width)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.gate1(self.norm1(self.conv1(inputs)))
        outputs: Tensor = self.gate2(self.norm2(self.conv2(hidden)) + self.shortcut(inputs))
        return outputs


class _PreactivationBlock(nn.Module):
    """Two convolutions, each after its gate, beside a shortcut."""

    def __init__(
        self, inputs: int, width: int, stride: int, *, projected: bool, plain: bool, gate: Callable[[int], Gate]
    ) -> None:
        super().__init__()
        self.norm1 = norm(inputs, plain=plain)
        self.gate1 = gate(inputs)
        self.conv1 = convolution(inputs, width, stride, plain=plain)
        self.norm2 = norm(width, plain=plain)
        self.gate2 = gate(width)
        self.conv2 = convolution(width, width, plain=plain)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            projection = convolution(inputs, width, stride, kernel=1, plain=plain)
            self.shortcut = projection if projected else PaddedIdentity(width - inputs, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.conv1(self.gate1(self.norm1(inputs)))
        outputs: Tensor = self.conv2(self.gate2(self.norm2(hidden))) + self.shortcut(inputs)
        return outputs


def blocks_of(wanted: Wanted) -> int:
    """Blocks (of two layers) per stage of a network with three stages and 6n + 2 layers."""
    blocks, rest = divmod(wanted.depth - 2, 6)
    if rest or blocks < 1:
        raise wanted.error(f"depth={wanted.depth}", "6n + 2 layers (8, 14, 20, ..., 56, ...)")
    return blocks


def _resnet(wanted: Wanted, *, preactivation: bool, shortcut: Shortcut, normalization: Normalization) -> nn.Module:
    return GatedResNet(
        wanted.images()[0],
        wanted.outputs,
        blocks=blocks_of(wanted),
        widths=(wanted.width, 2 * wanted.width, 4 * wanted.width),
        shortcut=shortcut,
        preactivation=preactivation,
        normalization=normalization,
        granularity=wanted.granularity,
    )


@network("resnet", width=16, depth=20)
def resnet(wanted: Wanted, *, shortcut: Shortcut = "identity", normalization: Normalization = "batch") -> nn.Module:
    """Residual network for small images; width: channels of the first of three stages, depth: 6n + 2 layers."""
    return _resnet(wanted, preactivation=False, shortcut=shortcut, normalization=normalization)


@network("resnet-preactivation", width=16, depth=20)
def resnet_preactivation(
    wanted: Wanted, *, shortcut: Shortcut = "identity", normalization: Normalization = "batch"
) -> nn.Module:
    """Residual network with gates before the convolutions and none after the sum; width and depth as in resnet."""
    return _resnet(wanted, preactivation=True, shortcut=shortcut, normalization=normalization)
