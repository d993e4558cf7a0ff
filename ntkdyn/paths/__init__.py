"""Path lengths: how many active nonlinearities a path from input to output meets, exactly, on the traced graph.

Nodes of the graph are channels; kernel size and space are ignored, except that flattening makes every pixel of a
channel a feature of its own. The conventions, each with a test:

- A dense layer or convolution connects all channels of a group; BatchNorm, LayerNorm, pooling, dropout, softmax,
  means over space, casts and multiplication by a constant are one-to-one and no units. Of these, what is nonlinear all
  the same (max-pooling, softmax, LayerNorm and its kin) is listed as uncounted.
- A Gate is active in a channel that is not frozen, however close to 1 its slope is. A nonlinearity that is no Gate
  (un-gated ReLU, GELU, SiLU, tanh, ...) is always active, and listed. A module that is called twice counts twice.
- Every `add` node is a choice between its branches with equal probability, per branch and not per edge. Sums of sums
  are not flattened: in `a + b + c`, that is `(a + b) + c`, c has probability 1/2. Adding a constant is no branch.
- A product of two values that depend on the input (squeeze-and-excitation, GLU, highway layers) is a choice between
  its factors, as in a sum, and one unit, always active; a quotient a / b is a times 1 / b, and 1 / b a unit. So is the
  larger of two values, and a selection that values decide on.
- A channel that zero padding or a concatenated constant made (option A shortcuts) has no predecessor there: at a sum
  it takes the other branch with probability 1; a product with it is one with a constant.
- Attention passes its values on, each channel to itself, cross attention those of the other stream; its weights are no
  path and softmax no unit. A product of two matrices that depend on the input makes such weights; what mixes channels
  by them is refused.
- Inputs of integers or booleans (tokens, padding masks) carry no path: paths start where an embedding, a linear layer
  or a convolution takes them.
- A node without a rule is refused by name, never guessed. A layer that is written out in several functions counts
  what they count: `path_rule(Norm)(uncounted)` makes a normalization one node and no unit again,
  `path_rule(Gelu)(activation)` an activation one unit (from `ntkdyn.paths.rules` and `ntkdyn.paths.layers`).
- Each output channel has equal weight.

The graph is traced by torch.fx and, where that fails or returns something else than the network, by torch.export;
control flow on shapes and on values of Python is that of the example.

Source: Mehmeti-Göpel and Disselhoff 2023 (arXiv 2211.17180) for the idea; formulas worked out here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..clone import structural_clone
from ..errors import TraceError
from . import attention as attention  # registers its rules
from . import products as products  # registers its rules
from . import transformers as transformers  # registers its rules
from .fidelity import require_fidelity
from .graph import PathGraph as PathGraph
from .graph import PathLengths as PathLengths
from .graph import finished
from .tracing import ExampleError, Traced, Untraceable, trace_by_export, trace_by_fx
from .walk import Walk

Tracer: TypeAlias = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], Traced]


@overload
def path_lengths(model: nn.Module, example: Any, *, exact: Literal[False] = False) -> PathLengths[float]: ...


@overload
def path_lengths(model: nn.Module, example: Any, *, exact: Literal[True]) -> PathLengths[Fraction]: ...


def path_lengths(model: nn.Module, example: Any, *, exact: bool = False) -> PathLengths[float] | PathLengths[Fraction]:
    """Mean, normalized and weighted path length of a network, and the distribution of lengths.

    The network itself is not touched. For many states of the same network use `trace_paths` once.

    Args: model: the network.  example: a batch of inputs: a tensor, a tuple of arguments or a mapping of keyword
        arguments; only shapes matter, and integers.  exact: numbers as fractions, which takes seconds for 50 layers.
    Returns: PathLengths; the module's page lists the conventions.
    Raises: TraceError: control flow that depends on values, or a node without a rule; the message names it.

    >>> path_lengths(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), torch.zeros(1, 3)).normalized
    1.0
    """
    graph = trace_paths(model, example)
    return graph.lengths(model, exact=True) if exact else graph.lengths(model)


def average_path_length(model: nn.Module, example: Any, normalized: bool = True) -> float:
    """NAPL of a network, or APL with normalized=False; active nonlinearities per path. See `path_lengths`."""
    lengths = path_lengths(model, example)
    return lengths.normalized if normalized else lengths.mean


def trace_paths(model: nn.Module, example: Any) -> PathGraph:
    """Trace the graph of a network for path lengths; args and errors as for `path_lengths`."""
    with torch.no_grad():
        try:
            return _traced(trace_by_fx, model, example)
        except ExampleError:
            raise
        except TraceError as error:
            first = error
        try:
            return _traced(trace_by_export, model, example)
        except ExampleError:
            raise
        except Untraceable as error:
            if not isinstance(first, Untraceable):
                raise first from None
            raise TraceError(
                f"path lengths: {error.where} can be traced neither by torch.export ({error.reason}) nor by torch.fx "
                f"({first.reason}); expected no control flow on values of tensors; take it out of forward, or measure "
                f"the traceable part"
            ) from error
        except TraceError:
            # torch.fx names what the network's author wrote, torch.export what it comes down to.
            if isinstance(first, Untraceable):
                raise
            raise first from None


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments. Copies: a first layer that works in place would write into the caller's."""
    copied = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, example)
    if isinstance(copied, Mapping):
        return (), dict(copied)
    return (tuple(copied) if isinstance(copied, (tuple, list)) else (copied,)), {}


def _traced(trace: Tracer, model: nn.Module, example: Any) -> PathGraph:
    """The graph by one tracer, checked against the network."""
    with _afresh(model, example) as (network, given, keywords):
        traced = trace(network, given, keywords)
    with _afresh(model, example):
        graph, returned = _walked(traced)
    with _afresh(model, example) as (network, given, keywords):
        require_fidelity(returned, network, given, keywords)
    return graph


@contextmanager
def _afresh(model: nn.Module, example: Any) -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """A clone and arguments that no run before has touched; random states are put back at the end."""
    given, keywords = _arguments(example)
    tensors = [leaf for leaf in tree_leaves((given, keywords)) if isinstance(leaf, Tensor) and leaf.is_cuda]
    with torch.random.fork_rng(devices=list({tensor.device.index for tensor in tensors})):
        yield structural_clone(model).eval(), given, keywords


def _walked(traced: Traced) -> tuple[PathGraph, Any]:
    """The graph, and what it returned on the example."""
    walk = Walk(traced)
    returned = walk.run(*traced.inputs, enable_io_processing=False)
    return finished(walk.program, walk.outputs, traced.network), returned
