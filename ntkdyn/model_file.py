"""The user's own network, by ``file.py:function`` or ``package.module:function``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .clone import structural_clone
from .errors import ConfigurationError
from .kernel.problem import default_forward
from .plugins import load_object


def build_own_network(text: str, example: Tensor, outputs: int, *, spare_outputs: bool = False) -> nn.Module:
    """Call ``file.py:function`` as function(inputs=example batch, outputs=classes) and return its network.

    The network is as the function made it, with ReLUs or with Gates. It must take the example and return
    [N, outputs].

    Args: spare_outputs: more outputs than classes are fine, as of a network that was trained on more of them.
    Raises: UnknownName: no such file, module or function.  ConfigurationError: the file does not load, the function
        fails or returns no network, or the network does not fit the example.
    """
    function = load_object(text)
    where = f"model {text!r}"
    if not callable(function):
        raise ConfigurationError(f"{where}: found a {type(function).__name__}, expected function(inputs, outputs)")
    try:
        network = function(inputs=example, outputs=outputs)
    except Exception as error:
        raise ConfigurationError(
            f"{where}: calling it with (inputs=batch {list(example.shape)}, outputs={outputs}) failed: "
            f"{_one_line(error)}; expected def function(inputs, outputs), which returns the network"
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigurationError(f"{where}: found a {type(network).__name__}, expected a torch.nn.Module")
    try:
        with torch.no_grad():
            result = default_forward(structural_clone(network).eval(), example.clone())
    except Exception as error:
        raise ConfigurationError(
            f"{where}: its forward pass fails on a batch {list(example.shape)} {example.dtype}: {_one_line(error)}; "
            "expected a network for these inputs"
        ) from error
    found = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
    enough = spare_outputs and isinstance(result, Tensor) and result.dim() == 2 and result.shape[1] >= outputs
    if found != [len(example), outputs] and not enough:
        raise ConfigurationError(
            f"{where}: found outputs {found}, expected {[len(example), outputs]}: an output for each of the {outputs} "
            "classes of the data"
        )
    return network


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
