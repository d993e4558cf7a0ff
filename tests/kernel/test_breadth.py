"""Metrics and directions of outputs against scaled rows, convolutions of any shape, attention without fall-back."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ntkdyn import empirical_ntk
from ntkdyn.errors import ConfigurationError, ShapeError, UndefinedMeasure
from ntkdyn.kernel import ENGINES, Projection, SummedOutputs
from ntkdyn.kernel.preparation import prepared
from ntkdyn.kernel.tracing import traced

NETWORKS = [
    "tied_embedding",
    "transposed_convolutions",
    "elementwise_parameters",
    "source_and_target_transformer",
    "weights_stored_transposed",
    "wide_products_of_many_positions",
]


def rows(problem: Any, inputs: Any, scales: dict[str, Tensor], oracles: ModuleType) -> Tensor:
    """Jacobian [N, C, P] in float64, each parameter's columns times the root of its scale."""
    model = copy.deepcopy(problem.model).double()
    found = oracles._jacobian(model, dict(model.named_parameters()), inputs, problem.forward)
    one = torch.ones(1, dtype=torch.float64)
    return torch.cat([row * scales.get(name, one).flatten().sqrt() for name, row in found.items()], -1)


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_metric_scales_columns(name: str, engine: str, zoo: ModuleType, oracles: ModuleType) -> None:
    problem = zoo.ZOO[name]()
    torch.manual_seed(0)
    named = dict(problem.model.named_parameters())
    metric = {key: torch.rand(leaf.shape, dtype=torch.float64) for key, leaf in list(named.items())[::2]}
    metric[list(named)[1]] = torch.tensor(0.3, dtype=torch.float64)
    first, second = (rows(problem, x, metric, oracles) for x in (problem.x1, problem.x2))
    further = {"forward": problem.forward, "metric": metric, "engine": engine, "dtype": torch.float64}
    for reduce, formula in (("full", "ncp,mdp->nmcd"), ("trace", "ncp,mcp->nm")):
        found = empirical_ntk(problem.model, problem.x1, reduce=reduce, **further)
        assert_near(found, torch.einsum(formula, first, first))
        found = empirical_ntk(problem.model, problem.x1, problem.x2, reduce=reduce, **further)
        assert_near(found, torch.einsum(formula, first, second))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_directions_of_outputs(name: str, engine: str, zoo: ModuleType, oracles: ModuleType) -> None:
    problem = zoo.ZOO[name]()
    first, second = (rows(problem, x, {}, oracles) for x in (problem.x1, problem.x2))
    further = {"forward": problem.forward, "engine": engine, "dtype": torch.float64}
    found = empirical_ntk(problem.model, problem.x1, problem.x2, reduce=SummedOutputs(), **further)
    assert_near(found, first.sum(1) @ second.sum(1).T)
    found = empirical_ntk(problem.model, problem.x1, problem.x2, reduce=Projection(3, 7), **further)
    signs = torch.from_numpy(_signs(7, 3, first.shape[1]))
    assert_near(found, torch.einsum("kc,ncp,kd,mdp->nm", signs, first, signs, second) / 3)


def _signs(seed: int, count: int, outputs: int) -> Any:
    return np.random.default_rng(seed).integers(0, 2, (count, outputs)) * 2.0 - 1.0


