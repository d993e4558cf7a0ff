"""How a layer's output gradient becomes the gradient of its parameters, sample by sample; one file per layer family.

A rule is a function of a Site that returns, per role ("weight", "bias"), a function from the gradients of K network
outputs with respect to the layer's output, [K, B, ...], to per-sample gradients: rows [K, B, P], or the cheaper Outer
where they are sums of outer products. A file in this folder that registers a rule is found by itself.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from ...errors import ConfigurationError


@dataclass(frozen=True)
class Outer:
    """Per-sample gradient  J[k, n] = Σ_t left[k, n, t] ⊗ right[n, t]  of a matrix [d_out, d_in], flattened.

    Args:
        left: [K, B, T, d_out], from the output gradients.
        right: [B, T, d_in]; or int64 [B, T], which stands for one-hot rows of width `classes`; or None, which stands
            for the number 1 at every position (a bias).
        classes: number of classes of an integer right; the matrix is then [classes, d_out].
        transposed: the parameter is the transpose [d_in, d_out] of that matrix.
    """

    left: Tensor
    right: Tensor | None
    classes: int = 0
    transposed: bool = False


# What a rule gives for one parameter: output gradients [K, B, ...] -> Outer, or rows [K, B, P].
Contribution = Callable[[Tensor], Outer | Tensor]


@dataclass(frozen=True, kw_only=True)
class Site:
    """One call in the forward pass that used wanted parameters, or the part of it that a range of samples takes.

    Attributes:
        input: its input, detached, [B, ...] with samples (or whole multiples of them) on axis 0.
        arguments: all its arguments by name; for a module the module itself under "module".
    """

    input: Tensor
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """A registered rule: what it matches, and how.

    Attributes:
        target: function, or class of modules (subclasses are not matched: their forward may differ).
        arguments: names of the positional arguments of a function; the first is the input.
        roles: names of the arguments (of the module's parameters) that are parameters.
        leading: number of leading axes of the input that are treated alike, so that any of them may hold the samples.
        applies: False leaves this call to plain autograd.
        gradient: the rule itself.
        commutes: the first two arguments may change places, so that the parameter may be either.
        reads: the rule needs the values of the input, and not only its shape.
    """

    target: Any
    arguments: tuple[str, ...]
    roles: tuple[str, ...]
    leading: Callable[[Mapping[str, Any]], int]
    applies: Callable[[Mapping[str, Any]], bool]
    gradient: Callable[[Site], Mapping[str, Contribution]]
    commutes: bool = False
    reads: bool = True


_RULES: dict[Any, Rule] = {}


def layer_rule(
    target: Any,
    *,
    arguments: str = "input",
    roles: str,
    leading: Callable[[Mapping[str, Any]], int] = lambda _: 1,
    applies: Callable[[Mapping[str, Any]], bool] = lambda _: True,
    commutes: bool = False,
    reads: bool = True,
) -> Callable[[Callable[[Site], Mapping[str, Contribution]]], Callable[[Site], Mapping[str, Contribution]]]:
    """Register the decorated function as the rule of a function or of a class of modules; see Rule.

    Raises: ConfigurationError: the target has a rule already.
    """

    def register(
        gradient: Callable[[Site], Mapping[str, Contribution]],
    ) -> Callable[[Site], Mapping[str, Contribution]]:
        if target in _RULES:
            first = _RULES[target].gradient
            raise ConfigurationError(
                f"{target!r} has two layer rules: {first.__module__}.{first.__name__} and "
                f"{gradient.__module__}.{gradient.__name__}; remove one"
            )
        names = tuple(arguments.split())
        _RULES[target] = Rule(target, names, tuple(roles.split()), leading, applies, gradient, commutes, reads)
        return gradient

    return register


@cache
def _load() -> None:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)


def rules() -> Mapping[Any, Rule]:
    """Every rule by its target."""
    _load()
    return _RULES
