"""Analytic kernels against a NumPy recursion over covariances and against wide networks; refusals by dotted name."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ntkdyn as nd
from ntkdyn.errors import ConfigurationError, MissingPackage, ShapeError, UnknownName, UnsupportedLayer
from ntkdyn.experiments.networks import GatedMLP
from ntkdyn.theory.layers import LAYERS
from ntkdyn.theory.stax import stax_layers

INSTALLED = all(importlib.util.find_spec(name) for name in ("jax", "neural_tangents"))
needs_theory = pytest.mark.skipif(not INSTALLED, reason="needs the extra theory and neural-tangents")

MIXED = torch.linspace(-0.2, 1.0, 6, dtype=torch.float64)


class Covariances:
    """The oracle: second moments of activations between all samples and pixels, and the tangent kernel, by hand.

    φ_a(u) = (1 - a) relu(u) + a u, so E[φ_a φ_a] = (1 - a)² E[relu relu] + a c and
    E[φ_a' φ_a'] = (1 - a)² P(u > 0, v > 0) + a, averaged over the slopes one by one. Inputs of variance 0 are left to
    test_exact_zeros.
    """

    def __init__(self, inputs: Tensor, *, standard: bool) -> None:
        array = inputs.double().flatten(2) if inputs.dim() > 2 else inputs.double()[:, :, None]
        self.width, self.space = array.shape[1], tuple(inputs.shape[2:])
        self.standard = standard
        self.moment = (torch.einsum("ncs,mct->nmst", array, array) / self.width).numpy()
        self.tangent = np.zeros_like(self.moment)

    def linear(self, width: int, weight: float, bias: float | None) -> Covariances:
        if self.moment.shape[-1] != 1:
            raise ValueError("flatten first")
        return self._affine(self.moment, self.tangent, self.width, width, weight, bias)

    def convolution(self, layer: nn.Conv2d, weight: float, bias: float | None) -> Covariances:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        number = torch.arange(1.0, np.prod(self.space) + 1).reshape(1, 1, *self.space)
        rows, columns = layer.padding if isinstance(layer.padding, tuple) else (0, 0)
        padded = functional.pad(number, (columns, columns, rows, rows), mode=mode)
        # [pixels of the window, windows], 0 outside of the image.
        windows = functional.unfold(padded, layer.kernel_size, stride=layer.stride)[0].long().numpy()
        averages = []
        for array in (self.moment, self.tangent):
            framed = np.pad(array, ((0, 0), (0, 0), (1, 0), (1, 0)))
            averages.append(np.mean([framed[:, :, window][:, :, :, window] for window in windows], axis=0))
        self.space = tuple(
            (size + 2 * pad - kernel) // stride + 1
            for size, pad, kernel, stride in zip(
                self.space, (rows, columns), layer.kernel_size, layer.stride, strict=True
            )
        )
        return self._affine(*averages, self.width * len(windows), layer.out_channels, weight, bias)

    def _affine(
        self, moment: Any, tangent: Any, fan_in: int, width: int, weight: float, bias: float | None
    ) -> Covariances:
        own = fan_in * moment + (bias is not None) if self.standard else weight * moment + (bias or 0.0)
        self.moment = weight * moment + (bias or 0.0)
        self.tangent = own + weight * tangent
        self.width = width
        return self

    def gate(self, slopes: Sequence[float]) -> Covariances:
        variance = np.einsum("nnss->ns", self.moment)
        scale = np.sqrt(variance[:, None, :, None] * variance[None, :, None, :])
        cosine = np.clip(self.moment / scale, -1, 1)
        angle = np.arccos(cosine)
        relu = scale * (np.sin(angle) + (np.pi - angle) * cosine) / (2 * np.pi)
        both_open = (np.pi - angle) / (2 * np.pi)
        self.tangent *= np.mean([(1 - a) ** 2 * both_open + a for a in slopes], axis=0)
        self.moment = np.mean([(1 - a) ** 2 * relu + a * self.moment for a in slopes], axis=0)
        return self

    def pool(self, window: int) -> Covariances:
        rows, columns = self.space
        split = (rows // window, window, columns // window, window)

        def pooled(array: Any) -> Any:
            n, m = array.shape[:2]
            means = array.reshape(n, m, *split, *split).mean((3, 5, 7, 9))
            return means.reshape(n, m, split[0] * split[2], split[0] * split[2])

        self.moment, self.tangent = pooled(self.moment), pooled(self.tangent)
        self.space = (split[0], split[2])
        return self

    def flatten(self) -> Covariances:
        pixels = self.moment.shape[-1]
        self.moment = np.einsum("nmss->nm", self.moment)[:, :, None, None] / pixels
        self.tangent = np.einsum("nmss->nm", self.tangent)[:, :, None, None] / pixels
        self.width *= pixels
        return self


def mlp(width: int = 6, outputs: int = 3, slope: Any = 0.3) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, width), nd.Gate(width, slope), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    ).double()


def cnn(width: int = 6, **convolution: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, width, 3, **convolution),
        nd.Gate(width, 0.375),
        nn.Conv2d(width, width, (1, 2), bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width * 8, 3),
    ).double()


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def close(found: Tensor, expected: Any) -> None:
    """Off the diagonal 1e-10; on it 1e-7: there neural-tangents takes the square root of a rounded 0."""
    reference = torch.as_tensor(expected)
    difference = (found - reference).abs() / reference.abs().max()
    assert difference.max() < 1e-7
    if found.shape[0] == found.shape[1]:
        assert difference.fill_diagonal_(0).max() < 1e-10


@needs_theory
@pytest.mark.parametrize("parametrization", ["standard", "ntk"])
@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0, -0.5, MIXED], ids=["relu", "0.3", "linear", "-0.5", "mixed"])
def test_mlp_equals_the_recursion(slope: Any, parametrization: Any) -> None:
    x = inputs(4, 5)
    slopes = [float(a) for a in torch.as_tensor(slope).reshape(-1)]
    oracle = Covariances(x, standard=parametrization == "standard").linear(6, 1.7, 0.2).gate(slopes)
    oracle.linear(6, 1.7, 0.2).gate([0.0]).linear(3, 1.7, 0.2)
    variances: dict[str, Any] = {"weight_variance": 1.7, "bias_variance": 0.2}
    model = mlp(slope=slope)
    found = nd.infinite_width_ntk(model, x, reduce="mean", parametrization=parametrization, **variances)
    close(found, oracle.tangent[:, :, 0, 0])
    close(nd.infinite_width_nngp(model, x, **variances), oracle.moment[:, :, 0, 0])
    block = nd.infinite_width_ntk(model, x[:3], x[1:3], reduce="mean", parametrization=parametrization, **variances)
    close(block, oracle.tangent[:3, 1:3, 0, 0])


@needs_theory
@pytest.mark.parametrize(
    "convolution",
    [
        {"padding": 0},
        {"padding": 1, "stride": 2},
        {"padding": (1, 0), "stride": (2, 1)},
        {"padding": 1, "stride": 2, "padding_mode": "circular"},
        {"padding": 1, "stride": (2, 2), "padding_mode": "reflect"},
        {"padding": 1, "stride": 2, "padding_mode": "replicate"},
    ],
    ids=str,
)
@pytest.mark.parametrize("parametrization", ["standard", "ntk"])
def test_cnn_equals_the_recursion(convolution: dict[str, Any], parametrization: Any) -> None:
    x = inputs(3, 2, 6, 5)
    if convolution == {"padding": 0}:
        x = x[:, :, :4]
    elif convolution.get("stride") == 2 or convolution["stride"] == (2, 2):
        x = inputs(3, 2, 8, 5)  # a row that XLA's "SAME" would pad at the other end
    elif convolution["stride"] == (2, 1):
        x = inputs(3, 2, 8, 5)[:, :, :7, :5]
    model = cnn(**convolution)
    shape = model[:4](x).shape[2:]
    model[5] = nn.Linear(6 * shape.numel(), 3).double()
    weights = {"0": 2.0, "2": 1.5, "5": 1.0}
    oracle = Covariances(x, standard=parametrization == "standard").convolution(model[0], 2.0, 0.1).gate([0.375])
    oracle.convolution(model[2], 1.5, None).gate([0.0]).flatten().linear(3, 1.0, 0.0)
    found = nd.infinite_width_ntk(
        model, x, parametrization=parametrization, weight_variance=weights, bias_variance={"0": 0.1, "5": 0.0}
    )
    close(found, 3 * oracle.tangent[:, :, 0, 0])


@needs_theory
def test_pooling_needs_covariances_between_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(3, 2, 4, 4)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nd.Gate(4, MIXED[:4])),
        nn.AvgPool2d(2),
        nn.Identity(),
        nn.Conv2d(4, 4, 2, padding=1),
        nd.Gate(4, 0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    ).double()
    oracle = Covariances(x, standard=True).convolution(model[0][0], 2.0, 0.1).gate([float(a) for a in MIXED[:4]])
    oracle.pool(2).convolution(model[3], 2.0, 0.1).gate([0.5])
    oracle.pool(3).flatten().linear(2, 2.0, 0.1)
    found = nd.infinite_width_ntk(model, x, reduce="mean", weight_variance=2.0, bias_variance=0.1)
    close(found, oracle.tangent[:, :, 0, 0])
    monkeypatch.setattr("ntkdyn.theory._BLOCK_BYTES", 4 * 8 * 16**2)
    in_blocks = nd.infinite_width_ntk(model, x, reduce="mean", weight_variance=2.0, bias_variance=0.1)
    assert torch.equal(in_blocks, in_blocks.T)
    assert torch.allclose(in_blocks, found, rtol=1e-12)


def drawn(build: Callable[[], nn.Module], measure: Callable[[nn.Module], Tensor], draws: int) -> Tensor:
    torch.manual_seed(0)
    return torch.stack([measure(build()) for _ in range(draws)])


def empirical(x: Tensor, **options: Any) -> Callable[[nn.Module], Tensor]:
    def measure(model: nn.Module) -> Tensor:
        names = [name for name, _ in model.named_parameters() if not name.endswith("slope")]
        return nd.empirical_ntk(model, x, parameters=names, **options)

    return measure


def scatter_around(kernels: Tensor, analytic: Tensor) -> None:
    """The mean over draws lies within five standard errors of every entry, and these are small."""
    assert kernels.shape[1:] == analytic.shape
    errors = kernels.std(0) / len(kernels) ** 0.5
    assert ((kernels.mean(0) - analytic).abs() <= 5 * errors + 1e-9 * analytic.abs().max()).all()
    assert errors.norm() < 0.06 * analytic.norm()


@needs_theory
@pytest.mark.parametrize("reduce", ["trace", "mean", "each", "full"])
def test_wide_networks_scatter_around_this_kernel(reduce: Any) -> None:
    x = inputs(4, 5)
    slopes = torch.linspace(0, 1, 256)

    def build() -> nn.Module:
        return mlp(width=256, slope=slopes)

    scatter_around(drawn(build, empirical(x, reduce=reduce), 60), nd.infinite_width_ntk(build(), x, reduce=reduce))


@needs_theory
def test_wide_cnns_scatter_around_this_kernel() -> None:
    x = inputs(3, 2, 8, 8)

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 64, 3, padding=1, stride=2), nd.Gate(64, 0.3), nn.AvgPool2d(2),
            nn.Conv2d(64, 64, 2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2),
        ).double()  # fmt: skip

    scatter_around(drawn(build, empirical(x), 40), nd.infinite_width_ntk(build(), x))


@needs_theory
@pytest.mark.parametrize("slope", [0.0, 0.5, MIXED.repeat(11)], ids=["relu", "0.5", "mixed"])
def test_exact_zeros(slope: Any) -> None:
    """Where inputs of a gate are 0 whatever the weights, its derivative is the slope, as in the network."""
    x = inputs(3, 2, 6, 6)
    x[0] = 0
    x[:, :, :, :3] = 0

    def build() -> nn.Module:
        model = nn.Sequential(
            nn.Conv2d(2, 66, 3), nd.Gate(66, slope), nn.Conv2d(66, 66, 1), nd.Gate(66, slope),
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4 * 66, 2),
        ).double()  # fmt: skip
        for layer in model:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        return model

    def whole_and_biases(model: nn.Module) -> Tensor:
        """The kernel of all, and that of biases alone, to which zeros matter most."""
        blocks = nd.empirical_ntk(model, x, per="parameter")
        weights, biases = (
            sum((block for name, block in blocks.items() if name.endswith(kind)), torch.zeros(3, 3))
            for kind in ("weight", "bias")
        )
        return torch.stack([weights + biases, biases])

    whole = nd.infinite_width_ntk(build(), x)
    scatter_around(drawn(build, whole_and_biases, 40), torch.stack([whole, whole - without_biases(build(), x)]))


def without_biases(model: nn.Module, x: Tensor) -> Tensor:
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.bias = None
    return nd.infinite_width_ntk(model, x)


@needs_theory
def test_one_slope_equals_neural_tangents_own() -> None:
    x = inputs(4, 5)
    model = nn.Sequential(nn.Linear(5, 6), nd.Gate(6, 0.375), nn.Linear(6, 3)).double()
    found = nd.infinite_width_ntk(model, x, reduce="mean", weight_variance=2.25, bias_variance=0.25)
    with stax_layers("the test") as stax:
        options = {"W_std": 1.5, "b_std": 0.5, "parameterization": "standard"}
        layers = stax.Dense(6, **options), stax.ABRelu(0.375, 1.0), stax.Dense(3, **options)
        close(found, np.array(stax.serial(*layers)[2](x.numpy(), None, "ntk")))


@needs_theory
def test_ntk_parametrization_is_the_metric_of_the_variances() -> None:
    x = inputs(4, 5)

    def build() -> nn.Sequential:
        model = mlp(width=256, slope=0.3)
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=(1.6 / layer.in_features) ** 0.5)
                nn.init.normal_(layer.bias, std=0.4)
        return model

    def scaled(model: nn.Module) -> Tensor:
        blocks = nd.empirical_ntk(model, x, per="parameter")
        fan_in = {"0": 5, "2": 256, "4": 256}
        return sum(
            (1.6 / fan_in[name] * blocks[f"{name}.weight"] + 0.16 * blocks[f"{name}.bias"] for name in fan_in),
            torch.zeros(4, 4, dtype=torch.float64),
        )

    analytic = nd.infinite_width_ntk(build(), x, parametrization="ntk", weight_variance=1.6, bias_variance=0.16)
    scatter_around(drawn(build, scaled, 60), analytic)


@needs_theory
def test_nngp_is_the_covariance_of_an_output() -> None:
    x = inputs(4, 5)

    def build() -> nn.Module:
        return mlp(width=258, outputs=512, slope=MIXED.repeat(43))

    def covariance(model: nn.Module) -> Tensor:
        with torch.no_grad():
            outputs: Tensor = model(x)
        return outputs @ outputs.T / 512

    scatter_around(drawn(build, covariance, 100), nd.infinite_width_nngp(build(), x))


@needs_theory
def test_frozen_channels_are_linear() -> None:
    x = inputs(3, 5)
    model, other = mlp(slope=0.0), mlp(slope=torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64))
    model[1].freeze(torch.arange(6) < 3)
    options: dict[str, Any] = {"weight_variance": 2.0, "bias_variance": 0.0}
    assert torch.equal(nd.infinite_width_ntk(model, x, **options), nd.infinite_width_ntk(other, x, **options))


@needs_theory
def test_variances_are_read_from_the_initialization() -> None:
    x = inputs(3, 8)
    torch.manual_seed(0)

    def fresh(initialize: Callable[[Tensor], Any] | None, *, zero: bool) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(8, 64), nd.Gate(64), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)).double()
        for layer in model:
            if isinstance(layer, nn.Linear):
                if initialize is not None:
                    initialize(layer.weight)
                if zero:
                    nn.init.zeros_(layer.bias)
        return model

    def kernel(model: nn.Module, weight: Any, bias: Any) -> Tensor:
        return nd.infinite_width_ntk(model, x, weight_variance=weight, bias_variance=bias)

    default = {"0": 1 / 24, "2": 1 / 192, "4": 1 / 96}
    model = fresh(None, zero=False)
    assert torch.equal(nd.infinite_width_ntk(model, x), kernel(model, 1 / 3, default))
    model = fresh(lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"), zero=True)
    assert torch.equal(nd.infinite_width_ntk(model, x), kernel(model, 2.0, 0.0))
    model = fresh(lambda w: nn.init.kaiming_uniform_(w, nonlinearity="linear"), zero=False)
    assert torch.equal(nd.infinite_width_ntk(model, x), kernel(model, 1.0, default))
    model = fresh(nn.init.xavier_normal_, zero=True)
    glorot = {"0": 16 / 72, "2": 128 / 96, "4": 64 / 35}
    assert torch.equal(nd.infinite_width_ntk(model, x), kernel(model, glorot, 0.0))
    model = GatedMLP(8, 3, width=64, depth=2)
    assert torch.equal(nd.infinite_width_ntk(model, x), kernel(model, 2.0, 0.0))


def test_unread_variances_are_asked_for() -> None:
    x = inputs(2, 5)
    model = mlp(width=64)
    nn.init.normal_(model[2].weight)
    with pytest.raises(ConfigurationError, match=r"no rule among .* fits, fan_in · variance .* give weight_variance="):
        nd.infinite_width_ntk(model, x)
    with pytest.raises(ConfigurationError, match=r"the weights fit .* and .*; fan_in|the weights fit .* and"):
        nd.infinite_width_ntk(nn.Linear(2, 1), inputs(2, 2))
    model = mlp(width=64)
    nn.init.ones_(model[2].bias)
    with pytest.raises(ConfigurationError, match="give bias_variance="):
        nd.infinite_width_ntk(model, x)
    with pytest.raises(ConfigurationError, match="weight_variance has no value for 2, 4"):
        nd.infinite_width_ntk(model, x, weight_variance={"0": 1.0}, bias_variance=0)
    with pytest.raises(UnknownName, match=r"bias_variance names '7'; expected layers among 0, 2, 4"):
        nd.infinite_width_ntk(model, x, weight_variance=1.0, bias_variance={"7": 1.0})
    with pytest.raises(ConfigurationError, match=r"weight_variance of '0' is -1\.0"):
        nd.infinite_width_ntk(model, x, weight_variance=-1.0, bias_variance=0)


class Residual(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def tied() -> nn.Sequential:
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.ReLU(), layer)


def frozen() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    model[2].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(5, 5), nn.Sequential(nn.Tanh()), nn.Linear(5, 2)), r"'1\.0' \(Tanh\) has no analytic"),
        (nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)), r"'1' \(BatchNorm1d\)"),
        (nn.Sequential(nn.Linear(5, 5), Residual()), r"'1' \(Residual\)"),
        (Residual(), "'<root>' \\(Residual\\)"),
        (nn.Sequential(nn.Linear(5, 5), nn.Dropout()), r"'1' \(Dropout\)"),
        (tied(), r"'2' \(Linear\) shares its weight with '0'"),
        (frozen(), r"'2' \(Linear\) has a bias without requires_grad"),
        (nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 2))), r"'0' \(Linear\) has a parameter 'weight_g'"),
        (nn.Sequential(nn.ReLU(), nn.Linear(5, 2)), r"'0' \(ReLU\) gets inputs that are not Gaussian"),
        (nn.Sequential(nn.Linear(5, 2), nn.ReLU(), nn.ReLU(), nn.Linear(2, 2)), r"'2' \(ReLU\) gets inputs that are"),
        (nn.Sequential(nn.Linear(5, 2), nd.Gate(2)), r"'1' \(Gate\) is not followed by a Linear or Conv2d"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_has_no_kernel_is_refused_by_name(model: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedLayer, match=message) as caught:
        nd.infinite_width_ntk(model, torch.ones(2, 5), weight_variance=2.0, bias_variance=0.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Conv2d(4, 4, 3, groups=2)], r"'0' \(Conv2d\) has groups=2"),
        ([nn.Conv2d(4, 4, 3, dilation=2)], r"'0' \(Conv2d\) has dilation=\(2, 2\)"),
        ([nn.Linear(8, 4)], r"'0' \(Linear\) gets inputs \['N', 4, 8, 8\]"),
        ([nn.Conv2d(4, 4, 3), nn.AvgPool2d(4, ceil_mode=True)], r"'1' \(AvgPool2d\) has ceil_mode"),
        ([nn.Conv2d(4, 4, 3), nn.AvgPool2d(4, padding=1, count_include_pad=False)], "padding that is not counted"),
        ([nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(4)], r"divides \[6, 6\] pixels into \[4, 4\] windows"),
        ([nn.Conv2d(4, 4, 3), nn.Flatten(2)], r"'1' \(Flatten\) returns \['N', 4, 36\]"),
        ([nn.Conv2d(4, 4, 3), nn.Flatten(), nn.ReLU(), nn.Linear(144, 2)], r"'2' \(ReLU\) gets inputs that are not"),
        ([nn.Conv2d(4, 4, 3), nd.Gate(6, dim=2), nn.Flatten(), nn.Linear(144, 2)], "has its channels on axis 2"),
        ([nn.Conv2d(4, 4, 3)], r"returns the network's outputs \['N', 4, 6, 6\]; expected \['N', 4\]"),
        ([nn.Conv2d(4, 4, 3), nn.Flatten()], r"'1' \(Flatten\) returns the network's outputs \['N', 144\]"),
    ],
)
def test_images_that_have_no_kernel_are_refused_by_name(layers: list[nn.Module], message: str) -> None:
    with pytest.raises(UnsupportedLayer, match=message):
        nd.infinite_width_ntk(nn.Sequential(*layers), torch.ones(2, 4, 8, 8), weight_variance=2.0, bias_variance=0.0)


def test_bad_arguments_are_named() -> None:
    model, x = mlp(width=64), inputs(3, 5)
    reduction: Any = "sum"
    parametrization: Any = "mup"
    with pytest.raises(ConfigurationError, match="reduce is 'sum'; expected one of 'trace', 'mean', 'each', 'full'"):
        nd.infinite_width_ntk(model, x, reduce=reduction)
    with pytest.raises(ConfigurationError, match="parametrization is 'mup'; expected one of 'standard', 'ntk'"):
        nd.infinite_width_ntk(model, x, parametrization=parametrization)
    with pytest.raises(ConfigurationError, match="infinite_width_nngp: x2 holds NaN or infinity"):
        nd.infinite_width_nngp(model, x, x / 0)
    with pytest.raises(ConfigurationError, match=r"dtype is torch\.int32; expected a floating dtype"):
        nd.infinite_width_ntk(model, x, dtype=torch.int32)
    with pytest.raises(ConfigurationError, match="x1 is complex"):
        nd.infinite_width_ntk(model, x.to(torch.complex64))
    with pytest.raises(UnsupportedLayer, match=r"layer '1' \(Gate\) has slopes that are not finite"):
        nd.infinite_width_ntk(mlp(width=64, slope=float("nan")), x)
    with pytest.raises(ShapeError, match=r"x1 is \[0, 5\]; expected a tensor \[N, ...\] with at least one sample"):
        nd.infinite_width_ntk(model, x[:0])
    with pytest.raises(ShapeError, match=r"x2 has samples \[4\]; expected \[5\] as in x1"):
        nd.infinite_width_ntk(model, x, x[:, :4])
    with pytest.raises(ShapeError, match=r"layer '0' \(Linear\) got samples of shape \[4\]"):
        nd.infinite_width_ntk(model, x[:, :4])
    with pytest.raises(ConfigurationError, match="Flatten has no Linear or Conv2d"):
        nd.infinite_width_ntk(nn.Flatten(), x)


@pytest.mark.parametrize("missing", ["neural_tangents", "jax"])
def test_a_missing_package_names_the_commands(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "neural_tangents"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingPackage) as caught:
        nd.infinite_width_ntk(GatedMLP(5, 2, width=64), torch.ones(2, 5))
    message = str(caught.value)
    assert "pip install -c constraints.txt '.[theory]' && pip install --no-deps neural-tangents==0.6.5" in message
    assert "\n" not in message
    assert isinstance(caught.value, ImportError)
    assert "neural_tangents.experimental" not in sys.modules


@needs_theory
def test_nothing_is_left_behind() -> None:
    code = (
        "import sys, torch, ntkdyn as nd\n"
        "from ntkdyn.experiments.networks import GatedMLP\n"
        "assert not {'jax', 'neural_tangents'} & set(sys.modules)\n"
        "model = GatedMLP(5, 2, width=64)\n"
        "model.linear1.register_forward_hook(lambda *_: 1 / 0)\n"
        "kernel = nd.infinite_width_ntk(model, torch.ones(2, 5))\n"
        "import jax, neural_tangents\n"
        "assert 'neural_tangents.experimental' not in sys.modules and not hasattr(neural_tangents, 'experimental')\n"
        "assert 'tensorflow' not in sys.modules\n"
        "print(kernel.dtype, jax.config.jax_enable_x64, jax.numpy.ones(1).dtype)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "torch.float32 False float32", done.stderr


def test_every_analytic_layer_is_tested() -> None:
    assert {kind.__name__ for kind in LAYERS} == {
        "Linear", "Conv2d", "AvgPool2d", "AdaptiveAvgPool2d", "Flatten", "Gate", "ReLU", "Identity",
    }  # fmt: skip
