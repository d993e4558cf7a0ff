"""gate_network: one Gate per call site, the same outputs, old state dicts load."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ntkdyn.conversion import gate_network
from ntkdyn.errors import ConversionError
from ntkdyn.gates import Gate, gates, nonlinear_units, slopes


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 2),
    )


class BasicBlock(nn.Module):
    """As in torchvision's ResNet18: one in-place ReLU for both call sites."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """As in torchvision's ResNet50: one in-place ReLU for three call sites of two widths."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, *blocks: nn.Module, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(*blocks)
        self.fc = nn.Linear(width, 3)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer1(x)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


def resnet18() -> nn.Module:
    return ResNet(BasicBlock(4, 4), BasicBlock(4, 6, 2), width=6)


def resnet50() -> nn.Module:
    return ResNet(Bottleneck(4, 3), Bottleneck(12, 2), width=8)


class Functional(nn.Module):
    """Five spellings, a plain attribute, dropout as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.weight = nn.Parameter(torch.full((6,), 0.25))
        self.note = {"kept": True}

    def forward(self, x: Tensor, scale: Tensor | None = None, *, shift: float = 0.5) -> Tensor:
        x = F.relu(self.layers[0](x))
        x = F.dropout(x, 0.5, training=self.training)
        x = torch.relu(self.layers[1](x))
        x = self.layers[2](x).relu()
        x = F.leaky_relu(self.layers[3](x), 0.2)
        x = self.layers[4](x) + shift
        x.relu_()
        if scale is not None:
            x = x * scale
        return F.prelu(x, self.weight)


class SelfAttention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        n, t, d = hidden.shape
        split = (n, t, self.heads, d // self.heads)
        query, key, value = (f(hidden).view(split).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / (d // self.heads) ** 0.5
        if mask is not None:
            scores = scores + mask
        return (scores.softmax(-1) @ value).transpose(1, 2).reshape(n, t, d)


class BertLayer(nn.Module):
    """As in Hugging Face's BERT: control flow, keyword arguments, the activation as a function attribute."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.attention = SelfAttention(size, 2)
        self.intermediate = nn.Linear(size, hidden)
        self.intermediate_act_fn = F.relu
        self.output = nn.Linear(hidden, size)
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden: Tensor, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor]:
        if hidden.shape[1] > 512:
            raise ValueError("too long")
        hidden = self.norm1(hidden + self.dropout(self.attention(hidden, attention_mask)))
        inner = self.intermediate_act_fn(self.intermediate(hidden))
        return (self.norm2(hidden + self.dropout(self.output(inner))),)


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(BertLayer(8, 12) for _ in range(2))
        self.pooler = nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.embeddings(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=attention_mask)[0]
        return {"logits": self.classifier(torch.tanh(self.pooler(hidden[:, 0])))}


def leaky() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.LeakyReLU(0.3), nn.Linear(4, 4), nn.LeakyReLU(0.1, inplace=True))


def prelu() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 4), nn.PReLU(4), nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    return net


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)


IMAGES = (4, 3, 8, 8)
NETWORKS: dict[str, tuple[Any, tuple[int, ...], dict[str, tuple[int, int]]]] = {
    "mlp": (mlp, (4, 5), {"1": (7, 1), "3": (6, 1)}),
    "cnn": (cnn, IMAGES, {"2": (4, 1), "6": (5, 1)}),
    "resnet18": (
        resnet18,
        IMAGES,
        {"relu": (4, 1), "layer1.0.relu": (4, 1), "layer1.0.relu_1": (4, 1), "layer1.1.relu": (6, 1),
         "layer1.1.relu_1": (6, 1)},
    ),
    "resnet50": (
        resnet50,
        IMAGES,
        {"relu": (4, 1), "layer1.0.relu": (3, 1), "layer1.0.relu_1": (3, 1), "layer1.0.relu_2": (12, 1),
         "layer1.1.relu": (2, 1), "layer1.1.relu_1": (2, 1), "layer1.1.relu_2": (8, 1)},
    ),
    "functional": (
        Functional,
        (4, 6),
        {"relu": (6, 1), "relu_1": (6, 1), "relu_2": (6, 1), "leaky_relu": (6, 1), "relu_3": (6, 1), "prelu": (6, 1)},
    ),
    "leaky": (leaky, (4, 5), {"1": (4, 1), "3": (4, 1)}),
    "prelu": (prelu, (4, 5), {"1": (4, 1), "3": (6, 1)}),
    "transformer": (transformer, (2, 3, 8), {"layers.0.activation": (16, -1), "layers.1.activation": (16, -1)}),
}  # fmt: skip
every_network = pytest.mark.parametrize("name", NETWORKS)


