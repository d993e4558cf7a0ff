"""The optimizer that applies a step: the one whose hooks run, inside the wrappers of frameworks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from ..errors import ConfigurationError
from .guard import without_modes


def applying_optimizer(optimizer: Any, path: Path) -> Optimizer:
    """The optimizer itself, or the one inside a wrapper that has no hooks of its own.

    Accelerate's wrapper is an Optimizer by class but not by construction: it has no hooks to register, and its step is
    none while gradients are accumulated. A wrapper with hooks of its own, Lookahead for one, applies more than the
    optimizer inside and is kept.

    Raises: ConfigurationError: no optimizer.
    """
    while not hasattr(optimizer, "_optimizer_step_post_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(f"recorder of {path}: found {type(optimizer).__name__}, expected attach(optimizer)")
    return optimizer


def overflowed(optimizer: Optimizer) -> bool:
    """Whether a GradScaler has found gradients beyond all numbers, so that a step changes nothing.

    It does not call an unfused optimizer at all then, but lets a fused one see it.
    """
    found = getattr(optimizer, "found_inf", None)
    if found is None:
        return False
    with without_modes():
        return bool(found)
