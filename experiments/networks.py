"""Networks of the experiments, and the user's own by ``file.py:function``."""

from __future__ import annotations

import importlib.util
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..clone import structural_clone
from ..conversion import gate_network
from ..errors import ConfigurationError
from ..gates import Gate, gates


class GatedMLP(nn.Sequential):
    """Fully connected network with a Gate after each of ``depth`` hidden layers: linear1, gate1, …, readout.

    Weights are normal with variance 2 / inputs of the layer, biases 0; no normalization. Inputs [N, ...] are
    flattened.

    Source: He et al. 2015 (arXiv 1502.01852) for the initialization.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        width: int = 64,
        depth: int = 6,
        granularity: Literal["channel", "layer"] = "channel",
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["flatten"] = nn.Flatten()
        size = inputs
        for number in range(1, depth + 1):
            layers[f"linear{number}"] = nn.Linear(size, width)
            layers[f"gate{number}"] = Gate(width, granularity=granularity)
            size = width
        layers["readout"] = nn.Linear(size, outputs)
        super().__init__(layers)
        for module in self:
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)


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


def load_network(text: str, example: Tensor, outputs: int, *, granularity: Literal["channel", "layer"]) -> nn.Module:
    """Build a user's network with ``file.py:function``, called as function(inputs=example batch, outputs=classes).

    A network without a Gate has its ReLUs replaced by Gates.

    Raises: ConfigurationError: no such file or function, or it returns no network with [N, outputs] outputs.
        ConversionError: a ReLU cannot be gated.
    """
    path, separator, name = text.rpartition(":")
    where = f"model {text!r}"
    if not separator or not path.endswith(".py") or not name:
        raise ConfigurationError(f"{where}: expected file.py:function")
    if not Path(path).is_file():
        raise ConfigurationError(f"{where}: there is no file {path}")
    specification = importlib.util.spec_from_file_location(f"ntkdyn_user_{Path(path).stem}", path)
    if specification is None or specification.loader is None:
        raise ConfigurationError(f"{where}: {path} is no Python file")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise ConfigurationError(f"{where}: importing {path} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigurationError(f"{where}: no function {name} in {path}; found {', '.join(found) or 'none'}")
    try:
        network = function(inputs=example, outputs=outputs)
    except Exception as error:
        raise ConfigurationError(
            f"{where}: calling it with (inputs=batch {list(example.shape)}, outputs={outputs}) failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigurationError(f"{where}: found a {type(network).__name__}, expected a torch.nn.Module")
    try:
        with torch.no_grad():
            result = structural_clone(network).eval()(example)
    except Exception as error:
        raise ConfigurationError(
            f"{where}: its forward pass fails on a batch {list(example.shape)} {example.dtype}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}; expected a network for these inputs"
        ) from error
    shape = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
    if shape != [len(example), outputs]:
        raise ConfigurationError(f"{where}: found outputs {shape}, expected {[len(example), outputs]}")
    return network if gates(network) else gate_network(network, example, granularity=granularity)
