"""What the convolutional networks are made of, and how they and the fully connected ones are initialized."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def norm(width: int, *, plain: bool) -> nn.Module:
    """BatchNorm, or nothing in a plain network, whose convolutions have biases instead."""
    return nn.Identity() if plain else nn.BatchNorm2d(width)


def convolution(inputs: int, width: int, stride: int = 1, *, kernel: int = 3, plain: bool) -> nn.Conv2d:
    """Convolution that keeps the image's size at stride 1, with biases only where no BatchNorm follows."""
    return nn.Conv2d(inputs, width, kernel, stride, padding=kernel // 2, bias=plain)


class PaddedIdentity(nn.Module):
    """Every ``stride``-th pixel of [N, C, H, W], and ``further`` channels of zeros."""

    def __init__(self, further: int, stride: int) -> None:
        super().__init__()
        self.further = further
        self.stride = stride

    def forward(self, inputs: Tensor) -> Tensor:
        # The last axes come first: width, height, channels.
        return functional.pad(inputs[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.further))


def initialize(model: nn.Module) -> None:
    """Draw weights of convolutions and linear layers normal with variance 2 / inputs of the layer; biases are 0.

    Source: He et al. 2015 (arXiv 1502.01852).
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
