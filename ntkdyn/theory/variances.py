"""Variances of a network's initialization: given, or read from the rule that its present weights fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import ConfigurationError, UnknownName

Variance = float | Mapping[str, float]


def weight_variances(where: str, given: Variance | None, layers: Mapping[str, Any]) -> dict[str, float]:
    """Return σ_w² = fan_in · Var(w) of each layer by name.

    Raises: ConfigurationError: not given and not recognized, or no finite numbers from 0 on.  UnknownName.
    """
    return _read_weights(where, layers) if given is None else _given(where, "weight_variance", given, layers)


def bias_variances(where: str, given: Variance | None, layers: Mapping[str, Any]) -> dict[str, float]:
    """Return σ_b² = Var(b) of each layer that has a bias, by name.

    Raises: as ``weight_variances``.
    """
    biased = {name: layer for name, layer in layers.items() if layer.bias is not None}
    return _read_biases(where, biased) if given is None else _given(where, "bias_variance", given, biased)


def _given(where: str, argument: str, given: Variance, layers: Mapping[str, Any]) -> dict[str, float]:
    if isinstance(given, Mapping):
        for name in given:
            if name not in layers:
                raise UnknownName(f"{where}: {argument} names {name!r}; expected layers among {', '.join(layers)}")
        missing = [name for name in layers if name not in given]
        if missing:
            raise ConfigurationError(f"{where}: {argument} has no value for {', '.join(missing)}; give one per layer")
        found = {name: float(value) for name, value in given.items()}
    else:
        found = dict.fromkeys(layers, float(given))
    for name, value in found.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigurationError(f"{where}: {argument} of {name!r} is {value}; expected a finite number from 0 on")
    return found


# Rules of initialization: σ_w² = fan_in · Var(w) from (fan_in, fan_out).
_RULES: Mapping[str, Callable[[int, int], float]] = {
    "PyTorch's default": lambda fan_in, fan_out: 1 / 3,
    "LeCun": lambda fan_in, fan_out: 1.0,
    "He": lambda fan_in, fan_out: 2.0,
    "Glorot": lambda fan_in, fan_out: 2 * fan_in / (fan_in + fan_out),
}

# Standard errors that present weights may lie away from their rule: a chance below 1e-6 a layer.
_STANDARD_ERRORS = 5.0


def _read_weights(where: str, layers: Mapping[str, Any]) -> dict[str, float]:
    """Recognize the one rule that the weights of all layers fit; its variance is exact, theirs is a sample's."""
    measured, tolerance = {}, {}
    candidates: dict[str, dict[str, float]] = {rule: {} for rule in _RULES}
    for name, layer in layers.items():
        weight = layer.weight.detach().double()
        fan_in = weight[0].numel()
        fan_out = weight.numel() // weight.shape[1]
        measured[name] = fan_in * float(weight.square().mean())
        tolerance[name] = _STANDARD_ERRORS * math.sqrt(2 / weight.numel())
        for rule, variance in _RULES.items():
            candidates[rule][name] = variance(fan_in, fan_out)
    fits = {
        rule: variances
        for rule, variances in candidates.items()
        if all(abs(measured[name] / variances[name] - 1) <= tolerance[name] for name in layers)
    }
    if len({tuple(variances.values()) for variances in fits.values()}) != 1:
        shown = ", ".join(f"{name} {value:.3g}" for name, value in measured.items())
        found = f"the weights fit {' and '.join(fits)}" if fits else f"no rule among {', '.join(_RULES)} fits"
        raise ConfigurationError(
            f"{where}: {found}, fan_in · variance of the weights is {shown}; give weight_variance="
        )
    return next(iter(fits.values()))


def _read_biases(where: str, layers: Mapping[str, Any]) -> dict[str, float]:
    """Recognize zero biases and PyTorch's default, uniform within ± 1 / sqrt(fan_in)."""
    variances, scaled = {}, []
    for name, layer in layers.items():
        bias = layer.bias.detach().double()
        fan_in = layer.weight[0].numel()
        variances[name] = 0.0 if not bool(bias.any()) else 1 / (3 * fan_in)
        if variances[name]:
            scaled.append(bias * math.sqrt(fan_in))
    if scaled:
        values = torch.cat(scaled)
        # A uniform variable's square has a relative standard deviation of sqrt(0.8).
        tolerance = _STANDARD_ERRORS * math.sqrt(0.8 / len(values))
        if float(values.abs().max()) > 1 + 1e-6 or abs(3 * float(values.square().mean()) - 1) > tolerance:
            raise ConfigurationError(
                f"{where}: biases are neither zero nor PyTorch's default, uniform within 1 / sqrt(fan_in); give "
                "bias_variance="
            )
    return variances
