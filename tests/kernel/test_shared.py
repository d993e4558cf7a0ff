"""Gradients that all output directions share: found by their numbers, exact by every route, never taken for others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkdyn import check_ntk, empirical_ntk, explain_ntk
from ntkdyn.errors import UnsupportedLayer
from ntkdyn.kernel import contraction
from ntkdyn.kernel.contraction import Contraction


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    tolerance = 1e-10 if found.dtype == torch.float64 else 1e-5
    assert (found - expected).norm() <= tolerance * expected.norm()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 6))


def cnn(pool: nn.Module) -> nn.Module:
    norm = nn.BatchNorm2d(12)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2))
    second = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), norm, nn.ReLU(), pool, nn.Flatten())
    return nn.Sequential(*first, *second, nn.Linear(12, 5)).eval()


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


# Network, shape of one sample, the layer whose gradients are shared.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "mlp": (mlp, (7,), "2"),
    "more outputs than features": (lambda: nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 60)), (7,), "0"),
    "convolution and means": (lambda: cnn(nn.AdaptiveAvgPool2d(1)), (3, 8, 8), "3"),
    "convolution and maxima": (lambda: cnn(nn.AdaptiveMaxPool2d(1)), (3, 8, 8), "3"),
    "positions": (
        lambda: nn.Sequential(nn.Linear(40, 30), nn.ReLU(), Mean(), nn.Linear(30, 5)), (3, 40), "0"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _looking_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is worth it for networks as small as these."""
    monkeypatch.setattr("ntkdyn.kernel.costs._LOOKS", 0.0)


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Parameters that were treated as shared, and how."""
    taken: set[tuple[str, str]] = set()
    original = Contraction._add_shared

    def noted(self: Contraction, name: str, first: Any, second: Any, route: Any) -> None:
        taken.add((name, route))
        original(self, name, first, second, route)

    monkeypatch.setattr(Contraction, "_add_shared", noted)
    return taken


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("reduce", ["trace", "mean", "each", "full"])
@pytest.mark.parametrize("size_2", [None, 5])
def test_equals_loop(
    name: str, reduce: Any, size_2: int | None, oracles: ModuleType, routes: set[tuple[str, str]]
) -> None:
    torch.manual_seed(0)
    build, shape, layer = NETWORKS[name]
    model, x1 = build(), torch.randn(11, *shape)
    x2 = None if size_2 is None else torch.randn(size_2, *shape)
    for dtype in (torch.float64, torch.float32):
        blocks = empirical_ntk(model, x1, x2, reduce=reduce, per="layer", dtype=dtype)
        expected = oracles.ntk_by_loop(model, x1, x2, reduce=reduce, per="layer")
        for key, block in blocks.items():
            assert_near(block, expected[key])
    if reduce in ("trace", "mean") or (reduce == "full" and "convolution" in name):
        assert any(parameter == f"{layer}.weight" for parameter, _ in routes)


def test_every_route_is_taken(routes: set[tuple[str, str]]) -> None:
    for build, shape, _ in NETWORKS.values():
        empirical_ntk(build(), torch.randn(11, *shape))
    assert {route for _, route in routes} == {"shared rows", "shared gram"}


def test_pairs_of_directions_and_of_samples(routes: set[tuple[str, str]], oracles: ModuleType) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(7, 40), nn.ReLU(), nn.Linear(40, 10, bias=False)), torch.randn(520, 7)
    found = empirical_ntk(model, x, reduce="full", dtype=torch.float64, metric={"0.bias": 0.5})
    assert routes == {("0.weight", "shared gram")}
    for chosen in (slice(0, 5), slice(515, 520)):
        blocks = oracles.ntk_by_loop(model, x[chosen], x[:5], reduce="full", per="parameter")
        assert_near(
            found[chosen, :5], sum(block * (0.5 if name == "0.bias" else 1.0) for name, block in blocks.items())
        )


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("reduce", ["trace", "each", "full"])
def test_a_metric(name: str, reduce: Any) -> None:
    torch.manual_seed(0)
    build, shape, layer = NETWORKS[name]
    model, x = build(), torch.randn(9, *shape)
    weight = model.get_parameter(f"{layer}.weight")
    for scale in (0.3, torch.rand_like(weight)):
        further: Any = {"reduce": reduce, "dtype": torch.float64, "metric": {f"{layer}.weight": scale}}
        assert_near(empirical_ntk(model, x, **further), empirical_ntk(model, x, engine="reference", **further))


def test_channels_that_are_dead_in_the_first_samples(oracles: ModuleType, routes: set[tuple[str, str]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 20, bias=False), nn.ReLU(), nn.Linear(20, 6))
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].weight[3] = 0.0
    x = torch.rand(40, 7)
    x[:30] *= -1.0
    for reduce in ("trace", "full"):
        assert_near(
            empirical_ntk(model, x, reduce=reduce, dtype=torch.float64), oracles.ntk_by_loop(model, x, reduce=reduce)
        )
    assert routes


class Nearly(nn.Module):
    """One sample, or one direction, departs a little from what all others do."""

    def __init__(self, departure: float) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(7, 20), nn.Linear(20, 6)
        self.departure = departure

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        last = self.departure * (x[:, :1] > 10) * hidden[:, :1].square()
        return torch.cat([self.head(hidden)[:, :5], self.head(hidden)[:, 5:] + last], 1)


def test_what_is_not_shared_is_not_taken_for_it(oracles: ModuleType, routes: set[tuple[str, str]]) -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 7)
    x[-1, 0] = 20.0
    x[-1, 1:] = 0.0
    for departure, shared in ((0.0, True), (1e-3, False), (1.0, False)):
        routes.clear()
        model = Nearly(departure)
        found = empirical_ntk(model, x, dtype=torch.float64, parameters=["first.*"])
        assert_near(found, oracles.ntk_by_loop(model, x, parameters=["first.weight", "first.bias"]))
        assert bool(routes) == shared


def test_two_layers_between_are_not_shared(routes: set[tuple[str, str]]) -> None:
    empirical_ntk(mlp(), torch.randn(11, 7))
    assert {name for name, _ in routes} == {"2.weight"}


def test_a_wrong_direction_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    original = contraction.shared_gradient

    def spoiled(*arguments: Any) -> Any:
        found = original(*arguments)
        return None if found is None else replace(found, gradient=1.01 * found.gradient)

    model, x = mlp(), torch.randn(11, 7)
    check_ntk(model, x)
    monkeypatch.setattr(contraction, "shared_gradient", spoiled)
    with pytest.raises(UnsupportedLayer, match="layer '2'"):
        check_ntk(model, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    build, shape, layer = NETWORKS[name]
    found = explain_ntk(build(), torch.randn(64, *shape))
    assert next(row.route for row in found.layers if row.layer == layer).startswith("shared")
    assert "shared" in capsys.readouterr().out
