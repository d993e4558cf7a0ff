"""A structural clone computes the same numbers and shares nothing that a forward or backward pass writes."""

from __future__ import annotations

import copy
import threading
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from ntkdyn.clone import structural_clone
from ntkdyn.errors import UnsupportedLayer
from ntkdyn.gates import Gate


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)))


def test_parameters_share_storage_and_buffers_are_copied() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), Gate(3))
    clone = structural_clone(model)
    for (name, live), (other_name, copied) in zip(model.named_parameters(), clone.named_parameters(), strict=True):
        assert name == other_name
        assert live is not copied
        assert live.data_ptr() == copied.data_ptr()
        assert copied.is_leaf
        assert isinstance(copied, nn.Parameter)
    for live, copied in zip(model.buffers(), clone.buffers(), strict=True):
        assert live.data_ptr() != copied.data_ptr()
        assert torch.equal(live, copied)
    clone(torch.randn(5, 4)).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in clone.parameters())
    assert int(model[1].num_batches_tracked) == 0
    assert int(clone[1].num_batches_tracked) == 1


def test_copied_parameters_on_request() -> None:
    model = nn.Linear(2, 2)
    clone = structural_clone(model, share_parameters=False)
    with torch.no_grad():
        clone.weight.zero_()
    assert model.weight.abs().sum() > 0


def test_frozen_parameters_require_gradients_in_the_clone() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    model.register_parameter("index", nn.Parameter(torch.tensor([1, 2]), requires_grad=False))
    clone = structural_clone(model)
    assert clone.weight.requires_grad
    assert not clone.index.requires_grad
    assert not model.weight.requires_grad


def test_users_hooks_do_not_run_and_stay_on_the_live_network() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True)
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    model[0].weight.register_hook(lambda gradient: calls.append("gradient"))
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    model.register_state_dict_post_hook(lambda *_: calls.append("state"))
    clone = structural_clone(model)
    clone(torch.ones(1, 2)).sum().backward()
    clone.state_dict()
    assert calls == []
    model(torch.ones(1, 2)).sum().backward()
    assert sorted(calls) == ["accumulated", "backward", "forward", "gradient", "pre"]


def test_training_flags_stay() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    model[2].eval()
    clone = structural_clone(model)
    assert [module.training for module in clone.modules()] == [module.training for module in model.modules()]
    clone.eval()
    assert model.training
    assert model[1].training


