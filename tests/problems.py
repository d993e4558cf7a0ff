"""The zoo: small networks with inputs, each with something that an engine may get wrong.

A problem is a function without arguments that builds it anew, always the same; ZOO lists them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ntkdyn.gates import Gate


@dataclass(frozen=True)
class Problem:
    """A network, two sets of inputs, and the further arguments of the kernel."""

    model: nn.Module
    x1: Any
    x2: Any
    forward: Callable[[nn.Module, Any], Tensor] | None = None
    parameters: tuple[str, ...] | None = None


ZOO: dict[str, Callable[[], Problem]] = {}


def problem(function: Callable[[], Problem]) -> Callable[[], Problem]:
    def build() -> Problem:
        with torch.random.fork_rng():
            torch.manual_seed(len(function.__name__))
            built = function()
            for parameter in built.model.parameters():
                # No parameter at a special value: zero biases and unit scales hide errors.
                if parameter.is_floating_point() and parameter.dim() < 2:
                    parameter.data += 0.3 * torch.randn_like(parameter)
        return built

    ZOO[function.__name__] = build
    return build


class Composite(nn.Module):
    """Layers by name and a function that calls them."""

    def __init__(self, call: Callable[[Any, Any], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.call = call

    def forward(self, inputs: Any) -> Any:
        return self.call(self, inputs)


def _trained_norm(norm: nn.Module) -> nn.Module:
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm.eval()


@problem
def mlp() -> Problem:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    return Problem(model, torch.randn(6, 5), torch.randn(4, 5))


@problem
def samples_equal_outputs() -> Problem:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    return Problem(model, torch.randn(4, 4), torch.randn(4, 4))


@problem
def one_sample() -> Problem:
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2))
    return Problem(model, torch.randn(1, 3), torch.randn(3, 3))


@problem
def width_one() -> Problem:
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    return Problem(model, torch.randn(5, 1), torch.randn(1, 1))


@problem
def without_bias() -> Problem:
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.GELU(), nn.Linear(6, 2, bias=False))
    return Problem(model, torch.randn(5, 5), torch.randn(3, 5))


@problem
def layer_called_twice() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(torch.tanh(self.middle(self.first(x))))))

    model = Composite(call, first=nn.Linear(4, 5), middle=nn.Linear(5, 5), head=nn.Linear(5, 2))
    return Problem(model, torch.randn(5, 4), torch.randn(2, 4))


@problem
def same_layer_at_two_lengths() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        # Once per position and once per sample: 3 + 1 uses of the same weight.
        return self.head(torch.tanh(self.shared(x)).mean(1) + torch.tanh(self.shared(x[:, 0])))

    model = Composite(call, shared=nn.Linear(4, 5), head=nn.Linear(5, 2))
    return Problem(model, torch.randn(5, 3, 4), torch.randn(2, 3, 4))


@problem
def tied_embedding() -> Problem:
    def call(self: Any, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.middle(self.table(tokens).mean(1)))
        return self.head(hidden)

    model = Composite(call, table=nn.Embedding(9, 4), middle=nn.Linear(4, 4), head=nn.Linear(4, 9, bias=False))
    model.head.weight = model.table.weight
    return Problem(model, torch.randint(0, 9, (4, 3)), torch.randint(0, 9, (3, 3)))


@problem
def tied_by_a_view() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        return functional.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t())

    return Problem(Composite(call, encoder=nn.Linear(4, 3)), torch.randn(5, 4), torch.randn(3, 4))


@problem
def in_place_activations() -> Problem:
    layers = [nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.LeakyReLU(0.1, inplace=True)]
    return Problem(nn.Sequential(*layers, nn.Linear(5, 3)), torch.randn(6, 4), torch.randn(3, 4))


@problem
def in_place_on_the_input() -> Problem:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))
    return Problem(model, torch.randn(5, 4), torch.randn(2, 4))


@problem
def residual_added_in_place() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        branch = self.second(hidden)
        branch += hidden
        return self.head(branch.relu_())

    model = Composite(call, first=nn.Linear(4, 5), second=nn.Linear(5, 5), head=nn.Linear(5, 2))
    return Problem(model, torch.randn(5, 4), torch.randn(3, 4))


@problem
def batch_norm() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False), _trained_norm(nn.BatchNorm2d(3)), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(48, 4), _trained_norm(nn.BatchNorm1d(4)), nn.ReLU(), nn.Linear(4, 3),
    )  # fmt: skip
    return Problem(model.eval(), torch.randn(4, 2, 4, 4), torch.randn(3, 2, 4, 4))


@problem
def layer_norm() -> Problem:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2), nn.LayerNorm((5, 2)))
    return Problem(model, torch.randn(4, 5, 4), torch.randn(3, 5, 4))


@problem
def other_norms() -> Problem:
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.InstanceNorm1d(4, affine=True), nn.GELU(),
        nn.Flatten(), nn.RMSNorm(16), nn.Linear(16, 2),
    )  # fmt: skip
    return Problem(model, torch.randn(4, 2, 6), torch.randn(3, 2, 6))


@problem
def embedding() -> Problem:
    def call(self: Any, tokens: Tensor) -> Tensor:
        # Position embeddings have no sample axis.
        hidden = self.table(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(torch.tanh(hidden).sum(1))

    layers = {"table": nn.Embedding(6, 4, padding_idx=2), "places": nn.Embedding(4, 4), "head": nn.Linear(4, 3)}
    return Problem(Composite(call, **layers), torch.randint(0, 6, (4, 4)), torch.randint(0, 6, (3, 4)))


@problem
def prelu() -> Problem:
    model = nn.Sequential(nn.Linear(5, 4), nn.PReLU(4), nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 4))
    return Problem(model, torch.randn(4, 5), torch.randn(5, 5))


@problem
def gates_at_exact_zeros() -> Problem:
    first, second = nn.Linear(4, 6, bias=False), nn.Linear(6, 4)
    x1, x2 = torch.randn(6, 4), torch.randn(3, 4)
    x1[0] = 0.0
    x2[1] = 0.0
    first.weight.data[:3] = first.weight.data[:3].sign()
    x1[1] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    gates = [Gate(6, torch.tensor([0.0, 0.3, 1.0, -0.2, 0.0, 0.5])), Gate(4, 0.0, granularity="layer")]
    return Problem(nn.Sequential(first, gates[0], second, gates[1], nn.Linear(4, 4)), x1, x2)


@problem
def frozen_gates() -> Problem:
    model = nn.Sequential(nn.Linear(4, 6), Gate(6, 0.2), nn.Linear(6, 5), Gate(5), nn.Linear(5, 2))
    model[1].freeze(torch.tensor([True, False, True, False, False, True]))
    model[3].freeze()
    return Problem(model, torch.randn(5, 4), torch.randn(3, 4))


@problem
def gate_on_the_last_axis() -> Problem:
    model = nn.Sequential(nn.Linear(4, 3), Gate(3, 0.2, dim=-1), nn.Linear(3, 2), nn.Flatten())
    return Problem(model, torch.randn(3, 3, 4), torch.randn(4, 3, 4))


@problem
def gated_convolution_over_black_borders() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), Gate(4, torch.tensor([0.0, 0.4, 1.0, -0.1])),
        nn.Conv2d(4, 4, 3, stride=2, bias=False), Gate(4), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    x1, x2 = torch.zeros(4, 1, 6, 6), torch.zeros(3, 1, 6, 6)
    x1[:, :, 2:5, 2:4], x2[:, :, 1:3, 3:6] = torch.randn(4, 1, 3, 2), torch.randn(3, 1, 2, 3)
    return Problem(model, x1, x2)


@problem
def odd_convolutions() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 1), groups=2), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding="same", dilation=2, groups=3), nn.Tanh(),
        nn.Conv2d(6, 4, 2, padding="same", padding_mode="reflect"), nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=4), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip
    model(torch.zeros(1, 4, 6, 6))
    return Problem(model, torch.randn(3, 4, 6, 6), torch.randn(2, 4, 6, 6))


@problem
def one_and_three_dimensional_convolutions() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        line = torch.tanh(self.line(x))
        return self.up(torch.tanh(self.volume(line.unflatten(2, (2, 2, 3)))).flatten(2)).flatten(1)

    model = Composite(call, line=nn.Conv1d(2, 2, 3, padding=1), volume=nn.Conv3d(2, 2, (1, 2, 2)),
                      up=nn.ConvTranspose1d(2, 1, 2))  # fmt: skip
    return Problem(model, torch.randn(3, 2, 12), torch.randn(2, 2, 12))


@problem
def lstm() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])

    model = Composite(call, recurrent=nn.LSTM(3, 4, num_layers=2, batch_first=True), head=nn.Linear(4, 2))
    return Problem(model, torch.randn(3, 4, 3), torch.randn(2, 4, 3))


@problem
def attention() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        mixed = x + self.attention(self.before(x), self.before(x), self.before(x), need_weights=False)[0]
        return self.head(mixed.mean(1))

    layers = {"before": nn.LayerNorm(4), "attention": nn.MultiheadAttention(4, 2, batch_first=True)}
    return Problem(Composite(call, **layers, head=nn.Linear(4, 2)), torch.randn(3, 3, 4), torch.randn(2, 3, 4))


@problem
def positions_before_samples() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        # [T, N, d] with T = N, and only the last position is read: the shape alone cannot tell the axes apart.
        hidden = torch.tanh(self.first(x.transpose(0, 1)))
        return self.head(self.norm(hidden)[-1])

    model = Composite(call, first=nn.Linear(4, 5), norm=nn.LayerNorm(5), head=nn.Linear(5, 2))
    return Problem(model, torch.randn(3, 3, 4), torch.randn(3, 3, 4))


@problem
def positions_folded_into_samples() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        rows = torch.tanh(self.first(x.flatten(0, 1)))
        pairs = self.norm(torch.cat([rows[0::2], rows[1::2]]))
        halves = torch.tanh(self.second(pairs)).chunk(2)
        return self.head(torch.cat(halves, 1))

    layers = {"first": nn.Linear(4, 5), "norm": _trained_norm(nn.BatchNorm1d(5)), "second": nn.Linear(5, 3)}
    return Problem(Composite(call, **layers, head=nn.Linear(6, 2)), torch.randn(4, 2, 4), torch.randn(3, 2, 4))


class RootOwned(nn.Module):
    """Parameters of the root itself, one used by multiplication, one by matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.head = nn.Linear(3, 2)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh((x * self.scale) @ self.matrix))


