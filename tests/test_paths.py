"""Path lengths: vectors by hand, closed forms, and enumeration of every path in exact fractions."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ntkdyn
from ntkdyn.errors import ConfigurationError, ShapeError, TraceError, UnknownName
from ntkdyn.gates import Gate
from ntkdyn.paths import PathLengths, average_path_length, path_lengths, trace_paths
from ntkdyn.paths.rules import Call, path_rule


class Residual(nn.Module):
    """x + branch(x), or shortcut(x) + branch(x)."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.branch(x)


class Function(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def gate(active: str | list[int]) -> Gate:
    """Gate whose channels are frozen where `active` holds 0."""
    result = Gate(len(active))
    result.freeze(torch.tensor([int(flag) == 0 for flag in active]))
    return result


def block(width: int) -> Residual:
    return Residual(nn.Sequential(Gate(width), nn.Linear(width, width), Gate(width), nn.Linear(width, width)))


# ---- vectors --------------------------------------------------------------------------------------------------------


def test_t1_identity_beside_four_dense_layers() -> None:
    layers: list[nn.Module] = [nn.Linear(1, 4), Gate(4)]
    for _ in range(3):
        layers += [nn.Linear(4, 4), Gate(4)]
    lengths = path_lengths(Residual(nn.Sequential(*layers, nn.Linear(4, 1))), torch.zeros(2, 1))
    assert lengths.paths == 257
    assert lengths.mean == 1024 / 257
    assert lengths.normalized == 2.0
    assert lengths.weighted == 2.0
    # Half the weight on the skip path, 1/512 on each of the 256 long ones.
    assert lengths.distribution.tolist() == [0.5, 0, 0, 0, 0.5]


def test_t2_unequal_masks() -> None:
    net = nn.Sequential(
        nn.Linear(3, 5), gate("11011"), nn.Linear(5, 3), gate("111"), nn.Linear(3, 4), gate("1001"), nn.Linear(4, 2)
    )
    lengths = path_lengths(net, torch.zeros(1, 3))
    assert lengths.paths == 360
    assert lengths.mean == pytest.approx(2.3, abs=1e-15)
    assert lengths.normalized == pytest.approx(2.3, abs=1e-15)
    assert lengths.per_layer == {"1": 0.8, "3": 1.0, "5": 0.5}


def pre_activation_net() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(3, 16)]
    for width, following in ((16, 32), (32, 64), (64, None)):
        layers += [block(width) for _ in range(9)]
        layers += [] if following is None else [nn.Linear(width, following)]
    return nn.Sequential(*layers, Gate(64), nn.Linear(64, 10))


def test_t4_deep_residual_net() -> None:
    lengths = path_lengths(pre_activation_net(), torch.zeros(2, 3))
    assert lengths.normalized == pytest.approx(28.0, abs=1e-12)
    assert lengths.mean == pytest.approx(54.90801, abs=5e-6)
    assert len(str(lengths.paths)) == 88
    assert len(lengths.distribution) == 56


def test_counts_beyond_the_range_of_float64() -> None:
    net = nn.Sequential(nn.Linear(3, 1000), *[nn.Linear(1000, 1000) for _ in range(110)], Gate(1000))
    lengths = path_lengths(net, torch.zeros(1, 3))
    assert lengths.paths == 3 * 1000**111
    assert lengths.mean == 1.0


def test_t5_frozen_everywhere_is_affine() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), Gate(8), block(8), nn.Linear(8, 2)).double()
    for found in ntkdyn.gates.gates(net).values():
        found.freeze()
    lengths = path_lengths(net, torch.zeros(1, 3, dtype=torch.float64))
    assert (lengths.mean, lengths.normalized, lengths.weighted) == (0, 0, 0)
    assert lengths.distribution.tolist() == [1, 0, 0, 0]
    x, y = torch.randn(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(net((x + y) / 2), (net(x) + net(y)) / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("linear", [0, 1, 5, 22])
def test_t6_whole_layers_linearized(linear: int) -> None:
    depth = 23
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 3, padding=1)]
    for index in range(depth - 1):
        last = index == depth - 2
        layers += [gate([int(index >= linear)] * 4)]
        layers += [nn.Flatten(), nn.Linear(16, 5)] if last else [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)]
    lengths = path_lengths(nn.Sequential(*layers), torch.zeros(2, 3, 2, 2))
    assert lengths.normalized == pytest.approx(depth - 1 - linear, abs=1e-12)
    assert lengths.mean == depth - 1 - linear


# ---- closed forms ---------------------------------------------------------------------------------------------------