def made(name: str) -> tuple[nn.Module, Tensor, dict[str, tuple[int, int]]]:
    torch.manual_seed(0)
    make, shape, sites = NETWORKS[name]
    return make(), torch.randn(shape), sites


def output(model: nn.Module, x: Any) -> Tensor:
    torch.manual_seed(1)
    result = model(**x) if isinstance(x, dict) else model(x)
    return result["logits"] if isinstance(result, dict) else result


@every_network
def test_one_gate_per_call_site(name: str) -> None:
    model, x, sites = made(name)
    gated = gate_network(model, x)
    assert {key: (gate.channels, gate.dim) for key, gate in gates(gated).items()} == sites
    assert not gates(model)
    assert not nonlinear_units(gated, x).always_active


@every_network
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_those_of_the_original(name: str, training: bool) -> None:
    model, x, _ = made(name)
    model.train(training)
    gated = gate_network(model, x)
    assert gated.training is training
    expected, found = output(model, x), output(gated, x)
    assert torch.equal(expected, found)
    expected.square().sum().backward()
    found.square().sum().backward()
    theirs = dict(gated.named_parameters())
    for key, parameter in model.named_parameters():
        if parameter.grad is not None and key in theirs:  # the weight of a PReLU is now a slope
            torch.testing.assert_close(theirs[key].grad, parameter.grad)


@every_network
def test_old_state_dict_loads_strictly(name: str) -> None:
    model, x, _ = made(name)
    gated = gate_network(model, x)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1)
    gated.load_state_dict(trained.state_dict(), strict=True)
    assert torch.equal(output(gated.eval(), x), output(trained.eval(), x))


@every_network
def test_copies_and_pickles(name: str) -> None:
    model, x, _ = made(name)
    gated = gate_network(model, x).eval()
    for other in (copy.deepcopy(gated), pickle.loads(pickle.dumps(gated))):
        assert list(gates(other)) == list(gates(gated))
        assert torch.equal(output(other, x), output(gated, x))
        next(iter(gates(other).values())).freeze()
        assert not torch.equal(output(other, x), output(gated, x))


@every_network
def test_without_example(name: str) -> None:
    model, x, sites = made(name)
    gated = gate_network(model)
    assert {key: gate.channels for key, gate in gates(gated).items()} == {key: size for key, (size, _) in sites.items()}
    assert torch.equal(output(gated, x), output(model, x))


@every_network
def test_layer_wise(name: str) -> None:
    model, x, sites = made(name)
    if name == "prelu":
        with pytest.raises(ConversionError, match=r"'1' \(PReLU\): its slopes differ between channels"):
            gate_network(model, x, granularity="layer")
        return
    gated = gate_network(model, x, granularity="layer")
    assert {key: gate.channels for key, gate in gates(gated).items()} == {key: size for key, (size, _) in sites.items()}
    assert all(slope.shape == (1,) for slope in slopes(gated).values())
    assert torch.equal(output(gated, x), output(model, x))


@every_network
def test_in_place(name: str) -> None:
    model, x, _ = made(name)
    reference = copy.deepcopy(model)
    assert gate_network(model, x, inplace=True) is model
    assert torch.equal(output(model, x), output(reference, x))
    assert list(gates(model)) == list(gates(gate_network(reference, x)))


@pytest.mark.parametrize("masked", [False, True])
def test_bert_written_like_hugging_face(masked: bool) -> None:
    torch.manual_seed(0)
    model = Bert().eval()
    example: dict[str, Tensor] = {"input_ids": torch.randint(11, (3, 5))}
    if masked:
        example["attention_mask"] = torch.zeros(3, 1, 1, 5).masked_fill(torch.rand(3, 1, 1, 5) < 0.3, -1e9)
    gated = gate_network(model, example)
    assert {key: (gate.channels, gate.dim) for key, gate in gates(gated).items()} == {
        "layers.0.intermediate_act_fn": (12, -1),
        "layers.1.intermediate_act_fn": (12, -1),
    }
    assert torch.equal(output(gated, example), output(model, example))
    counts = nonlinear_units(gated, example)
    assert counts.always_active == {"tanh": "Tanh"}
    assert counts.uncounted == {f"layers.{i}.attention.softmax": "softmax" for i in (0, 1)}


def test_slopes_are_those_of_the_activations() -> None:
    torch.manual_seed(0)
    assert [slope.unique().tolist() for slope in slopes(gate_network(leaky())).values()] == [
        pytest.approx([0.3]),
        pytest.approx([0.1]),
    ]
    found = slopes(gate_network(prelu()))
    torch.testing.assert_close(found["1"], torch.tensor([0.1, 0.2, 0.3, 0.4]))
    torch.testing.assert_close(found["3"], torch.full((6,), 0.25))


