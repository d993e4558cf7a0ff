"""Kinds of networks with everything in them that a recorder might disturb: name -> (network, batch of 8 inputs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import ntkdyn as nd

Family = Callable[[], tuple[nn.Module, Callable[[], Any]]]
FAMILIES: dict[str, Family] = {}


def family(build: Family) -> Family:
    FAMILIES[build.__name__] = build
    return build


def _vectors() -> Tensor:
    return torch.randn(8, 4)


def _images() -> Tensor:
    return torch.randn(8, 2, 6, 6)


def _tokens() -> Tensor:
    return torch.randint(11, (8, 5))


class Calls(nn.Module):
    """A network given by a function of itself and its inputs."""

    def __init__(self, forward: Callable[[Any, Any], Tensor], **parts: Any) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, inputs: Any) -> Tensor:
        return self._forward(self, inputs)


@family
def mlp() -> Any:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), _vectors


@family
def gated() -> Any:
    return nn.Sequential(nn.Linear(4, 6), nd.Gate(6, slope=0.3), nn.Linear(6, 3)), _vectors


@family
def prelu_inplace() -> Any:
    return nn.Sequential(
        nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)
    ), _vectors


@family
def batch_norm() -> Any:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nd.Gate(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ), _images


@family
def group_norm() -> Any:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), _images


@family
def instance_norm() -> Any:
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), _images


@family
def layer_and_rms_norm() -> Any:
    return nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 3)
    ), _vectors


@family
def dropout() -> Any:
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nd.Gate(8), nn.AlphaDropout(0.2), nn.Linear(8, 3)), _vectors


@family
def functional_dropout() -> Any:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        return self.last(functional.dropout(self.first(inputs).relu(), 0.3, training=self.training))

    return Calls(forward, first=nn.Linear(4, 8), last=nn.Linear(8, 3)), _vectors


@family
def dropout_of_its_own_generator() -> Any:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).relu()
        if self.training:
            hidden = hidden * (torch.rand(hidden.shape, generator=self.generator) > 0.3)
        return self.last(hidden)

    generator = torch.Generator().manual_seed(4)
    return Calls(forward, first=nn.Linear(4, 8), last=nn.Linear(8, 3), generator=generator), _vectors


@family
def residual() -> Any:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs)
        return self.last(hidden + self.norm(self.conv(hidden)).relu_()).mean((2, 3))

    parts = {"stem": nn.Conv2d(2, 4, 3), "conv": nn.Conv2d(4, 4, 3, padding=1), "norm": nn.BatchNorm2d(4)}
    return Calls(forward, **parts, last=nn.Conv2d(4, 3, 1)), _images


@family
def depthwise() -> Any:
    return nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.SiLU(), nn.Conv2d(4, 3, 4), nn.Flatten()), _images


@family
def one_dimensional() -> Any:
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.ELU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(8, 3)), (
        lambda: torch.randn(8, 2, 6)
    )


@family
def lstm() -> Any:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # not every processor has recurrent layers in bfloat16
            hidden = self.rnn(inputs)[0]
        return self.last(hidden[:, -1])

    return Calls(forward, rnn=nn.LSTM(3, 4, batch_first=True), last=nn.Linear(4, 3)), lambda: torch.randn(8, 5, 3)


@family
def gru() -> Any:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            hidden = self.rnn(inputs)[0]
        return self.last(hidden.mean(1))

    rnn = nn.GRU(3, 4, num_layers=2, dropout=0.2, batch_first=True)
    return Calls(forward, rnn=rnn, last=nn.Linear(4, 3)), lambda: torch.randn(8, 5, 3)


@family
def embedding() -> Any:
    return nn.Sequential(nn.Embedding(11, 4, padding_idx=0), nn.Flatten(), nn.Tanh(), nn.Linear(20, 3)), _tokens


@family
def embedding_bag() -> Any:
    return nn.Sequential(nn.EmbeddingBag(11, 4, mode="mean"), nn.Linear(4, 3)), _tokens


@family
def transformer() -> Any:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)

    def forward(self: Any, tokens: Tensor) -> Tensor:
        return self.last(self.layer(self.embed(tokens)).mean(1))

    return Calls(forward, embed=nn.Embedding(11, 4), layer=layer, last=nn.Linear(4, 3)), _tokens


@family
def attention() -> Any:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        return self.last(self.attend(inputs, inputs, inputs, need_weights=False)[0].mean(1))

    attend = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)
    return Calls(forward, attend=attend, last=nn.Linear(4, 3)), lambda: torch.randn(8, 5, 4)


@family
def tied() -> Any:
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    last.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), last, nn.Linear(4, 3)), _vectors


@family
def called_twice() -> Any:
    layer, gate = nn.Linear(4, 4), nd.Gate(4)
    return nn.Sequential(layer, gate, layer, gate, nn.Linear(4, 3)), _vectors


@family
def parametrized() -> Any:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), parametrizations.orthogonal(nn.Linear(6, 6)),
        parametrizations.spectral_norm(nn.Linear(6, 3)),
    ), _vectors  # fmt: skip


@family
def pruned_and_normed_by_hooks() -> Any:
    first = nn.Linear(4, 6)
    prune.random_unstructured(first, "weight", amount=0.3)
    last = torch.nn.utils.spectral_norm(nn.Linear(6, 3))  # the old one moves a buffer in a forward pre-hook
    return nn.Sequential(first, nn.ReLU(), last), _vectors


@family
def plain_attributes() -> Any:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(float(inputs.detach().sum()))
        if self.training:
            self.total.add_(inputs.detach().mean())
        return self.last(self.first(inputs).relu())

    network = Calls(forward, first=nn.Linear(4, 6), last=nn.Linear(6, 3), calls=0, seen=[])
    network.register_buffer("total", torch.zeros(()))
    return network, _vectors


@family
def hooks_of_the_user() -> Any:
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    network.calls = []
    network[0].register_forward_pre_hook(lambda module, inputs: network.calls.append("pre"))
    network[0].register_forward_hook(lambda module, inputs, outputs: outputs * 1.1)
    network[2].register_full_backward_hook(lambda module, inner, outer: network.calls.append("backward"))
    network[2].weight.register_hook(lambda gradient: gradient * 0.5)
    network.register_state_dict_post_hook(lambda *_: network.calls.append("state"))
    return network, _vectors


@family
def frozen_and_mixed_modes() -> Any:
    network = nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(6, 6),
        nn.Dropout(0.3),
        nn.Linear(6, 3),
    )
    network[0].requires_grad_(False)
    network[1].eval()
    network[3].eval()
    return network, _vectors


@family
def double_precision() -> Any:
    network = nn.Sequential(nn.Linear(4, 6), nd.Gate(6), nn.Linear(6, 3)).double()
    return network, lambda: torch.randn(8, 4, dtype=torch.float64)


@family
def lists_of_parameters() -> Any:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        return (inputs @ self.weights[0]).tanh() @ self.weights[1] + self.named["bias"]

    weights = nn.ParameterList([torch.randn(4, 6), torch.randn(6, 3)])
    return Calls(forward, weights=weights, named=nn.ParameterDict({"bias": torch.zeros(3)})), _vectors


@family
def checkpointed() -> Any:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        if self.training:
            hidden = checkpoint(self.middle, hidden, use_reentrant=False)
        else:
            hidden = self.middle(hidden)
        return self.last(hidden)

    middle = nn.Sequential(nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 6))
    return Calls(forward, first=nn.Linear(4, 6), middle=middle, last=nn.Linear(6, 3)), _vectors


@family
def lazy() -> Any:
    network = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(3))
    network(torch.zeros(1, 4))
    return network, _vectors


@family
def dictionary_of_inputs() -> Any:
    def forward(self: Any, inputs: Any) -> Tensor:
        return self.last((self.first(inputs["x"]) + self.embed(inputs["token"])).relu())

    parts = {"first": nn.Linear(4, 6), "embed": nn.Embedding(11, 6), "last": nn.Linear(6, 3)}
    return Calls(forward, **parts), lambda: {"x": torch.randn(8, 4), "token": torch.randint(11, (8,))}
