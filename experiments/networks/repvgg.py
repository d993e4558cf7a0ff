"""RepVGG: three branches a layer in training, one convolution a layer afterwards."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ConfigurationError
from ...gates import Gate, Granularity
from .convolution import convolution, initialize
from .imagenet_resnet import Stem
from .registry import Wanted, network


class RepVGG(nn.Sequential):
    """RepVGG-A0 as it stands, with a Gate in the place of every ReLU.

    Every layer is gate(BatchNorm(3x3 convolution) + BatchNorm(1x1 convolution) + BatchNorm(x)), the last where the
    shape stays; one layer in front, four stages, mean over the image, readout: 2 + sum(blocks) layers. Weights are
    normal with variance 2 / inputs of the layer, biases 0.

    In both graphs, this one and that of ``fused()``, APL = NAPL = the sum over layers of the share of active units
    (branches of a sum hold no units of their own), whichever they are; 22 for A0 to A2 with all units active.

    Args:
        inputs: channels of the images [N, inputs, height, width].
        outputs: number of outputs.
        blocks: layers of each stage.
        widths: channels of the layer in front and of each stage; A0 48-48-96-192-1280, A1 64-64-128-256-1280,
            A2 64-96-192-384-1408.
        stem: "imagenet": the layer in front and all stages halve the image; "small": the first two of these five do
            not, for images of 32 pixels.
        granularity: of the gates, as in Gate.

    Raises: ConfigurationError: another stem.
    Source: Ding et al. 2021 (arXiv 2101.03697), table 2.
    """

    readout: nn.Linear

    def __init__(
        self,
        inputs: int = 3,
        outputs: int = 1000,
        *,
        blocks: Sequence[int] = (2, 4, 14, 1),
        widths: Sequence[int] = (48, 48, 96, 192, 1280),
        stem: Stem = "imagenet",
        granularity: Granularity = "channel",
    ) -> None:
        if stem not in ("imagenet", "small"):
            raise ConfigurationError(f"RepVGG: stem is {stem!r}; expected 'imagenet' or 'small'")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        size = inputs
        for number, (count, width) in enumerate(zip((1, *blocks), widths, strict=True)):
            stage = nn.Sequential()
            for position in range(count):
                halves = not position and (stem == "imagenet" or number > 1)
                stage.append(_Branches(size, width, 2 if halves else 1, granularity=granularity))
                size = width
            layers[f"stage{number}"] = stage
        layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "readout": nn.Linear(size, outputs)}
        super().__init__(layers)
        initialize(self)

    def fused(self) -> nn.Sequential:
        """The plain network with the same outputs in evaluation mode, with copies of all tensors; this one stays.

        Each layer is one 3x3 convolution with biases and a gate of the same name and state.
        """
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for name, part in self.named_children():
            if isinstance(part, nn.Sequential):
                parts[name] = nn.Sequential(*(layer.fused() for layer in part if isinstance(layer, _Branches)))
        parts |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "readout": _copy(self.readout)}
        return nn.Sequential(parts).train(self.training)


class _Branches(nn.Module):
    """A 3x3 convolution, a 1x1 convolution and, where the shape stays, the identity, each with BatchNorm; a gate."""

    def __init__(self, inputs: int, width: int, stride: int, *, granularity: Granularity) -> None:
        super().__init__()
        self.conv = convolution(inputs, width, stride, plain=False)
        self.norm = nn.BatchNorm2d(width)
        self.point_conv = convolution(inputs, width, stride, kernel=1, plain=False)
        self.point_norm = nn.BatchNorm2d(width)
        self.identity_norm = nn.BatchNorm2d(width) if stride == 1 and inputs == width else None
        self.gate = Gate(width, granularity=granularity)

    def forward(self, inputs: Tensor) -> Tensor:
        total = self.norm(self.conv(inputs)) + self.point_norm(self.point_conv(inputs))
        if self.identity_norm is not None:
            total = total + self.identity_norm(inputs)
        outputs: Tensor = self.gate(total)
        return outputs

    @torch.no_grad()
    def fused(self) -> nn.Sequential:
        kernel, bias = _folded(self.conv.weight, self.norm)
        # A 1x1 kernel is a 3x3 one that is 0 around its middle, and the identity a 1x1 convolution.
        points = [(self.point_conv.weight, self.point_norm)]
        if self.identity_norm is not None:
            points.append((torch.eye(len(kernel)).to(kernel)[:, :, None, None], self.identity_norm))
        for point, norm in points:
            further, shift = _folded(point, norm)
            kernel, bias = kernel + functional.pad(further, (1, 1, 1, 1)), bias + shift
        width, inputs = kernel.shape[:2]
        # On "meta" no random numbers are drawn, so that the caller's generator stays as it is.
        conv = nn.Conv2d(inputs, width, 3, self.conv.stride[0], padding=1, device="meta", dtype=kernel.dtype)
        conv.to_empty(device=kernel.device).load_state_dict({"weight": kernel, "bias": bias})
        gate = Gate(width, self.gate.slope, granularity=self.gate.granularity)
        gate.load_state_dict(self.gate.state_dict())
        return nn.Sequential(OrderedDict(conv=conv, gate=gate))


def _folded(weight: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel and biases of a convolution together with the BatchNorm after it, in evaluation mode."""
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise ConfigurationError("RepVGG: a BatchNorm has no running statistics; expected some; nothing can be fused")
    scale = norm.weight / (variance + norm.eps).sqrt()
    return weight * scale[:, None, None, None], norm.bias - mean * scale


def _copy(linear: nn.Linear) -> nn.Linear:
    weight = linear.weight
    copy = nn.Linear(linear.in_features, linear.out_features, device="meta", dtype=weight.dtype)
    copy.to_empty(device=weight.device).load_state_dict(linear.state_dict())
    return copy


# Channels of the first and of the last stage of A0, A1 and A2; the last one lies between these, and in proportion
# outside.
_FIRST, _LAST = (48, 64, 96), (1280, 1280, 1408)


def _last_width(width: int) -> int:
    if width <= _FIRST[0]:
        return math.ceil(width * _LAST[0] / _FIRST[0])
    for (low, high), (start, end) in zip(pairwise(_FIRST), pairwise(_LAST), strict=True):
        if width <= high:
            return start + (end - start) * (width - low) // (high - low)
    return width * _LAST[-1] // _FIRST[-1]


@network("repvgg", width=48, depth=23)
def repvgg(wanted: Wanted, *, stem: Stem | None = None) -> nn.Module:
    """RepVGG-A; width: channels of the first stage (48: A0, 64: A1, 96: A2), depth: layers, 23 in the paper.

    Another depth has the third stage longer or shorter, at least 1 layer. The stem fits the images (64 pixels).
    """
    channels, _, _ = wanted.images()
    if wanted.depth < 10:
        raise wanted.error(f"depth={wanted.depth}", "at least 10: 9 layers and a third stage")
    width = wanted.width
    return RepVGG(
        channels,
        wanted.outputs,
        blocks=(2, 4, wanted.depth - 9, 1),
        widths=(min(64, width), width, 2 * width, 4 * width, _last_width(width)),
        stem=stem or ("small" if wanted.small() else "imagenet"),
        granularity=wanted.granularity,
    )
