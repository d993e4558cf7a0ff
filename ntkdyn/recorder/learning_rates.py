"""Learning rates of the applied steps and their sum, which is the continuous time of training."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..probe import Field
from .guard import without_modes

# Rates on another device are fetched together, so that training waits for them once in so many steps.
_MOST_WAITING = 1000


class LearningRates:
    """The learning rates with which an optimizer made its steps, those of its first parameter group.

    ``value`` is the rate of the last applied step; before the first one, and behind steps that were not counted, the
    rate that the optimizer holds. ``sum`` is that of all applied steps behind step ``since``, an attribute of the group
    (``since_step``): 0, or where a training is recorded from a later step on, that step. Where steps were applied
    between two attaches, so that it is unknown, it is NaN from there on. A run that branches from a recorded one counts
    on from it.

    Attributes: recorded: the last step at which they are in the run.
    """

    group = "learning_rate"
    fields = (
        Field(name="value", dtype="f8", long_name="learning rate of the last applied step"),
        Field(name="sum", dtype="f8", long_name="sum of learning rates over applied steps"),
    )

    def __init__(self) -> None:
        self._since = 0
        self._steps = 0
        self._sum = 0.0
        self._value: float | None = None
        self._used: float | Tensor | None = None
        self._waiting: list[float | Tensor] = []
        self._optimizer: Optimizer | None = None
        self.recorded: int | None = None

    def follow(self, optimizer: Optimizer, step: int, path: Path) -> None:
        """Record the rates of this optimizer, of which so many steps are applied; one without rates has no records.

        Warns where rates are recorded already and some of the steps since then were not counted.
        """
        held = _number(optimizer.param_groups[0].get("lr"))
        if held is None:
            return
        self._settle()
        self._optimizer = optimizer
        if self._value is not None and step == self._since + self._steps:
            return
        self._value = held if isinstance(held, float) else _fetched([held])[0]
        if step == self._since + self._steps:
            return
        if self.recorded is None:
            self._since, self._steps, self._sum = step, 0, 0.0
            return
        warnings.warn(
            f"{path}: found {self._steps} of {step - self._since} applied steps counted, expected all since step "
            f"{self._since}; learning_rate/sum is NaN from here on; attach the optimizer to all steps of a run",
            RuntimeWarning,
            stacklevel=5,
        )
        self._steps, self._sum = step - self._since, math.nan

    def leave(self) -> None:
        """End what ``follow`` began."""
        # Nothing is fetched here: training may have ended with an error of the device.
        self._optimizer = None

    def before_step(self, optimizer: Optimizer) -> None:
        """Note the rate that a step will use: before it, as schedulers may follow it as hooks of the optimizer too."""
        rate = optimizer.param_groups[0].get("lr")
        # Nearly always a float; one call less in every step.
        self._used = rate if type(rate) is float else _number(rate)

    def applied(self) -> None:
        """Count the step that was noted last."""
        if self._used is not None:
            self._waiting.append(self._used)
            if len(self._waiting) == _MOST_WAITING:
                self._settle()

    def at(self, step: int) -> dict[str, np.ndarray[Any, Any]]:
        """Value and sum at a step, unless they are ``recorded``; nothing while no optimizer is followed."""
        if self._optimizer is None or self._value is None or self.recorded == step:
            return {}
        self._settle()
        return {"value": np.array(self._value), "sum": np.array(self._sum)}

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the group."""
        return {"optimizer": type(self._optimizer).__name__, "parameter_group": 0, "since_step": self._since}

    def dump(self) -> dict[str, Any]:
        """State for a checkpoint, JSON values, of which NaN is none."""
        self._settle()
        known = None if math.isnan(self._sum) else self._sum
        return {"since": self._since, "steps": self._steps, "sum": known, "value": self._value}

    @staticmethod
    def load(state: Mapping[str, Any]) -> LearningRates:
        """Go on from what ``dump`` returned.  Raises: KeyError, TypeError, ValueError: it is something else."""
        rates = LearningRates()
        rates._since, rates._steps = operator.index(state["since"]), operator.index(state["steps"])
        rates._sum = math.nan if state["sum"] is None else float(state["sum"])
        rates._value = None if state["value"] is None else float(state["value"])
        return rates

    def _settle(self) -> None:
        fetched = iter(_fetched([rate for rate in self._waiting if isinstance(rate, Tensor)]))
        for rate in self._waiting:
            self._value = next(fetched) if isinstance(rate, Tensor) else rate
            # One after the other, so that the sum does not depend on when it was last asked for.
            self._sum += self._value
        self._steps += len(self._waiting)
        self._waiting.clear()


def _number(rate: Any) -> float | Tensor | None:
    """A learning rate as an optimizer holds it; None where it is no number."""
    if isinstance(rate, Tensor):
        with without_modes():
            # A copy, as schedulers write into the tensor.
            return rate.detach().clone().reshape(()) if rate.numel() == 1 else None
    return float(rate) if isinstance(rate, Real) else None


def _fetched(rates: Sequence[Tensor]) -> list[float]:
    """Numbers of tensors that may be on several devices, at once."""
    if not rates:
        return []
    with without_modes():
        return [float(rate) for rate in torch.stack([rate.to(rates[0].device) for rate in rates]).tolist()]
