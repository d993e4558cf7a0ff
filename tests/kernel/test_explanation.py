"""What explain_ntk says, against what the engine does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ntkdyn import Projection, empirical_ntk, explain_ntk
from ntkdyn.kernel import Reduction
from ntkdyn.kernel.contraction import Contraction
from ntkdyn.kernel.costs import Extent, costs
from ntkdyn.kernel.factors import Form


class Mixed(nn.Module):
    """An embedding, a recurrent layer, linear layers over positions, a convolution: each its own route."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(500, 8)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.hidden = nn.Linear(8, 64)
        self.head = nn.Linear(64, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.recurrent(self.table(tokens))[0])
        x = self.convolution(x.mT).mT.mean(1)
        return self.head(torch.relu(self.hidden(x)))


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = explain_ntk(Mixed(), torch.randint(0, 500, (30, 16)))
    printed = capsys.readouterr().out
    assert printed.strip() == str(found)
    routes = {row.layer: row.route for row in found.layers}
    assert routes["(passes)"] == "1 forward, 5 backward"
    assert routes["recurrent"] == "autograd"
    assert routes["table"] == "pairs"
    assert routes["hidden"] == "gram"
    assert routes["head"] == "last layer"
    assert routes["unused"] == "none (zero)"
    assert routes["norm"] == "rows"
    assert all(row.flops >= 0 and row.bytes >= 0 and row.seconds >= 0 for row in found.layers)
    assert found.seconds == pytest.approx(sum(row.seconds for row in found.layers))
    for column in ("layer", "route", "GFLOP", "MB", "ms", "total"):
        assert column in printed


def test_operations_follow_the_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 10))
    one = explain_ntk(model, torch.randn(100, 20), reduce="full")
    two = explain_ntk(model, torch.randn(200, 20), reduce="full")
    gram = [next(row for row in found.layers if row.layer == "0") for found in (one, two)]
    assert gram[0].route == gram[1].route == "gram"
    assert gram[1].flops == pytest.approx(4 * gram[0].flops)
    assert "backward" in capsys.readouterr().out


def test_passes_stop_at_the_first_layer(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 10))
    passes = explain_ntk(model, torch.randn(100, 20)).layers[0]
    forward, backward = 20 * 30 + 30 * 40 + 40 * 10, 30 * 40 + 40 * 10
    assert passes.flops == 2 * 100 * (forward + 10 * backward)
    assert passes.route in capsys.readouterr().out


class Scores(nn.Module):
    """One parameter that belongs to no layer, and is not used as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 30))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) @ self.weight.sinh()


def test_passes_by_plain_autograd_are_counted_with_their_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    passes, own = explain_ntk(Scores(), torch.randn(100, 20)).layers
    assert (passes.route, own.route) == ("1 forward, 0 backward", "autograd")
    assert passes.flops == 2 * 100 * 20 * 30
    assert own.flops == 30 * 2 * 100 * 20 * 30
    assert own.route in capsys.readouterr().out


def test_seeds_on_the_feature_side(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 300))
    found = explain_ntk(model, torch.randn(20, 6))
    assert found.layers[0].route == "1 forward, 8 backward"
    projected = explain_ntk(model, torch.randn(20, 6), reduce=Projection(3, seed=0))
    assert projected.layers[0].route == "1 forward, 3 backward"
    assert "last layer" in capsys.readouterr().out


def test_nothing_is_changed() -> None:
    model, x = nn.Linear(3, 2), torch.randn(12, 3)
    before = empirical_ntk(model, x)
    explain_ntk(model, x, max_memory=2**27)
    assert torch.equal(empirical_ntk(model, x), before)


def test_no_route_looks_at_numbers_on_other_devices() -> None:
    table = Form(positions=16, d_out=8, d_in=500, classes=500, numbers=4000)
    hidden = Form(positions=16, d_out=8, d_in=30, classes=0, numbers=240, products=3840)
    here = Extent((64, 64), 10, "trace", symmetric=True, itemsize=4)
    there = replace(here, on_cpu=False)
    assert "pairs" in costs(table, here)
    assert "shared rows" in costs(hidden, here, shared=True)
    assert set(costs(table, there)) == set(costs(hidden, there, shared=True)) == {"rows", "gram"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("reduce", ["trace", "full"])
def test_the_host_never_waits_on_cuda(reduce: Reduction, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Contraction.add

    def strict(self: Contraction, *arguments: Any, **further: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            add(self, *arguments, **further)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Contraction, "add", strict)
    empirical_ntk(Mixed().cuda(), torch.randint(0, 500, (30, 16), device="cuda"), reduce=reduce)