def test_sequential_net_adds_its_active_shares() -> None:
    generator = np.random.default_rng(0)
    widths = generator.integers(1, 9, size=7).tolist()
    masks = [generator.integers(0, 2, size=width).tolist() for width in widths]
    layers: list[nn.Module] = []
    for before, width, mask in zip([3, *widths], widths, masks, strict=False):
        layers += [nn.Linear(before, width), gate(mask)]
    lengths = path_lengths(nn.Sequential(*layers, nn.Linear(widths[-1], 2)), torch.zeros(1, 3))
    expected = sum(np.mean(mask) for mask in masks)
    assert lengths.mean == pytest.approx(expected)
    assert lengths.normalized == pytest.approx(expected)
    assert lengths.distribution @ np.arange(8) == pytest.approx(expected)


def test_residual_blocks_add_half_their_branch() -> None:
    branch = nn.Sequential(Gate(6), nn.Linear(6, 4), gate("1100"), nn.Linear(4, 6))
    pre = nn.Sequential(nn.Linear(3, 6), Residual(branch), nn.Linear(6, 2))
    assert path_lengths(pre, torch.zeros(1, 3)).normalized == pytest.approx(1.5 / 2)
    branch = nn.Sequential(nn.Linear(6, 4), gate("1100"), nn.Linear(4, 6))
    post = nn.Sequential(nn.Linear(3, 6), Residual(branch), gate("111000"), nn.Linear(6, 2))
    assert path_lengths(post, torch.zeros(1, 3)).normalized == pytest.approx(0.5 / 2 + 0.5)


def test_unnormalized_skip_weight_vanishes_with_width() -> None:
    for width in (4, 16):
        branch = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width), Gate(width))
        lengths = path_lengths(Residual(branch), torch.zeros(1, width))
        assert 1 - Fraction(lengths.mean).limit_denominator(10**6) == Fraction(1, 1 + width**2)
        assert lengths.normalized == 0.5


def test_linear_layers_do_not_change_the_normalized_length() -> None:
    short = nn.Sequential(nn.Linear(3, 4), gate("1110"), Residual(nn.Sequential(Gate(4), nn.Linear(4, 4))))
    long = nn.Sequential(
        nn.Linear(3, 50), nn.Linear(50, 4), gate("1110"),
        Residual(nn.Sequential(Gate(4), nn.Linear(4, 9), nn.Linear(9, 4))), nn.Linear(4, 7),
    )  # fmt: skip
    first, second = path_lengths(short, torch.zeros(1, 3)), path_lengths(long, torch.zeros(1, 3))
    assert first.normalized == pytest.approx(second.normalized)
    assert first.mean != pytest.approx(second.mean)


# ---- every path, one by one -----------------------------------------------------------------------------------------


@dataclass
class Node:
    """A channel: chooses uniformly among what reaches it, and adds its own unit."""

    before: list[Node]
    active: int = 0
    weight: Fraction = Fraction(0)
    source: bool = False

    def paths(self) -> list[tuple[Fraction, int, Fraction]]:
        """(probability, length, weighted length) of every path that ends here."""
        if self.source:
            return [(Fraction(1), 0, Fraction(0))]
        choices = [found for found in (node.paths() for node in self.before) if found]
        return [
            (probability / len(choices), length + self.active, weighted + self.weight)
            for found in choices
            for probability, length, weighted in found
        ]


