"""Kernels of infinitely wide gated networks through neural-tangents (extra ``theory``, imported inside).

Conventions, tested against wide networks in tests/test_theory.py:

- Standard parametrization: weights have variance σ_w² / fan_in, biases σ_b², and the kernel is the sum over weights
  and biases of products of derivatives, as in ``empirical_ntk``. It grows with the widths of the network and is their
  leading order: empirical kernels of fresh networks scatter around it with relative deviations O(width^-1/2).
- NTK parametrization: the limit itself, without widths; it is J diag(s) Jᵀ with s = σ_w² / fan_in for weights, σ_b²
  for biases.
- Slopes of gates belong to the architecture: they shape the kernel, derivatives by them are not part of it.
- Channels of one gate share a distribution of slopes; the kernel is the mean over channels. It depends on slopes by
  their mean and mean square alone, because E[φ_a(u) φ_a(v)] is quadratic in a.
- Where an input of a gate is 0 whatever the weights (a black patch without random biases), its derivative is the
  slope, as in Gate and ReLU.
- Outputs are independent: Θ_cc' = δ_cc' Θ. neural-tangents returns Θ, the ``mean`` here; the trace is C Θ.

Source: Jacot et al. 2018 (arXiv 1806.07572); Sohl-Dickstein et al. 2020 (arXiv 2001.07301) for the standard
parametrization; Tsuchida et al. 2018 (arXiv 1711.09090) for leaky ReLUs; Novak et al. 2020 (arXiv 1912.02803).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..clone import structural_clone, unwrapped
from ..errors import ConfigurationError, ShapeError, UnsupportedLayer
from ..gates import ROOT, Gate
from .layers import CHECKS, LAYERS, Site
from .stax import stax_layers
from .variances import Variance, bias_variances, weight_variances

Reduction = Literal["trace", "mean", "each", "full"]
Parametrization = Literal["standard", "ntk"]

# Largest array of one block of sample pairs; pooling needs covariances between all pairs of pixels.
_BLOCK_BYTES = 2**28


def infinite_width_ntk(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    reduce: Reduction = "trace",
    parametrization: Parametrization = "standard",
    weight_variance: Variance | None = None,
    bias_variance: Variance | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Analytic NTK  Θ = lim Σ_p ∂f_c(x)/∂θ_p · ∂f_c(x')/∂θ_p  over weights and biases of a freshly drawn network.

    The same convention as ``empirical_ntk``: "standard" is its leading order at the widths of this network, "ntk" the
    width-free limit of Σ_p s_p ∂f ∂f with s = σ_w² / fan_in for weights and σ_b² for biases. Slopes of gates are not
    counted. Only the architecture and the variances matter, not the weights.

    Args:
        model: an nn.Sequential (nested too) of Linear, Conv2d, Flatten, Gate, ReLU, AvgPool2d, AdaptiveAvgPool2d and
            Identity, with Linear or Conv2d after the last gate and outputs [N, C].
        x1: inputs [N1, ...].
        x2: inputs [N2, ...] for the second axis; None means x1.
        reduce: "trace" C Θ [N1, N2]; "mean" Θ; "each" [C, N1, N2]; "full" [N1, N2, C, C], zero between outputs.
        parametrization: "standard" or "ntk".
        weight_variance: σ_w² = fan_in · Var(w), a number or one per layer by dotted name; None reads the rule by which
            the network was initialized from its weights: PyTorch's default (1/3), LeCun (1), He (2) or Glorot.
        bias_variance: σ_b² = Var(b), as weight_variance; None: zero biases, or PyTorch's default 1 / (3 fan_in).
        dtype: of the result; None means that of the parameters. It is computed in float64, on the CPU.

    Returns: Tensor on the device of x1.
    Raises:
        MissingPackage: jax or neural-tangents cannot be imported; the message holds the commands that install them.
        UnsupportedLayer: a layer without an analytic kernel here, by dotted name.
        ConfigurationError: an unknown option, variances that cannot be read, inputs that are not finite.
        ShapeError: inputs that do not fit the network.  UnknownName: a variance for a layer that does not exist.
    """
    where = "infinite_width_ntk"
    for argument, value, kind in (("reduce", reduce, Reduction), ("parametrization", parametrization, Parametrization)):
        if value not in get_args(kind):
            expected = ", ".join(map(repr, get_args(kind)))
            raise ConfigurationError(f"{where}: {argument} is {value!r}; expected one of {expected}")
    network = _network(where, model, x1, x2, weight_variance, bias_variance, parametrization)
    kernel = network.kernel(x1, x2, "ntk", dtype)
    outputs = network.outputs
    if reduce == "mean":
        return kernel
    if reduce == "trace":
        return outputs * kernel
    if reduce == "each":
        return kernel.expand(outputs, *kernel.shape).clone()
    return kernel[:, :, None, None] * torch.eye(outputs, dtype=kernel.dtype, device=kernel.device)