def test_projection_is_unbiased(zoo: ModuleType) -> None:
    problem = zoo.ZOO["mlp"]()
    full = empirical_ntk(problem.model, problem.x1, reduce="full", dtype=torch.float64)
    exact = torch.einsum("nmcc->nm", full)
    draws = [empirical_ntk(problem.model, problem.x1, reduce=Projection(2, s), dtype=torch.float64) for s in range(150)]
    found = torch.stack(draws)
    own = torch.einsum("nncd->ncd", full)
    variance = (own.square().sum((1, 2)) - torch.einsum("ncc->nc", own).square().sum(1)) * 2 / 2
    deviation = (found.mean(0) - exact).diagonal().abs()
    assert (deviation <= 5 * (variance / len(draws)).sqrt()).all()
    ratio = found.diagonal(dim1=1, dim2=2).var(0) / variance
    assert ((ratio > 0.5) & (ratio < 2)).all()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    further=st.integers(0, 2),
    transposed=st.booleans(),
    samples=st.integers(1, 4),
)
def test_convolution_of_any_shape(
    groups: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: int,
    further: int,
    transposed: bool,
    samples: int,
    oracles: ModuleType,
) -> None:
    torch.manual_seed(0)
    options = {"stride": stride, "dilation": dilation, "padding": padding, "groups": groups}
    length = (3 - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1 + further
    assume(length > 0 and further < max(stride, dilation))
    layer = (
        nn.ConvTranspose1d(2, 4, kernel, output_padding=further, **options)
        if transposed
        else nn.Conv1d(2, 4, kernel, **options)
    )
    assume(transposed or 4 + 2 * padding >= dilation * (kernel - 1) + 1)
    model, x = nn.Sequential(layer, nn.Tanh(), nn.Flatten()), torch.randn(samples, 2, 3 if transposed else 4)
    expected = oracles.ntk_by_loop(model, x, reduce="full")
    assert_near(empirical_ntk(model, x, reduce="full", dtype=torch.float64), expected)


@pytest.mark.parametrize(
    "name",
    ["attention", "transformer_encoder", "transformer_encoder_with_its_fast_path", "transformer_positions_first",
     "source_and_target_transformer", "cross_attention_of_other_widths", "transposed_convolutions",
     "elementwise_parameters", "root_owned_parameters", "added_parameter_then_in_place", "convnext_block",
     "weights_stored_transposed", "wide_products_of_many_positions"],
)  # fmt: skip
def test_no_fall_back(name: str, zoo: ModuleType) -> None:
    problem = zoo.ZOO[name]()
    further = {"per": None, "metric": None, "dtype": None, "max_memory": None, "train_mode": ()}
    before = torch.backends.mha.get_fastpath_enabled()
    with prepared(
        problem.model,
        problem.x1,
        None,
        reduce="full",
        forward=problem.forward,
        parameters=problem.parameters,
        **further,
    ) as prepared_problem:
        assert traced(prepared_problem).trace.rest == ()
    assert torch.backends.mha.get_fastpath_enabled() == before


def _spoiled(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[1].weight.data[0, 1] = value
    return model


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf(engine: str, value: float) -> None:
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    bad = x.clone()
    bad[2, 1] = value
    with pytest.raises(UndefinedMeasure, match="x1 has NaN or Inf in sample 2"):
        empirical_ntk(model, bad, engine=engine)
    with pytest.raises(UndefinedMeasure, match="x2 has NaN or Inf in sample 2"):
        empirical_ntk(model, x, bad, engine=engine)
    with pytest.raises(UndefinedMeasure, match=r"parameter '1\.weight' holds NaN or Inf"):
        empirical_ntk(_spoiled(value), x, engine=engine)


def test_numbers_whose_sum_overflows_are_fine() -> None:
    x = torch.full((2, 3), 3e38)
    assert not x.sum().isfinite()
    with pytest.raises(UndefinedMeasure, match="the kernel has NaN or Inf"):  # not the inputs
        empirical_ntk(nn.Linear(3, 2), x)
    assert torch.equal(empirical_ntk(nn.Linear(3, 2), x, parameters=["bias"]), torch.full((2, 2), 2.0))


@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_of_different_kinds(engine: str) -> None:
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    with pytest.raises(ShapeError, match=r"x1 has samples of shape \[\(3,\)\], x2 of \[\(5, 3\)\]"):
        empirical_ntk(model, x, torch.ones(2, 5, 3), engine=engine)
    with pytest.raises(ShapeError, match="x1 is on cpu, x2 on meta"):
        empirical_ntk(model, x, torch.ones(2, 3, device="meta"), engine=engine)
    with pytest.raises(ShapeError, match="x1 has tensors of shape"):
        empirical_ntk(model, x[:0], engine=engine)
    with pytest.raises(ConfigurationError, match="metric"):
        empirical_ntk(model, x, metric={"weight": -1.0}, engine=engine)


def test_unreached_parameters_are_said_once() -> None:
    model = nn.Linear(3, 2)
    model.unused = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"'unused\.weight', 'unused\.bias' do not reach") as seen:
        blocks = empirical_ntk(model, torch.ones(4, 3), per="parameter")
    assert len(seen) == 1
    assert not blocks["unused.weight"].any()
    # The reference engine finds the same zeros, and says nothing.
    assert not empirical_ntk(model, torch.ones(4, 3), per="parameter", engine="reference")["unused.weight"].any()


class Empty(nn.Module):
    """A parameter without entries, which a layer that is switched off leaves behind."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0))
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x) + self.nothing.sum()
        return outputs


@pytest.mark.parametrize("reduce", ["trace", "mean", "each", "full"])
@pytest.mark.parametrize("openblas", [True, False])
def test_parameter_without_entries(openblas: bool, reduce: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkdyn.kernel.accumulator.by_openblas", lambda _: openblas)
    x = torch.randn(5, 3)
    found = empirical_ntk(Empty(), x, reduce=reduce, per="parameter")
    expected = empirical_ntk(Empty().layer, x, reduce=reduce, per="parameter")
    assert not found.pop("nothing").any()
    for name, block in expected.items():
        torch.testing.assert_close(found[f"layer.{name}"], block)


def test_bias_that_is_named_before_its_weight(oracles: ModuleType) -> None:
    class Early(nn.Module):
        def __init__(self, shape: int) -> None:
            super().__init__()
            self.bias, self.weight = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight).tanh()

    for shape in (4, 1):
        model, x = Early(shape), torch.randn(5, 3)
        assert_near(empirical_ntk(model, x, dtype=torch.float64), oracles.ntk_by_loop(model, x))


@pytest.mark.parametrize("engine", ENGINES)
def test_products_by_keyword(engine: str, oracles: ModuleType) -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 2))
            self.bias = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.addmm(self.bias, mat1=x, mat2=self.first).tanh()
            return torch.matmul(torch.matmul(input=hidden, other=self.second).tanh(), other=self.second.T)

    model, x = Keywords(), torch.randn(5, 3)
    assert_near(empirical_ntk(model, x, dtype=torch.float64, engine=engine), oracles.ntk_by_loop(model, x))


@pytest.mark.parametrize("reduce", ["trace", "full"])
def test_layer_that_only_some_inputs_reach(reduce: str, oracles: ModuleType) -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.upper, self.lower, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            upper, lower = self.upper(x), self.lower(x)
            return self.head((upper if x.flatten()[0] > 0 else lower).tanh())

    model, x = Fork(), torch.rand(5, 3) + 0.1
    with pytest.warns(UserWarning, match=r"'lower\.weight', 'lower\.bias' do not reach"):
        found = empirical_ntk(model, x, -x[:3], reduce=reduce, dtype=torch.float64)
    assert_near(found, oracles.ntk_by_loop(model, x, -x[:3], reduce=reduce))
