"""Path lengths against the enumeration of every path, on random graphs of all kinds of layers, in fractions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from ntkdyn.gates import Gate
from ntkdyn.paths import trace_paths

SIZE = 4
MOST_PATHS = 3000

Choice = tuple[Fraction, int, Fraction]


@dataclass
class Channel:
    """Chooses uniformly among what reaches it, and adds its own unit. The only thing that the enumeration knows."""

    before: list[Channel]
    length: int = 0
    weight: Fraction = Fraction(0)
    source: bool = False

    def __post_init__(self) -> None:
        self.before = [channel for channel in self.before if channel.reached]
        self.reached = self.source or bool(self.before)
        self.count = 1 if self.source else sum(channel.count for channel in self.before)

    def paths(self) -> list[Choice]:
        """(probability, length, weighted length) of every path that ends here."""
        if self.source:
            return [(Fraction(1), 0, Fraction(0))]
        return [
            (probability / len(self.before), length + self.length, weight + self.weight)
            for channel in self.before
            for probability, length, weight in channel.paths()
        ]


def unit(before: list[Channel], active: bool = True) -> Channel:
    return Channel(before, int(active), Fraction(int(active)))


@dataclass
class Plan:
    """What forward does, as (kind, operands, module's index or other setting), and that wired channel by channel."""

    steps: list[tuple[str, tuple[int, ...], Any]] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    wired: list[list[Channel]] = field(default_factory=list)
    outputs: tuple[int, ...] = ()

    def add(self, kind: str, operands: tuple[int, ...], setting: Any, channels: list[Channel]) -> None:
        self.steps.append((kind, operands, setting))
        self.wired.append(channels)

    def module(self, module: nn.Module) -> int:
        self.modules.append(module)
        return len(self.modules) - 1


class Net(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.steps, self.outputs = plan.steps, plan.outputs
        self.parts = nn.ModuleList(plan.modules)

    def forward(self, x: Tensor) -> Any:
        values: list[Tensor] = []
        for kind, operands, setting in self.steps:
            given = [values[index] for index in operands]
            values.append(self.run(kind, given, setting) if kind != "input" else self.parts[setting](x))
        found = tuple(values[index] for index in self.outputs)
        return found if len(found) > 1 else found[0]

    def run(self, kind: str, given: list[Tensor], setting: Any) -> Tensor:
        first, *others = given
        match kind:
            case "module":
                return self.parts[setting](first)
            case "add":
                return first + others[0]
            case "product":
                return first * others[0]
            case "quotient":
                return first / others[0]
            case "larger":
                return torch.maximum(first, others[0])
            case "selected":
                return torch.where(first > 0, first, others[0])
            case "cat":
                return torch.cat(given, dim=1)
            case "pad":
                return functional.pad(first, (0, 0, 0, 0, *setting))
            case "pick":
                return first[:, setting]
            case "space":
                return functional.interpolate(first.mean((2, 3), keepdim=True) + 1, size=SIZE)
            case "squeeze":
                # Squeeze-and-excitation: one weight per channel, from the means over space.
                return first * torch.sigmoid(self.parts[setting](first.mean((2, 3), keepdim=True)))
        raise ValueError(kind)


def dense(before: list[Channel], outputs: int, groups: int) -> list[Channel]:
    size, each = len(before) // groups, outputs // groups
    return [Channel(before[j // each * size : (j // each + 1) * size]) for j in range(outputs)]


def gated(before: list[Channel], gate: Gate) -> list[Channel]:
    slopes = gate.slope.tolist() * (len(before) if gate.granularity == "layer" else 1)
    frozen = gate.frozen.tolist() * (len(before) if gate.granularity == "layer" else 1)
    return [
        Channel([channel]) if fixed else Channel([channel], 1, abs(1 - Fraction(slope)))
        for channel, fixed, slope in zip(before, frozen, slopes, strict=True)
    ]


KINDS = """
dense dense depthwise gate gate gate norm relu softplus pool add add product quotient larger selected cat cat pad pick
space squeeze glu again
"""


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    plan = Plan()
    width = draw(st.integers(1, 4))
    sources = [Channel([], source=True) for _ in range(2)]
    plan.add("input", (), plan.module(nn.Conv2d(2, width, 1)), dense(sources, width, 1))
    for _ in range(draw(st.integers(1, 8))):
        extend(draw, plan, draw(st.sampled_from(KINDS.split())))
        assume(sum(channel.count for channel in plan.wired[-1]) <= MOST_PATHS)
    others = draw(st.sets(st.integers(0, len(plan.steps) - 1), max_size=1)) - {len(plan.steps) - 1}
    plan.outputs = (*sorted(others), len(plan.steps) - 1)
    return plan


def extend(draw: st.DrawFn, plan: Plan, kind: str) -> None:
    index = draw(st.integers(0, len(plan.steps) - 1)) if draw(st.booleans()) else len(plan.steps) - 1
    before = plan.wired[index]
    width = len(before)
    same = [other for other, channels in enumerate(plan.wired) if len(channels) == width]
    other = draw(st.sampled_from(same))
    pairs = list(zip(before, plan.wired[other], strict=True))

    def module(made: nn.Module, channels: list[Channel]) -> None:
        plan.add("module", (index,), plan.module(made), channels)

    match kind:
        case "dense" | "depthwise":
            outputs = width * draw(st.integers(1, 2)) if kind == "depthwise" else draw(st.integers(1, 4))
            fitting = [g for g in (1, 2, 3) if width % g == 0 and outputs % g == 0]
            groups = width if kind == "depthwise" else draw(st.sampled_from(fitting))
            module(nn.Conv2d(width, outputs, 3, padding=1, groups=groups), dense(before, outputs, groups))
        case "gate":
            layer = draw(st.integers(0, 3)) == 0
            size = 1 if layer else width
            slopes = draw(st.lists(st.sampled_from([0.0, 0.25, 0.1, 1.0, 1.5]), min_size=size, max_size=size))
            frozen = draw(st.lists(st.booleans(), min_size=size, max_size=size))
            made = Gate(width, torch.tensor(slopes, dtype=torch.float64), granularity="layer" if layer else "channel")
            made.freeze(torch.tensor(frozen))
            module(made, gated(before, made))
        case "norm":
            module(nn.BatchNorm2d(width), before)
        case "pool":
            module(nn.MaxPool2d(3, 1, 1), before)
        case "relu" | "softplus":
            module(nn.ReLU() if kind == "relu" else nn.Softplus(), [unit([channel]) for channel in before])
        case "glu":
            if width % 2 == 0:
                second = [unit([channel]) for channel in before[width // 2 :]]
                factors = zip(before[: width // 2], second, strict=True)
                module(nn.GLU(dim=1), [unit([a, b], a.reached and b.reached) for a, b in factors])
        case "again":
            # A module called a second time: a gate counts at each call.
            shared = [i for i, m in enumerate(plan.modules) if getattr(m, "channels", None) == width]
            if shared:
                number = draw(st.sampled_from(shared))
                plan.add("module", (index,), number, gated(before, plan.modules[number]))  # type: ignore[arg-type]
        case "add":
            plan.add(kind, (index, other), None, [Channel([a, b]) for a, b in pairs])
        case "product":
            plan.add(kind, (index, other), None, [unit([a, b], a.reached and b.reached) for a, b in pairs])
        case "quotient":
            inverse = [unit([b]) for b in plan.wired[other]]
            factors = zip(before, inverse, strict=True)
            plan.add(kind, (index, other), None, [unit([a, b], a.reached and b.reached) for a, b in factors])
        case "larger" | "selected":
            plan.add(kind, (index, other), None, [unit([a, b]) for a, b in pairs])
        case "cat":
            beside = draw(st.integers(0, len(plan.steps) - 1))
            if width + len(plan.wired[beside]) <= 6:
                plan.add(kind, (index, beside), None, before + plan.wired[beside])
        case "pad":
            low, high = draw(st.integers(0, 1)), draw(st.integers(0, 1))
            plan.add(kind, (index,), (low, high), [Channel([])] * low + before + [Channel([])] * high)
        case "pick":
            picked = draw(st.lists(st.integers(0, width - 1), min_size=1, max_size=4))
            if any(before[i].reached for i in picked):
                plan.add(kind, (index,), picked, [before[i] for i in picked])
        case "space":
            plan.add(kind, (index,), None, before)
        case "squeeze":
            excited = [unit([channel]) for channel in dense(before, width, 1)]
            factors = zip(before, excited, strict=True)
            channels = [unit([a, b], a.reached and b.reached) for a, b in factors]
            plan.add(kind, (index,), plan.module(nn.Conv2d(width, width, 1)), channels)


@settings(max_examples=120, deadline=None)
@given(plan=plans())
def test_random_graphs_equal_enumeration(plan: Plan) -> None:
    ends = [channel for index in plan.outputs for channel in plan.wired[index] if channel.reached]
    assume(sum(channel.count for channel in ends) <= 2 * MOST_PATHS)
    net = Net(plan).double().eval()
    graph = trace_paths(net, torch.ones(1, 2, SIZE, SIZE, dtype=torch.float64))
    every = [path for channel in ends for path in channel.paths()]
    exact = graph.lengths(net, exact=True)

    def expectation(values: list[Fraction]) -> Fraction:
        return sum((p * value for (p, _, _), value in zip(every, values, strict=True)), Fraction(0)) / len(ends)

    counts = Counter(length for _, length, _ in every)
    longest = len(exact.distribution)
    assert exact.paths == len(every)
    assert exact.path_counts == tuple(counts[length] for length in range(longest))
    assert exact.mean == Fraction(sum(length for _, length, _ in every), len(every))
    assert exact.normalized == expectation([Fraction(length) for _, length, _ in every])
    assert exact.weighted == expectation([weight for _, _, weight in every])
    distribution = [expectation([Fraction(length == n) for _, length, _ in every]) for n in range(longest)]
    assert exact.distribution.tolist() == distribution
    assert all(isinstance(share, Fraction) for share in exact.distribution)
    lengths = graph.lengths(net)
    assert lengths.mean == float(exact.mean)
    assert lengths.path_counts == exact.path_counts
    assert lengths.normalized == pytest.approx(float(exact.normalized), rel=1e-12, abs=1e-12)
    assert lengths.weighted == pytest.approx(float(exact.weighted), rel=1e-12, abs=1e-12)
    np.testing.assert_allclose(lengths.distribution, exact.distribution.astype(float), rtol=1e-12, atol=1e-12)
