"""Layers with an analytic kernel: what each must fulfil, and how it becomes layers of neural_tangents.stax.

A new layer is one function under ``@analytic``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedLayer
from ..gates import Gate


@dataclass(frozen=True)
class Site:
    """One layer of the network: shapes without the sample axis, and whether its inputs are Gaussian in the limit."""

    name: str
    module: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    gaussian: bool
    parametrization: str
    weight_variance: float = 0.0
    bias_variance: float = 0.0

    def refuse(self, found: str, remedy: str) -> UnsupportedLayer:
        return UnsupportedLayer(f"layer {self.name!r} ({type(self.module).__name__}) {found}; {remedy}")

    @property
    def scales(self) -> dict[str, Any]:
        # A bias of variance 0 is still trained; None means that there is none.
        bias = None if self.module.bias is None else math.sqrt(self.bias_variance)
        return {"W_std": math.sqrt(self.weight_variance), "b_std": bias, "parameterization": self.parametrization}


_Layer = Callable[[Site, Any], list[Any]]
LAYERS: dict[type[nn.Module], _Layer] = {}
CHECKS: dict[type[nn.Module], Callable[[Site], None]] = {}


def analytic(*kinds: type[nn.Module], check: Callable[[Site], None] = lambda site: None) -> Callable[[_Layer], _Layer]:
    """Register how a layer becomes stax layers, and what it must fulfil."""

    def register(function: _Layer) -> _Layer:
        for kind in kinds:
            LAYERS[kind] = function
            CHECKS[kind] = check
        return function

    return register


def _check_linear(site: Site) -> None:
    if len(site.inputs) != 1:
        raise site.refuse(f"gets inputs {['N', *site.inputs]}", "expected [N, features]; put a Flatten before it")


@analytic(nn.Linear, check=_check_linear)
def _linear(site: Site, stax: Any) -> list[Any]:
    return [stax.Dense(site.module.out_features, **site.scales)]


def _check_convolution(site: Site) -> None:
    if site.module.groups != 1:
        raise site.refuse(f"has groups={site.module.groups}", "the analytic kernel needs groups=1")
    if set(site.module.dilation) != {1}:
        raise site.refuse(f"has dilation={site.module.dilation}", "the analytic kernel needs dilation=1")


# torch's padding modes as numpy names them.
_PADDINGS = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}


@analytic(nn.Conv2d, check=_check_convolution)
def _convolution(site: Site, stax: Any) -> list[Any]:
    layer = site.module
    convolution = stax.Conv(layer.out_channels, layer.kernel_size, strides=layer.stride, padding="VALID", **site.scales)
    if layer.padding == "same":  # an even kernel has its odd pixel at the end
        padding = tuple(((size - 1) // 2, size // 2) for size in layer.kernel_size)
    else:
        padding = tuple((size, size) for size in ((0, 0) if layer.padding == "valid" else layer.padding))
    return [*_padding(stax, padding, _PADDINGS[layer.padding_mode]), convolution]


def _check_pooling(site: Site) -> None:
    layer = site.module
    if len(site.inputs) != 3:
        raise site.refuse(f"gets inputs {['N', *site.inputs]}", "expected [N, C, H, W]")
    if layer.ceil_mode or layer.divisor_override is not None:
        raise site.refuse("has ceil_mode or divisor_override", "the analytic kernel needs plain windows")
    if set(_pair(layer.padding)) != {0} and not layer.count_include_pad:
        raise site.refuse("has padding that is not counted", "the analytic kernel needs count_include_pad=True")


@analytic(nn.AvgPool2d, check=_check_pooling)
def _average_pooling(site: Site, stax: Any) -> list[Any]:
    layer = site.module
    window, strides = _pair(layer.kernel_size), _pair(layer.stride)
    padding = tuple((size, size) for size in _pair(layer.padding))
    return [*_padding(stax, padding, "constant"), stax.AvgPool(window, strides=strides, padding="VALID")]


def _check_adaptive_pooling(site: Site) -> None:
    if len(site.inputs) != 3:
        raise site.refuse(f"gets inputs {['N', *site.inputs]}", "expected [N, C, H, W]")
    if any(size % count for size, count in zip(site.inputs[1:], site.outputs[1:], strict=True)):
        raise site.refuse(
            f"divides {list(site.inputs[1:])} pixels into {list(site.outputs[1:])} windows",
            "the analytic kernel needs windows of one size",
        )


@analytic(nn.AdaptiveAvgPool2d, check=_check_adaptive_pooling)
def _adaptive_pooling(site: Site, stax: Any) -> list[Any]:
    window = tuple(size // count for size, count in zip(site.inputs[1:], site.outputs[1:], strict=True))
    return [stax.AvgPool(window, strides=window, padding="VALID")]


def _check_flatten(site: Site) -> None:
    if len(site.outputs) != 1 or site.module.start_dim != 1:
        raise site.refuse(f"returns {['N', *site.outputs]}", "expected [N, features]: start_dim=1, end_dim=-1")


@analytic(nn.Flatten, check=_check_flatten)
def _flatten(site: Site, stax: Any) -> list[Any]:
    return [stax.Flatten()] if len(site.inputs) > 1 else []


def _check_activation(site: Site) -> None:
    if not site.gaussian:
        raise site.refuse(
            "gets inputs that are not Gaussian at infinite width",
            "expected a Linear or Conv2d before it, not a Flatten",
        )
    if isinstance(site.module, Gate):
        if not bool(torch.isfinite(site.module.slope).all()):
            raise site.refuse("has slopes that are not finite", "the analytic kernel needs finite slopes")
        axis = site.module.dim % (len(site.inputs) + 1)
        if axis != 1:
            raise site.refuse(f"has its channels on axis {axis}", "expected axis 1, that of independent channels")


@analytic(Gate, nn.ReLU, check=_check_activation)
def _activation(site: Site, stax: Any) -> list[Any]:
    """Expectations over Gaussian u, v and over the slopes a of all channels, with φ_a(u) = (1 - a) relu(u) + a u.

    E[φ φ] = E[(1 - a)²] E[relu relu] + E[a] c and E[φ' φ'] = E[(1 - a)²] P(u > 0, v > 0) + E[a (1 - a)] (P(u > 0) +
    P(v > 0)) + E[a²].

    Not stax.ABRelu: it knows one slope, and lets a unit whose input is exactly 0 for all weights (a black patch without
    random biases) be half open, where Gate and ReLU have derivative a; see test_exact_zeros.
    """
    import jax.numpy as jnp

    slopes = site.module.effective_slope.detach().double() if isinstance(site.module, Gate) else torch.zeros(1)
    both, one, none = (float(x.mean()) for x in ((1 - slopes) ** 2, slopes * (1 - slopes), slopes**2))

    def expectations(covariance: Any, left: Any, right: Any, tangent: Any) -> tuple[Any, Any]:
        scale = jnp.sqrt(left * right)
        cosine = jnp.clip(covariance / jnp.where(scale > 0, scale, 1.0), -1, 1)
        angle = jnp.arctan2(jnp.sqrt((1 - cosine) * (1 + cosine)), cosine)
        relu = scale * (jnp.sin(angle) + (jnp.pi - angle) * cosine) / (2 * jnp.pi)
        if tangent is not None:
            open_both = jnp.where(scale > 0, (jnp.pi - angle) / (2 * jnp.pi), 0.0)
            open_each = 0.5 * (left > 0) + 0.5 * (right > 0)
            tangent = tangent * (both * open_both + one * open_each + none)
        return both * relu + (one + none) * covariance, tangent

    def kernel_function(kernel: Any, **requirements: Any) -> Any:
        # Variances [N, *space] of both samples, where covariances are [N1, N2, *space], each spatial axis twice in a
        # row unless only its diagonal is kept.
        paired = not kernel.diagonal_spatial
        first = _diagonal(kernel.cov1) if paired else kernel.cov1
        second = first if kernel.cov2 is None else _diagonal(kernel.cov2) if paired else kernel.cov2
        here, there = (slice(None), None), (None, slice(None))
        space = first.ndim - 1
        left = first[here + here * space if paired else here]
        right = second[there + there * space if paired else there]
        nngp, tangent = expectations(kernel.nngp, left, right, kernel.ntk)

        def within(covariance: Any, variance: Any) -> Any:
            if not paired:
                return expectations(covariance, variance, variance, None)[0]
            pixels = variance[(slice(None), *here * space)]
            other_pixels = variance[(slice(None), *there * space)]
            return expectations(covariance, pixels, other_pixels, None)[0]

        return kernel.replace(
            nngp=nngp,
            ntk=tangent,
            cov1=within(kernel.cov1, first),
            cov2=None if kernel.cov2 is None else within(kernel.cov2, second),
            is_gaussian=False,
        )

    # The shapes are those of the inputs.
    initialize, apply, _ = stax.Identity()
    return [stax.layer(lambda: (initialize, apply, kernel_function))()]


def _diagonal(covariance: Any) -> Any:
    """Variances [N, *space] out of covariances [N, *space], each spatial axis twice in a row."""
    import jax.numpy as jnp

    for _ in range((covariance.ndim - 1) // 2):
        # The diagonal becomes the last axis, so that the next pair moves to the front.
        covariance = jnp.diagonal(covariance, axis1=1, axis2=2)
    return covariance


@analytic(nn.Identity)
def _identity(site: Site, stax: Any) -> list[Any]:
    return []


def _padding(stax: Any, sizes: tuple[tuple[int, int], ...], mode: str) -> list[Any]:
    """Pad rows and columns in a layer of its own: with strides, stax pads as XLA does and not as torch does."""
    if not any(before or after for before, after in sizes):
        return []
    import jax.numpy as jnp

    def initialize(key: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[()]]:
        samples, rows, columns, channels = shape
        return (samples, rows + sum(sizes[0]), columns + sum(sizes[1]), channels), ()

    def apply(parameters: Any, inputs: Any, **options: Any) -> Any:
        return jnp.pad(inputs, ((0, 0), *sizes, (0, 0)), mode=mode)

    @stax.requires(batch_axis=0, channel_axis=-1)  # type: ignore[untyped-decorator, unused-ignore]
    def kernel_function(kernel: Any, **requirements: Any) -> Any:
        # Each spatial axis once where only variances are kept, else twice in a row.
        axes = sizes[::-1] if kernel.is_reversed else sizes
        widths = [size for size in axes for _ in range(1 if kernel.diagonal_spatial else 2)]

        def padded(array: Any, sample_axes: int) -> Any:
            # The tangent kernel of the inputs is a plain 0.
            if array is None or array.ndim == 0:
                return array
            return jnp.pad(array, [(0, 0)] * sample_axes + widths, mode=mode)

        own = 1 if kernel.diagonal_batch else 2
        return kernel.replace(
            nngp=padded(kernel.nngp, 2),
            ntk=None if kernel.ntk is None else padded(kernel.ntk, 2),
            cov1=padded(kernel.cov1, own),
            cov2=padded(kernel.cov2, own),
        )

    return [stax.layer(lambda: (initialize, apply, kernel_function))()]


def _pair(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)
