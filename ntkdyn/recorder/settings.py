"""What a recorder may be told, checked before anything is measured."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import get_args

from torch import nn

from ..errors import ConfigurationError
from .snapshots import BatchNorm, has_running_norms


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices.  Raises: ConfigurationError."""
    if value not in choices:
        raise ConfigurationError(f"Recorder: found {name}={value!r}, expected one of {', '.join(map(repr, choices))}")


def check_model(model: object) -> None:
    """Refuse what is no network.  Raises: ConfigurationError."""
    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ConfigurationError(f"Recorder: found {found} as model, expected a torch.nn.Module")


def chosen_batchnorm(chosen: BatchNorm | None, calibrated: bool, model: nn.Module) -> BatchNorm:
    """The treatment of BatchNorm, as chosen or by what there is; running statistics are warned of.

    Raises: ConfigurationError: no such treatment, or re-estimation without data.
    """
    if chosen is not None:
        check_choice("batchnorm", chosen, get_args(BatchNorm))
        if chosen == "reestimate" and not calibrated:
            raise ConfigurationError("Recorder: found batchnorm='reestimate' without data, expected calibration=inputs")
        return chosen
    if not calibrated and has_running_norms(model):
        warnings.warn(
            "BatchNorm is recorded with its running statistics, which are those of nothing at step 0; give "
            "calibration=inputs, or batchnorm='running' to keep them",
            RuntimeWarning,
            stacklevel=3,
        )
    return "reestimate" if calibrated else "running"