class Aliases(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.again = self.head
        self.plain_list = [self.head, {"inner": self.embedding}]
        self.unregistered = [nn.Linear(4, 4)]
        self.bound = self.double
        self.closure = lambda inputs: 1 * self.head(inputs)
        self.calls = 0
        self.history: list[Tensor] = []
        self.state = torch.zeros(3)

    def double(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return 2 * inputs

    def forward(self, indices: Tensor) -> Tensor:
        hidden = self.unregistered[0](self.bound(self.embedding(indices)))
        self.history.append(hidden)
        self.state += 1
        return self.closure(hidden) + self.plain_list[0](hidden) + self.again(hidden)  # type: ignore[no-any-return,operator]


def test_aliases_ties_lists_methods_and_closures() -> None:
    model = Aliases()
    indices = torch.tensor([1, 2])
    expected = model(indices)
    model.head.register_forward_hook(lambda *_: pytest.fail("the live layer was called"))
    model.unregistered[0].register_forward_hook(lambda *_: pytest.fail("the live layer was called"))
    clone = structural_clone(model)
    assert isinstance(clone, Aliases)
    assert clone.head is clone.again is clone.plain_list[0]
    assert clone.plain_list[1]["inner"] is clone.embedding  # type: ignore[index]
    assert clone.head.weight is clone.embedding.weight
    assert clone.bound.__self__ is clone  # type: ignore[attr-defined]
    assert clone.unregistered[0] is not model.unregistered[0]
    assert torch.equal(clone(indices), expected)
    assert (model.calls, len(model.history), float(model.state[0])) == (1, 1, 1.0)
    assert (clone.calls, len(clone.history), float(clone.state[0])) == (2, 2, 2.0)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_flat_weights_of_recurrent_layers(kind: type[nn.RNNBase]) -> None:
    model = kind(3, 4, 2)
    clone = structural_clone(model)
    own = {id(parameter) for parameter in clone.parameters()}
    assert {id(weight) for weight in clone._flat_weights} == own
    assert {id(reference()) for reference in clone._flat_weight_refs} == own
    inputs = torch.randn(2, 5, 3)
    assert torch.equal(clone(inputs)[0], model(inputs)[0])
    clone(inputs)[0].sum().backward()
    assert model.weight_hh_l0.grad is None
    assert clone.weight_hh_l0.grad is not None


def test_old_weight_norm_follows_the_live_weights() -> None:
    model = old_weight_norm()
    inputs = torch.randn(2, 4)
    model(inputs)
    clone = structural_clone(model)
    with torch.no_grad():
        model[0].weight_g.mul_(3)
    live_weight = model[0].weight
    assert torch.equal(clone(inputs), structural_clone(model)(inputs))
    clone(inputs).sum().backward()
    assert clone[0].weight_g.grad is not None
    assert model[0].weight is live_weight
    assert torch.equal(clone(inputs), model(inputs))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))),
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3))),
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3))),
        lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(4, 3), "weight", 4)),
        old_weight_norm,
        lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU())),
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0),
    ],
)
def test_same_numbers_and_nothing_moves(make: Any) -> None:
    model = make()
    inputs = torch.randn(2, 4) if not isinstance(model, nn.TransformerEncoderLayer) else torch.randn(2, 3, 4)
    before = copy.deepcopy({key: value.clone() for key, value in model.state_dict().items()})
    clone = structural_clone(model).eval()
    outputs = clone(inputs)
    clone.train()(inputs).sum().backward()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(outputs, model.eval()(inputs))


def test_compiled_wrappers_are_taken_off() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    wrapped = torch.compile(inner)
    assert type(structural_clone(wrapped)) is nn.Sequential
    nested = nn.Sequential(torch.compile(nn.Linear(2, 3)), nn.DataParallel(nn.Linear(3, 1)))
    clone = structural_clone(nested)
    assert [type(child) for child in clone] == [nn.Linear, nn.Linear]
    assert [name for name, _ in clone.named_parameters()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert torch.equal(clone(torch.ones(1, 2)), nested[1](nested[0]._orig_mod(torch.ones(1, 2))))
    in_place = nn.Linear(2, 2)
    in_place.compile()
    assert structural_clone(in_place)._compiled_call_impl is None


def test_what_cannot_be_copied_is_kept() -> None:
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    model.generator = torch.Generator().manual_seed(3)
    model.forward = types.MethodType(lambda self, inputs: 3 * nn.Linear.forward(self, inputs), model)  # type: ignore[method-assign]
    clone = structural_clone(model)
    assert clone.lock is model.lock
    state = model.generator.get_state()
    torch.rand(3, generator=clone.generator)
    assert torch.equal(model.generator.get_state(), state)
    assert clone.forward.__self__ is clone
    inputs = torch.ones(1, 2)
    assert torch.equal(clone(inputs), model(inputs))


def test_shared_modules_and_none_entries() -> None:
    shared = nn.Linear(3, 3, bias=False)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    model.register_module("nothing", None)
    clone = structural_clone(model)
    assert clone[0] is clone[2]
    assert clone.nothing is None
    assert len(list(clone.parameters())) == 1


def test_what_is_refused() -> None:
    with pytest.raises(UnsupportedLayer, match=r"parameter '0.weight' is not initialized yet; run one batch"):
        structural_clone(nn.Sequential(nn.LazyLinear(3)))
    scripted = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(UnsupportedLayer, match=r"layer '0' .* TorchScript"):
        structural_clone(nn.Sequential(scripted))