def test_rewritten_module_keeps_class_attributes_and_modes() -> None:
    torch.manual_seed(0)
    model = Functional()
    x = torch.randn(50, 6)
    gated = gate_network(model, x)
    assert isinstance(gated, Functional)
    assert type(gated).__name__ == "Functional"
    assert gated.note == {"kept": True}
    assert not torch.equal(gated(x), gated(x))  # functional dropout
    gated.eval()
    assert torch.equal(gated(x), gated(x))
    assert torch.equal(gated(x, shift=0.5), gated(x))
    with pytest.raises(ConversionError, match=r"shift is 0\.1; its gates were made with shift=0\.5"):
        gated(x, shift=0.1)
    with pytest.raises(ConversionError, match="scale"):
        gated(x, torch.ones(6))
    with_scale = gate_network(model, (x, torch.full((6,), 2.0)))
    torch.manual_seed(3)
    expected = model.eval()(x, torch.full((6,), 3.0))
    assert torch.equal(with_scale.eval()(x, torch.full((6,), 3.0)), expected)


def test_prelu_called_twice_gives_two_gates_that_load_the_one_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.PReLU(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.second(self.act(self.first(x))))

    torch.manual_seed(0)
    model = Twice()
    gated = gate_network(model, torch.randn(3, 4))
    assert list(gates(gated)) == ["act", "act_1"]
    with torch.no_grad():
        model.act.weight.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    gated.load_state_dict(model.state_dict(), strict=True)
    for slope in slopes(gated).values():
        assert torch.equal(slope, model.act.weight)
    again = gate_network(Twice(), torch.randn(3, 4))
    gated.act_1.freeze()
    again.load_state_dict(gated.state_dict(), strict=True)
    assert again.act_1.frozen.all()
    assert not again.act.frozen.any()


def test_one_module_under_two_names() -> None:
    torch.manual_seed(0)
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 5), act)
    gated = gate_network(model, torch.randn(2, 3))
    assert {name: gate.channels for name, gate in gates(gated).items()} == {"1": 4, "3": 5}
    assert model[1] is model[3]


def test_shared_block_has_one_gate() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = nn.Sequential(block, block, nn.Linear(4, 2))
    x = torch.randn(5, 4)
    gated = gate_network(model, x)
    assert list(gates(gated)) == ["0.1"]
    assert torch.equal(gated(x), model(x))


def test_in_place_relu_whose_input_is_used_again() -> None:
    class Overwrites(nn.Module):
        def __init__(self, module: bool) -> None:
            super().__init__()
            self.linear, self.act, self.module = nn.Linear(4, 4), nn.ReLU(inplace=True), module

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.linear(x) + 0
            out = self.act(hidden) if self.module else F.relu(hidden, inplace=True)
            return out + hidden

    torch.manual_seed(0)
    x = torch.randn(5, 4)
    model = Overwrites(False)
    assert torch.equal(gate_network(model, x)(x), model(x))
    with pytest.raises(ConversionError, match="set inplace=False"):
        gate_network(Overwrites(True), x)