@problem
def root_owned_parameters() -> Problem:
    return Problem(RootOwned(), torch.randn(4, 4), torch.randn(3, 4))


@problem
def weight_norm() -> Problem:
    norm = torch.nn.utils.parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Linear(4, 5)), nn.Tanh(), norm(nn.Linear(5, 2)))
    return Problem(model, torch.randn(4, 4), torch.randn(3, 4))


@problem
def energy_gradient() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        # The network's output is the derivative of another network: its weights act twice.
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.head(torch.tanh(self.first(x))).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

    model = Composite(call, first=nn.Linear(3, 5), head=nn.Linear(5, 1, bias=False))
    return Problem(model, torch.randn(4, 3), torch.randn(2, 3))


@problem
def dictionary_inputs() -> Problem:
    def call(self: Any, batch: dict[str, Tensor]) -> Tensor:
        return self.head(torch.tanh(self.table(batch["token"]) + self.first(batch["value"])))

    model = Composite(call, table=nn.Embedding(5, 4), first=nn.Linear(3, 4), head=nn.Linear(4, 2))
    sets = [{"token": torch.randint(0, 5, (n,)), "value": torch.randn(n, 3)} for n in (4, 3)]
    return Problem(model, *sets)


@problem
def tuple_inputs_by_forward() -> Problem:
    model = nn.Bilinear(3, 2, 4)
    sets = [(torch.randn(n, 3), torch.randn(n, 2)) for n in (4, 3)]
    return Problem(model, *sets, forward=lambda model, inputs: model(*inputs))


