"""The benchmark's networks in torch, and their weights and inputs on disk, from which every tool loads the same."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from kernel_cases import OUTPUTS, Case
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

SLOPE = 0.3  # of the gated variants


class LastAxis(nn.PReLU):
    """PReLU whose channels lie on the last axis; torch's own looks for them on axis 1."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, channels] -> the same."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def activation(kind: str, channels: int, dim: int = 1) -> nn.Module:
    """relu, or a unit of the same slope in all channels: ntkdyn's Gate or torch's PReLU."""
    if kind == "relu":
        return nn.ReLU()
    if kind == "prelu":
        return (nn.PReLU if dim == 1 else LastAxis)(channels, init=SLOPE)
    from ntkdyn import Gate

    return Gate(channels, slope=SLOPE, dim=dim)


class Residual(nn.Module):
    """Basic block of the residual networks for 32x32 images; the shortcut strides and pads (option A).

    Source: He et al. 2015 (arXiv 1512.03385), section 4.2.
    """

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.stride, self.padding = outputs // inputs, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.act1 = activation(kind, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.act2 = activation(kind, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        short = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        return self.act2(y + short)


class Attention(nn.Module):
    """Multi-head self-attention of four linear layers, without mask and dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] -> the same."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Token and position embedding, one pre-norm block, mean over positions, linear readout."""

    def __init__(self, kind: str, width: int = 128, length: int = 16, vocabulary: int = 1000, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, heads)
        self.up = nn.Linear(width, 4 * width)
        self.act = activation(kind, 4 * width, dim=-1)
        self.down = nn.Linear(4 * width, width)
        self.readout = nn.Linear(width, OUTPUTS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [N, T] -> [N, 10]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        x = self.token(tokens) + self.position(positions)
        x = x + self.attention(self.norm1(x))
        x = x + self.down(self.act(self.up(self.norm2(x))))
        return self.readout(self.norm3(x).mean(1))


def _mlp(kind: str, width: int, depth: int) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    size = 784
    for number in range(1, depth + 1):
        layers[f"linear{number}"] = nn.Linear(size, width)
        layers[f"act{number}"] = activation(kind, width)
        size = width
    layers["readout"] = nn.Linear(size, OUTPUTS)
    return nn.Sequential(layers)


def _cnn(kind: str) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for number, (width, stride) in enumerate([(16, 1), (16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)], 1):
        layers[f"conv{number}"] = nn.Conv2d(channels, width, 3, stride=stride, padding=1)
        layers[f"act{number}"] = activation(kind, width)
        channels = width
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["readout"] = nn.Linear(channels, OUTPUTS)
    return nn.Sequential(layers)


def _resnet20(kind: str) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv"] = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    layers["norm"] = nn.BatchNorm2d(16)
    layers["act"] = activation(kind, 16)
    channels = 16
    for number, width in enumerate([16, 16, 16, 32, 32, 32, 64, 64, 64], 1):
        layers[f"block{number}"] = Residual(channels, width, kind)
        channels = width
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["readout"] = nn.Linear(channels, OUTPUTS)
    return nn.Sequential(layers)


def build(case: Case) -> nn.Module:
    """The case's network with torch's initial weights, in evaluation mode."""
    makers = {"mlp": _mlp, "cnn": _cnn, "resnet20": _resnet20, "transformer": Transformer}
    return makers[case.network](case.activation, **case.settings).eval()


def inputs(case: Case) -> Tensor:
    """Its batch: normal numbers, or tokens."""
    generator = torch.Generator().manual_seed(1)
    if case.network == "transformer":
        return torch.randint(1000, (case.samples, 16), generator=generator)
    shape = (784,) if case.network == "mlp" else (3, 32, 32)
    return torch.randn((case.samples, *shape), generator=generator)


def write(case: Case, folder: Path) -> None:
    """Save weights, statistics and inputs: problem.safetensors in ``folder``."""
    torch.manual_seed(0)
    network = build(case)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: no entry at its initial value
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    tensors = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    save_file({**tensors, "inputs": inputs(case)}, folder / "problem.safetensors")


def read(case: Case, folder: Path, device: str = "cpu") -> tuple[nn.Module, Tensor]:
    """The network with the saved weights, and the saved inputs."""
    tensors = load_file(folder / "problem.safetensors", device=device)
    batch = tensors.pop("inputs")
    network = build(case).to(device)
    network.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    return network, batch


def kinks(network: nn.Module, x: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Samples [N] with an activation's input within rounding of 0: |input| < tolerance * rms of the layer's inputs.

    There two right programs in float32 may take different sides of a ReLU, and the whole row of the kernel differs.
    """
    found = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def look(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        values = arguments[0].detach().flatten(1)
        found.logical_or_((values.abs() < tolerance * values.square().mean().sqrt()).any(1))

    units = [module for name, module in network.named_modules() if name.rpartition(".")[2].startswith("act")]
    handles = [unit.register_forward_hook(look) for unit in units]
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return found


def autograd_block(network: nn.Module, x: Tensor) -> Tensor:
    """Full kernel [N, N, C, C] of a few samples from rows of the Jacobian by plain autograd, one at a time."""
    parameters = list(network.parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(network(x[i : i + 1])[0, c], parameters)])
        for i in range(len(x))
        for c in range(OUTPUTS)
    ]
    jacobian = torch.stack(rows)
    return (jacobian @ jacobian.T).view(len(x), OUTPUTS, len(x), OUTPUTS).permute(0, 2, 1, 3)