class RandomNet(nn.Module):
    """A random network of convolutions, gates, nested residuals, zero-padded shortcuts and concatenations.

    `forward` is what torch.fx traces; `wire` builds the same graph channel by channel for the enumeration.
    """

    def __init__(self, generator: np.random.Generator, width: int, depth: int, out: int | None = None) -> None:
        super().__init__()
        self.plan: list[tuple[str, Any]] = []
        self.parts = nn.ModuleList()
        for _ in range(generator.integers(1, 4)):
            kinds = ["dense", "gate", "gate", "norm", "flip"] + (["residual", "padded", "cat"] if depth else [])
            kind = str(generator.choice(kinds))
            extra: Any = None
            part: nn.Module = nn.Identity()
            if kind == "dense":
                part, width = self._dense(generator, width, int(generator.integers(1, 4)))
            elif kind == "gate":
                slopes = generator.integers(0, 5, size=width) / 4
                found = Gate(width, slope=torch.tensor(slopes, dtype=torch.float64))
                found.freeze(torch.from_numpy(generator.random(width) < 0.4))
                part = found
            elif kind == "norm":
                part = nn.BatchNorm2d(width)
            elif kind == "residual":
                part = RandomNet(generator, width, depth - 1, width)
            elif kind == "padded":
                extra = (int(generator.integers(0, 2)), int(generator.integers(0, 2)))
                part, width = RandomNet(generator, width, depth - 1, width + sum(extra)), width + sum(extra)
            elif kind == "cat":
                inner = int(generator.integers(1, 3))
                part, width = RandomNet(generator, width, depth - 1, inner), width + inner
            self.plan.append((kind, extra))
            self.parts.append(part)
        if out is not None:
            self.plan.append(("dense", None))
            self.parts.append(self._dense(generator, width, out)[0])
            width = out
        self.width = width

    @staticmethod
    def _dense(generator: np.random.Generator, width: int, out: int) -> tuple[nn.Module, int]:
        groups = [g for g in (1, 2, 3) if width % g == 0 and out % g == 0]
        kernel = int(generator.choice([1, 3]))
        return nn.Conv2d(width, out, kernel, padding=kernel // 2, groups=int(generator.choice(groups))), out

    def forward(self, x: Tensor) -> Tensor:
        for (kind, extra), part in zip(self.plan, self.parts, strict=True):
            if kind == "residual":
                x = x + part(x)
            elif kind == "padded":
                x = functional.pad(x, (0, 0, 0, 0, *extra)) + part(x)
            elif kind == "cat":
                x = torch.cat([x, part(x)], dim=1)
            elif kind == "flip":
                x = x.flip(1)
            else:
                x = part(x)
        return x

    def wire(self, nodes: list[Node]) -> list[Node]:
        for (kind, extra), part in zip(self.plan, self.parts, strict=True):
            if kind == "dense":
                assert isinstance(part, nn.Conv2d)
                size, each = len(nodes) // part.groups, part.out_channels // part.groups
                blocks = [nodes[i * size : (i + 1) * size] for i in range(part.groups)]
                nodes = [Node(blocks[j // each]) for j in range(part.out_channels)]
            elif kind == "gate":
                assert isinstance(part, Gate)
                frozen, slopes = part.frozen.tolist(), part.slope.tolist()
                nodes = [
                    Node([node]) if fixed else Node([node], 1, abs(1 - Fraction(slope)))
                    for node, fixed, slope in zip(nodes, frozen, slopes, strict=True)
                ]
            elif kind in ("residual", "padded"):
                assert isinstance(part, RandomNet)
                low, high = extra or (0, 0)
                shortcut = [Node([]) for _ in range(low)] + nodes + [Node([]) for _ in range(high)]
                nodes = [Node([a, b]) for a, b in zip(shortcut, part.wire(nodes), strict=True)]
            elif kind == "cat":
                assert isinstance(part, RandomNet)
                nodes = nodes + part.wire(nodes)
            elif kind == "flip":
                nodes = nodes[::-1]
        return nodes


@pytest.mark.parametrize("seed", range(60))
def test_random_graphs_equal_enumeration(seed: int) -> None:
    generator = np.random.default_rng(seed)
    net = RandomNet(generator, 2, 2).double().eval()
    ends = [found for found in (node.paths() for node in net.wire([Node([], source=True), Node([], source=True)]))
            if found]  # fmt: skip
    every = [path for found in ends for path in found]
    lengths = path_lengths(net, torch.zeros(2, 2, 4, 4, dtype=torch.float64))
    if any(isinstance(module, (nn.Conv2d, Gate)) for module in net.modules()):
        # Without any layer the inputs have no channels that could be told apart.
        assert lengths.paths == len(every)
    assert lengths.mean == float(Fraction(sum(length for _, length, _ in every), len(every)))
    assert sum(probability for probability, _, _ in every) == len(ends)
    normalized = sum(probability * length for probability, length, _ in every) / len(ends)
    weighted = sum(probability * weight for probability, _, weight in every) / len(ends)
    assert lengths.normalized == pytest.approx(float(normalized), abs=1e-13)
    assert lengths.weighted == pytest.approx(float(weighted), abs=1e-13)
    distribution = np.zeros(len(lengths.distribution))
    for probability, length, _ in every:
        distribution[length] += float(probability / len(ends))
    np.testing.assert_allclose(lengths.distribution, distribution, atol=1e-13)


# ---- conventions ----------------------------------------------------------------------------------------------------


def test_sums_of_sums_are_not_flattened() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = Gate(2), nn.Sequential(Gate(2), Gate(2)), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) + self.c(x)

    class Python(Three):
        def forward(self, x: Tensor) -> Tensor:
            return sum([self.a(x), self.b(x), self.c(x)])  # type: ignore[return-value]

    for net in (Three(), Python()):
        lengths = path_lengths(net, torch.zeros(1, 2))
        # ((a + b) + c): 1/4, 1/4, 1/2; a flat choice would give a third each and length 1.
        assert lengths.normalized == 0.25 * 1 + 0.25 * 2
        assert lengths.mean == 1.0


def test_constants_and_parameters_are_no_branches() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.gate = nn.Parameter(torch.zeros(4)), Gate(4)

        def forward(self, x: Tensor) -> Tensor:
            y = 2 * (self.gate(x) + self.shift) * self.shift / 3 - 1
            return 1 - y + torch.ones_like(x) + x.new_zeros(x.shape[0], 4)

    assert path_lengths(Shifted(), torch.zeros(2, 4)).normalized == 1.0


@pytest.mark.parametrize(
    "shortcut",
    [
        lambda x: functional.pad(x, (0, 0, 0, 0, 0, 2)),
        lambda x: functional.pad(x[:, :, ::1, ::1], (0, 0, 0, 0, 0, 2), "constant", 1.0),
        lambda x: torch.cat([x, torch.zeros(2, 2, 4, 4)], dim=1),
        lambda x: torch.cat((x, torch.zeros_like(x)), 1),
        lambda x: torch.cat((x, x * 0), 1),
        lambda x: torch.cat((x, x.mul(0)), 1),
    ],
)
def test_zero_padded_shortcut_takes_the_branch(shortcut: Any) -> None:
    branch = nn.Sequential(nn.Conv2d(2, 4, 1), Gate(4))
    net = nn.Sequential(nn.Conv2d(3, 2, 1), Residual(branch, Function(shortcut)))
    lengths = path_lengths(net, torch.zeros(2, 3, 4, 4))
    # Channels 0 and 1: skip with 1/2; channels 2 and 3: no skip.
    assert lengths.normalized == (0.5 + 0.5 + 1 + 1) / 4
    assert lengths.paths == 2 * (3 + 6) + 2 * 6
    # A dense layer behind channels that nothing reaches chooses among the others.
    behind = nn.Sequential(nn.Conv2d(3, 2, 1), gate("10"), Function(shortcut), nn.Conv2d(4, 3, 1))
    assert path_lengths(behind, torch.zeros(2, 3, 4, 4)).normalized == 0.5


def test_a_parameter_that_is_zero_stays_a_connection() -> None:
    class SkipInit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.gate = nn.Parameter(torch.zeros(())), Gate(2)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * self.gate(x)

    assert path_lengths(SkipInit(), torch.zeros(1, 2)).normalized == 0.5


def test_grouped_and_depthwise_convolutions_connect_within_groups() -> None:
    grouped = nn.Sequential(nn.Conv2d(1, 4, 1), gate("1100"), nn.Conv2d(4, 2, 1, groups=2), gate("10"))
    lengths = path_lengths(grouped, torch.zeros(1, 1, 3, 3))
    # Group one has two active units and one more, group two none: 2 or 0, never 1.
    assert lengths.distribution.tolist() == [0.5, 0, 0.5]
    dense = nn.Sequential(nn.Conv2d(1, 4, 1), gate("1100"), nn.Conv2d(4, 2, 1), gate("10"))
    assert path_lengths(dense, torch.zeros(1, 1, 3, 3)).distribution.tolist() == [0.25, 0.5, 0.25]
    depthwise = nn.Sequential(nn.Conv2d(1, 3, 1), gate("100"), nn.Conv2d(3, 6, 3, padding=1, groups=3), gate("111000"))
    assert path_lengths(depthwise, torch.zeros(1, 1, 3, 3)).distribution == pytest.approx([1 / 2, 1 / 6, 1 / 3])
    transposed = nn.Sequential(nn.Conv2d(1, 4, 1), gate("1100"), nn.ConvTranspose2d(4, 2, 2, groups=2), gate("10"))
    np.testing.assert_array_equal(path_lengths(transposed, torch.zeros(1, 1, 3, 3)).distribution, [0.5, 0, 0.5])


def test_partly_linear_units_count_fully_and_are_weighted_beside() -> None:
    net = nn.Sequential(nn.Linear(2, 4), Gate(4, slope=torch.tensor([0.0, 0.5, 1.0, 1.25])), nn.Linear(4, 1))
    lengths = path_lengths(net, torch.zeros(1, 2))
    assert lengths.normalized == 1.0
    assert lengths.weighted == (1 + 0.5 + 0 + 0.25) / 4
    net[1].freeze(torch.tensor([False, True, False, False]))  # type: ignore[operator]
    lengths = path_lengths(net, torch.zeros(1, 2))
    assert lengths.normalized == 0.75
    assert lengths.weighted == (1 + 0 + 0.25) / 4
    assert lengths.per_layer == {"1": 0.75}


def test_layer_wise_gates_count_all_their_channels() -> None:
    net = nn.Sequential(nn.Linear(2, 4), Gate(4, granularity="layer"), nn.Linear(4, 1))
    assert path_lengths(net, torch.zeros(1, 2)).normalized == 1.0
    net[1].freeze()  # type: ignore[operator]
    assert path_lengths(net, torch.zeros(1, 2)).per_layer == {"1": 0.0}


@pytest.mark.parametrize(
    "unit",
    [
        nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.LeakyReLU(0.1), nn.PReLU(), nn.ELU(),
        nn.Sigmoid(), nn.Softplus(), nn.ReLU6(), nn.Hardswish(), Function(torch.relu), Function(functional.gelu),
        Function(lambda x: x.tanh()), Function(lambda x: functional.relu(x, inplace=True)), Function(lambda x: x**2),
        Function(lambda x: x.clamp(min=0)), Function(torch.sigmoid), Function(lambda x: x.relu_()),
    ],
)  # fmt: skip
def test_units_that_are_no_gates_are_always_active(unit: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(2, 3), unit, nn.Linear(3, 2), Gate(2))
    lengths = path_lengths(net, torch.zeros(1, 2))
    assert (lengths.mean, lengths.normalized, lengths.weighted) == (2, 2, 2)
    assert list(lengths.per_layer) == ["3"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Identity(), nn.Dropout(), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4),
        nn.LayerNorm([4, 6, 6]), Function(lambda x: x.mT.data), Function(lambda x: x.mT),
        nn.MaxPool2d(2), nn.AvgPool2d(3), nn.AdaptiveAvgPool2d(2), nn.Softmax(1), nn.Upsample(scale_factor=2),
        nn.ZeroPad2d(1), nn.ReflectionPad2d(1), Function(lambda x: functional.max_pool2d(x, 2)),
        Function(lambda x: functional.dropout(x, 0.5)), Function(lambda x: functional.log_softmax(x, dim=1)),
        Function(lambda x: functional.pad(x, (1, 1, 1, 1))),
        Function(lambda x: functional.pad(x, (1, 1, 1, 1), "reflect")),
        Function(lambda x: x.mean(dim=(2, 3), keepdim=True)), Function(lambda x: x.contiguous().float() * 3),
        Function(lambda x: x[:, :, ::2, 1:]), Function(lambda x: -x), Function(lambda x: torch.roll(x, 1, 3)),
        Function(lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2)), Function(lambda x: x.transpose(2, 3)),
        Function(lambda x: x.view(x.size(0), 2, 2, 6, 6).flatten(1, 2)), Function(lambda x: x.amax(3, True)),
        Function(lambda x: torch.cat(x.chunk(2, dim=1), dim=1)), Function(lambda x: torch.stack(x.unbind(1), dim=1)),
        Function(lambda x: torch.cat(torch.split(x, [1, 3], 1), 1)), Function(lambda x: x.unsqueeze(0).squeeze(0)),
        nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (6, 6))), nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(2)),
        Function(lambda x: torch.cat([x, x], dim=2)), Function(lambda x: torch.cat([x, torch.zeros(2, 4, 1, 6)], 2)),
    ],
)  # fmt: skip
def test_one_to_one_layers(layer: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), gate("1000"), layer, gate("1100"), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    lengths = path_lengths(net, torch.zeros(2, 3, 6, 6))
    # 2, 1, 0, 0: channel by channel; mixing channels would give another distribution.
    assert lengths.distribution.tolist() == [0.5, 0.25, 0.25]
    assert lengths.paths == 3 * 4 * 4 * 2


