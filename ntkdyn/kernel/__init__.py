"""The empirical neural tangent kernel of any network, as a value; knows no recording and no files."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ..clone import structural_clone, unwrapped
from ..errors import ConfigurationError, UnknownName, UnsupportedLayer
from . import layerwise, reference
from .problem import ROOT, Forward, Problem, default_forward, plain_autograd, refuse_coupled_layers, sample_count

Reduction = Literal["trace", "mean", "each", "full"]
Per = Literal["layer", "parameter"]
Engine = Literal["layerwise", "reference"]

REDUCTIONS: tuple[str, ...] = ("trace", "mean", "each", "full")
ENGINES: Mapping[str, Callable[[Problem], dict[str, Tensor]]] = {
    "layerwise": layerwise.blocks,
    "reference": reference.blocks,
}


@overload
def empirical_ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    reduce: Reduction = "trace",
    per: None = None,
    forward: Forward | None = None,
    parameters: Iterable[str] | None = None,
    engine: Engine = "layerwise",
    dtype: torch.dtype | None = None,
    train_mode: Iterable[str] = (),
) -> Tensor: ...


@overload
def empirical_ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    reduce: Reduction = "trace",
    per: Per,
    forward: Forward | None = None,
    parameters: Iterable[str] | None = None,
    engine: Engine = "layerwise",
    dtype: torch.dtype | None = None,
    train_mode: Iterable[str] = (),
) -> dict[str, Tensor]: ...


def empirical_ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    reduce: Reduction = "trace",
    per: Per | None = None,
    forward: Forward | None = None,
    parameters: Iterable[str] | None = None,
    engine: Engine = "layerwise",
    dtype: torch.dtype | None = None,
    train_mode: Iterable[str] = (),
) -> Tensor | dict[str, Tensor]:
    """Empirical NTK  Θ(x, x')_cc' = Σ_p ∂f_c(x)/∂θ_p · ∂f_c'(x')/∂θ_p  of a network at its present parameters.

    The network itself is never touched: the kernel is taken on a structural clone, with the training flags that the
    network has. Outputs [N] count as one output, [N, T, V] and deeper are flattened to [N, T·V].

    Args:
        model: any module; its layers must be in evaluation mode where that matters (see train_mode).
        x1: tensor, or pytree of tensors with samples on axis 0; handed to the model as its only argument.
        x2: other samples for the second axis; None means x1 and runs the network once.
        reduce: "trace" Σ_c Θ_cc [N1, N2]; "mean" the same divided by the number of outputs; "each" Θ_cc [C, N1, N2];
            "full" [N1, N2, C, C]. The trace is not the kernel of the summed outputs, which is Σ_cc' Θ_cc'.
        per: None for the whole kernel; "layer" or "parameter" for a dict from dotted name to its contribution. The
            contributions add up to the whole; a shared parameter belongs to its first owner in named_parameters();
            parameters of the model itself belong to "<root>".
        forward: forward(model, inputs) -> tensor of outputs; the default is model(inputs), or its .logits.
        parameters: names or fnmatch patterns ("head.*"); None means all with requires_grad. Named ones count even
            where requires_grad is False.
        engine: "layerwise" contracts layer by layer; "reference" takes one row of the Jacobian at a time.
        dtype: compute and return in this precision; None means that of the parameters. Below 32 bits it is computed
            in float32 and rounded at the end.
        train_mode: names or patterns of BatchNorm and Dropout layers that may run in training mode. With them the
            kernel of a sample depends on the other samples, or is one random draw.

    Returns:
        Tensor, or dict of tensors, on the device of the outputs.
    Raises:
        ConfigurationError: an unknown reduce, per, engine or dtype; outputs that do not depend on the model.
        UnknownName: a parameter or layer that does not exist.
        ShapeError: inputs or outputs without samples on axis 0; x1 and x2 with different numbers of outputs.
        UnsupportedLayer: a layer that cannot be treated exactly, by its dotted name.
    Source: Jacot et al. 2018 (arXiv 1806.07572).

    >>> empirical_ntk(torch.nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    tensor([[ 6.,  7.],
            [ 7., 10.]])
    """
    _check_choice("reduce", reduce, REDUCTIONS)
    _check_choice("engine", engine, tuple(ENGINES))
    if per is not None:
        _check_choice("per", per, ("layer", "parameter"))
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigurationError(f"empirical_ntk: dtype is {dtype!r}; expected a floating dtype such as torch.float64")
    model = unwrapped(model)
    names = resolve_parameters(model, parameters)
    training = frozenset(_matching(train_mode, [name for name, _ in model.named_modules()], "train_mode", "layer"))
    refuse_coupled_layers(model, training)
    size = sample_count(x1, "x1")
    size_2 = None if x2 is None else sample_count(x2, "x2")

    with plain_autograd(model):
        # Copies of the parameters: a forward pass that writes into its own weights must not reach the live ones.
        clone = structural_clone(model, share_parameters=False)
        # By position, because the clone has lost the wrappers of inner modules (torch.compile), part of their names.
        leaves = dict(zip([name for name, _ in model.named_parameters()], clone.parameters(), strict=True))
        result_dtype = dtype or _promoted([leaves[name].dtype for name in names])
        compute_dtype = torch.float32 if torch.finfo(result_dtype).bits < 32 else result_dtype
        cast = dtype is not None or result_dtype != compute_dtype
        problem = Problem(
            model=clone.to(compute_dtype) if cast else clone,
            parameters={name: leaves[name] for name in names},
            keys={name: _key(name, per) for name in names},
            inputs=x1,
            inputs_2=x2,
            sizes=(size, size if size_2 is None else size_2),
            forward=forward or default_forward,
            reduce="trace" if reduce == "mean" else reduce,
            dtype=compute_dtype,
            cast_inputs=cast,
            train_mode=training,
        )
        blocks = ENGINES[engine](problem)
        if reduce == "mean":
            blocks = {key: block / problem.outputs for key, block in blocks.items()}
        blocks = {key: block.to(result_dtype) for key, block in blocks.items()}
    return blocks if per is not None else blocks[""]


def resolve_parameters(model: nn.Module, parameters: Iterable[str] | None = None) -> tuple[str, ...]:
    """Names of the parameters that a kernel is taken over, in the order of named_parameters().

    Args:
        parameters: names or fnmatch patterns; None means every parameter with requires_grad. A second name of a
            shared parameter stands for the first one.
    Raises:
        UnknownName: a name or pattern that fits no parameter.
        ConfigurationError: nothing is left to take a kernel over.
        UnsupportedLayer: a parameter that is not real-valued.
    """
    model = unwrapped(model)
    owned = dict(model.named_parameters())
    if parameters is None:
        names = [name for name, parameter in owned.items() if parameter.requires_grad]
        if not names:
            raise ConfigurationError(
                f"{type(model).__name__} has no parameter with requires_grad; name some by parameters="
            )
    else:
        first = {id(parameter): name for name, parameter in owned.items()}
        aliases = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        chosen = {aliases[name] for name in _matching(parameters, list(aliases), "parameters", "parameter")}
        names = [name for name in owned if name in chosen]
        if not names:
            raise ConfigurationError("parameters= is empty; expected at least one name, or None for all")
    for name in names:
        if not owned[name].is_floating_point():
            raise UnsupportedLayer(
                f"parameter {name!r} has dtype {owned[name].dtype}; the kernel needs real floating parameters; "
                f"leave it out by parameters="
            )
    return tuple(names)


def _matching(patterns: Iterable[str], names: list[str], argument: str, kind: str) -> list[str]:
    if isinstance(patterns, str):
        raise ConfigurationError(f"{argument} is the string {patterns!r}; expected a list of names: [{patterns!r}]")
    found: list[str] = []
    known = set(names)
    for pattern in patterns:
        fits = [pattern] if pattern in known else fnmatch.filter(names, pattern)
        if not fits:
            near = get_close_matches(pattern, names, n=3, cutoff=0.5) or names[:3]
            raise UnknownName(f"{argument}: no {kind} fits {pattern!r}; did you mean {', '.join(map(repr, near))}?")
        found += fits
    return found


def _check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ConfigurationError(f"empirical_ntk: {argument} is {value!r}; expected one of {expected}")


def _promoted(dtypes: list[torch.dtype]) -> torch.dtype:
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def _key(name: str, per: str | None) -> str:
    if per is None:
        return ""
    return name if per == "parameter" else name.rpartition(".")[0] or ROOT
