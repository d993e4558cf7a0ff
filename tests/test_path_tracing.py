"""Networks that torch.fx cannot trace, and networks that nobody can: torch.export, Hugging Face, refusals by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ntkdyn
from ntkdyn import paths
from ntkdyn.clone import structural_clone
from ntkdyn.errors import TraceError
from ntkdyn.gates import Gate, gates
from ntkdyn.paths import PathGraph, path_lengths, trace_paths
from ntkdyn.paths.layers import activation, uncounted
from ntkdyn.paths.rules import Call, Track, path_rule
from ntkdyn.paths.tracing import Traced, trace_by_export, trace_by_fx


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def partly_frozen(channels: int, dim: int = 1) -> Gate:
    gate = Gate(channels, dim=dim)
    gate.freeze(torch.arange(channels) < channels // 2)
    return gate


class Attentive(nn.Module):
    """Attention of torch.nn and by hand, encoder and decoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.gate = nn.Linear(3, 4), partly_frozen(4, dim=-1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True)
        self.encoder.activation = partly_frozen(6, dim=-1)
        self.decoder = nn.TransformerDecoderLayer(4, 2, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        y = self.encoder(x + self.attention(x, x, self.gate(x))[0])
        return self.decoder(x, self.gate(y))


class Several(nn.Module):
    """Grouped convolutions, shuffles, padding, concatenation, products, one gate twice, in-place units."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.grouped = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.norm, self.gate, self.wide = nn.BatchNorm2d(8), partly_frozen(4), partly_frozen(8)
        self.relu, self.end = nn.ReLU(inplace=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.gate(self.start(x))
        y = self.wide(self.norm(self.grouped(self.gate(x))))
        y = y.view(y.shape[0], 2, 4, y.shape[2], y.shape[3]).transpose(1, 2).flatten(1, 2)
        y = self.relu(y) + functional.pad(x, (0, 0, 0, 0, 2, 2))
        z = torch.cat([x, y * torch.sigmoid(y.mean((2, 3), keepdim=True))], dim=1)
        return self.end(functional.adaptive_avg_pool2d(functional.max_pool2d(z, 2), 1).flatten(1)), x.amax((2, 3))


def by(tracer: Callable[..., Traced], model: nn.Module, *inputs: Tensor) -> PathGraph:
    with torch.no_grad():
        return paths._walked(tracer(structural_clone(model).eval(), inputs, {}))[0]


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Attentive(), torch.zeros(2, 5, 3)),
        (Several(), torch.zeros(2, 3, 4, 4)),
        (nn.Sequential(nn.Linear(3, 4), nn.GLU(), partly_frozen(2), nn.LayerNorm(2)), torch.zeros(2, 3)),
    ],
)
def test_both_tracers_agree(model: nn.Module, example: Tensor) -> None:
    first, second = (by(tracer, model, example).lengths(model, exact=True) for tracer in (trace_by_fx, trace_by_export))
    for name in ("mean", "normalized", "weighted", "per_layer", "path_counts", "active", "effective_width"):
        assert getattr(first, name) == getattr(second, name)
    np.testing.assert_array_equal(first.distribution, second.distribution)
    assert set(first.always_active.values()) == set(second.always_active.values())


def test_names_of_both_tracers_agree() -> None:
    first, second = (by(tracer, Several(), torch.zeros(2, 3, 4, 4)) for tracer in (trace_by_fx, trace_by_export))
    assert first.gates == second.gates == {"gate": 4, "wide": 8}
    assert first.always_active == second.always_active == {"relu": "ReLU", "sigmoid": "Sigmoid", "mul": "mul"}
    assert first.uncounted == second.uncounted == {"max_pool2d": "max-pool", "amax": "amax"}


# ---- networks that torch.fx cannot trace ----------------------------------------------------------------------------


class Deciding(nn.Module):
    """Control flow on shapes, attributes and arguments; keyword arguments; a loop over the length of a tensor."""

    def __init__(self, width: int, residual: bool) -> None:
        super().__init__()
        self.residual, self.start, self.gate = residual, nn.Linear(3, width), partly_frozen(width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, *, repeat: bool = False, **options: Any) -> dict[str, Tensor]:
        if x.shape[0] > 1 and x.dim() == 2:
            x = self.start(x)
        y = self.gate(x) if options.get("gated", True) else x
        if self.residual:
            y = x + y
        for layer, _ in zip(self.layers, range(x.shape[0]), strict=False):
            y = layer(y)
            if repeat:
                y = torch.relu(y)
        return {"y": y}


def test_control_flow_on_shapes_and_python_values() -> None:
    x = torch.zeros(2, 3)
    assert path_lengths(Deciding(4, residual=False), x).normalized == 0.5
    assert path_lengths(Deciding(4, residual=True), {"x": x}).normalized == 0.25
    assert path_lengths(Deciding(4, residual=True), {"repeat": True, "x": x}).normalized == 0.25 + 2
    assert path_lengths(Deciding(4, residual=True), {"x": x, "gated": False}).normalized == 0
    lengths = path_lengths(nn.Sequential(Deciding(4, residual=False), nn.Identity()), torch.zeros(3, 3))
    assert lengths.paths == 4**4 * 3
    assert dict(lengths.per_layer) == {"0.gate": 0.5}


def test_layer_wise_and_nested_gates_stay_recognizable() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate = nn.Conv2d(3, 4, 1), Gate(4, granularity="layer")
            block = nn.Sequential(nn.Conv2d(4, 4, 1), self.gate, nn.Conv2d(4, 2, 1), Gate(2))
            self.blocks = nn.ModuleDict({"a": block})

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.blocks["a"](x if len(x) > 9 else self.gate(x))

    net = Nested()
    graph = trace_paths(net, torch.zeros(1, 3, 2, 2))
    assert dict(graph.gates) == {"gate": 4, "blocks.a.3": 2}
    assert graph.lengths(net).normalized == 3.0
    net.gate.freeze()
    assert graph.lengths(net).normalized == 1.0


def test_own_rules_hold_for_both_tracers() -> None:
    class Mixing(nn.Module):
        """Two inputs, a plain argument, and two outputs, one of which is no tensor."""

        def forward(self, x: Tensor, y: Tensor, *, factor: int) -> tuple[Tensor, int]:
            return x.cumsum(0) * factor + y.sum(), factor

    class Whole(nn.Module):
        def __init__(self, decides: bool) -> None:
            super().__init__()
            self.decides, self.start, self.gate, self.mixing = decides, nn.Linear(3, 4), Gate(4), Mixing()

        def forward(self, x: Tensor) -> Tensor:
            x = self.start(x)
            if self.decides and x.shape[0] > 1:
                x = self.gate(x)
            return self.mixing(self.gate(x), x, factor=3)[0]

    with pytest.raises(TraceError, match=r"'cumsum' \(.*cumsum\) in layer 'mixing' has no rule"):
        path_lengths(Whole(True), torch.zeros(2, 3))

    @path_rule(Mixing)
    def mixing(call: Call) -> Any:
        first = call.argument(0, "x")
        assert isinstance(first, Track)
        assert call.keywords["factor"] == 3
        return first, None

    assert path_lengths(Whole(False), torch.zeros(2, 3)).normalized == 1.0
    assert path_lengths(Whole(True), torch.zeros(2, 3)).normalized == 2.0


def test_layers_that_are_written_out_can_be_one_node() -> None:
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    class Unit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x * (1 + torch.tanh(x + 0.04 * x**3))

    net = nn.Sequential(nn.Linear(3, 4), Norm(), nn.Linear(4, 4), Unit())
    written_out = path_lengths(net, torch.zeros(2, 3))
    assert written_out.normalized == (0.5 * 2 + 1) + (0.5 * (1 + 0.5) + 1)
    assert list(written_out.always_active) == ["1.pow", "1.rsqrt", "1.mul", "3.pow", "3.tanh", "3.mul"]
    path_rule(Norm)(uncounted)
    path_rule(Unit)(activation)
    lengths = path_lengths(net, torch.zeros(2, 3))
    assert lengths.normalized == 1.0
    assert dict(lengths.always_active) == {"3": "Unit"}
    assert dict(lengths.uncounted) == {"1": "Norm"}


def test_subclasses_of_transformer_layers_are_seen_through() -> None:
    class Gated(nn.TransformerEncoderLayer):
        def _ff_block(self, x: Tensor) -> Tensor:
            return self.linear2(functional.silu(self.linear1(x)) * self.linear1(x))

    net = nn.Sequential(nn.Linear(3, 4), nn.TransformerEncoder(Gated(4, 2, 6), 1, enable_nested_tensor=False))
    assert path_lengths(net, torch.zeros(2, 5, 3)).normalized == 0.5 * (0.5 + 1)
    linear = nn.TransformerEncoderLayer(4, 2, 6, activation=lambda x: 2 * x)
    assert path_lengths(nn.Sequential(nn.Linear(3, 4), linear), torch.zeros(2, 5, 3)).normalized == 0.0


def test_whole_transformer() -> None:
    net = nn.Transformer(4, 2, 1, 2, 6, batch_first=True)
    lengths = path_lengths(net, (torch.zeros(2, 5, 4), torch.zeros(2, 3, 4)))
    memory = 0.5
    assert lengths.normalized == 0.5 * (0.5 * memory + 0.5) + 0.5 * memory + 0.5
    assert lengths.uncounted["decoder.norm"] == "LayerNorm"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hugging_face_bert(attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, vocab_size=20,
        max_position_embeddings=16, attn_implementation=attention,
    )  # fmt: skip
    net = transformers.BertForSequenceClassification(config)
    tokens = torch.zeros(2, 5, dtype=torch.long)
    lengths = path_lengths(net, tokens)
    # Two GELUs in residual branches and the pooler's tanh.
    assert lengths.normalized == 2 * 0.5 + 1
    assert sorted(lengths.always_active.values()) == ["GELU", "GELU", "Tanh"]
    assert lengths.uncounted["bert.encoder.layer.0.output.LayerNorm"] == "LayerNorm"
    for layer in net.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = partly_frozen(12, dim=-1)
    graph = trace_paths(net, {"attention_mask": torch.ones_like(tokens), "input_ids": tokens})
    name = "bert.encoder.layer.{}.intermediate.intermediate_act_fn"
    assert dict(graph.gates) == {name.format(0): 12, name.format(1): 12}
    assert graph.lengths(net).normalized == 2 * 0.25 + 1
    # One choice of four sums, with token, position and type embeddings as sources.
    assert graph.lengths(net, exact=True).path_counts == path_lengths(net, tokens, exact=True).path_counts


# ---- the live network -----------------------------------------------------------------------------------------------


def test_the_live_network_is_not_touched() -> None:
    net = nn.Sequential(Deciding(4, residual=True))
    net.train()
    called: list[str] = []
    net[0].gate.register_forward_hook(lambda *_: called.append("hook"))
    before = copy.deepcopy(net.state_dict())
    members = {name: sorted(vars(module)) for name, module in net.named_modules()}
    storage = {name: parameter.data_ptr() for name, parameter in net.named_parameters()}
    example, random = torch.full((2, 3), 2.0), torch.get_rng_state()
    path_lengths(net, example)
    assert not called
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert all(module.training for module in net.modules())
    assert members == {name: sorted(vars(module)) for name, module in net.named_modules()}
    assert storage == {name: parameter.data_ptr() for name, parameter in net.named_parameters()}
    assert (example == 2).all()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(type(parameter) is nn.Parameter and parameter.grad is None for parameter in net.parameters())
    assert torch.equal(gates(net)["0.gate"](example.new_full((1, 4), -1.0)), torch.tensor([[-1.0, -1.0, 0.0, 0.0]]))


def test_networks_of_torch_export_are_recorded() -> None:
    net = nn.Sequential(nn.Linear(3, 4), partly_frozen(4), Function(lambda x: x if x.shape[1] > 1 else -x))
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    found = ntkdyn.measure(net, ["path-length"], torch.zeros(5, 3))
    assert float(found["path_length/normalized"]) == 0.5
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x: x if x.sum() > 0 else -x,
            r"layer '1' \(Function\) at '.*if x.sum\(\) > 0 else.*' can be traced neither by torch.export \(values of "
            r"tensors leave them by '__bool__'\) nor by torch.fx \(.*control flow.*\); expected no control flow",
        ),
        (lambda x: x * float(x.sum()), r"layer '1' \(Function\) at '.*float\(x.sum\(\)\).*' can .*by '__float__'"),
        (lambda x: x * x.sum().item(), r"node 'item' \(Tensor.item\) in layer '1' makes a constant of what depends"),
        (lambda x: x if x.sum().item() > 2 else -x, r"layer '1' \(Function\) .* leave them by 'item'"),
        (lambda x: x if torch.equal(x, -x) else -x, r"layer '1' \(Function\) .* leave them by 'equal'"),
        (lambda x: x[x > 0], r"node 'getitem' \(_operator.getitem\) in layer '1' takes a value that carries no path"),
        (
            lambda x: x if len(x) > 9 else x.cumsum(1),
            r"node 'cumsum' \(aten.cumsum\) in layer '1' has no rule for paths",
        ),
        (lambda x: x[:, : len(x)] @ x, r"'matmul' .* in layer '1'|layer '1' \(Function\) fails on the example"),
    ],
)
def test_what_nobody_can_trace_is_named(
    function: Callable[..., Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        path_lengths(nn.Sequential(nn.Linear(3, 4), Function(function)), torch.zeros(3, 3))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("path lengths: ")
    # torch.export would print the graph as far as it came.
    assert capfd.readouterr() == ("", "")


def test_an_example_that_does_not_fit_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(Deciding(4, residual=True))
    with pytest.raises(
        TraceError, match=r"layer '0.start' \(Linear\) fails on the example: .*; give an example"
    ) as caught:
        path_lengths(net, torch.zeros(2, 5))
    assert "\n" not in str(caught.value)
    assert not caplog.records
    with pytest.raises(TraceError, match=r"layer '<root>' \(Sequential\) fails on the example: .*unexpected keyword"):
        path_lengths(net, {"nothing": torch.zeros(2, 5)})
