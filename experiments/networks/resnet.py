"""Residual networks for small images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from ...errors import ConfigurationError
from ...gates import Gate


class GatedResNet(nn.Module):
    """Residual network for small images with a Gate in the place of every ReLU; ResNet20 as it stands.

    A 3x3 convolution, one stage of ``blocks`` blocks per width, each later stage at half the resolution of the one
    before, mean over the image, readout: 2 * blocks * len(widths) + 2 layers. A block is
    gate2(norm2(conv2(gate1(norm1(conv1(x))))) + shortcut(x)). Weights are normal with variance 2 / inputs of the
    layer, biases 0.

    Args:
        inputs: channels of the images [N, inputs, height, width].
        outputs: number of outputs.
        blocks: blocks per stage; 3 is ResNet20, 9 is ResNet56.
        widths: channels of each stage.
        shortcut: "identity" fills missing channels with zeros and takes every second pixel, without parameters (option
            A, He et al.'s choice for CIFAR; Mehmeti-Göpel and Disselhoff name none); "convolution" takes a normalized
            1x1 convolution where the shape changes (option B).
        normalization: "batch", or "none": biases instead.
        granularity: of the gates, as in Gate.

    Raises: ConfigurationError: another shortcut or normalization.
    Source: He et al. 2015 (arXiv 1512.03385), section 4.2; 2211.17180 for its gates.
    """

    def __init__(
        self,
        inputs: int = 3,
        outputs: int = 10,
        *,
        blocks: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        shortcut: Literal["identity", "convolution"] = "identity",
        normalization: Literal["batch", "none"] = "batch",
        granularity: Literal["channel", "layer"] = "channel",
    ) -> None:
        super().__init__()
        if shortcut not in ("identity", "convolution"):
            raise ConfigurationError(f"GatedResNet: shortcut is {shortcut!r}; expected 'identity' or 'convolution'")
        if normalization not in ("batch", "none"):
            raise ConfigurationError(f"GatedResNet: normalization is {normalization!r}; expected 'batch' or 'none'")
        plain, projected, gate = (
            normalization == "none",
            shortcut == "convolution",
            partial(Gate, granularity=granularity),
        )
        size = widths[0]
        self.conv, self.norm = _convolution(inputs, size, plain=plain)
        self.gate = gate(size)
        self.stages = nn.Sequential()
        for number, width in enumerate(widths):
            stage = nn.Sequential()
            for block in range(blocks):
                stride = 2 if number and not block else 1
                stage.append(_Block(size, width, stride, projected=projected, plain=plain, gate=gate))
                size = width
            self.stages.append(stage)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.readout = nn.Linear(size, outputs)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stages(self.gate(self.norm(self.conv(images))))
        outputs: Tensor = self.readout(self.pool(hidden).flatten(1))
        return outputs


class _Block(nn.Module):
    """Two convolutions beside a shortcut; the second gate comes after their sum."""

    def __init__(
        self, inputs: int, width: int, stride: int, *, projected: bool, plain: bool, gate: Callable[[int], Gate]
    ) -> None:
        super().__init__()
        self.conv1, self.norm1 = _convolution(inputs, width, stride, plain=plain)
        self.gate1 = gate(width)
        self.conv2, self.norm2 = _convolution(width, width, plain=plain)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            projection = nn.Sequential(*_convolution(inputs, width, stride, kernel=1, plain=plain))
            self.shortcut = projection if projected else _PaddedIdentity(width - inputs, stride)
        self.gate2 = gate(width)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.gate1(self.norm1(self.conv1(inputs)))
        outputs: Tensor = self.gate2(self.norm2(self.conv2(hidden)) + self.shortcut(inputs))
        return outputs


class _PaddedIdentity(nn.Module):
    """Every ``stride``-th pixel of [N, C, H, W], and ``further`` channels of zeros."""

    def __init__(self, further: int, stride: int) -> None:
        super().__init__()
        self.further = further
        self.stride = stride

    def forward(self, inputs: Tensor) -> Tensor:
        # The last axes come first: width, height, channels.
        return functional.pad(inputs[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.further))


def _convolution(
    inputs: int, width: int, stride: int = 1, *, kernel: int = 3, plain: bool
) -> tuple[nn.Conv2d, nn.Module]:
    convolution = nn.Conv2d(inputs, width, kernel, stride, padding=kernel // 2, bias=plain)
    return convolution, nn.Identity() if plain else nn.BatchNorm2d(width)