def test_channels_are_followed_through_shuffles() -> None:
    shuffled = nn.Sequential(nn.Conv2d(1, 4, 1), gate("1100"), nn.ChannelShuffle(2), nn.Conv2d(4, 2, 1, groups=2))
    np.testing.assert_array_equal(path_lengths(shuffled, torch.zeros(1, 1, 3, 3)).distribution, [0.5, 0.5])
    by_hand = Function(lambda x: x.view(1, 2, 2, 3, 3).transpose(1, 2).contiguous().view(1, -1, 3, 3))
    shuffled = nn.Sequential(nn.Conv2d(1, 4, 1), gate("1100"), by_hand, nn.Conv2d(4, 2, 1, groups=2))
    np.testing.assert_array_equal(path_lengths(shuffled, torch.zeros(1, 1, 3, 3)).distribution, [0.5, 0.5])
    halves = nn.Sequential(
        nn.Conv2d(1, 4, 1), gate("1100"), Function(lambda x: torch.cat([x.chunk(2, 1)[1], x.chunk(2, 1)[1]], 1))
    )
    assert path_lengths(halves, torch.zeros(1, 1, 3, 3)).normalized == 0.0
    picked = nn.Sequential(nn.Linear(1, 4), gate("1100"), Function(lambda x: x[:, [0, 0, 3]]))
    assert path_lengths(picked, torch.zeros(1, 1)).normalized == pytest.approx(2 / 3)


