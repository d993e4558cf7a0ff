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
from torch.utils import checkpoint

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


@problem
def transposed_convolutions() -> Problem:
    model = nn.Sequential(
        nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), groups=2), nn.Tanh(),
        nn.ConvTranspose2d(6, 2, 2, dilation=2, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 3, stride=3), nn.Flatten(),
    )  # fmt: skip
    return Problem(model, torch.randn(3, 4, 2, 2), torch.randn(2, 4, 2, 2))


@problem
def transposed_volumes() -> Problem:
    model = nn.Sequential(
        nn.Conv1d(2, 2, 1), nn.Unflatten(2, (1, 2, 2)), nn.ConvTranspose3d(2, 2, (2, 1, 2), bias=False), nn.Flatten(),
        nn.ReLU(), nn.Linear(24, 2),
    )  # fmt: skip
    return Problem(model, torch.randn(3, 2, 4), torch.randn(2, 2, 4))


@problem
def padding_modes() -> Problem:
    modes = ("zeros", "reflect", "replicate", "circular")
    layers = [nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode), nn.Tanh()) for mode in modes]
    return Problem(
        nn.Sequential(*layers, nn.Conv2d(2, 1, 4), nn.Flatten()), torch.randn(4, 2, 4, 4), torch.ones(1, 2, 4, 4)
    )


@problem
def embedding_bags() -> Problem:
    def call(self: Any, tokens: Tensor) -> Tensor:
        bags = self.mean(tokens) + self.sum(tokens) + self.largest(tokens)
        return self.head(torch.tanh(bags + self.padded(tokens) + self.padded_sum(tokens)))

    layers = {
        "mean": nn.EmbeddingBag(5, 4), "sum": nn.EmbeddingBag(5, 4, mode="sum"),
        "largest": nn.EmbeddingBag(5, 4, mode="max"), "padded": nn.EmbeddingBag(5, 4, padding_idx=1),
        "padded_sum": nn.EmbeddingBag(5, 4, padding_idx=-2, mode="sum"), "head": nn.Linear(4, 2),
    }  # fmt: skip
    x1 = torch.randint(0, 5, (4, 3))
    x1[0] = 1
    return Problem(Composite(call, **layers), x1, torch.randint(0, 5, (3, 3)))


@problem
def gru_and_rnn() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)[0])[0][:, -1])

    model = Composite(call, first=nn.GRU(3, 3, batch_first=True, bidirectional=True),
                      second=nn.RNN(6, 3, batch_first=True), head=nn.Linear(3, 2))  # fmt: skip
    return Problem(model, torch.randn(3, 3, 3), torch.randn(2, 3, 3))


@problem
def transformer_encoder() -> Problem:
    def call(self: Any, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.encoder(batch["value"], src_key_padding_mask=batch["padding"])
        return self.head(hidden.mean(1))

    layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, norm_first=True, activation="gelu")
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(4), enable_nested_tensor=False)
    model = Composite(call, encoder=encoder, head=nn.Linear(4, 2)).eval()
    sets = [
        {"value": torch.randn(n, 3, 4), "padding": torch.arange(3) > torch.arange(1, n + 1)[:, None]} for n in (3, 2)
    ]
    return Problem(model, *sets)


@problem
def transformer_encoder_with_its_fast_path() -> Problem:
    def call(self: Any, batch: dict[str, Tensor]) -> Tensor:
        return self.head(self.encoder(batch["value"], src_key_padding_mask=batch["padding"])[:, 0])

    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), 2)
    model = Composite(call, encoder=encoder, head=nn.Linear(4, 2)).eval()
    sets = [{"value": torch.randn(n, 3, 4), "padding": torch.arange(3).expand(n, 3) > 1} for n in (3, 2)]
    return Problem(model, *sets, parameters=("encoder.layers.1.*",))


@problem
def transformer_positions_first() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype)
        return self.head(self.layer(x.transpose(0, 1), src_mask=mask, is_causal=True)[-1])

    model = Composite(call, layer=nn.TransformerEncoderLayer(4, 2, 5), head=nn.Linear(4, 2)).eval()
    return Problem(model, torch.randn(3, 3, 4), torch.randn(2, 3, 4))


@problem
def source_and_target_transformer() -> Problem:
    model = nn.Transformer(4, 2, 1, 1, 5, batch_first=True).eval()
    sets = [(torch.randn(n, 3, 4), torch.randn(n, 2, 4)) for n in (3, 2)]
    return Problem(model, *sets, forward=lambda model, inputs: model(*inputs)[:, :, :2])