@problem
def one_output_without_axis() -> Problem:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0))
    return Problem(model, torch.randn(5, 4), torch.randn(3, 4))


@problem
def positions_as_outputs() -> Problem:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6))
    return Problem(model, torch.randint(0, 6, (3, 3)), torch.randint(0, 6, (2, 3)))


@problem
def outputs_as_logits() -> Problem:
    model = Composite(lambda self, x: SimpleNamespace(logits=self.head(x)), head=nn.Linear(4, 3))
    return Problem(model, torch.randn(4, 4), torch.randn(3, 4))


@problem
def softmax_outputs() -> Problem:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.Softmax(-1))
    return Problem(model, torch.randn(4, 4), torch.randn(3, 4))


@problem
def selected_parameters() -> Problem:
    model = nn.Sequential(nn.Linear(4, 5), Gate(5, 0.1), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    return Problem(model, torch.randn(4, 4), torch.randn(3, 4), parameters=("0.*", "2.bias"))


@problem
def strided_inputs() -> Problem:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    return Problem(model, torch.randn(4, 5).T, torch.randn(3, 8)[:, ::2])


@problem
def layer_without_effect() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        hidden = self.first(x)
        self.monitor(hidden)
        return self.head(hidden.relu_())

    model = Composite(call, first=nn.Linear(4, 5), monitor=nn.Linear(5, 2), head=nn.Linear(5, 3))
    return Problem(model, torch.randn(4, 4), torch.randn(3, 4))