def test_flattened_pixels_are_features() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1), gate("10"), nn.Flatten(), Gate(8), nn.Linear(8, 3), gate("110"), nn.Linear(3, 2)
    )
    net[3].freeze(torch.tensor([True] + [False] * 7))  # type: ignore[operator]
    lengths = path_lengths(net, torch.zeros(1, 1, 2, 2))
    assert lengths.normalized == pytest.approx(1 / 2 + 7 / 8 + 2 / 3)
    pooled = nn.Sequential(nn.Conv2d(1, 2, 1), gate("10"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    assert path_lengths(pooled, torch.zeros(1, 1, 2, 2)).paths == 6


def test_means_over_channels_are_dense() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1), gate("1000"), Function(lambda x: x.mean(1, keepdim=True)), Gate(1))
    lengths = path_lengths(net, torch.zeros(1, 1, 2, 2))
    assert lengths.normalized == 1.25
    assert path_lengths(nn.Sequential(net, Function(lambda x: x.sum())), torch.zeros(1, 1, 2, 2)).normalized == 1.25


def test_functional_layers() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = gate("1100")
            self.kernel = nn.Parameter(torch.zeros(4, 3, 1, 1))
            self.grouped = nn.Parameter(torch.zeros(2, 2, 1, 1))
            self.weight = nn.Parameter(torch.zeros(5, 2))
            self.matrix = nn.Parameter(torch.zeros(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            x = functional.conv2d(self.gate(functional.conv2d(x, self.kernel)), self.grouped, groups=2)
            return functional.linear(x.mean((2, 3)), self.weight) @ self.matrix

    lengths = path_lengths(Functional(), torch.zeros(2, 3, 2, 2))
    assert lengths.normalized == 0.5
    assert lengths.paths == 3 * 2 * 2 * 5 * 6


def test_sequences_have_their_channels_last() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.gate = nn.Embedding(7, 4), Gate(6, dim=-1)
            self.position = nn.Embedding(5, 4)
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
            x = self.embed(tokens) + self.position(torch.arange(5))
            x = x + self.down(self.gate(self.up(x)))
            if mask is not None:
                x = x * mask
            return x[:, 0]

    net = Tokens()
    assert path_lengths(net, torch.zeros(2, 5, dtype=torch.long)).normalized == 0.5
    assert path_lengths(net, (torch.zeros(2, 5, dtype=torch.long),)).normalized == 0.5


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoders(norm_first: bool) -> None:
    def layer() -> nn.TransformerEncoderLayer:
        return nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=norm_first)

    example = torch.zeros(2, 5, 4)
    plain = path_lengths(layer(), example)
    # 4 features; attention is two dense maps of width 4 beside the skip, the feed-forward part 4 -> 6 -> 4 beside it.
    attended = 1 + 4 * 4
    assert plain.paths == 4 * (attended + 4 * attended * 6)
    assert plain.normalized == 0.5
    gated = layer()
    gated.activation = Gate(6, dim=-1)
    gated.activation.freeze(torch.tensor([True] * 3 + [False] * 3))
    for net, prefix in ((gated, ""), (nn.Sequential(gated, nn.Linear(4, 2)), "0.")):
        lengths = path_lengths(net, example)
        assert lengths.normalized == 0.25
        assert lengths.per_layer == {f"{prefix}activation": 0.5}
    stack = nn.TransformerEncoder(layer(), 3, norm=nn.LayerNorm(4), enable_nested_tensor=False)
    for net, prefix in ((stack, ""), (nn.Sequential(nn.Linear(4, 4), stack), "1.")):
        stack.layers[1].activation = gated.activation
        lengths = path_lengths(net, example)
        assert lengths.normalized == pytest.approx(1.25)
        assert lengths.per_layer == {f"{prefix}layers.1.activation": 0.5}


def test_attention_follows_the_values() -> None:
    class Attention(nn.Module):
        def __init__(self, ready_made: bool) -> None:
            super().__init__()
            self.ready_made = ready_made
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.project, self.out, self.gate = nn.Linear(4, 12), nn.Linear(4, 4), gate("1000")
            self.gate.dim = -1

        def forward(self, x: Tensor) -> Tensor:
            if self.ready_made:
                return x + self.attention(x, x, self.gate(x), need_weights=False)[0]
            q, k, v = self.project(self.gate(x)).chunk(3, dim=-1)
            q, k, v = (part.view(2, 5, 2, 2).transpose(1, 2) for part in (q, k, v))
            mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 4)
            return x + self.out(mixed)

    for ready_made in (True, False):
        lengths = path_lengths(Attention(ready_made), torch.zeros(2, 5, 4))
        assert lengths.normalized == pytest.approx(0.125)
        assert lengths.paths == 4 * (1 + 4 * 4)


