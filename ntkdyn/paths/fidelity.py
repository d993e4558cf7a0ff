"""Whether a traced graph returns on the example what the network itself returns.

A tracer can lose what it does not see: what forward decides by isinstance, a write through `.data`, state kept
between calls. Where such a loss shows in the outputs, the graph is not used. It may not show on an example of zeros
in a network without biases: nothing but the example is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..call_sites import ROOT
from .tracing import Untraceable


def require_fidelity(
    returned: Any, network: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]
) -> None:
    """Run the network and compare: every tensor up to eps^(2/3) of its largest element, eps that of its type.

    torch.export takes some layers apart, so rounding may differ. Tensors without data are compared by shape.

    Args: returned: by the graph.  network, arguments, keywords: as before the graph was run, also random states.
    Raises: Untraceable: the graph returned something else, or the network fails.
    """
    try:
        expected = network(*arguments, **keywords)
    except Exception as error:
        raise _different(network) from error
    found, wanted = (
        [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)] for value in (returned, expected)
    )
    if len(found) != len(wanted) or not all(map(_agree, found, wanted)):
        raise _different(network)


def _different(network: nn.Module) -> Untraceable:
    return Untraceable(
        "what it traces does not return what forward returns; does forward write through .data, keep state, "
        "or draw random numbers that are not of torch?",
        f"layer '{ROOT}' ({type(network).__name__})",
    )


def _agree(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if found.is_meta or torch.equal(found, expected):
        return True
    if not (expected.is_floating_point() or expected.is_complex()):
        return False
    largest = expected.abs().nan_to_num(0.0, 0.0, 0.0).max()
    bound = float(largest) * torch.finfo(expected.dtype).eps ** (2 / 3)
    return torch.allclose(found, expected, rtol=0.0, atol=bound, equal_nan=True)