class Convolution1d(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        self.conv, self.linear, self.order = nn.Conv1d(3, 5, 1), nn.Linear(3, 5), order

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "conv":
            return F.relu(self.conv(x))
        if self.order == "transposed":
            return F.relu(self.conv(x).transpose(1, 2).contiguous() + 0)
        if self.order == "linear":
            return F.relu(self.linear(x.transpose(1, 2)))
        if self.order == "flat":
            return F.relu(self.conv(x).flatten(1))
        return F.relu(x)


@pytest.mark.parametrize(
    ("order", "expected"), [("conv", (5, 1)), ("transposed", (5, -1)), ("linear", (5, -1)), ("flat", (35, 1))]
)
def test_channel_axis_of_three_axes(order: str, expected: tuple[int, int]) -> None:
    torch.manual_seed(0)
    gate = gates(gate_network(Convolution1d(order), torch.randn(2, 3, 7)))["relu"]
    assert (gate.channels, gate.dim) == expected


def test_unknown_channel_axis_is_named() -> None:
    with pytest.raises(ConversionError, match="'relu' in forward of '<root>': the layers before it do not tell"):
        gate_network(Convolution1d("none"), torch.randn(2, 3, 7))


def test_channels_last_linear_in_images() -> None:
    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.act = nn.Linear(3, 6), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.linear(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    gate = gates(gate_network(Permuted(), torch.randn(2, 3, 4, 5)))["act"]
    assert (gate.channels, gate.dim) == (6, -1)


@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
@pytest.mark.parametrize("activation", ["relu", nn.ReLU(), F.relu])
def test_transformer_layers(layer: type[nn.Module], activation: Any) -> None:
    torch.manual_seed(0)
    model = layer(8, 2, 16, dropout=0.0, batch_first=True, activation=activation).eval()
    x = torch.randn(2, 3, 8)
    example = x if layer is nn.TransformerEncoderLayer else (x, torch.randn(2, 4, 8))
    gated = gate_network(model, example)
    assert list(gates(gated)) == ["activation"]
    inputs = example if isinstance(example, tuple) else (example,)
    with torch.no_grad():  # the fused path of the original is on here
        torch.testing.assert_close(gated(*inputs), model(*inputs))
        gates(gated)["activation"].freeze()
        assert not torch.allclose(gated(*inputs), model(*inputs))


def test_padded_transformer_without_gradients() -> None:
    torch.manual_seed(0)
    model = transformer().eval()
    gated = gate_network(model, torch.randn(2, 3, 8))
    padding = torch.tensor([[False, False, True], [False, False, False]])
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        expected, found = model(x, src_key_padding_mask=padding), gated(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding])


def test_partial_as_attribute() -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.act = functools.partial(F.leaky_relu, negative_slope=0.2)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.linear(x))

    for example in (torch.randn(2, 3), None):
        gated = gate_network(Partial(), example)
        torch.testing.assert_close(slopes(gated)["act"], torch.full((4,), 0.2))


def test_double_precision() -> None:
    torch.manual_seed(0)
    model, x, _ = made("resnet18")
    model, x = model.double(), x.double()
    gated = gate_network(model, x)
    assert all(slope.dtype == torch.float64 for slope in slopes(gated).values())
    assert torch.equal(gated(x), model(x))


def test_only_the_generators_and_statistics_of_clones_move() -> None:
    model, x, _ = made("cnn")
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    gate_network(model, x)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_single_sample_in_training_mode() -> None:
    # BatchNorm refuses one sample in training mode; evaluation mode alone is enough.
    model, x, sites = made("cnn")
    assert list(gates(gate_network(model.eval(), x[:1]))) == list(sites)


def test_activation_of_training_mode_only() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.aux, self.act = nn.Linear(3, 4), nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.relu(self.trunk(x))
            return hidden + F.relu(self.act(self.aux(hidden))) if self.training else hidden

    torch.manual_seed(0)
    model = Auxiliary().eval()
    x = torch.randn(3, 3)
    gated = gate_network(model, x)
    assert list(gates(gated)) == ["act", "relu", "relu_1"]
    for training in (True, False):
        assert torch.equal(gated.train(training)(x), model.train(training)(x))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x)) if x.sum() > 0 else F.relu(x)


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.GELU()), torch.randn(2, 3), "calls no ReLU, LeakyReLU or PReLU; found GELU"),
        (nn.Linear(3, 3), None, "found no nonlinearity"),
        (nn.Sequential(nn.Linear(3, 3), Gate(3)), torch.randn(2, 3), "found Gate"),
        (Branching(), torch.ones(2, 3), "cannot be traced .*give each activation its own nn.ReLU attribute"),
        (Branching(), None, "cannot be traced without an example .*call gate_network\\(model, example\\)"),
        (nn.ReLU(), torch.randn(2, 3), "single ReLU"),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), None, "'1' \\(ReLU\\): the layers before it .*example"),
    ],
)
def test_what_cannot_be_converted_is_named(model: nn.Module, example: Any, message: str) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        gate_network(model, example)
    assert "\n" not in str(caught.value)


def test_wrong_granularity_and_wrapped_network() -> None:
    with pytest.raises(ConversionError, match="granularity is 'unit'"):
        gate_network(mlp(), granularity="unit")  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match=r"wrapped in DataParallel.*convert it first"):
        gate_network(nn.DataParallel(mlp()))


def test_other_activations_stay_and_are_listed() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.relu6, self.pool = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ReLU6(), nn.MaxPool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(torch.tanh(F.gelu(self.pool(self.relu6(self.relu(self.conv(x))))))).softmax(1)

    gated = gate_network(Mixed(), torch.randn(2, 3, 4, 4))
    counts = nonlinear_units(gated, torch.randn(2, 3, 4, 4))
    assert counts.total == {"relu": 4}
    assert counts.always_active == {"relu6": "ReLU6", "gelu": "GELU", "tanh": "Tanh", "silu": "SiLU"}
    assert counts.uncounted == {"pool": "MaxPool2d", "softmax": "softmax"}