def test_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.gate = nn.Linear(2, 3), nn.Linear(5, 3), Gate(3)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.gate(self.a(x) + self.b(y)), self.a(x)

    lengths = path_lengths(Two(), (torch.zeros(1, 2), torch.zeros(1, 5)))
    assert lengths.paths == 3 * 7 + 3 * 2
    assert lengths.normalized == 0.5


def test_in_place_units_change_the_shortcut_too() -> None:
    class PreActivation(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.relu, self.conv = nn.ReLU(inplace=inplace), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x + self.conv(self.relu(x))

    assert path_lengths(PreActivation(False), torch.zeros(1, 3)).normalized == 0.5
    assert path_lengths(PreActivation(True), torch.zeros(1, 3)).normalized == 1.0


def test_gates_used_twice_and_networks_of_one_layer() -> None:
    shared = Gate(3)
    twice = nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 3), shared)
    lengths = path_lengths(twice, torch.zeros(1, 3))
    assert lengths.normalized == 2.0
    assert list(lengths.per_layer) == ["1"]
    alone = path_lengths(gate("100"), torch.zeros(1, 3))
    assert alone.normalized == pytest.approx(1 / 3)
    assert list(alone.per_layer) == ["<root>"]
    assert path_lengths(nn.Linear(3, 2), torch.zeros(1, 3)).paths == 6
    # One sample without a batch axis.
    assert path_lengths(nn.Sequential(nn.Linear(3, 4), gate("1000")), torch.zeros(3)).normalized == 0.25


