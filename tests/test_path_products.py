"""Path lengths through products, selections and matrix products; what is listed beside the counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ntkdyn.errors import TraceError
from ntkdyn.gates import Gate
from ntkdyn.paths import path_lengths


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.parts)


def normalized(function: Callable[..., Any], *parts: nn.Module, width: int = 4) -> float:
    return path_lengths(nn.Sequential(nn.Linear(3, width), Function(function, *parts)), torch.ones(2, 3)).normalized


# ---- products -------------------------------------------------------------------------------------------------------


def test_a_product_is_a_choice_and_a_unit() -> None:
    # Either factor with 1/2, and one unit on both ways.
    assert normalized(lambda x, gate: x * gate(x), Gate(4)) == 0.5 * 0 + 0.5 * 1 + 1
    assert normalized(lambda x: x * torch.sigmoid(x)) == 1.5
    assert normalized(lambda x: x.mul(x).mul_(2)) == 1.0
    assert normalized(lambda x, gate: gate(x) / x, Gate(4)) == 0.5 * 1 + 0.5 * 1 + 1
    assert normalized(lambda x: 1 / x) == 1.0
    # One function is one unit.
    assert normalized(functional.silu) == 1.0


def test_squeeze_and_excitation() -> None:
    class SqueezeAndExcitation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.gate, self.up = nn.Linear(4, 2), Gate(2), nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            weights = torch.sigmoid(self.up(self.gate(self.down(x.mean((2, 3))))))
            return x * weights.view(x.shape[0], -1, 1, 1)

    net = nn.Sequential(nn.Conv2d(3, 4, 1), Gate(4), SqueezeAndExcitation())
    lengths = path_lengths(net, torch.zeros(2, 3, 5, 5))
    assert lengths.normalized == 1 + 0.5 * 0 + 0.5 * (1 + 1) + 1
    assert lengths.paths == 3 * 4 * (1 + 4 * 2)
    assert dict(lengths.always_active) == {"2.sigmoid": "Sigmoid", "2.mul": "mul"}
    net[2].gate.freeze()
    assert path_lengths(net, torch.zeros(2, 3, 5, 5)).normalized == 1 + 0.5 * 1 + 1


def test_gated_linear_units() -> None:
    by_hand = normalized(lambda x: x[:, :2] * torch.sigmoid(x[:, 2:]))
    assert by_hand == 0.5 * 0 + 0.5 * 1 + 1
    for glu in (lambda x: functional.glu(x, 1), nn.GLU(), functional.glu):
        assert normalized(glu) == by_hand
    swiglu = normalized(
        lambda x, a, b, c: c(functional.silu(a(x)) * b(x)), nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
    )
    assert swiglu == 0.5 * 1 + 0.5 * 0 + 1
    # Channel by channel: the first half has the unit, the second not.
    unequal = Gate(4)
    unequal.freeze(torch.tensor([True, True, False, True]))
    assert normalized(lambda x, gate: functional.glu(gate(x), 1), unequal) == 1.5 + 0.5 * 0.5


def test_highway_layers() -> None:
    def highway(x: Tensor, gate: nn.Module, carry: nn.Module, transform: nn.Module) -> Tensor:
        t = torch.sigmoid(carry(x))
        return t * gate(transform(x)) + (1 - t) * x

    found = normalized(highway, Gate(4), nn.Linear(4, 4), nn.Linear(4, 4))
    through, beside = 0.5 * 1 + 0.5 * 1 + 1, 0.5 * 1 + 0.5 * 0 + 1
    assert found == 0.5 * through + 0.5 * beside


def test_a_product_with_channels_out_of_reach_is_linear() -> None:
    padded = Function(lambda x: functional.pad(x[:, :2], (0, 2)) * x)
    lengths = path_lengths(nn.Sequential(nn.Linear(3, 4), padded), torch.zeros(1, 3))
    assert lengths.distribution.tolist() == [0.5, 0.5]


def test_selections_and_larger_values() -> None:
    for relu in (
        lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
        lambda x: x * (x > 0),
        lambda x: x * (x > 0).float(),
        lambda x: x.masked_fill(x < 0, 0.0),
        lambda x: torch.maximum(x, torch.zeros(())),
        lambda x: torch.max(x, -x),
        lambda x: x / (1 + (x > 0)),
    ):
        assert normalized(relu) == 1.0
    # A constant decides nothing.
    assert normalized(lambda x: torch.where(torch.ones(4) > 0, x, -x)) == 0.0
    assert normalized(lambda x: x.masked_fill(torch.ones(4) > 0, 0.0)) == 0.0
    assert normalized(lambda x, gate: torch.maximum(gate(x), x), Gate(4)) == 1.5
    for largest in (lambda x: torch.max(x, 0)[0], lambda x: x.max(0).values, lambda x: x.amax(0)):
        assert normalized(largest) == 0.0
    assert normalized(lambda x: torch.minimum(torch.max(x), torch.zeros(4))) == 1.0


def test_integer_inputs_start_paths_where_they_are_taken() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.gate, self.hot = nn.Embedding(7, 4), Gate(4, dim=-1), nn.Linear(7, 4)

        def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
            x = self.gate(self.embed(tokens))
            x = x * (tokens != 0).unsqueeze(-1)
            x = x + self.hot(functional.one_hot(tokens, 7).float())
            if mask is not None:
                x = (x * mask.unsqueeze(-1).float()).masked_fill(~mask.bool().unsqueeze(-1), 0.0)
            return x

    tokens = torch.ones(2, 5, dtype=torch.long)
    for example in (tokens, (tokens, torch.ones(2, 5, dtype=torch.long))):
        lengths = path_lengths(Tokens(), example)
        assert lengths.normalized == 0.5
        assert lengths.paths == 4 * (1 + 7)
    half = Function(lambda tokens, embed: embed(torch.div(tokens, 2, rounding_mode="floor")), nn.Embedding(7, 4))
    assert path_lengths(half, tokens).paths == 4
    image = nn.Sequential(Function(lambda x: x.float() / 255 - 0.5), nn.Conv2d(3, 4, 1), Gate(4))
    assert path_lengths(image, torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).paths == 3 * 4


# ---- matrices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mixed",
    [
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
        lambda q, k, v: torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v),
        lambda q, k, v: torch.einsum("bnm,bmc->bnc", torch.einsum("bnc,bmc->bnm", q, k).softmax(-1), v),
        lambda q, k, v: torch.baddbmm(torch.zeros(2, 5, 5), q, k.mT).relu() @ v,
        lambda q, k, v: (v.mT @ (q @ k.mT).softmax(-1).mT).mT,
        functional.scaled_dot_product_attention,
    ],
)
def test_attention_by_matrix_products(mixed: Callable[..., Tensor]) -> None:
    def attention(x: Tensor, key: nn.Module, value: nn.Module) -> Tensor:
        return x + mixed(x, key(x), value(x))

    value = Gate(4, dim=-1)
    value.freeze(torch.tensor([True, True, False, True]))
    block = Function(attention, Gate(4, dim=-1), value)
    lengths = path_lengths(nn.Sequential(nn.Linear(3, 4), block), torch.zeros(2, 5, 3))
    assert lengths.distribution.tolist() == [7 / 8, 1 / 8]
    assert lengths.uncounted["1.parts.0"] == "Gate"
    assert len(lengths.uncounted) >= 2


def test_rotated_queries_and_grouped_heads() -> None:
    """Rotary positions mix the channels of a head pair by pair; fewer heads of keys and values than of queries."""

    def attention(x: Tensor, query: nn.Module, key: nn.Module, value: nn.Module, out: nn.Module) -> Tensor:
        q = query(x).view(2, 5, 4, 2).transpose(1, 2)
        k, v = (part(x).view(2, 5, 2, 2).transpose(1, 2) for part in (key, value))
        angle = torch.ones(5, 2)
        q, k = (h * angle.cos() + torch.cat([-h[..., 1:], h[..., :1]], -1) * angle.sin() for h in (q, k))
        mixed = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return out(mixed.transpose(1, 2).reshape(2, 5, 8))

    parts = (nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 4))
    lengths = path_lengths(nn.Sequential(nn.Linear(3, 4), Function(attention, *parts)), torch.zeros(2, 5, 3))
    assert lengths.normalized == 0.0
    assert lengths.paths == 4 * 8 * 4 * 3


def test_rotated_values_take_both_channels() -> None:
    def rotated(x: Tensor, gate: nn.Module) -> Tensor:
        heads = gate(x).view(2, 5, 2, 2).transpose(1, 2)
        turned = heads * 2 + torch.cat([-heads[..., 1:], heads[..., :1]], -1)
        return turned.transpose(1, 2).reshape(2, 5, 4)

    first = Gate(4, dim=-1)
    first.freeze(torch.tensor([False, True, True, True]))
    net = nn.Sequential(nn.Linear(3, 4), Function(rotated, first))
    # Channels 0 and 1 each take either of the two with 1/2.
    assert path_lengths(net, torch.zeros(2, 5, 3)).distribution.tolist() == [3 / 4, 1 / 4]
    assert path_lengths(net, torch.zeros(2, 5, 3)).paths == 4 * 2 * 3


@pytest.mark.parametrize(
    ("function", "outputs"),
    [
        (lambda x: x @ torch.ones(4, 5), 5),
        (lambda x: torch.einsum("bc,cd->bd", x, torch.ones(4, 5)), 5),
        (lambda x: torch.einsum("dc, bc -> bd", torch.ones(5, 4), x), 5),
        (lambda x: torch.addmm(torch.ones(5), x, torch.ones(4, 5)), 5),
        (lambda x: torch.ones(5, 4) @ x.T, 5),
        (lambda x: x @ torch.ones(4), 1),
        (lambda x: torch.bmm(x.unsqueeze(0), torch.ones(1, 4, 5)), 5),
    ],
)
def test_constant_matrices_mix_all_channels(function: Callable[..., Any], outputs: int) -> None:
    gate = Gate(4)
    gate.freeze(torch.tensor([True, True, True, False]))
    lengths = path_lengths(nn.Sequential(nn.Linear(3, 4), gate, Function(function)), torch.zeros(2, 3))
    assert lengths.normalized == 0.25
    assert lengths.paths == 3 * 4 * outputs


def test_constant_matrices_over_positions_are_one_to_one() -> None:
    gate = Gate(4, dim=-1)
    gate.freeze(torch.tensor([True, True, True, False]))
    for function in (lambda x: torch.ones(6, 5) @ x, lambda x: torch.einsum("mn,bnc->bmc", torch.ones(6, 5), x)):
        lengths = path_lengths(nn.Sequential(nn.Linear(3, 4), gate, Function(function)), torch.zeros(2, 5, 3))
        assert lengths.distribution.tolist() == [0.75, 0.25]
        assert lengths.paths == 3 * 4


# ---- reductions -----------------------------------------------------------------------------------------------------

REDUCTIONS = {
    "mean": torch.mean,
    "sum": lambda x, **axes: x.sum(**axes),
    "amax": torch.amax,
    "amin": lambda x, **axes: x.amin(**axes),
    "max": lambda x, **axes: torch.max(x, **axes)[0],
    "min": lambda x, **axes: x.min(**axes)[0],
}


@pytest.mark.parametrize("decides", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS)
def test_reductions_take_the_names_of_numpy(reduction: Callable[..., Tensor], decides: bool) -> None:
    gate = Gate(4, dim=-1)
    gate.freeze(torch.tensor([True, True, True, False]))

    def measured(after: nn.Module, **axes: Any) -> tuple[float, int]:
        # A decision on the length leaves it to torch.export.
        block = Function(lambda x, after: after(reduction(x, **axes) if not decides or len(x) else x), after)
        lengths = path_lengths(nn.Sequential(nn.Linear(3, 4), gate, block), torch.zeros(2, 5, 3))
        return lengths.normalized, lengths.paths

    # Over positions every channel stays, over the channels all meet in one.
    assert measured(nn.Linear(4, 2), axis=1) == measured(nn.Linear(4, 2), dim=1) == (0.25, 3 * 4 * 2)
    assert measured(nn.Linear(4, 2), axis=-2, keepdims=True) == (0.25, 3 * 4 * 2)
    assert measured(nn.Linear(1, 2), axis=2, keepdims=True) == (0.25, 3 * 4 * 2)
    assert measured(nn.Identity(), axis=0) == (0.25, 3 * 4)


def test_operands_take_the_names_of_numpy() -> None:
    assert normalized(lambda x: torch.mean(x=x, axis=0)) == 0.0
    assert normalized(lambda x: torch.div(x, x2=1 + torch.relu(x))) == 0.5 * 0 + 0.5 * 2 + 1
    assert normalized(lambda x: torch.mul(x1=x, x2=torch.relu(x))) == 0.5 * 0 + 0.5 * 1 + 1


def test_reductions_without_axes_take_all() -> None:
    for function in (torch.sum, lambda x: x.sum(()), lambda x: x.mean(dim=[]), torch.max, lambda x: x.sum().sum(0)):
        lengths = path_lengths(nn.Sequential(nn.Linear(3, 4), Function(function)), torch.zeros(2, 3))
        assert (lengths.normalized, lengths.paths) == (0.0, 3 * 4)


@pytest.mark.parametrize("name", ["prod", "std", "var", "logsumexp", "median", "nansum"])
def test_other_reductions_are_refused(name: str) -> None:
    with pytest.raises(TraceError, match=f"'{name}' .* in layer '1' has no rule for paths"):
        normalized(lambda x: getattr(torch, name)(x, axis=1))


# ---- pooling --------------------------------------------------------------------------------------------------------

POOLS = (
    nn.AvgPool1d(3, 1, 1),
    nn.AvgPool2d(3, 1, 1),
    nn.MaxPool1d(3, 1, 1),
    nn.AdaptiveAvgPool1d(4),
    type("Renamed", (nn.AvgPool1d,), {})(3, 1, 1),
    lambda x: functional.avg_pool1d(x, 3, 1, 1),
    lambda x: functional.max_pool1d(x, 3, 1, 1),
    lambda x: functional.avg_pool1d(x, 3, 1, 1) if len(x) else x,
    lambda x: functional.adaptive_avg_pool2d(x, (5, 4)),
)


@pytest.mark.parametrize("pool", POOLS)
def test_pooling_along_the_channels_is_refused(pool: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 4), Function(lambda x: x), pool if isinstance(pool, nn.Module) else Function(pool))
    with pytest.raises(
        TraceError, match=r"pools or pads axis 2 of shape \(2, 5, 4\), along which the channels lie; move the channels"
    ):
        path_lengths(net, torch.zeros(2, 5, 3))


def test_pooling_along_space_is_one_to_one() -> None:
    gate = Gate(4, dim=-1)
    gate.freeze(torch.tensor([True, True, True, False]))
    for pool in (nn.AvgPool1d(3, 1, 1), nn.MaxPool1d(2), nn.AdaptiveAvgPool1d(1), nn.ZeroPad1d((1, -1))):
        net = nn.Sequential(nn.Linear(3, 4), gate, Function(lambda x, pool: pool(x.mT), pool))
        lengths = path_lengths(net, torch.zeros(2, 5, 3))
        assert lengths.distribution.tolist() == [0.75, 0.25]
        assert lengths.paths == 3 * 4
    # torch.export sees a pad by zeros, which moves the channels by one: only the last was active.
    moved = nn.Sequential(nn.Linear(3, 4), gate, nn.ZeroPad1d((1, -1)))
    assert path_lengths(moved, torch.zeros(2, 5, 3)).normalized == 0.0
    # One channel is not mixed with others.
    assert path_lengths(nn.Sequential(nn.Linear(3, 1), nn.AvgPool1d(3, 1, 1)), torch.zeros(2, 5, 3)).paths == 3


# ---- what is listed -------------------------------------------------------------------------------------------------


def test_what_is_nonlinear_and_uncounted_is_listed() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Gate(4), nn.MaxPool2d(2), nn.GroupNorm(2, 4), nn.AvgPool2d(1), nn.GELU(),
        nn.BatchNorm2d(4, track_running_stats=False), nn.InstanceNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU(),
        Function(lambda x: functional.relu(functional.max_pool2d(functional.relu(x), 2))), nn.Flatten(),
        nn.LayerNorm(4), nn.Softmax(1),
    )  # fmt: skip
    lengths = path_lengths(net, torch.zeros(2, 3, 4, 4))
    assert dict(lengths.always_active) == {"6": "GELU", "10": "ReLU", "11.relu": "ReLU", "11.relu_1": "ReLU"}
    assert dict(lengths.uncounted) == {
        "3": "MaxPool2d", "4": "GroupNorm", "7": "BatchNorm2d", "8": "InstanceNorm2d", "11.max_pool2d": "max-pool",
        "13": "LayerNorm", "14": "Softmax",
    }  # fmt: skip
    assert lengths.normalized == 5.0


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x + (x @ x.T) @ torch.ones(2, 4), "'add'.* takes a value that carries no path"),
        (
            lambda x: functional.linear(x @ x.T, torch.ones(3, 2)),
            "'linear'.* has 1 operands .* expected the first alone",
        ),
        (lambda x: functional.linear(x, torch.ones(3, 4) * (x > 0).sum()), "'linear'.* has 2 operands"),
        (lambda x: x @ (x.T @ x), "mixes the channels of shape .* with weights that depend on the network's input"),
        (
            lambda x: functional.scaled_dot_product_attention(*[x.unsqueeze(0).mT] * 3),
            "mixes axis 1 of its values, along which the channels lie",
        ),
        (lambda x: functional.embedding(x.argmax(1), torch.ones(4, 2)), "looks up what layers before it computed"),
        (lambda x: torch.addmm(x, x, torch.ones(4, 4)), "adds a matrix product to what carries paths"),
        (lambda x: torch.einsum("bc,cde->bde", x, torch.ones(4, 2, 2)), "mixes the channels .* with constants"),
        (lambda x: torch.div(x, 0.5, rounding_mode="floor"), r"'div' .* rounds what carries paths .*='floor'\), which"),
        (lambda x: x.div_(0.5, rounding_mode="trunc"), r"'div_' .* rounds what carries paths .*='trunc'\), which"),
        (lambda x: torch.div(1, x, rounding_mode="floor") if len(x) else x, "'div' .* rounds what carries paths"),
        (lambda x: torch.ones(4).copy_(x[0]), r"\(Tensor.copy_\) in layer '1' has no rule"),
    ],
)
def test_what_has_no_meaning_for_paths_is_refused(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        normalized(function)
    assert "\n" not in str(caught.value)
    assert "in layer '1'" in str(caught.value)


def test_writing_into_parts_is_refused() -> None:
    def assigned(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] = 0
        return x

    def written(x: Tensor) -> Tensor:
        x[:, :2].relu_()
        return x

    with pytest.raises(TraceError, match=r"\(aten.fill_\) in layer '1' has no rule for paths"):
        normalized(assigned)
    with pytest.raises(TraceError, match="in layer '1' writes in place into a tensor of which other parts are used"):
        normalized(written)
    # A view whose base is not used any more may be written.
    assert normalized(lambda x: x.view(2, 2, 2).flatten(1).relu_()) == 1.0
