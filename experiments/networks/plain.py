"""Plain convolutional networks: the residual ones for small images, without their shortcuts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from ...errors import ConfigurationError
from ...gates import Gate, Granularity
from .convolution import convolution, initialize, norm
from .registry import Wanted, network
from .resnet import Normalization, blocks_of


class PlainNet(nn.Sequential):
    """Convolutions one after the other, each followed by BatchNorm and a Gate, with the stages of GatedResNet.

    conv, norm, gate; then per stage 2 * ``blocks`` times the same, the first at stride 2 in later stages; mean over
    the image, readout: 2 * blocks * len(widths) + 2 layers. Weights are normal with variance 2 / inputs of the layer,
    biases 0.

    Args:
        inputs: channels of the images [N, inputs, height, width].
        outputs: number of outputs.
        blocks: pairs of layers per stage.
        widths: channels of each stage.
        normalization: "batch", or "none": biases instead.
        granularity: of the gates, as in Gate.

    Raises: ConfigurationError: another normalization.
    Source: He et al. 2015 (arXiv 1512.03385), section 4.2, "plain".
    """

    def __init__(
        self,
        inputs: int = 3,
        outputs: int = 10,
        *,
        blocks: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        normalization: Normalization = "batch",
        granularity: Granularity = "channel",
    ) -> None:
        if normalization not in ("batch", "none"):
            raise ConfigurationError(f"PlainNet: normalization is {normalization!r}; expected 'batch' or 'none'")
        plain = normalization == "none"
        layers = _layer(inputs, widths[0], plain=plain, granularity=granularity)
        stages, size = nn.Sequential(), widths[0]
        for number, width in enumerate(widths):
            stage = nn.Sequential()
            for position in range(2 * blocks):
                stride = 2 if number and not position else 1
                stage.append(nn.Sequential(_layer(size, width, stride, plain=plain, granularity=granularity)))
                size = width
            stages.append(stage)
        layers["stages"] = stages
        layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "readout": nn.Linear(size, outputs)}
        super().__init__(layers)
        initialize(self)


def _layer(
    inputs: int, width: int, stride: int = 1, *, plain: bool, granularity: Granularity
) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        conv=convolution(inputs, width, stride, plain=plain),
        norm=norm(width, plain=plain),
        gate=Gate(width, granularity=granularity),
    )


@network("plain", width=16, depth=20)
def plain(wanted: Wanted, *, normalization: Normalization = "batch") -> nn.Module:
    """Convolutional network without shortcuts; width: channels of the first of three stages, depth: 6n + 2 layers."""
    return PlainNet(
        wanted.images()[0],
        wanted.outputs,
        blocks=blocks_of(wanted),
        widths=(wanted.width, 2 * wanted.width, 4 * wanted.width),
        normalization=normalization,
        granularity=wanted.granularity,
    )
