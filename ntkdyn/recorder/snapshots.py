"""What the recorder shows to probes: probe sets, and clones of the network that are run under guard.

Nothing here writes to the live network, to a random state, or to a switch of torch that outlives the snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ..errors import ConfigurationError, NtkdynError, ShapeError

Forward = Callable[[nn.Module, Any], Tensor]
BatchNorm = Literal["reestimate", "running"]
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class ProbeSet:
    """Fixed inputs, any pytree of tensors with samples on axis 0, and their targets or None."""

    name: str
    inputs: Any
    targets: Tensor | None
    size: int

    def to(self, device: torch.device) -> ProbeSet:
        """The same set on another device."""
        inputs = tree_map_only(Tensor, lambda leaf: leaf.to(device), self.inputs)
        return ProbeSet(self.name, inputs, None if self.targets is None else self.targets.to(device), self.size)


def probe_sets(sets: Any) -> dict[str, ProbeSet]:
    """Probe sets by name, from a tensor, a pair (inputs, targets), or a mapping of names to these.

    The only set of a tensor or pair has the name "".

    Raises: ConfigurationError: no set, no sample, different numbers of samples, another type, or NaN.
    """
    if isinstance(sets, Mapping):
        named = dict(sets)
    elif isinstance(sets, (Tensor, np.ndarray)) or (isinstance(sets, (tuple, list)) and len(sets) == 2):
        named = {"": sets}
    else:
        raise ConfigurationError(
            f"sets: found {type(sets).__name__}, expected a tensor, (inputs, targets), or a mapping of names to these"
        )
    if not named:
        raise ConfigurationError("sets: found no probe set, expected at least one, e.g. {'test': (x, y)}")
    for name in named:
        if not isinstance(name, str):
            raise ConfigurationError(f"sets: found the name {name!r} of type {type(name).__name__}, expected a string")
    return {name: _probe_set(name, value) for name, value in named.items()}


def _probe_set(name: str, value: Any) -> ProbeSet:
    where = f"probe set {name!r}" if name else "the probe set"
    inputs, targets = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, None)
    inputs = fixed_inputs(inputs, where)
    sizes = [len(leaf) for leaf in tree_leaves(inputs)]
    if targets is not None:
        try:
            # A copy, as of the inputs: the set stays what it was when the caller goes on with her tensors.
            targets = torch.as_tensor(targets).detach().clone()
        except (TypeError, ValueError, RuntimeError):
            found = type(targets).__name__
            raise ConfigurationError(f"{where}: found targets of type {found}, expected a tensor") from None
        if targets.dim() == 0 or len(targets) != sizes[0]:
            raise ConfigurationError(
                f"{where}: found {sizes[0]} inputs and targets of shape {list(targets.shape)}, expected one a sample"
            )
    return ProbeSet(name, inputs, targets, sizes[0])


def fixed_inputs(inputs: Any, where: str) -> Any:
    """A copy of a pytree of tensors (NumPy arrays become tensors).

    Raises: ConfigurationError: no tensor, other leaves, no samples, or different numbers of samples.
    """
    inputs = tree_map_only(np.ndarray, torch.from_numpy, inputs)
    leaves = tree_leaves(inputs)
    strangers = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    if strangers or not leaves:
        found = type(strangers[0]).__name__ if strangers else "nothing"
        raise ConfigurationError(
            f"{where}: found {found}, expected a tensor, (inputs, targets), or a pytree of tensors with samples on "
            "axis 0"
        )
    sizes = {leaf.shape[0] if leaf.dim() else 0 for leaf in leaves}
    if sizes == {0} or 0 in sizes:
        raise ConfigurationError(f"{where}: found no sample, expected at least one on axis 0 of every tensor")
    if len(sizes) > 1:
        raise ConfigurationError(
            f"{where}: found inputs with {' and '.join(map(str, sorted(sizes)))} samples, expected equally many"
        )
    missing = sum(int(leaf.isnan().sum()) for leaf in leaves if leaf.is_floating_point())
    if missing:
        numbers = sum(leaf.numel() for leaf in leaves)
        raise ConfigurationError(
            f"{where}: found NaN in {missing} of {numbers} numbers, expected none; clean the inputs"
        )
    return tree_map(lambda leaf: leaf.detach().clone(), inputs)


def run_forward(forward: Forward, model: nn.Module, inputs: Any, where: str) -> Tensor:
    """Outputs of the forward pass on the user's inputs.

    Raises: ConfigurationError: the network does not take them.
    """
    try:
        return forward(model, inputs)
    except NtkdynError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{list(leaf.shape)} {leaf.dtype}" for leaf in tree_leaves(inputs))
        raise ConfigurationError(
            f"{where}: the forward pass fails on inputs {shapes}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}; expected inputs of the shape and type that the network is trained on, "
            "and a forward pass for any number of samples"
        ) from error


def has_running_norms(model: nn.Module) -> bool:
    """Whether a BatchNorm with running statistics is in the network."""
    return any(isinstance(module, NORMS) and module.running_mean is not None for module in model.modules())


@torch.no_grad()
def reestimate(clone: nn.Module, inputs: Any, forward: Forward) -> None:
    """Give every BatchNorm of a clone the statistics of its inputs in one batch: mean and unbiased variance.

    As PyTorch's cumulative average (momentum=None, reset before) does in training mode, the batch itself is normalized
    by its biased variance, and a layer used twice gets the average over its uses. Everything else stays in evaluation
    mode. Not done by switching to training mode: SyncBatchNorm would then wait for the other processes.

    Raises: ConfigurationError: a layer sees one value a channel, so that it has no variance.
    """
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def take(norm: Any, arguments: tuple[Tensor, ...]) -> None:
        values = arguments[0].transpose(0, 1).flatten(1) if arguments[0].dim() > 1 else arguments[0][:, None]
        if values.shape[1] < 2:
            raise ConfigurationError(
                f"calibration: a {type(norm).__name__} sees 1 value a channel, expected at least 2; give more samples"
            )
        variance, mean = torch.var_mean(values, dim=1, correction=1)
        seen.setdefault(norm, []).append((mean, variance))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(torch.var(values, dim=1, correction=0))

    with ExitStack() as stack:
        for module in clone.modules():
            if isinstance(module, NORMS) and module.running_mean is not None:
                stack.callback(module.register_forward_pre_hook(take).remove)
        run_forward(forward, clone, copied(inputs), "calibration")
    for norm, uses in seen.items():
        norm.running_mean.copy_(torch.stack([mean for mean, _ in uses]).mean(0))  # type: ignore[operator]
        norm.running_var.copy_(torch.stack([variance for _, variance in uses]).mean(0))  # type: ignore[operator]


def copied(inputs: Any) -> Any:
    """A copy of a pytree of tensors, for a network to work on in place."""
    # A network whose first layer works in place would otherwise change the probe set for good.
    return tree_map_only(Tensor, Tensor.clone, inputs)


def checked_outputs(outputs: Any, size: int) -> Tensor:
    """The outputs, detached.

    Raises: ShapeError: no tensor with the samples on axis 0.
    """
    if not isinstance(outputs, Tensor):
        raise ShapeError(
            f"the forward pass returned {type(outputs).__name__}; expected a tensor [N, ...] or an object with "
            ".logits; give forward=lambda model, inputs: ..."
        )
    if outputs.dim() == 0 or len(outputs) != size:
        raise ShapeError(f"the outputs have shape {list(outputs.shape)}; expected {size} samples on axis 0")
    return outputs.detach()
