"""From the user's network, inputs and names to the problem that an engine is given."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..clone import structural_clone, unwrapped
from ..errors import ConfigurationError, ShapeError, UndefinedMeasure, UnknownName, UnsupportedLayer
from ..gates import gates
from .problem import Forward, Problem, default_forward, layer_of, plain_autograd, refuse_coupled_layers, sample_count
from .reduction import Reduction, check_reduction

Per = Literal["layer", "parameter"]
Metric = Mapping[str, float | Tensor]


@contextmanager
def prepared(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    reduce: Reduction = "trace",
    per: Per | None = None,
    forward: Forward | None = None,
    parameters: Iterable[str] | None = None,
    metric: Metric | None = None,
    dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    train_mode: Iterable[str] = (),
) -> Iterator[Problem]:
    """Check everything and yield the problem; within the context gradients are off and autocast is too.

    Arguments and errors are those of ``empirical_ntk``. ``problem.result_dtype`` is what the caller wants back.
    """
    check_reduction(reduce)
    check_choice("per", per, (None, "layer", "parameter"))
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigurationError(f"dtype is {dtype!r}; expected a floating dtype such as torch.float64")
    if max_memory is not None and (isinstance(max_memory, bool) or not isinstance(max_memory, int) or max_memory < 1):
        raise ConfigurationError(f"max_memory is {max_memory!r}; expected a number of bytes, or None")
    model = unwrapped(model)
    names = resolve_parameters(model, parameters)
    training = frozenset(_matching(train_mode, [name for name, _ in model.named_modules()], "train_mode", "layer"))
    refuse_coupled_layers(model, training)
    size = sample_count(x1, "x1")
    size_2 = None if x2 is None else sample_count(x2, "x2")
    _check_numbers(model, x1, x2)

    with plain_autograd(model):
        # Copies of the parameters: a forward pass that writes into its own weights must not reach the live ones.
        clone = structural_clone(model, share_parameters=False)
        # By position, because the clone has lost the wrappers of inner modules (torch.compile), part of their names.
        leaves = dict(zip([name for name, _ in model.named_parameters()], clone.parameters(), strict=True))
        wanted = {id(leaves[name]) for name in names}
        for gate in gates(clone).values():
            # Else every backward pass would make gradients of slopes too: a tenth of the time of a gated MLP's kernel.
            gate.slope.requires_grad_(id(gate.slope) in wanted)
        result_dtype = dtype or _promoted([leaves[name].dtype for name in names])
        compute_dtype = torch.float32 if torch.finfo(result_dtype).bits < 32 else result_dtype
        cast = dtype is not None or result_dtype != compute_dtype
        yield Problem(
            model=clone.to(compute_dtype) if cast else clone,
            parameters={name: leaves[name] for name in names},
            keys={name: _key(name, per) for name in names},
            scales=_scales(metric, {name: leaves[name] for name in names}, compute_dtype),
            inputs=x1,
            inputs_2=x2,
            sizes=(size, size if size_2 is None else size_2),
            forward=forward or default_forward,
            reduce=reduce,
            dtype=compute_dtype,
            result_dtype=result_dtype,
            cast_inputs=cast,
            train_mode=training,
            max_memory=max_memory,
        )


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


def _promoted(dtypes: list[torch.dtype]) -> torch.dtype:
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def _key(name: str, per: str | None) -> str:
    if per is None:
        return ""
    return name if per == "parameter" else layer_of(name)


def check_choice(argument: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ConfigurationError for a value that is none of the choices."""
    if value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ConfigurationError(f"{argument} is {value!r}; expected one of {expected}")


def _check_numbers(model: nn.Module, x1: Any, x2: Any) -> None:
    """Raise for inputs of other kinds than each other's, and for NaN and Inf in inputs, weights or buffers."""
    first, second = ([leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)] for x in (x1, x2))
    if second:
        found = [[tuple(leaf.shape[1:]) for leaf in leaves] for leaves in (first, second)]
        if found[0] != found[1]:
            raise ShapeError(f"x1 has samples of shape {found[0]}, x2 of {found[1]}; expected the same")
        devices = [sorted({str(leaf.device) for leaf in leaves}) for leaves in (first, second)]
        if devices[0] != devices[1]:
            raise ShapeError(f"x1 is on {', '.join(devices[0])}, x2 on {', '.join(devices[1])}; expected one device")
    for argument, leaves in (("x1", first), ("x2", second)):
        for leaf in leaves:
            if leaf.is_floating_point() and not _is_finite(leaf):
                rows = (~leaf.isfinite()).flatten(1).any(1) if leaf.dim() > 1 else ~leaf.isfinite()
                sample = int(rows.nonzero()[0])
                raise UndefinedMeasure(
                    f"{argument} has NaN or Inf in sample {sample}; the kernel is undefined; remove such samples"
                )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not _is_finite(parameter.detach()):
            raise UndefinedMeasure(
                f"parameter {name!r} holds NaN or Inf; the kernel is undefined; training has diverged before this step"
            )


def _is_finite(tensor: Tensor) -> bool:
    # The sum is faster, and finite only where every entry is; finite entries may still overflow in it.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _scales(metric: Metric | None, leaves: Mapping[str, nn.Parameter], dtype: torch.dtype) -> dict[str, float | Tensor]:
    """The metric by parameter, checked; a tensor that is one number becomes that number."""
    scales: dict[str, float | Tensor] = {}
    for pattern, value in (metric or {}).items():
        for name in _matching([pattern], list(leaves), "metric", "parameter"):
            leaf = leaves[name]
            scale: float | Tensor
            if isinstance(value, Tensor) and value.numel() > 1:
                try:
                    scale = value.detach().to(leaf.device, dtype).expand(leaf.shape)
                except RuntimeError as error:
                    raise ShapeError(
                        f"metric[{pattern!r}] has shape {tuple(value.shape)}; parameter {name!r} needs a number or "
                        f"a tensor that expands to {tuple(leaf.shape)}"
                    ) from error
                bad = not bool((scale.isfinite() & (scale >= 0)).all())
            else:
                scale = float(value)
                bad = not 0 <= scale < float("inf")
            if bad:
                raise ConfigurationError(
                    f"metric[{pattern!r}] has a value that is negative or not finite; expected numbers ≥ 0, "
                    f"such as learning rates"
                )
            scales[name] = scale
    return scales
