"""Path lengths of whole networks: closed forms of residual nets, DenseNet, decoders, widths, exact numbers."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ntkdyn.analysis.gating import effective_width
from ntkdyn.gates import Gate, gates, nonlinear_units
from ntkdyn.paths import path_lengths, trace_paths

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Block(nn.Module):
    """Two convolutions beside a shortcut: identity, 1 x 1 convolution (option B) or zero padding (option A)."""

    def __init__(self, before: int, width: int, pre: bool, option: str) -> None:
        super().__init__()
        self.pre, self.option, self.extra = pre, option, width - before
        self.conv1, self.conv2 = nn.Conv2d(before, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(before if pre else width), nn.BatchNorm2d(width)
        self.gate1, self.gate2 = Gate(before if pre else width), Gate(width)
        self.shortcut = nn.Conv2d(before, width, 1) if self.extra and option == "B" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            branch = self.conv2(self.gate2(self.norm2(self.conv1(self.gate1(self.norm1(x))))))
        else:
            branch = self.norm2(self.conv2(self.gate1(self.norm1(self.conv1(x)))))
        shortcut = self.shortcut(x)
        if self.extra and self.option == "A":
            shortcut = functional.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return shortcut + branch if self.pre else self.gate2(shortcut + branch)


def resnet(each: int, *, pre: bool, option: str = "B", widths: tuple[int, ...] = (16, 32, 64)) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 1, 1)] + ([] if pre else [Gate(widths[0])])
    sizes = [width for width in widths for _ in range(each)]
    for before, width in zip([widths[0], *sizes], sizes, strict=False):
        layers.append(Block(before, width, pre, option))
    end = [Gate(widths[-1])] if pre else []
    return nn.Sequential(*layers, *end, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def frozen_at_random(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for gate in gates(net).values():
        gate.freeze(torch.rand(gate.channels, generator=generator) < 0.6)
    return net


def shares(net: nn.Module, suffix: str) -> Fraction:
    found = [gate for name, gate in gates(net).items() if name.endswith(suffix)]
    return sum((Fraction(int((~gate.frozen).sum()), gate.channels) for gate in found), Fraction(0))


def test_resnet56_pre_activation() -> None:
    net = resnet(9, pre=True)
    assert path_lengths(net, EXAMPLE).normalized == pytest.approx(27 + 1, abs=1e-12)
    frozen_at_random(net)
    # Half of each branch's units, in channel means; the last gate fully.
    branches = shares(net, ".gate1") + shares(net, ".gate2")
    last = shares(net, "") - branches
    assert path_lengths(net, EXAMPLE, exact=True).normalized == branches / 2 + last


def test_resnet56_post_activation() -> None:
    net = resnet(9, pre=False)
    assert path_lengths(net, EXAMPLE).normalized == pytest.approx(1 + 27 * 1.5, abs=1e-12)
    frozen_at_random(net)
    branches, after = shares(net, ".gate1"), shares(net, ".gate2")
    first = shares(net, "") - branches - after
    assert path_lengths(net, EXAMPLE, exact=True).normalized == first + branches / 2 + after


def test_resnet56_with_zero_padded_shortcuts() -> None:
    # At the two padded shortcuts half of the channels have the branch alone: 1/4 instead of 1/2 on the shortcut.
    assert path_lengths(resnet(9, pre=False, option="A"), EXAMPLE).normalized == pytest.approx(1 + 25 * 1.5 + 2 * 1.75)
    pre = path_lengths(resnet(9, pre=True, option="A"), EXAMPLE).normalized
    assert pre == pytest.approx(25 * 1 + 2 * 1.5 + 1)


def test_resnet110_counts_every_path_exactly() -> None:
    lengths = path_lengths(resnet(18, pre=False), EXAMPLE)
    polynomial, width = {1: 3}, 16
    for index in range(54):
        after = (16, 32, 64)[index // 18]
        shortcut = 1 if after == width else width
        following: dict[int, int] = {}
        for length, count in polynomial.items():
            following[length + 1] = following.get(length + 1, 0) + shortcut * count
            following[length + 2] = following.get(length + 2, 0) + after * width * count
        polynomial, width = following, after
    expected = {length: 10 * 64 * count for length, count in polynomial.items()}
    assert lengths.path_counts == tuple(expected.get(length, 0) for length in range(110))
    assert lengths.paths == sum(lengths.path_counts) == sum(expected.values())
    assert len(str(lengths.paths)) > 160
    assert lengths.mean == float(Fraction(sum(n * count for n, count in expected.items()), lengths.paths))
    assert lengths.distribution.sum() == pytest.approx(1.0, abs=1e-12)
    assert lengths.normalized == pytest.approx(1 + 54 * 1.5, abs=1e-11)


def test_three_hundred_layers_overflow_nowhere() -> None:
    layers: list[nn.Module] = [nn.Linear(3, 8)]
    for _ in range(300):
        layers += [nn.Linear(8, 8), Gate(8)]
    graph = trace_paths(nn.Sequential(*layers), torch.zeros(1, 3))
    lengths = graph.lengths(nn.Sequential(*layers))
    assert lengths.paths == 3 * 8**301
    assert lengths.mean == lengths.normalized == 300.0
    assert lengths.path_counts == (0,) * 300 + (lengths.paths,)


class DenseLayer(nn.Module):
    def __init__(self, before: int, growth: int) -> None:
        super().__init__()
        self.norm, self.gate, self.conv = nn.BatchNorm2d(before), Gate(before), nn.Conv2d(before, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.gate(self.norm(x)))], dim=1)


def test_densenet() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), DenseLayer(4, 2), DenseLayer(6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    lengths = path_lengths(net, EXAMPLE, exact=True)
    # 4 channels of length 0, 2 of length 1, and 2 that take one of 6 channels before: (4 * 1 + 2 * 2) / 6.
    assert lengths.normalized == Fraction(0 * 4 + 1 * 2 + Fraction(8, 6) * 2, 8)
    assert lengths.path_counts == (3 * 4, 3 * 4 * 2 + 3 * 4 * 2, 3 * 4 * 2 * 2)


def test_widths() -> None:
    net = nn.Sequential(nn.Linear(3, 8), Gate(8), nn.Linear(8, 4), Gate(4), nn.Linear(4, 6), Gate(6), nn.Linear(6, 1))
    net[1].freeze(torch.arange(8) < 2)
    net[5].freeze()
    graph = trace_paths(net, torch.zeros(1, 3))
    lengths = graph.lengths(net)
    assert dict(lengths.active) == {"1": 6, "3": 4, "5": 0} == dict(nonlinear_units(net).active)
    assert dict(lengths.total) == {"1": 8, "3": 4, "5": 6}
    assert lengths.effective_width == 10 / 1.75
    assert lengths.mean_active_width == 5.0
    both = effective_width(list(lengths.active.values()), lengths.normalized)
    assert (lengths.effective_width, lengths.mean_active_width) == (both.per_path, both.per_layer)
    assert graph.lengths(net, exact=True).effective_width == Fraction(40, 7)
    for gate in gates(net).values():
        gate.freeze()
    nothing = graph.lengths(net)
    assert np.isnan(nothing.effective_width)
    assert np.isnan(nothing.mean_active_width)


def test_widths_count_what_the_lengths_count() -> None:
    gate = Gate(5)
    net = nn.Sequential(nn.Linear(3, 5), gate, nn.Linear(5, 5), gate, nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 1))
    lengths = path_lengths(net, torch.zeros(1, 3))
    # Twice the gate, once the GELU.
    assert lengths.normalized == 3.0
    assert lengths.effective_width == (5 + 5 + 9) / 3
    assert lengths.mean_active_width == (5 + 5 + 9) / 3
    assert dict(lengths.active) == {"1": 5}


def test_exact_numbers_are_fractions() -> None:
    net = nn.Sequential(nn.Linear(3, 3), Gate(3, slope=torch.tensor([0.1, 0.0, 0.5])), nn.Linear(3, 1))
    lengths = path_lengths(net, torch.zeros(1, 3), exact=True)
    slope = Fraction(float(torch.tensor(0.1)))
    assert lengths.weighted == ((1 - slope) + 1 + Fraction(1, 2)) / 3
    numbers: list[Any] = [lengths.mean, lengths.normalized, lengths.weighted, *lengths.distribution]
    assert all(type(number) is Fraction for number in [*numbers, *lengths.per_layer.values()])


class CrossAttention(nn.Module):
    """A decoder block by plain functional calls: queries from one stream, keys and values from the other."""

    def __init__(self, written_out: bool) -> None:
        super().__init__()
        self.written_out = written_out
        self.query, self.key, self.value, self.out = (nn.Linear(4, 4) for _ in range(4))
        self.before, self.memory, self.gate = Gate(4, dim=-1), Gate(4, dim=-1), Gate(4, dim=-1)
        self.embed_target, self.embed_source = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        x, memory = self.before(self.embed_target(target)), self.memory(self.embed_source(source))
        q, k, v = self.query(x), self.key(self.gate(memory)), self.value(memory)
        q, k, v = (part.view(part.shape[0], -1, 2, 2).transpose(1, 2) for part in (q, k, v))
        if self.written_out:
            scores = (q @ k.transpose(-2, -1) / 2**0.5).masked_fill(torch.zeros(3, 6, dtype=torch.bool), -1e9)
            mixed = functional.dropout(scores.softmax(-1), 0.1, self.training) @ v
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("written_out", [False, True])
def test_cross_attention_goes_along_the_values(written_out: bool) -> None:
    net = CrossAttention(written_out)
    net.memory.freeze(torch.tensor([True, False, False, False]))
    lengths = path_lengths(net, (torch.zeros(2, 3, 3), torch.zeros(2, 6, 5)), exact=True)
    # The stream of the queries goes on beside: 1 unit, or 3/4 of one from the memory; nothing through keys.
    assert lengths.normalized == Fraction(1, 2) * 1 + Fraction(1, 2) * Fraction(3, 4)
    assert lengths.paths == 4 * (3 + 4 * 4 * 5)
    assert set(lengths.per_layer) == {"before", "memory"}
    assert lengths.uncounted["gate"] == "Gate"
    listed = {"matmul": "attention scores", "softmax": "softmax"}
    sdpa = {"scaled_dot_product_attention": "attention"}
    assert dict(lengths.uncounted) == {"gate": "Gate"} | (listed if written_out else sdpa)


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_decoders(norm_first: bool) -> None:
    def layer() -> nn.TransformerDecoderLayer:
        return nn.TransformerDecoderLayer(4, 2, 6, batch_first=True, norm_first=norm_first)

    class Two(nn.Module):
        def __init__(self, decoder: nn.Module) -> None:
            super().__init__()
            self.target, self.source, self.gate = nn.Linear(3, 4), nn.Linear(3, 4), Gate(4, dim=-1)
            self.decoder = decoder

        def forward(self, target: Tensor, source: Tensor) -> Tensor:
            return self.decoder(self.target(target), self.gate(self.source(source)))

    example = (torch.zeros(2, 5, 3), torch.zeros(2, 7, 3))
    one = layer()
    one.activation = Gate(6, dim=-1)
    lengths = path_lengths(Two(one), example)
    # Half of the paths come from the memory, through its gate; then half a unit of the feed-forward part.
    assert lengths.normalized == 0.5 * 1 + 0.5
    assert list(lengths.per_layer) == ["gate", "decoder.activation"]
    attended = 3 * (1 + 16)
    assert lengths.paths == 4 * (attended + 16 * 3) * (1 + 4 * 6)
    stack = nn.TransformerDecoder(layer(), 2, norm=nn.LayerNorm(4))
    lengths = path_lengths(Two(stack), example)
    assert lengths.normalized == 0.5 * (0.5 + 0.5) + 0.5 * 1 + 0.5
    assert list(lengths.always_active) == ["decoder.layers.0.activation", "decoder.layers.1.activation"]
    assert lengths.uncounted["decoder.layers.1.multihead_attn"] == "MultiheadAttention"
    assert lengths.uncounted["decoder.layers.0.norm3"] == lengths.uncounted["decoder.norm"] == "LayerNorm"
