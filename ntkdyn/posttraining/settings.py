"""What post-training may be told, checked before anything is trained."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from ..errors import ConfigurationError
from ..linearization import Rule
from ..slope_owner import SlopeVector, Survivors

OptimizerName = Literal["adam", "sgd"]
Target = float | int

_RECOVERY_SHARE = 0.25
_SEED_LIMIT = 2**63  # of torch's generators and of integers in a recording


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one post-training; each target takes ramp, settling and recovery once.

    Raises: ConfigurationError: a setting out of range; those of the Linearizer are checked by it.
    """

    targets: tuple[Target, ...]
    ramp_epochs: int
    settle_epochs: int | None
    recovery_epochs: int
    optimizer: OptimizerName
    learning_rate: float
    momentum: float
    weight_decay: float
    strength: float
    rule: Rule
    survivors: Survivors
    common_slope: float
    points: int
    seed: int

    def __post_init__(self) -> None:
        for name, value, least in (
            ("ramp_epochs", self.ramp_epochs, 1),
            ("settle_epochs", 0 if self.settle_epochs is None else self.settle_epochs, 0),
            ("recovery_epochs", self.recovery_epochs, 0),
            ("points", self.points, 1),
            ("seed", self.seed, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigurationError(f"linearize: found {name}={value!r}, expected a whole number from {least} on")
        if self.seed >= _SEED_LIMIT:
            raise ConfigurationError(f"linearize: found seed={self.seed}, expected a whole number below 2^63")
        for name, rate, fits in (
            ("learning_rate", self.learning_rate, self.learning_rate > 0),
            ("momentum", self.momentum, 0 <= self.momentum < 1),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0),
        ):
            if not fits or not math.isfinite(rate):
                expected = "a number in [0, 1)" if name == "momentum" else "a positive number"
                raise ConfigurationError(f"linearize: found {name}={rate}, expected {expected}")
        if self.optimizer not in get_args(OptimizerName):
            raise ConfigurationError(
                f"linearize: found optimizer={self.optimizer!r}, expected one of {', '.join(get_args(OptimizerName))}"
            )
        if self.survivors == "keep" and self.settle_epochs:
            raise ConfigurationError(
                f"linearize: found settle_epochs={self.settle_epochs} with survivors='keep', which leaves the "
                "survivors where they are, expected 0; drop it, or choose survivors='common' or 'relu'"
            )
        if self.survivors != "keep" and self.settle_epochs == 0:
            raise ConfigurationError(
                f"linearize: found settle_epochs=0 with survivors={self.survivors!r}, expected at least 1, as their "
                "slopes would jump"
            )

    @property
    def settling(self) -> int:
        """Epochs in which the survivors move to their slope; 0 where they stay."""
        default = 0 if self.survivors == "keep" else 1
        return default if self.settle_epochs is None else self.settle_epochs

    @property
    def epochs(self) -> int:
        """Epochs that one target takes."""
        return self.ramp_epochs + self.settling + self.recovery_epochs

    def doubts(self, counts: Sequence[int]) -> list[str]:
        """What will probably hurt, in one line each; ``counts`` are the units that the targets ask for."""
        lines = [
            f"linearize: target {target} of the units is none of them after rounding, and the network becomes linear; "
            "give 0 if that is meant, or a larger share or number"
            for target, count in zip(self.targets, counts, strict=True)
            if target and not count
        ]
        if self.recovery_epochs >= _RECOVERY_SHARE * self.epochs:
            return lines
        return [
            *lines,
            f"linearize: recovery_epochs={self.recovery_epochs} of {self.epochs} epochs leave the network no time to "
            f"recover from the ramp; rule: ramp and settling end by {1 - _RECOVERY_SHARE:.0%} of the epochs, here with "
            f"recovery_epochs={math.ceil((self.ramp_epochs + self.settling) / 3)} or more",
        ]


def warn(lines: Sequence[str]) -> None:
    """Give each line as a RuntimeWarning of the caller of ``linearize``."""
    for line in lines:
        warnings.warn(line, RuntimeWarning, stacklevel=3)


def read_target(text: str) -> Target:
    """Read a target: "0.1" is a share of all units, "38" a number of units.

    >>> read_target("0.1"), read_target("38")
    (0.1, 38)

    Raises: ConfigurationError: no number.
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ConfigurationError(
        f"target {text!r}: expected a share of the units such as 0.1, or a whole number of units such as 38"
    )


def counts(model: nn.Module, targets: Sequence[Target]) -> list[int]:
    """Number of active units that each target asks for, from most to fewest.

    Raises: ConfigurationError: a target that is no share and no count, asks for more than what is still active, or for
        more than the target before it.
    """
    if not targets:
        raise ConfigurationError("linearize: found no target, expected at least one, e.g. target=0.1")
    slopes = SlopeVector(model, "linearize")
    gone = slopes.frozen().tolist()
    present = sum(size for size, frozen in zip(slopes.sizes, gone, strict=True) if not frozen)
    found: list[int] = []
    for target in targets:
        if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 <= target < math.inf:
            raise ConfigurationError(
                f"target {target!r}: expected a share of the units in [0.0, 1.0], or a whole number of units"
            )
        share = isinstance(target, float)
        if target > (1 if share else slopes.total):
            limit = "a share of at most 1.0" if share else f"at most the {slopes.total} units of the network"
            hint = f"; {target:g} units are {int(target)} without a point" if share and target == int(target) else ""
            raise ConfigurationError(f"target {target}: found more units than there are, expected {limit}{hint}")
        wanted = slopes.total * target if share else target
        # Half a unit of slack: a share of what is left need not be a whole number.
        if wanted >= present + 0.5:
            raise ConfigurationError(
                f"target {target}: asks for {round(wanted)} of {slopes.total} units, of which only {present} are not "
                f"frozen yet; frozen units stay linear; give a number up to {present}"
            )
        found.append(slopes.target(present if wanted > present else target, f"target {target}"))
        if len(found) > 1 and found[-1] >= found[-2]:
            raise ConfigurationError(
                f"target {target}: asks for {found[-1]} units after a target of {found[-2]}, expected fewer each time; "
                "list the targets from most to fewest units"
            )
    return found