@problem
def cross_attention_of_other_widths() -> Problem:
    def call(self: Any, batch: tuple[Tensor, ...]) -> Tensor:
        mixed, weights = self.attention(*batch)
        return self.head(mixed.flatten(1)) + weights.sum((1, 2))[:, None] * weights[:, 0, :2]

    model = Composite(
        call, attention=nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True), head=nn.Linear(8, 2)
    )
    sets = [(torch.randn(n, 2, 4), torch.randn(n, 3, 3), torch.randn(n, 3, 5)) for n in (3, 2)]
    return Problem(model, *sets)


@problem
def unusual_attention() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        hidden = self.first(x, x.flip(1), x, average_attn_weights=False)[0]
        return self.second(hidden, hidden, hidden)[0].mean(1)

    model = Composite(call, first=nn.MultiheadAttention(4, 2, bias=False, batch_first=True),
                      second=nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True,
                                                   batch_first=True))  # fmt: skip
    return Problem(model, torch.randn(3, 2, 4), torch.randn(2, 2, 4))


@problem
def causal_language_model() -> Problem:
    def call(self: Any, tokens: Tensor) -> Tensor:
        hidden = self.table(tokens) + self.places(torch.arange(tokens.shape[1]))
        q, k, v = (one.unflatten(-1, (2, 2)).transpose(1, 2) for one in self.qkv(self.norm(hidden)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head(hidden + self.down(functional.gelu(self.up(hidden))))

    layers = {
        "table": nn.Embedding(7, 4), "places": nn.Embedding(3, 4), "norm": nn.LayerNorm(4), "qkv": nn.Linear(4, 12),
        "out": nn.Linear(4, 4), "up": nn.Linear(4, 6), "down": nn.Linear(6, 4), "head": nn.Linear(4, 7, bias=False),
    }  # fmt: skip
    model = Composite(call, **layers)
    model.head.weight = model.table.weight
    return Problem(model, torch.randint(0, 7, (3, 3)), torch.randint(0, 7, (2, 3)))


class VisionTransformer(nn.Module):
    """Patches, a class token and learned positions, as parameters of the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.position = nn.Parameter(torch.randn(1, 5, 4))
        self.layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).mT
        hidden = torch.cat([self.token.expand(len(x), -1, -1), patches], 1)
        return self.head(self.layer(hidden + self.position)[:, 0])


@problem
def vision_transformer() -> Problem:
    return Problem(VisionTransformer().eval(), torch.randn(5, 1, 4, 4), torch.randn(2, 1, 4, 4))


@problem
def convnext_block() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        hidden = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        hidden = self.scale(self.down(functional.gelu(self.up(hidden)))).permute(0, 3, 1, 2)
        return self.head((x + hidden).mean((2, 3)))

    layers = {"depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4), "norm": nn.LayerNorm(4), "up": nn.Linear(4, 8),
              "down": nn.Linear(8, 4), "scale": Elementwise((4,)), "head": nn.Linear(4, 2)}  # fmt: skip
    return Problem(Composite(call, **layers), torch.randn(4, 4, 3, 3), torch.randn(3, 4, 3, 3))


class Elementwise(nn.Module):
    """Parameters of one shape on either side of a product and of a sum."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.left, self.right, self.bias, self.offset = (nn.Parameter(torch.randn(shape)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.bias, torch.mul(self.left * x, self.right)) + self.offset


@problem
def elementwise_parameters() -> Problem:
    layers = [Elementwise(shape) for shape in ((), (1,), (4,), (3, 1), (1, 3, 4), (1, 1, 1))]
    x1 = torch.randn(3, 3, 4)
    return Problem(nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)), x1, torch.randn(2, 3, 4))


@problem
def added_parameter_then_in_place() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        hidden = self.first(x)
        outputs = hidden + self.head.bias
        hidden.relu_()
        return self.head(outputs + hidden)

    return Problem(Composite(call, first=nn.Linear(4, 3), head=nn.Linear(3, 3)), torch.randn(4, 4), torch.randn(3, 4))


