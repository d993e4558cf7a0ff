"""Path lengths of networks that write in place, and of those whose graph is not what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ntkdyn import paths
from ntkdyn.clone import structural_clone
from ntkdyn.errors import TraceError
from ntkdyn.gates import Gate
from ntkdyn.paths import path_lengths
from ntkdyn.paths.tracing import trace_by_export, trace_by_fx


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.parts)


def normalized(function: Callable[..., Any], *parts: nn.Module) -> float:
    return path_lengths(nn.Sequential(nn.Linear(3, 4), Function(function, *parts)), torch.zeros(2, 3)).normalized


# ---- writes that torch.fx does not see by itself --------------------------------------------------------------------


def added_to_another_name(x: Tensor, branch: nn.Module) -> Tensor:
    y = x
    y += torch.relu(branch(x))
    return x.mean(0)


def added_before_a_shortcut(x: Tensor, branch: nn.Module) -> Tensor:
    residual = x
    x += branch(torch.relu(x))
    return torch.relu(x) + residual


def multiplied(x: Tensor, branch: nn.Module) -> Tensor:
    y = x
    y *= torch.sigmoid(branch(x))
    return x


def divided(x: Tensor, branch: nn.Module) -> Tensor:
    y = x
    y /= 2 + torch.relu(branch(x))
    return x


def subtracted(x: Tensor, branch: nn.Module) -> Tensor:
    y = x
    y -= torch.relu(branch(x))
    return x


def raised(x: Tensor, branch: nn.Module) -> Tensor:
    y = x
    y **= 2
    return branch(x)


def written_into_a_view(x: Tensor, branch: nn.Module) -> Tensor:
    y = x.mT
    y *= 2
    return branch(y.mT)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (added_to_another_name, 0.5 * 0 + 0.5 * 1),
        (added_before_a_shortcut, 0.5 * (0.5 * 0 + 0.5 * 1 + 1) + 0.5 * (0.5 * 0 + 0.5 * 1)),
        (multiplied, 0.5 * 0 + 0.5 * 1 + 1),
        # A unit of its own makes 1 / b of b.
        (divided, 0.5 * 0 + 0.5 * 2 + 1),
        (subtracted, 0.5 * 0 + 0.5 * 1),
        (raised, 1.0),
        (written_into_a_view, 0.0),
    ],
)
@pytest.mark.parametrize("trace", [trace_by_fx, trace_by_export])
def test_operators_that_write_in_place_write(function: Callable[..., Any], expected: float, trace: Any) -> None:
    network = nn.Sequential(nn.Linear(3, 4), Function(function, nn.Linear(4, 4)))
    with torch.no_grad():
        graph, _ = paths._walked(trace(structural_clone(network).eval(), (torch.zeros(2, 3),), {}))
    assert graph.lengths(network).normalized == expected


def test_an_operator_that_writes_into_a_part_is_refused() -> None:
    def part(x: Tensor) -> Tensor:
        y = x.T
        y *= torch.relu(y)
        return x

    with pytest.raises(TraceError, match=r"\(_operator.imul\) in layer '1' writes in place into a tensor of which"):
        normalized(part)


def test_in_place_operators_on_sizes_count_nothing() -> None:
    def sizes(x: Tensor) -> Tensor:
        rows = x.shape[0]
        rows -= 1
        return x[:rows]

    assert normalized(sizes) == 0.0


# ---- what the outputs show ------------------------------------------------------------------------------------------


def test_a_decision_on_the_type_is_that_of_a_tensor() -> None:
    # With the 1, no bias makes both the same at an input of zeros.
    assert normalized(lambda x: torch.relu(x) + 1 if isinstance(x, Tensor) else x) == 1.0


def test_random_numbers_of_torch_are_the_same_in_both() -> None:
    for function in (
        functional.dropout,
        lambda x: functional.dropout(x) + torch.randn(4),
        lambda x: x + torch.randn(4),
        lambda x: functional.dropout(x) if len(x) > 1 else x,
    ):
        assert normalized(function) == 0.0


def test_what_no_tracer_sees_is_refused() -> None:
    def behind_the_back(x: Tensor) -> Tensor:
        x.data = torch.relu(x) + 1
        return x

    state = np.random.default_rng(0)
    for function in (behind_the_back, lambda x: x + float(state.normal())):
        network = nn.Sequential(nn.Linear(3, 4), Function(function))
        with pytest.raises(
            TraceError,
            match=r"layer '<root>' \(Sequential\) can be traced neither by torch.export \(what it traces does not "
            r"return what forward returns; does forward write through .data, keep state, or draw random numbers",
        ) as caught:
            path_lengths(network, torch.zeros(2, 3))
        assert "\n" not in str(caught.value)


def test_runs_of_both_tracers_start_from_the_same_state() -> None:
    class Cached(nn.Module):
        """Makes a table at the first call, as rotary embeddings do."""

        def __init__(self) -> None:
            super().__init__()
            self.table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.cos(x.new_ones(4))
            return x * self.table if len(x) > 1 else x

    cached = Cached()
    assert path_lengths(nn.Sequential(nn.Linear(3, 4), cached, Gate(4)), torch.zeros(2, 3)).normalized == 1.0
    assert cached.table is None


def test_outputs_that_are_no_numbers_are_the_same() -> None:
    assert normalized(lambda x: (x * float("nan"), x / 0)) == 0.0


def test_networks_without_data_are_traced() -> None:
    with torch.device("meta"):
        network, example = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(2, 3)
    assert path_lengths(network, example).normalized == 1.0
