"""The house's Transformer: against one written out for a single sentence, padding, causality, path lengths, kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntkdyn as nd
from ntkdyn.errors import ConfigurationError
from ntkdyn.experiments.networks import Transformer
from ntkdyn.gates import gates

TOKENS = 30


def network(**options: Any) -> Transformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 12, "depth": 2, "heads": 3, "feedforward": 10, "positions": 16}
    model = Transformer(TOKENS, **sizes | options).double().eval()
    with torch.no_grad():
        # Normalizations and biases are 1 and 0 at first, where an error would not show.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def sentences(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, TOKENS, (count, length), generator=torch.Generator().manual_seed(seed))


def written_out(state: dict[str, Tensor], source: list[int], target: list[int], *, heads: int, depth: int) -> Tensor:
    """Logits [T, tokens] of one sentence pair, position by position and head by head."""
    width = state["sources.weight"].shape[1]

    def linear(name: str, x: Tensor) -> Tensor:
        return state[f"{name}.weight"] @ x + state[f"{name}.bias"]

    def normalized(name: str, x: Tensor) -> Tensor:
        spread = ((x - x.mean()) ** 2).mean()
        return (x - x.mean()) / (spread + 1e-5) ** 0.5 * state[f"{name}.weight"] + state[f"{name}.bias"]

    def embedded(table: str, tokens: list[int]) -> list[Tensor]:
        result = []
        for place, token in enumerate(tokens):
            angles = [place / 10_000 ** (2 * (i // 2) / width) for i in range(width)]
            wave = torch.tensor([math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(angles)])
            result.append(state[f"{table}.weight"][token] * width**0.5 + wave)
        return result

    def attention(name: str, query: Tensor, keys: list[Tensor]) -> Tensor:
        size = width // heads
        mixed = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            q = linear(f"{name}.query", query)[part]
            scores = torch.stack([q @ linear(f"{name}.key", key)[part] / size**0.5 for key in keys])
            weights = scores.exp() / scores.exp().sum()
            mixed.append(sum(w * linear(f"{name}.value", key)[part] for w, key in zip(weights, keys, strict=True)))
        return linear(f"{name}.output", torch.cat(mixed))

    def forward(name: str, x: Tensor) -> Tensor:
        hidden, slope = linear(f"{name}.expand", x), state[f"{name}.gate.slope"]
        return linear(f"{name}.contract", torch.where(hidden > 0, hidden, slope * hidden))

    encoded = embedded("sources", source)
    for layer in range(depth):
        name = f"encoder.{layer}"
        seen = [normalized(f"{name}.norm1", x) for x in encoded]
        encoded = [x + attention(f"{name}.attention", n, seen) for x, n in zip(encoded, seen, strict=True)]
        encoded = [x + forward(f"{name}.feedforward", normalized(f"{name}.norm2", x)) for x in encoded]
    encoded = [normalized("encoder_norm", x) for x in encoded]
    decoded = embedded("targets", target)
    for layer in range(depth):
        name = f"decoder.{layer}"
        seen = [normalized(f"{name}.norm1", x) for x in decoded]
        decoded = [x + attention(f"{name}.attention", seen[t], seen[: t + 1]) for t, x in enumerate(decoded)]
        decoded = [x + attention(f"{name}.cross_attention", normalized(f"{name}.norm2", x), encoded) for x in decoded]
        decoded = [x + forward(f"{name}.feedforward", normalized(f"{name}.norm3", x)) for x in decoded]
    return torch.stack([state["targets.weight"] @ normalized("decoder_norm", x) for x in decoded])


@pytest.mark.parametrize(("depth", "heads"), [(1, 1), (2, 3)])
def test_it_is_the_transformer_of_the_papers(depth: int, heads: int) -> None:
    model = network(depth=depth, heads=heads)
    source, target = sentences(3, 5), sentences(3, 4, seed=1)
    logits = model(source, target)
    for one, x, y in zip(logits, source.tolist(), target.tolist(), strict=True):
        expected = written_out(dict(model.state_dict()), x, y, heads=heads, depth=depth)
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-10)


def test_sizes() -> None:
    model = Transformer(100, width=8, depth=3, heads=2, feedforward=20)
    attention, norm, feedforward = 4 * (8 * 8 + 8), 16, 8 * 20 + 20 + 20 * 8 + 8
    encoder, decoder = attention + 2 * norm + feedforward, 2 * attention + 3 * norm + feedforward
    slopes = sum(gate.slope.numel() for gate in gates(model).values())
    assert slopes == 6 * 20
    # The readout is the embedding of the targets.
    expected = 2 * 100 * 8 + 3 * (encoder + decoder) + 2 * norm
    assert sum(part.numel() for part in model.parameters()) - slopes == expected
    assert {gate.slope.numel() for gate in gates(Transformer(9, granularity="layer")).values()} == {1}


def test_padding_changes_nothing() -> None:
    model = network()
    source, target = sentences(4, 6), sentences(4, 5, seed=1)
    source[1, 4:] = target[2, 2:] = target[3, 3:] = 0
    longer = model(nn.functional.pad(source, (0, 3)), nn.functional.pad(target, (0, 2)))[:, :5]
    real = target != 0
    torch.testing.assert_close(longer[real], model(source, target)[real], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(longer[1], model(source[1:2, :4], target[1:2])[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(longer[2, :2], model(source[2:3], target[2:3, :2])[0], rtol=1e-12, atol=1e-12)


def test_no_position_sees_what_follows() -> None:
    model = network()
    source, target = sentences(2, 6), sentences(2, 5, seed=1)
    other = target.clone()
    other[:, 3:] = sentences(2, 2, seed=2)
    torch.testing.assert_close(model(source, target)[:, :3], model(source, other)[:, :3], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(source, target)[:, 3], model(source, other)[:, 3])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_path_length_in_closed_form(depth: int) -> None:
    """Residual sums are 1/2-1/2, attention leads along its values, so with shares p of active units in layer l:

    encoder e = sum_l p_l / 2, as paths enter with length 0;  decoder e_l = (e_(l-1) + e) / 2 + p_l / 2, e_0 = 0.
    Self-attention of the decoder has the same length on both branches.
    """
    model = network(depth=depth)
    generator = np.random.default_rng(depth)
    share: dict[str, float] = {}
    for name, gate in gates(model).items():
        linear = int(generator.integers(0, gate.channels + 1))
        gate.freeze(torch.arange(gate.channels) < linear)
        share[name] = 1 - linear / gate.channels
    encoder = sum(share[f"encoder.{layer}.feedforward.gate"] / 2 for layer in range(depth))
    expected = 0.0
    for layer in range(depth):
        expected = (expected + encoder) / 2 + share[f"decoder.{layer}.feedforward.gate"] / 2
    lengths = nd.path_lengths(model, (sentences(2, 6), sentences(2, 4)))
    assert lengths.normalized == pytest.approx(expected, rel=1e-12)
    assert lengths.distribution.sum() == pytest.approx(1)
    assert lengths.per_layer == pytest.approx(share)
    for gate in gates(model).values():
        gate.freeze()
    assert nd.average_path_length(model, (sentences(2, 6), sentences(2, 4))) == 0


def test_as_many_positions_of_sources_as_of_targets_make_no_other_path() -> None:
    model = network()
    lengths = [nd.path_lengths(model, (sentences(2, n), sentences(2, m))) for n, m in ((5, 5), (5, 3), (3, 3), (10, 1))]
    assert len({(one.normalized, one.mean) for one in lengths}) == 1


def reference_log_probability(model: nn.Module, inputs: Any) -> Tensor:
    logits = model(inputs[0], inputs[1][:, :-1])
    chosen = logits.log_softmax(-1).gather(2, inputs[1][:, 1:, None]).squeeze(2)
    return chosen * (inputs[1][:, 1:] != 0)


@pytest.mark.parametrize("forward", [None, reference_log_probability])
def test_kernels_are_exact(forward: Any) -> None:
    model = network(width=6, heads=2, feedforward=5, depth=1)
    source, target = sentences(3, 4), sentences(3, 3, seed=1)
    source[1, 2:] = target[2, 2:] = 0
    found = nd.empirical_ntk(model, (source, target), forward=forward, per="layer")
    outputs = model(source, target) if forward is None else forward(model, (source, target))
    rows = [
        torch.cat([part.flatten() for part in torch.autograd.grad(one, list(model.parameters()), retain_graph=True)])
        for one in outputs.flatten()
    ]
    jacobian = torch.stack(rows).view(3, outputs[0].numel(), -1)
    expected = torch.einsum("icp,jcp->ij", jacobian, jacobian)
    total = torch.stack(list(found.values())).sum(0)
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    assert "targets" in found  # embedding and readout are one matrix
    assert not any("readout" in name for name in found)


@pytest.mark.parametrize("sizes", [{"width": 10, "heads": 3}, {"width": 9, "heads": 3}])
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"width={sizes['width']} and heads=3; expected an even width, a multiple of heads"
    ):
        Transformer(9, **sizes)
