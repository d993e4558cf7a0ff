"""The empirical neural tangent kernel of any network, as a value; knows no recording and no files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ..errors import UndefinedMeasure
from . import layerwise, reference
from .diagonal import diagonal_blocks
from .explanation import ExplainedLayer as ExplainedLayer
from .explanation import Explanation, explained
from .operator import NTKOperator as NTKOperator
from .preparation import Metric, Per, check_choice, prepared
from .preparation import resolve_parameters as resolve_parameters
from .problem import Forward, Problem
from .reduction import Projection as Projection
from .reduction import Reduction as Reduction
from .reduction import SummedOutputs as SummedOutputs

Engine = Literal["layerwise", "reference"]

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
    metric: Metric | None = None,
    engine: Engine = "layerwise",
    dtype: torch.dtype | None = None,
    max_memory: int | None = None,
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
    metric: Metric | None = None,
    engine: Engine = "layerwise",
    dtype: torch.dtype | None = None,
    max_memory: int | None = None,
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
    metric: Metric | None = None,
    engine: Engine = "layerwise",
    dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    train_mode: Iterable[str] = (),
) -> Tensor | dict[str, Tensor]:
    """Empirical NTK  Θ(x, x')_cc' = Σ_p ∂f_c(x)/∂θ_p · ∂f_c'(x')/∂θ_p  of a network at its present parameters.

    The network itself is never touched: the kernel is taken on a structural clone, with the training flags that the
    network has. Outputs [N] count as one output, [N, T, V] and deeper are flattened to [N, T·V].

    Args:
        model: any module; its layers must be in evaluation mode where that matters (see train_mode).
        x1: tensor, or pytree of tensors with samples on axis 0. A mapping whose keys are names of the model's arguments
            is handed over as these, a tuple as several arguments where the model requires several; else x1 is the only
            argument.
        x2: other samples for the second axis; None means x1 and runs the network once.
        reduce: "trace" Σ_c Θ_cc [N1, N2]; "mean" the same divided by the number of outputs; "each" Θ_cc [C, N1, N2];
            "full" [N1, N2, C, C]; Projection(count, seed) an unbiased estimate of the trace at the cost of ``count``
            outputs; SummedOutputs() the kernel Σ_cc' Θ_cc' of the summed outputs, which is not the trace.
        per: None for the whole kernel; "layer" or "parameter" for a dict from dotted name to its contribution. The
            contributions add up to the whole; a shared parameter belongs to its first owner in named_parameters();
            parameters of the model itself belong to "<root>".
        forward: forward(model, inputs) -> tensor of outputs; the default calls the model and takes its tensor, or
            its .logits.
        parameters: names or fnmatch patterns ("head.*"); None means all with requires_grad. Named ones count even
            where requires_grad is False.
        metric: parameter name or pattern -> s ≥ 0, a number or a tensor that expands to the parameter's shape: the
            kernel J diag(s) Jᵀ of group learning rates, 1/fan_in, or Adam's 1/(√v + ε). What is not named has s = 1.
        engine: "layerwise" contracts layer by layer; "reference" takes one row of the Jacobian at a time.
        dtype: compute and return in this precision; None means that of the parameters. Below 32 bits it is computed
            in float32 and rounded at the end.
        max_memory: bytes that the computation may take at its peak, besides the network, its inputs and the result;
            None means as much as is fastest. Smaller values are slower, not different.
        train_mode: names or patterns of BatchNorm and Dropout layers that may run in training mode. With them the
            kernel of a sample depends on the other samples, or is one random draw.

    Returns:
        Tensor, or dict of tensors, on the device of the outputs.
    Raises:
        ConfigurationError: an unknown reduce, per, engine, metric or dtype; outputs that do not depend on the model;
            a max_memory that is too small for one row, with the least that works.
        UnknownName: a parameter or layer that does not exist.
        ShapeError: inputs or outputs without samples on axis 0; x1 and x2 of different shapes or devices.
        UndefinedMeasure: NaN or Inf in inputs, parameters or outputs.
        NondeterministicForward: the forward pass is random, or a sample's output depends on the other samples.
        UnsupportedLayer: a layer that cannot be treated exactly, by its dotted name.
    Source: Jacot et al. 2018 (arXiv 1806.07572).

    >>> empirical_ntk(torch.nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    tensor([[ 6.,  7.],
            [ 7., 10.]])
    """
    check_choice("engine", engine, tuple(ENGINES))
    with prepared(
        model,
        x1,
        x2,
        reduce=reduce,
        per=per,
        forward=forward,
        parameters=parameters,
        metric=metric,
        dtype=dtype,
        max_memory=max_memory,
        train_mode=train_mode,
    ) as problem:
        blocks = _finished(problem, ENGINES[engine](problem))
    return blocks if per is not None else blocks[""]


def ntk_diagonal(
    model: nn.Module,
    x: Any,
    *,
    reduce: Reduction = "trace",
    per: Per | None = None,
    forward: Forward | None = None,
    parameters: Iterable[str] | None = None,
    metric: Metric | None = None,
    dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    train_mode: Iterable[str] = (),
) -> Tensor | dict[str, Tensor]:
    """Kernel of each sample with itself, Θ(x_n, x_n): the squared norms of per-sample gradients, without N² work.

    Args: as in ``empirical_ntk``.

    Returns: [N] for "trace", "mean", a Projection and SummedOutputs; [C, N] for "each"; [N, C, C] for "full"; with
        ``per`` a dict of these.
    Raises: as ``empirical_ntk``.

    >>> ntk_diagonal(torch.nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    tensor([ 6., 10.])
    """
    with prepared(
        model,
        x,
        reduce=reduce,
        per=per,
        forward=forward,
        parameters=parameters,
        metric=metric,
        dtype=dtype,
        max_memory=max_memory,
        train_mode=train_mode,
    ) as problem:
        blocks = _finished(problem, diagonal_blocks(problem))
    return blocks if per is not None else blocks[""]


def explain_ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    reduce: Reduction = "trace",
    forward: Forward | None = None,
    parameters: Iterable[str] | None = None,
    metric: Metric | None = None,
    dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    train_mode: Iterable[str] = (),
) -> Explanation:
    """Print how ``empirical_ntk`` would compute this kernel: layer, route, operations, bytes, predicted time.

    Only a few samples are run. Routes: "gram" multiplies inner products of layer inputs and output gradients, "rows"
    makes per-sample gradients, "shared ..." does either in one direction for all outputs, "pairs" looks at equal tokens
    only, "last layer" needs no backward pass, "autograd" is plain autograd a sample at a time, for what no rule knows.

    Args: as in ``empirical_ntk``.
    Returns: the same as an object: ``.layers`` with one row a layer and route, ``.seconds``.
    Raises: as ``empirical_ntk``.
    """
    with prepared(
        model,
        x1,
        x2,
        reduce=reduce,
        forward=forward,
        parameters=parameters,
        metric=metric,
        dtype=dtype,
        max_memory=max_memory,
        train_mode=train_mode,
    ) as problem:
        found = explained(problem)
    print(found)
    return found


def _finished(problem: Problem, blocks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Divide where a mean is wanted, round to the wanted precision, refuse what is not finite."""
    for key, block in blocks.items():
        if problem.reduce == "mean":
            block /= problem.outputs  # noqa: PLW2901
        # The sum needs no memory, and is finite only where every entry is.
        if not block.sum().isfinite():
            where = f" in {key!r}" if key else ""
            raise UndefinedMeasure(
                f"the kernel has NaN or Inf{where}: an overflow, or a function without a derivative at these inputs; "
                "try dtype=torch.float64, or leave such samples out"
            )
    return {key: block.to(problem.result_dtype) for key, block in blocks.items()}