def infinite_width_nngp(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    weight_variance: Variance | None = None,
    bias_variance: Variance | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Analytic covariance  K(x, x') = lim E[f_c(x) f_c(x')]  of each output of a freshly drawn network; [N1, N2].

    Other arguments and errors as in ``infinite_width_ntk``; the covariance does not depend on the parametrization.

    Source: Lee et al. 2018 (arXiv 1711.00165); Matthews et al. 2018 (arXiv 1804.11271).
    """
    network = _network("infinite_width_nngp", model, x1, x2, weight_variance, bias_variance, "ntk")
    return network.kernel(x1, x2, "nngp", dtype)


@dataclass(frozen=True)
class _Network:
    """A network whose every layer has an analytic kernel."""

    where: str
    sites: tuple[Site, ...]
    dtype: torch.dtype

    @property
    def outputs(self) -> int:
        return self.sites[-1].outputs[0]

    def kernel(self, x1: Tensor, x2: Tensor | None, kind: str, dtype: torch.dtype | None) -> Tensor:
        """Return one kind of kernel in blocks of sample pairs, those of a symmetric kernel once."""
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigurationError(
                f"{self.where}: dtype is {dtype!r}; expected a floating dtype such as torch.float64"
            )
        with stax_layers(self.where) as stax:
            import jax

            layers = [layer for site in self.sites for layer in LAYERS[type(site.module)](site, stax)]
            kernel_function = stax.serial(*layers)[2]
            if self._pixels > 1:
                # Six convolutions, pooling, 64 images of 8x8: 9 s compiled, 39 s not. An MLP pays 0.4 s for nothing.
                kernel_function = jax.jit(kernel_function, static_argnums=2)
            first = _channels_last(x1)
            second = first if x2 is None else _channels_last(x2)
            rows = self._rows_of_a_block()
            result = torch.zeros(len(first), len(second), dtype=torch.float64)
            for i in range(0, len(first), rows):
                for j in range(i if x2 is None else 0, len(second), rows):
                    other = None if x2 is None and i == j else second[j : j + rows]
                    # A copy: torch must not write into memory that belongs to jax.
                    block = torch.from_numpy(np.array(kernel_function(first[i : i + rows], other, kind)))
                    result[i : i + rows, j : j + rows] = block
            if x2 is None:
                result = result.triu() + result.triu(1).T
        return result.to(device=x1.device, dtype=dtype or self.dtype)

    @property
    def _pixels(self) -> int:
        return max(math.prod(site.inputs[1:]) for site in self.sites)

    def _rows_of_a_block(self) -> int:
        pools = any(isinstance(site.module, (nn.AvgPool2d, nn.AdaptiveAvgPool2d)) for site in self.sites)
        return max(1, math.isqrt(_BLOCK_BYTES // (8 * self._pixels ** (2 if pools else 1))))


def _network(
    where: str,
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None,
    weight_variance: Variance | None,
    bias_variance: Variance | None,
    parametrization: str,
) -> _Network:
    for name, inputs in (("x1", x1), ("x2", x2)):
        if inputs is None and name == "x2":
            continue
        if not isinstance(inputs, Tensor) or inputs.dim() < 2 or not len(inputs):
            found = list(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise ShapeError(f"{where}: {name} is {found}; expected a tensor [N, ...] with at least one sample")
        if inputs.is_complex() or not bool(torch.isfinite(inputs).all()):
            found = "is complex" if inputs.is_complex() else "holds NaN or infinity"
            raise ConfigurationError(f"{where}: {name} {found}; expected finite real numbers")
        if inputs.shape[1:] != x1.shape[1:]:
            raise ShapeError(
                f"{where}: x2 has samples {list(inputs.shape[1:])}; expected {list(x1.shape[1:])} as in x1"
            )
    layers = list(_flat(ROOT, unwrapped(model)))
    _refuse_dependent_weights(layers)
    weighted = {name: layer for name, layer in layers if isinstance(layer, (nn.Linear, nn.Conv2d))}
    if not weighted:
        raise ConfigurationError(f"{where}: {type(model).__name__} has no Linear or Conv2d; expected at least one")
    weights = weight_variances(where, weight_variance, weighted)
    biases = bias_variances(where, bias_variance, weighted)
    sites: list[Site] = []
    example = torch.zeros(1, *x1.shape[1:], dtype=next(iter(weighted.values())).weight.dtype)
    gaussian = False
    for name, layer in layers:
        before = tuple(example.shape[1:])
        try:
            with torch.no_grad():
                # A clone, because a forward pass would fire the user's hooks.
                example = structural_clone(layer, share_parameters=False).cpu()(example)
        except (RuntimeError, ShapeError) as error:
            found = f"layer {name!r} ({type(layer).__name__}) got samples of shape {list(before)}"
            raise ShapeError(f"{where}: {found}: {' '.join(str(error).split())}") from None
        variances = weights.get(name, 0.0), biases.get(name, 0.0)
        site = Site(name, layer, before, tuple(example.shape[1:]), gaussian, parametrization, *variances)
        CHECKS[type(layer)](site)
        if name in weighted:
            gaussian = True
        elif isinstance(layer, (Gate, nn.ReLU)) or (isinstance(layer, nn.Flatten) and len(before) > 1):
            # Flattened pixels of one channel are correlated.
            gaussian = False
        sites.append(site)
    last = next(site for site in reversed(sites) if site.name in weighted or isinstance(site.module, (Gate, nn.ReLU)))
    if last.name not in weighted:
        raise last.refuse("is not followed by a Linear or Conv2d", "outputs must be linear in random weights")
    if sites[-1].outputs != last.outputs[:1]:
        raise sites[-1].refuse(
            f"returns the network's outputs {['N', *sites[-1].outputs]}",
            f"expected {['N', *last.outputs[:1]]}: one output per channel of {last.name!r}, the last random weights",
        )
    return _Network(where, tuple(sites), next(iter(weighted.values())).weight.dtype)


def _flat(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers in their order by dotted name, those of nested containers in their place."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for child, layer in module._modules.items():
            if layer is not None:
                yield from _flat(child if name == ROOT else f"{name}.{child}", layer)
    elif type(module) in LAYERS and "forward" not in vars(module):
        yield name, module
    else:
        known = ", ".join(kind.__name__ for kind in LAYERS)
        raise UnsupportedLayer(
            f"layer {name!r} ({type(module).__name__}) has no analytic kernel here; expected an nn.Sequential of "
            f"{known}; take nd.empirical_ntk of wide networks instead"
        )


def _refuse_dependent_weights(layers: list[tuple[str, nn.Module]]) -> None:
    """Refuse what the limit does not know: weights used twice, computed from other parameters, or not trained."""
    owners: dict[int, str] = {}
    for name, layer in layers:
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        where = f"layer {name!r} ({type(layer).__name__})"
        for key, parameter in layer.named_parameters():
            if id(parameter) in owners:
                raise UnsupportedLayer(
                    f"{where} shares its {key} with {owners[id(parameter)]!r}; the analytic kernel needs independent "
                    "weights in every layer"
                )
            owners[id(parameter)] = name
            if key not in ("weight", "bias"):
                raise UnsupportedLayer(f"{where} has a parameter {key!r}; the analytic kernel knows weight and bias")
            if not parameter.requires_grad:
                raise UnsupportedLayer(
                    f"{where} has a {key} without requires_grad; the analytic kernel counts all weights and biases"
                )


def _channels_last(inputs: Tensor) -> Any:
    array = inputs.detach().double().cpu()
    return (array.movedim(1, -1) if array.dim() > 2 else array).numpy()
