"""Gate, freezing, penalty and counts against formulas written out here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.fx
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from ntkdyn.conversion import gate_network
from ntkdyn.errors import ConfigurationError, ConversionError, ShapeError
from ntkdyn.gates import (
    Gate,
    freeze_linear,
    frozen,
    gates,
    nonlinear_units,
    slope_penalty,
    slopes,
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
EDGES = [0.0, -0.0, 1.5, -1.5, math.inf, 1e-45, -1e-45, 6e4, -6e4]


def bits(values: Tensor) -> Tensor:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.detach().view(whole)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), Gate(4), nn.Linear(4, 5), Gate(5), nn.Linear(5, 2)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slope_zero_is_relu_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.tensor([EDGES]).repeat(3, 7).T.contiguous().to(dtype)
    assert torch.equal(bits(Gate(3).to(dtype)(x)), bits(torch.relu(x)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_slope_one_is_the_identity_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.tensor([[*EDGES, -math.inf]]).repeat(3, 7).T.contiguous().to(dtype)
    assert torch.equal(bits(Gate(3, slope=1.0).to(dtype)(x)), bits(x))
    gate = Gate(3).to(dtype)
    gate.freeze()
    assert torch.equal(bits(gate(x)), bits(x))


def test_minus_infinity_at_slope_zero_is_nan_as_in_prelu() -> None:
    x = torch.tensor([[-math.inf]])
    assert Gate(1)(x).isnan().all()
    assert nn.functional.prelu(x, torch.zeros(1)).isnan().all()


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
def test_derivative_at_zero(slope: float) -> None:
    x = torch.zeros(1, 3, requires_grad=True)
    Gate(3, slope=slope)(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((1, 3), slope))


@pytest.mark.parametrize(("shape", "dim"), [((4, 3), 1), ((4, 3, 5), 1), ((4, 5, 3), -1), ((4, 3, 5, 2), 1), ((3,), 1)])
def test_equals_prelu(shape: tuple[int, ...], dim: int) -> None:
    torch.manual_seed(0)
    weight = torch.tensor([0.1, -0.4, 1.3], dtype=torch.float64)
    gate = Gate(3, slope=weight, dim=dim)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameter = weight.clone().requires_grad_()
    inputs = x[None] if x.dim() == 1 else x.transpose(1, dim)
    expected = nn.functional.prelu(inputs, parameter)
    expected = expected[0] if x.dim() == 1 else expected.transpose(1, dim)
    torch.testing.assert_close(gate(x), expected)
    upstream = torch.randn_like(x)
    ours = torch.autograd.grad(gate(x), (x, gate.slope), upstream)
    theirs = torch.autograd.grad(expected, (x, parameter), upstream)
    torch.testing.assert_close(ours, theirs)


def test_opposite_convention_of_snl() -> None:
    # SNL: a relu(x) + (1 - a) x, so that 1 is ReLU.
    torch.manual_seed(0)
    x, a = torch.randn(6, 4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    torch.testing.assert_close(Gate(4, slope=1 - a)(x), a * torch.relu(x) + (1 - a) * x)


def test_gradients_of_second_order() -> None:
    torch.manual_seed(0)
    gate = Gate(3, slope=0.3).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gate, (x,))
    assert torch.autograd.gradgradcheck(lambda x: gate(x) ** 2, (x,))


@pytest.mark.parametrize("samples", [2, 5])
def test_exact_under_vmap(samples: int) -> None:
    # samples = outputs = 2 is where nn.PReLU under vmap(jacrev) is silently wrong (torch 2.13).
    model = network()
    x = torch.randn(samples, 3, dtype=torch.float64)
    x[0, 0] = 0
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    rows = []
    for sample in x:
        for output in model(sample[None])[0]:
            rows.append(torch.autograd.grad(output, tuple(model.parameters()), retain_graph=True))
    expected = [torch.stack(column) for column in zip(*rows, strict=True)]

    def f(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample,))

    for transform in (jacrev, jacfwd):
        found = vmap(transform(f), (None, 0))(parameters, x)
        for key, block in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[key].flatten(0, 1), block)


SLOPES = [0.0, 0.3, 1.0, -0.5]


def formula(inputs: Tensor, slope: Tensor) -> Tensor:
    """What a Gate is, put together by autograd; its derivatives at exactly 0 are the slope in every mode."""
    return torch.relu(inputs) + slope * inputs.clamp_max(0)


def gated(inputs: Tensor, slope: Tensor) -> Tensor:
    return functional_call(Gate(4), {"slope": slope}, (inputs,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_values_and_derivatives(dtype: torch.dtype) -> None:
    x = torch.tensor([[*EDGES, math.nan]]).repeat(4, 7).T.contiguous().to(dtype).requires_grad_()
    slope = torch.tensor(SLOPES, dtype=dtype)
    # Not formula(): an addcmul rounds once, so that a product that is less than half the least number keeps its sign.
    found, expected = gated(x, slope), torch.addcmul(torch.relu(x), x.clamp_max(0), slope)
    assert torch.equal(bits(found), bits(expected))
    torch.testing.assert_close(found, formula(x, slope), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(bits(vmap(gated, (1, None), 1)(x[:, None], slope)[:, 0]), bits(expected))
    for value in (found, expected):
        (gradient,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
        assert torch.equal(gradient, torch.where(x <= 0, slope, 1.0))


def zeros_among_numbers(*shape: int) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0], x[1, 0] = 0.0, -0.0
    return x


def forward_mode(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, slope: Tensor) -> list[Tensor]:
    with forward_ad.dual_level():
        of_inputs = function(forward_ad.make_dual(x, torch.ones_like(x)), slope)
        of_slope = function(x, forward_ad.make_dual(slope, torch.ones_like(slope)))
        return [forward_ad.unpack_dual(value).tangent for value in (of_inputs, of_slope)]


def batched_gradients(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, slope: Tensor) -> list[Tensor]:
    leaves = (x.clone().requires_grad_(), slope.clone().requires_grad_())
    seeds = torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    return list(torch.autograd.grad(function(*leaves), leaves, seeds, is_grads_batched=True))


def second_derivatives(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, slope: Tensor) -> list[Tensor]:
    leaves = (x.clone().requires_grad_(), slope.clone().requires_grad_())
    upstream = torch.full_like(x, 0.7, requires_grad=True)
    first = torch.autograd.grad(function(*leaves), leaves, upstream, create_graph=True)
    return list(torch.autograd.grad(sum((one**2).sum() for one in first), (*leaves, upstream)))


def forward_over_reverse(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, slope: Tensor) -> list[Tensor]:
    def gradient(x: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
        return torch.func.grad(lambda *leaves: (function(*leaves) ** 2).sum(), (0, 1))(x, slope)

    return list(jvp(gradient, (x, slope), (torch.ones_like(x), torch.ones_like(slope)))[1])


@pytest.mark.parametrize("mode", [forward_mode, batched_gradients, second_derivatives, forward_over_reverse])
def test_derivatives_where_prelu_is_wrong(mode: Callable[..., list[Tensor]]) -> None:
    # torch 2.13: second derivatives and forward mode of torch.prelu take 1 for the slope at exactly 0.
    x, slope = zeros_among_numbers(5, 4), torch.tensor(SLOPES, dtype=torch.float64)
    for found, expected in zip(mode(gated, x, slope), mode(formula, x, slope), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("outer", [jacrev, jacfwd])
@pytest.mark.parametrize("inner", [jacrev, jacfwd])
@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0)])
def test_nested_transforms(outer: Callable[..., object], inner: Callable[..., object], dims: tuple[int, int]) -> None:
    x, slope = zeros_among_numbers(3, 1, 4), torch.tensor(SLOPES, dtype=torch.float64).repeat(3, 1)
    arguments = [value if dim == 0 else value[0] for value, dim in zip((x, slope), dims, strict=True)]

    def derivatives(function: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        second = vmap(outer(inner(lambda *leaves: function(*leaves) ** 2, (0, 1)), (0, 1)), dims)
        return [block for row in second(*arguments) for block in row]

    for found, expected in zip(derivatives(gated), derivatives(formula), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("wanted", ["inputs", "slope"])
def test_gradient_of_one_argument_only(wanted: str) -> None:
    x, slope = zeros_among_numbers(5, 4, 3), torch.tensor(SLOPES, dtype=torch.float64)
    leaf = (x if wanted == "inputs" else slope).requires_grad_()
    found = torch.autograd.grad(gated(x, slope).square().sum(), leaf)
    expected = torch.autograd.grad(formula(x, slope[:, None]).square().sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("frozen_too", [False, True])
def test_compiled_and_traced_training(frozen_too: bool) -> None:
    model, x = network(torch.float32), torch.randn(4, 3)
    if frozen_too:
        gates(model)["1"].freeze(torch.tensor([True, False, False, True]))
    expected = torch.autograd.grad(model(x).square().sum(), tuple(model.parameters()))
    traced = [torch.compile(model, backend="aot_eager", fullgraph=True), torch.jit.trace(model, x)]
    for other in traced:
        found = torch.autograd.grad(other(x).square().sum(), tuple(model.parameters()))
        torch.testing.assert_close(found, expected)
    assert torch.equal(make_fx(model)(x)(x), model(x))


def test_compiles_without_graph_breaks() -> None:
    model = network(torch.float32)
    x = torch.randn(4, 3)
    gates(model)["1"].freeze(torch.tensor([True, False, False, True]))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))


def test_traces_with_fx() -> None:
    model = network()
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(4, 3, dtype=torch.float64)
    gates(model)["1"].freeze()
    assert torch.equal(traced(x), model(x))


def test_half_inputs_stay_half() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Gate(4, slope=0.2)(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_copies_are_independent() -> None:
    model = network()
    other = copy.deepcopy(model)
    gates(other)["1"].freeze()
    assert not gates(model)["1"].frozen.any()
    assert gates(model)["1"].slope.eq(0).all()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_no_optimizer_undoes_freezing(optimizer: type[torch.optim.Optimizer]) -> None:
    model = network()
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    steps = optimizer(model.parameters(), lr=0.1, weight_decay=0.1, **options)
    x = torch.randn(8, 3, dtype=torch.float64)
    gate = gates(model)["1"]
    for step in range(6):
        if step == 3:  # momentum is there already
            gate.freeze(torch.tensor([True, True, False, False]))
        steps.zero_grad()
        (model(x) ** 2).mean().backward()
        if step >= 3:
            assert gate.slope.grad is not None
            assert torch.equal(gate.slope.grad[:2], torch.zeros(2, dtype=torch.float64))
        steps.step()
    assert not torch.equal(gate.slope[:2], torch.ones(2, dtype=torch.float64))
    assert torch.equal(slopes(model)["1"][:2], torch.ones(2, dtype=torch.float64))
    inputs = torch.randn(8, 4, dtype=torch.float64)
    assert torch.equal(gate(inputs)[:, :2], inputs[:, :2])
    assert not torch.equal(gate(inputs)[:, 2:], inputs[:, 2:])


def test_all_frozen_is_affine() -> None:
    model = network()
    for gate in gates(model).values():
        gate.freeze()
    x, y = torch.randn(2, 7, 3, dtype=torch.float64)
    torch.testing.assert_close(model((x + y) / 2), (model(x) + model(y)) / 2, rtol=0, atol=1e-14)


def test_state_dict_round_trip_and_old_keys() -> None:
    gate = Gate(3, slope=torch.tensor([0.1, 0.2, 0.3]))
    gate.freeze(torch.tensor([False, True, False]))
    other = Gate(3)
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other.slope, gate.slope)
    assert torch.equal(other.frozen, gate.frozen)
    Gate(3).load_state_dict({}, strict=True)
    Gate(3).load_state_dict({"slope": torch.ones(3)}, strict=True)
    for weight in (torch.tensor([0.4]), torch.tensor([0.4, 0.4, 0.4])):
        fresh = Gate(3)
        fresh.load_state_dict({"weight": weight}, strict=True)
        assert torch.equal(fresh.slope, torch.full((3,), 0.4))
    with pytest.raises(RuntimeError, match="size mismatch for slope"):
        Gate(3).load_state_dict({"weight": torch.ones(2)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Gate(3).load_state_dict({"bias": torch.ones(2)})
    with pytest.raises(RuntimeError, match=r"Missing key.*linear.weight"):
        nn.ModuleDict({"linear": nn.Linear(2, 2), "gate": Gate(2)}).load_state_dict({}, strict=True)


def test_layer_wise_gate() -> None:
    gate = Gate(4, slope=0.25, granularity="layer")
    assert gate.slope.shape == gate.frozen.shape == (1,)
    x = torch.randn(3, 4)
    torch.testing.assert_close(gate(x), nn.functional.leaky_relu(x, 0.25))
    model = nn.Sequential(nn.Linear(3, 4), gate)
    counts = nonlinear_units(model)
    assert (counts.active, counts.total, counts.weighted) == ({"1": 4}, {"1": 4}, {"1": 3.0})
    with torch.no_grad():
        gate.slope.fill_(0.995)
    assert freeze_linear(model) == 4
    assert nonlinear_units(model).active_total == 0
    assert "granularity='layer'" in repr(gate)


def test_penalty_at_relu() -> None:
    model = network()
    penalty = slope_penalty(model)
    assert penalty.item() == 9
    penalty.backward()
    for gate in gates(model).values():
        assert gate.slope.grad is not None
        assert torch.equal(gate.slope.grad, torch.full_like(gate.slope, -0.5))


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_penalty_gradient_is_capped_at_its_value_at_the_tolerance(side: float) -> None:
    distances = torch.tensor([1.0, 0.25, 0.0100001, 0.0099999, 1e-4, 1e-12], dtype=torch.float64)
    model = nn.Sequential(Gate(6, slope=1 + side * distances))
    penalty = slope_penalty(model)
    torch.testing.assert_close(penalty, distances.sqrt().sum())
    (gradient,) = torch.autograd.grad(penalty, gates(model)["0"].slope)
    expected = side * torch.tensor([0.5, 1.0, 5.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=0)
    assert gradient.abs().max() <= 5.0 + 1e-12


def test_penalty_leaves_out_frozen_slopes_and_stops_at_one() -> None:
    gate = Gate(3, slope=torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    gate.freeze(torch.tensor([True, False, False]))
    model = nn.Sequential(gate)
    penalty = slope_penalty(model)
    assert penalty.item() == 1
    (gradient,) = torch.autograd.grad(penalty, gate.slope)
    assert gradient.tolist() == [0, -0.5, 0]
    with torch.no_grad():
        gate.slope[0] = 0.3  # what an optimizer might write: still free of charge
    assert slope_penalty(model).item() == 1


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_penalty_exponents(exponent: float) -> None:
    slope = torch.tensor([0.0, 0.4, 1.3, -0.2], dtype=torch.float64)
    model = nn.Sequential(Gate(4, slope=slope))
    torch.testing.assert_close(slope_penalty(model, exponent), ((1 - slope).abs() ** exponent).sum())
    assert torch.autograd.gradcheck(
        lambda slope: functional_penalty(model, slope, exponent), (slope.clone().requires_grad_(),)
    )


def functional_penalty(model: nn.Module, slope: Tensor, exponent: float) -> Tensor:
    class Priced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self) -> Tensor:
            return slope_penalty(self.inner, exponent)

    return functional_call(Priced(), {"inner.0.slope": slope}, ())


def test_freezing_is_monotone_and_strict() -> None:
    gate = Gate(4, slope=torch.tensor([0.9899, 0.9901, 1.0099, 1.0101], dtype=torch.float64))
    model = nn.Sequential(gate)
    assert freeze_linear(model) == 2
    assert gate.frozen.tolist() == [False, True, True, False]
    assert gate.slope[1:3].tolist() == [1.0, 1.0]
    with torch.no_grad():
        gate.slope.zero_()
    assert freeze_linear(model) == 0
    assert gate.frozen.tolist() == [False, True, True, False]
    gate.freeze(torch.tensor([True, False, False, False]))
    assert gate.frozen.tolist() == [True, True, True, False]
    assert freeze_linear(model, tolerance=2.0) == 1


def test_names_slopes_and_counts() -> None:
    model = network()
    assert list(gates(model)) == ["1", "3"]
    assert list(gates(Gate(2))) == ["<root>"]
    gates(model)["3"].freeze(torch.tensor([True, True, False, False, False]))
    with torch.no_grad():
        gates(model)["3"].slope[2] = 1.25
    found = slopes(model)
    assert not found["1"].requires_grad
    found["1"] += 1  # a copy
    assert gates(model)["1"].slope.eq(0).all()
    assert frozen(model)["3"].tolist() == [True, True, False, False, False]
    counts = nonlinear_units(model)
    assert counts.active == {"1": 4, "3": 3}
    assert counts.total == {"1": 4, "3": 5}
    assert counts.weighted == {"1": 4.0, "3": 2.25}
    assert (counts.active_total, counts.total_total, counts.weighted_total) == (7, 9, 6.25)
    assert counts.active_share == 7 / 9
    assert math.isnan(nonlinear_units(nn.Linear(2, 2)).active_share)


def test_what_is_no_gate_is_listed() -> None:
    model = nn.Sequential(nn.ReLU(), nn.GELU(), nn.Tanh(), nn.ReLU6(), nn.LSTM(2, 2), nn.MaxPool1d(2), nn.Softmax(1))
    counts = nonlinear_units(model)
    assert counts.always_active == {"0": "ReLU", "1": "GELU", "2": "Tanh", "3": "ReLU6", "4": "LSTM"}
    assert counts.uncounted == {"5": "MaxPool1d", "6": "Softmax"}
    assert nonlinear_units(nn.SiLU()).always_active == {"<root>": "SiLU"}
    attention = nonlinear_units(nn.TransformerEncoderLayer(4, 2, 4), torch.randn(3, 2, 4))
    assert attention.uncounted == {"self_attn": "MultiheadAttention"}
    assert attention.always_active == {"activation": "ReLU"}


def test_functions_whose_own_name_differs_are_listed() -> None:
    class Named(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return functional.lp_pool2d(functional.threshold(inputs, 0.0, 0.0), 2.0, 2)

    counts = nonlinear_units(Named(), torch.randn(2, 3, 4, 4))
    assert list(counts.always_active.values()) == ["Threshold"]
    assert list(counts.uncounted.values()) == ["power-average pool"]


class Clamped(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.clamp(min=0)


def test_a_relu_in_other_words_is_listed() -> None:
    class Rectifiers(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            guarded = inputs.clamp(min=1e-6) + inputs.clamp(0, 1) + inputs.clamp_max(0) + inputs.int().clamp(min=0)
            ends = torch.clamp(inputs, min=torch.tensor(0.0)) + inputs.clone().clamp_(0) + inputs.clip(0)
            return guarded + ends + inputs.clamp_min(0.0) + torch.maximum(torch.zeros(3), inputs)

    assert nonlinear_units(Rectifiers(), torch.randn(4, 3)).always_active == {
        "clamp": "clamp at 0", "clamp_1": "clamp at 0", "clip": "clip at 0", "clamp_min": "clamp_min at 0",
        "maximum": "maximum at 0",
    }  # fmt: skip
    with pytest.raises(ConversionError, match="found clamp at 0"):
        gate_network(nn.Sequential(nn.Linear(3, 3), Clamped()), torch.randn(4, 3))


def test_counting_with_an_example_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Gate(4), nn.Dropout(0.5))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    nonlinear_units(model, torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gate(0), "channels is 0; expected at least 1"),
        (lambda: Gate(2, granularity="unit"), "granularity is 'unit'; expected 'channel' or 'layer'"),  # type: ignore[arg-type]
        (lambda: Gate(2, slope=torch.zeros(3)), r"slope has shape \(3,\); expected a number or \[2\]"),
        (lambda: slope_penalty(nn.Linear(2, 2)), "slope_penalty: Linear has no Gate; .*gate_network"),
        (lambda: freeze_linear(nn.Linear(2, 2)), "freeze_linear: Linear has no Gate"),
        (lambda: freeze_linear(Gate(2), tolerance=0), "tolerance is 0; expected a positive number"),
        (lambda: slope_penalty(Gate(2), exponent=0), "exponent is 0"),
    ],
)
def test_wrong_settings(make: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 4), (2, 1), (5,), (2, 4, 3)])
def test_wrong_channel_axis(shape: tuple[int, ...]) -> None:
    # A size of 1 would broadcast in silence.
    with pytest.raises(ShapeError, match=r"Gate\(3, dim=1\) got an input of shape .*; expected size 3 on axis 1"):
        Gate(3)(torch.zeros(shape))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda() -> None:
    model = network(torch.float32).cuda()
    gates(model)["1"].freeze(torch.tensor([True, False, False, False]))
    x = torch.randn(4, 3)
    torch.testing.assert_close(model(x.cuda()).cpu(), copy.deepcopy(model).cpu()(x))
    slope_penalty(model).backward()
    assert nonlinear_units(model).active_total == 8