class Stored(nn.Module):
    """Weights stored [in, out]: GPT-2's addmm over positions, a square one used as it is, again, and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
        self.square, self.head = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.addmm(self.bias, x.reshape(-1, 3), self.first).view(*x.shape[:-1], 4).tanh()
        hidden = (hidden @ self.square).tanh() @ self.square
        return functional.linear(hidden.tanh(), self.square).tanh().sum(1) @ self.head


@problem
def weights_stored_transposed() -> Problem:
    return Problem(Stored(), torch.randn(4, 5, 3), torch.randn(3, 5, 3))


@problem
def wide_products_of_many_positions() -> Problem:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return ((x @ self.first).tanh() @ self.second).tanh().mean(1)

    return Problem(Wide(), torch.randn(3, 9, 3), torch.randn(2, 9, 3))


@problem
def parameters_times_parameters() -> Problem:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            # Products without samples, of the length that four samples have.
            mixed = torch.tanh(x @ (self.first @ self.second))
            return torch.matmul(mixed, self.first * self.scale + self.second) + torch.matmul(mixed, self.first)

    return Problem(Product(), torch.randn(4, 4), torch.randn(4, 4))


@problem
def residual_block_with_projection() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x)).relu_()
        hidden = self.norm_2(self.second(hidden))
        hidden += self.projection(x)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(hidden.mean((2, 3))))))
        return self.head((hidden.relu_() * gate[:, :, None, None]).mean((2, 3)))

    layers = {
        "first": nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False), "norm": _trained_norm(nn.BatchNorm2d(4)),
        "second": nn.Conv2d(4, 4, 3, padding=1, bias=False), "norm_2": _trained_norm(nn.BatchNorm2d(4)),
        "projection": nn.Conv2d(2, 4, 1, stride=2), "squeeze": nn.Linear(4, 2), "excite": nn.Linear(2, 4),
        "head": nn.Linear(4, 2),
    }  # fmt: skip
    return Problem(Composite(call, **layers).eval(), torch.randn(3, 2, 4, 4), torch.randn(2, 2, 4, 4))


@problem
def unet() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        first = torch.relu(self.first(x))
        deep = torch.relu(self.middle(functional.max_pool2d(first, 2)))
        return self.head(torch.cat([first, self.up(deep)], 1))

    model = Composite(call, first=nn.Conv2d(1, 2, 3, padding=1), middle=nn.Conv2d(2, 3, 3, padding=1),
                      up=nn.ConvTranspose2d(3, 2, 2, stride=2), head=nn.Conv2d(4, 1, 1))  # fmt: skip
    return Problem(model, torch.randn(3, 1, 4, 4), torch.randn(2, 1, 4, 4))


@problem
def normed_weights() -> Problem:
    weight, spectral = torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(weight(nn.Conv1d(2, 3, 2)), nn.Tanh(), nn.Flatten(), spectral(nn.Linear(9, 3)))
    return Problem(model.eval(), torch.randn(4, 2, 4), torch.randn(3, 2, 4))


@problem
def positions_equal_samples_and_outputs() -> Problem:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten())
    return Problem(model, torch.randn(4, 4, 4), torch.randn(4, 4, 4))


@problem
def more_positions_than_samples() -> Problem:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2))
    return Problem(model, torch.randn(2, 12, 2), torch.randn(3, 12, 2))


@problem
def functional_call() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        own = dict(self.inner.named_parameters())
        doubled = {name: 2 * value for name, value in own.items()}
        return torch.func.functional_call(self.inner, own, x) + torch.func.functional_call(
            self.inner, doubled, x.flip(1)
        )

    inner = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    return Problem(Composite(call, inner=inner), torch.randn(4, 4), torch.randn(3, 4))


@problem
def transformed_forward() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        return self.head(torch.func.vmap(lambda row: torch.tanh(self.first(row)))(x))

    return Problem(Composite(call, first=nn.Linear(4, 3), head=nn.Linear(3, 2)), torch.randn(4, 4), torch.randn(3, 4))


@problem
def layer_at_three_shapes() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        hidden = self.shared(x).mean((1, 2)) + self.shared(x[:, 0]).mean(1) + self.shared(x[:, 0, 0])
        return self.head(torch.tanh(hidden))

    model = Composite(call, shared=nn.Linear(4, 3), head=nn.Linear(3, 2))
    return Problem(model, torch.randn(3, 2, 3, 4), torch.randn(2, 2, 3, 4))


@problem
def checkpointed_layers() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        return self.head(checkpoint.checkpoint(self.body, x, use_reentrant=False))

    body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh())
    return Problem(Composite(call, body=body, head=nn.Linear(3, 2)), torch.randn(4, 4), torch.randn(3, 4))


class Cube(torch.autograd.Function):
    """w x³ with a gradient of its own."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(x, weight)
        return weight * x**3

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = context.saved_tensors
        return 3 * gradient * weight * x**2, (gradient * x**3).sum(0)


@problem
def own_autograd_function() -> Problem:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return Cube.apply(x, self.weight)

    model = nn.Sequential(nn.Linear(4, 4), Layer(), nn.Linear(4, 2))
    return Problem(model, torch.randn(4, 4), torch.randn(3, 4))


@problem
def fourier_mixing() -> Problem:
    def call(self: Any, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(torch.fft.fft2(x).real)).mean(1))

    return Problem(
        Composite(call, first=nn.Linear(4, 3), head=nn.Linear(3, 2)), torch.randn(4, 3, 4), torch.randn(3, 3, 4)
    )