def test_subclasses_that_keep_the_forward_keep_the_rule() -> None:
    class Named(nn.Linear):
        pass

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return torch.relu(functional.linear(input, self.weight * 2, self.bias))

    assert path_lengths(nn.Sequential(Named(2, 3)), torch.zeros(1, 2)).normalized == 0.0
    assert path_lengths(nn.Sequential(Scaled(2, 3)), torch.zeros(1, 2)).normalized == 1.0
    reparametrized = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    assert path_lengths(nn.Sequential(reparametrized), torch.zeros(1, 2)).paths == 6


# ---- one graph, many states -----------------------------------------------------------------------------------------


def test_a_graph_is_traced_once_and_read_often() -> None:
    net = nn.Sequential(nn.Linear(2, 4), Gate(4), nn.Linear(4, 4), Gate(4), nn.Linear(4, 1))
    graph = trace_paths(net, torch.zeros(1, 2))
    assert graph.gates == {"1": 4, "3": 4}
    assert graph.lengths(net).normalized == 2.0
    later = copy.deepcopy(net)
    later[1].freeze(torch.tensor([True, True, False, False]))  # type: ignore[operator]
    assert graph.lengths(later).normalized == 1.5
    assert graph.lengths(nn.DataParallel(later)).normalized == 1.5
    assert graph.lengths(net).normalized == 2.0
    assert len(graph.lengths(later).distribution) == len(graph.lengths(net).distribution) == 3
    assert average_path_length(later, torch.zeros(1, 2)) == 1.5
    assert average_path_length(later, torch.zeros(1, 2), normalized=False) == 1.5
    with pytest.raises(UnknownName, match="has no gate '1' \\(it has none\\); trace this network"):
        graph.lengths(nn.Linear(2, 3))
    with pytest.raises(ShapeError, match="gate '1' has 5 channels; the graph was traced with 4"):
        graph.lengths(nn.Sequential(nn.Linear(2, 5), Gate(5)))


