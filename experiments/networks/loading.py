"""The user's own network, by ``file.py:function``."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ...clone import structural_clone
from ...conversion import gate_network
from ...errors import ConfigurationError
from ...gates import gates


def load_network(text: str, example: Tensor, outputs: int, *, granularity: Literal["channel", "layer"]) -> nn.Module:
    """Build a user's network with ``file.py:function``, called as function(inputs=example batch, outputs=classes).

    A network without a Gate has its ReLUs replaced by Gates.

    Raises: ConfigurationError: no such file or function, or it returns no network with [N, outputs] outputs.
        ConversionError: a ReLU cannot be gated.
    """
    path, separator, name = text.rpartition(":")
    where = f"model {text!r}"
    if not separator or not path.endswith(".py") or not name:
        raise ConfigurationError(f"{where}: expected file.py:function")
    if not Path(path).is_file():
        raise ConfigurationError(f"{where}: there is no file {path}")
    specification = importlib.util.spec_from_file_location(f"ntkdyn_user_{Path(path).stem}", path)
    if specification is None or specification.loader is None:
        raise ConfigurationError(f"{where}: {path} is no Python file")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise ConfigurationError(f"{where}: importing {path} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigurationError(f"{where}: no function {name} in {path}; found {', '.join(found) or 'none'}")
    try:
        network = function(inputs=example, outputs=outputs)
    except Exception as error:
        raise ConfigurationError(
            f"{where}: calling it with (inputs=batch {list(example.shape)}, outputs={outputs}) failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigurationError(f"{where}: found a {type(network).__name__}, expected a torch.nn.Module")
    try:
        with torch.no_grad():
            result = structural_clone(network).eval()(example)
    except Exception as error:
        raise ConfigurationError(
            f"{where}: its forward pass fails on a batch {list(example.shape)} {example.dtype}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}; expected a network for these inputs"
        ) from error
    shape = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
    if shape != [len(example), outputs]:
        raise ConfigurationError(f"{where}: found outputs {shape}, expected {[len(example), outputs]}")
    return network if gates(network) else gate_network(network, example, granularity=granularity)
