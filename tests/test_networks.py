"""Every registered network: path lengths against fractions, affine without units, kernels, states, slopes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ntkdyn as nd
from ntkdyn.experiments.networks import NETWORKS, build_network
from ntkdyn.gates import gates
from ntkdyn.paths import trace_paths

HALF = Fraction(1, 2)


@dataclass(frozen=True)
class Case:
    """A small network."""

    name: str
    width: int
    depth: int
    options: dict[str, Any] = field(default_factory=dict)
    granularity: Any = "channel"
    affine: bool = True
    """Whether nothing but its gates is nonlinear."""

    @property
    def example(self) -> Tensor:
        size = 4 if self.name in ("vit", "mlp") else 8
        return torch.randn(3, 2, size, size, generator=torch.Generator().manual_seed(0))

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return build_network(
            self.name, self.example, 3,
            width=self.width, depth=self.depth, granularity=self.granularity, options=self.options,
        )  # fmt: skip

    def __str__(self) -> str:
        return "-".join(map(str, (self.name, self.width, self.depth, *self.options.values(), self.granularity)))


CASES = [
    Case("mlp", 5, 3),
    Case("mlp", 4, 1, granularity="layer"),
    Case("plain", 3, 8),
    Case("plain", 2, 14, {"normalization": "none"}, "layer"),
    Case("resnet", 3, 8),
    Case("resnet", 3, 14, {"shortcut": "convolution"}),
    Case("resnet", 2, 14, {"normalization": "none"}, "layer"),
    Case("resnet-preactivation", 3, 8),
    Case("resnet-preactivation", 3, 14, {"shortcut": "convolution"}),
    Case("resnet-preactivation", 2, 14, {"normalization": "none"}, "layer"),
    Case("resnet18", 3, 10),
    Case("resnet18", 2, 18, {"stem": "imagenet"}, affine=False),
    Case("resnet50", 2, 14),
    Case("resnet50", 1, 26, {"stem": "imagenet"}, "layer", affine=False),
    Case("vgg", 2, 11, affine=False),
    Case("vgg", 2, 13, {"pooling": "mean"}),
    Case("vgg", 1, 16, {"head": "hidden", "pooling": "mean"}, "layer"),
    Case("repvgg", 3, 10),
    Case("repvgg", 2, 12, {"stem": "imagenet"}, "layer"),
    Case("vit", 4, 2, {"patch": 2, "heads": 2}, affine=False),
    Case("vit", 6, 1, {"patch": 2, "heads": 3, "reading": "mean"}, "layer", affine=False),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def freeze_some(model: nn.Module, seed: int) -> dict[str, list[bool]]:
    """Freeze random channels, other shares of them in each gate; which units are active, by gate."""
    generator = random.Random(seed)
    active = {}
    for name, gate in gates(model).items():
        share = generator.choice([0, 0.2, 0.5, 0.8, 1])
        mask = torch.tensor([generator.random() < share for _ in range(gate.frozen.numel())])
        gate.freeze(mask)
        active[name] = (~mask).expand(gate.channels).tolist()
    return active


# ---- path lengths: channel by channel -------------------------------------------------------------------------------

# Paths that end in a channel: their number, their summed lengths, the expected length of a walk back.
Channel = tuple[int, int, Fraction]
Units = Callable[[list[Channel]], list[Channel]]


def dense(before: list[Channel], outputs: int) -> list[Channel]:
    reached = [channel for channel in before if channel[0]]
    paths, total = sum(channel[0] for channel in reached), sum(channel[1] for channel in reached)
    return [(paths, total, sum((channel[2] for channel in reached), Fraction(0)) / len(reached))] * outputs


def join(*branches: list[Channel]) -> list[Channel]:
    joined = []
    for channels in zip(*branches, strict=True):
        reached = [channel for channel in channels if channel[0]]
        expected = sum((channel[2] for channel in reached), Fraction(0)) / len(reached)
        joined.append((sum(channel[0] for channel in channels), sum(channel[1] for channel in channels), expected))
    return joined


def padded(before: list[Channel], width: int) -> list[Channel]:
    return before + [(0, 0, Fraction(0))] * (width - len(before))


def chain(before: list[Channel], widths: list[int], units: Units) -> list[Channel]:
    for width in widths:
        before = units(dense(before, width))
    return before


def walk_residual(before: list[Channel], case: Case, units: Units) -> list[Channel]:
    pre, widths = case.name == "resnet-preactivation", [case.width, 2 * case.width, 4 * case.width]
    before = dense(before, case.width) if pre else chain(before, [case.width], units)
    for width in widths:
        for _ in range((case.depth - 2) // 6):
            if width == len(before):
                shortcut = before
            elif "shortcut" in case.options:
                shortcut = dense(before, width)
            else:
                shortcut = padded(before, width)
            if pre:
                before = join(dense(units(dense(units(before), width)), width), shortcut)
            else:
                before = units(join(dense(units(dense(before, width)), width), shortcut))
    return units(before) if pre else before


def walk_imagenet(before: list[Channel], case: Case, units: Units) -> list[Channel]:
    before = chain(before, [case.width], units)
    for width in (case.width, 2 * case.width, 4 * case.width, 8 * case.width):
        for _ in range({10: 1, 18: 2, 14: 1, 26: 2}[case.depth]):
            inner = [width, width] if case.name == "resnet50" else [width]
            outputs = 4 * width if case.name == "resnet50" else width
            shortcut = before if len(before) == outputs else dense(before, outputs)
            before = units(join(dense(chain(before, inner, units), outputs), shortcut))
    return before


def walk_vgg(before: list[Channel], case: Case, units: Units) -> list[Channel]:
    counts = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}[case.depth]
    widths = [case.width * factor for factor, count in zip((1, 2, 4, 8, 8), counts, strict=True) for _ in range(count)]
    before = chain(before, widths, units)
    if case.options.get("head") == "hidden":
        pixels = [channel for channel in before for _ in range(7 * 7)]
        return chain(pixels, [64 * case.width] * 2, units)
    return before


def walk_repvgg(before: list[Channel], case: Case, units: Units) -> list[Channel]:
    w = case.width
    counts = {w: 1 + 2, 2 * w: 4, 4 * w: case.depth - 9, -(-80 * w // 3): 1}
    for width, count in counts.items():
        for layer in range(count):
            total = join(dense(before, width), dense(before, width))
            # The layer in front and the first of the first stage have equally many channels; the large stem halves
            # the image in both.
            same = layer > (1 if width == w and "stem" in case.options else 0)
            before = units(join(total, before) if same else total)
    return before


def walk_vit(before: list[Channel], case: Case, units: Units) -> list[Channel]:
    before = dense(before, case.width)
    for _ in range(case.depth):
        before = join(before, dense(dense(before, case.width), case.width))
        before = join(before, dense(units(dense(before, 4 * case.width)), case.width))
    return before


WALKS: dict[str, Callable[[list[Channel], Case, Units], list[Channel]]] = {
    "mlp": lambda before, case, units: chain(before * 16, [case.width] * case.depth, units),
    "plain": lambda before, case, units: chain(
        before, [case.width] + [case.width * f for f in (1, 2, 4) for _ in range((case.depth - 2) // 3)], units
    ),
    "resnet": walk_residual,
    "resnet-preactivation": walk_residual,
    "resnet18": walk_imagenet,
    "resnet50": walk_imagenet,
    "vgg": walk_vgg,
    "repvgg": walk_repvgg,
    "vit": walk_vit,
}


@every_case
def test_path_lengths_equal_a_recursion_in_fractions(case: Case) -> None:
    model = case.build()
    graph = trace_paths(model, case.example)
    compare(graph.lengths(model), case, {name: [True] * gate.channels for name, gate in gates(model).items()})
    for seed in range(3):
        model = case.build()
        masks = freeze_some(model, seed)
        compare(graph.lengths(model), case, masks)


def compare(found: nd.PathLengths, case: Case, masks: dict[str, list[bool]]) -> None:
    left: Iterator[list[bool]] = iter(masks.values())

    def units(channels: list[Channel]) -> list[Channel]:
        active = next(left)
        return [(p, t + p * a, e + a) for (p, t, e), a in zip(channels, active, strict=True)]

    ends = dense(WALKS[case.name]([(1, 0, Fraction(0))] * case.example.shape[1], case, units), 3)
    assert next(left, None) is None
    paths, total = sum(channel[0] for channel in ends), sum(channel[1] for channel in ends)
    assert found.paths == paths
    assert found.mean == float(Fraction(total, paths))
    assert found.normalized == pytest.approx(float(sum(channel[2] for channel in ends) / 3), rel=1e-12, abs=1e-12)
    assert found.per_layer == pytest.approx({name: sum(mask) / len(mask) for name, mask in masks.items()})


# ---- path lengths: closed forms in the shares of active units -------------------------------------------------------


def pairs(shares: list[Fraction]) -> list[list[Fraction]]:
    return [shares[i : i + 2] for i in range(0, len(shares), 2)]


def branch_weights(blocks: int, *, identity: bool) -> list[Fraction]:
    """Probability of the branch in each block: half of the channels of a padded shortcut have no other way."""
    changes = (blocks // 3, 2 * blocks // 3) if identity else ()
    return [Fraction(3, 4) if block in changes else HALF for block in range(blocks)]


def residual(shares: list[Fraction], *, identity: bool = True) -> Fraction:
    first, *rest = shares
    blocks = list(zip(pairs(rest), branch_weights(len(rest) // 2, identity=identity), strict=True))
    return first + sum((weight * inner + after for (inner, after), weight in blocks), Fraction(0))


def preactivated(shares: list[Fraction], *, identity: bool = True) -> Fraction:
    *rest, last = shares
    blocks = zip(pairs(rest), branch_weights(len(rest) // 2, identity=identity), strict=True)
    return last + sum((weight * (one + two) for (one, two), weight in blocks), Fraction(0))


def bottlenecks(shares: list[Fraction]) -> Fraction:
    first, *rest = shares
    blocks = [rest[i : i + 3] for i in range(0, len(rest), 3)]
    return first + sum((HALF * (one + two) + after for one, two, after in blocks), Fraction(0))


def total(shares: list[Fraction]) -> Fraction:
    return sum(shares, Fraction(0))


CLOSED_FORMS: dict[str, tuple[Callable[[list[Fraction]], Fraction], int]] = {
    # Formula of NAPL, and its value with every unit active at the default depth.
    "mlp": (total, 6),
    "plain": (total, 19),
    "resnet": (residual, 15),
    "resnet-preactivation": (preactivated, 11),
    "resnet18": (lambda shares: residual(shares, identity=False), 13),
    "resnet50": (bottlenecks, 33),
    "vgg": (total, 13),
    "repvgg": (total, 22),
    "vit": (lambda shares: HALF * sum(shares), 3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_defaults_have_closed_forms(name: str) -> None:
    example = torch.zeros(2, 3, 32, 32)
    model = build_network(name, example, 10).eval()
    assert model(example).shape == (2, 10)
    formula, all_active = CLOSED_FORMS[name]
    graph = trace_paths(model, example)
    assert graph.lengths(model).normalized == pytest.approx(all_active, rel=1e-12)
    shares = [Fraction(sum(mask), len(mask)) for mask in freeze_some(model, 0).values()]
    found = graph.lengths(model)
    assert found.normalized == pytest.approx(float(formula(shares)), rel=1e-12)
    if formula is total:
        # Without shortcuts, or with those of RepVGG, which lie beside no units.
        assert found.mean == pytest.approx(float(formula(shares)), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "shortcut", "length"),
    [
        # After the sum: 1 + 27 (1/2 + 1); before: 27 (1/2 + 1/2) + 1. Padding two shortcuts makes half of the channels
        # there certain to take the branch: 1/4 more for each unit of it.
        ("resnet", "convolution", 41.5),
        ("resnet", "identity", 41.5 + 2 * 0.25),
        ("resnet-preactivation", "convolution", 28),
        ("resnet-preactivation", "identity", 28 + 2 * 0.5),
    ],
)
def test_resnet56(name: str, shortcut: str, length: float) -> None:
    example = torch.zeros(2, 3, 32, 32)
    model = build_network(name, example, 10, width=4, depth=56, options={"shortcut": shortcut})
    graph = trace_paths(model, example)
    assert graph.lengths(model).normalized == pytest.approx(length, rel=1e-12)
    shares = [Fraction(sum(mask), len(mask)) for mask in freeze_some(model, 3).values()]
    formula = residual if name == "resnet" else preactivated
    expected = float(formula(shares, identity=shortcut == "identity"))
    assert graph.lengths(model).normalized == pytest.approx(expected, rel=1e-12)


# ---- what else holds for all ----------------------------------------------------------------------------------------


def trained(case: Case, seed: int = 0) -> nn.Module:
    """In float64, with statistics, weights and slopes that are none of the initial ones."""
    model = case.build(seed).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(case.example.double()).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        for gate in gates(model).values():
            gate.slope.uniform_(-0.2, 0.9)
    return model.eval()


@every_case
def test_all_parameters_are_trained(case: Case) -> None:
    model = case.build().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    outputs = model(case.example)
    assert outputs.shape == (3, 3)
    outputs.square().sum().backward()
    # Softmax does not see what all keys have in common, nor a maximum the negative side while anything is positive.
    excused = ("attention.key.bias", *([] if case.affine else ["slope"]))
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in without if not name.endswith(excused)] == []
    statistics = [name for name in before if name.endswith("running_mean")]
    assert all(not torch.equal(before[name], model.state_dict()[name]) for name in statistics)
    assert all(gate.channels > 0 and not gate.slope.any() for gate in gates(model).values())
    counts = nd.nonlinear_units(model, case.example)
    assert counts.always_active == {}
    assert bool(counts.uncounted) != case.affine


@every_case
def test_affine_without_units(case: Case) -> None:
    model = trained(case)
    for gate in gates(model).values():
        gate.freeze()
    lengths = nd.path_lengths(model, case.example.double())
    assert (lengths.mean, lengths.normalized, lengths.weighted) == (0, 0, 0)
    x, y = torch.randn(2, *case.example.shape, dtype=torch.float64)
    middle, mean = model((x + y) / 2), (model(x) + model(y)) / 2
    assert torch.allclose(middle, mean, rtol=1e-10, atol=1e-10 * float(mean.detach().abs().max())) == case.affine


@every_case
def test_states_can_be_stored(case: Case) -> None:
    model, other = trained(case), case.build(1).double().eval()
    freeze_some(model, 4)
    x = case.example.double()
    assert not torch.equal(model(x), other(x))
    assert other.load_state_dict(model.state_dict()) == ([], [])
    assert torch.equal(model(x), other(x))
    again = case.build()
    assert all(torch.equal(one, two) for one, two in zip(case.build().parameters(), again.parameters(), strict=True))


@every_case
def test_kernels(case: Case) -> None:
    model, x = trained(case), case.example.double()
    found, expected = (nd.empirical_ntk(model, x, engine=engine) for engine in ("layerwise", "reference"))
    assert float((found - expected).norm() / expected.norm()) < 1e-12


@every_case
def test_granularity(case: Case) -> None:
    for gate in gates(case.build()).values():
        assert gate.slope.numel() == (1 if case.granularity == "layer" else gate.channels)