def test_the_live_network_is_not_touched() -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Gate(4), nn.Dropout(), block(4))
    net[5] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    net.train()
    called: list[str] = []
    net[1].register_forward_hook(lambda *_: called.append("hook"))
    before = copy.deepcopy(net.state_dict())
    names = {name: sorted(vars(module)) for name, module in net.named_modules()}
    example = torch.full((2, 3, 4, 4), -1.0)
    random = torch.get_rng_state()
    path_lengths(net, example)
    assert not called
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in net.modules())
    assert names == {name: sorted(vars(module)) for name, module in net.named_modules()}
    assert (example == -1).all()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in net.parameters())


def test_public_names() -> None:
    assert ntkdyn.path_lengths is path_lengths
    assert ntkdyn.average_path_length is average_path_length
    assert ntkdyn.PathLengths is PathLengths


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Function(lambda x: x if x.sum() > 0 else -x), "layer '1' .* neither by torch.export .*control flow"),
        (Function(lambda x: torch.cumsum(x, 1)), r"node 'cumsum' \(torch.cumsum\) in layer '1' has no rule for paths"),
        (Function(lambda x: x.sort(1).values), r"\(Tensor.sort\) in layer '1' has no rule for paths; register a rule"),
        (nn.GRU(4, 4), r"layer '1' \(GRU\) has no rule for paths; register a rule with ntkdyn.paths.rules.path_rule"),
        (nn.Linear(5, 2), r"layer '1' \(Linear\) fails on the example: .*give an example that the network accepts"),
        (Function(lambda x: x.detach() @ x.T), r"along a path \(paths end at node 'matmul' .* in layer '1'"),
        (Function(lambda x: torch.zeros(3)), "no output depends on the network's input"),
        (Function(lambda x: x.view(2, 2, 2).relu()), r"takes shape \(2, 2, 2\) in which the channels lie on no single"),
        (Function(lambda x: x.view(2, 2, 2)), r"node 'output' \(output\) takes shape"),
        (Function(lambda x: x.real), "reads the attribute 'real'"),
        (nn.Sequential(Function(lambda x: x.t()), nn.Linear(2, 2)), "'1.1' .* axis 1 .* channels lie on axis 0"),
        (nn.Sequential(Function(lambda x: x.t() + x), nn.Linear(2, 2)), "fails on the example"),
        (Function(lambda x: x[:, :2].t() + x[:, :2]), r"joins branches with their channels on axes \[0, 1\]"),
        (
            Function(lambda x: functional.scaled_dot_product_attention(x, x, torch.zeros(2, 4))),
            "has values that carry no path",
        ),
        (nn.MaxPool1d(2, return_indices=True), "returned tuple; expected one tensor"),
    ],
)
def test_what_cannot_be_followed_is_named(layer: nn.Module, message: str) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        path_lengths(nn.Sequential(nn.Linear(3, 4), layer), torch.zeros(2, 3))
    assert "\n" not in str(caught.value)


def test_own_rules() -> None:
    class Rotate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(x, 0)

    net = nn.Sequential(nn.Linear(2, 3), Rotate(), Gate(3))
    with pytest.raises(TraceError, match="cumsum"):
        path_lengths(net, torch.zeros(1, 2))

    @path_rule(Rotate)
    def rotate(call: Call) -> Any:
        return call.single()

    assert path_lengths(net, torch.zeros(1, 2)).normalized == 1.0
    with pytest.raises(ConfigurationError, match="Linear'> has a rule already"):
        path_rule(nn.Linear)(rotate)


# ---- speed ----------------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.stride, self.extra = (1 if before == width else 2), width - before
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, self.stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.gate1, self.gate2 = Gate(width), Gate(width)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.extra:
            shortcut = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return self.gate2(shortcut + self.bn2(self.conv2(self.gate1(self.bn1(self.conv1(x))))))


def resnet56() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), Gate(16)]
    widths = [16] * 9 + [32] * 9 + [64] * 9
    for before, width in zip([16, *widths], widths, strict=False):
        layers.append(BasicBlock(before, width))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def test_resnet56() -> None:
    lengths = path_lengths(resnet56(), torch.zeros(2, 3, 32, 32))
    # 1 unit, 27 blocks of half a unit and one after the sum; two shortcuts without a predecessor in half the channels.
    assert lengths.normalized > 1 + 27 * 1.5
    assert len(lengths.distribution) == 1 + 1 + 27 * 2
    assert lengths.distribution.sum() == pytest.approx(1.0)
    assert lengths.distribution @ np.arange(56) == pytest.approx(lengths.normalized)
