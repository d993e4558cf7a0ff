"""Linearization in a training loop: a penalty makes gates linear until an exact number is left.

The loop stays the user's own::

    linearizer = Linearizer(model, remaining=0.1, steps=400, survivors="common", settle_steps=200)
    optimizer = torch.optim.Adam(linearizer.weights())
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        optimizer.step()
        linearizer.step()

`MaskRamp` and `SlopeReplay` are the controls with the same interface: which gates survive, or the whole path of the
slopes, is given instead of learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import ConfigurationError, DivergedTraining
from .gates import frozen
from .slope_owner import SLOPE_RANGE, SlopeOwner, SlopeVector, Survivors, toward

Rule = Literal["clipped", "half-threshold"]
# Without a gradient of the loss the clipped step takes a slope from 0 to 1 in 4 / (3 eta lambda) calls; at strength 1
# that is steps / 1.25, so that units that resist have the last fifth of the ramp.
_HEAD_START = 1.25


def clipped_step(distance: Tensor, amount: float) -> Tensor:
    """Explicit gradient step of amount * sqrt(d), clipped:  d <- max(0, d - amount * 0.5 / sqrt(max(d, 1e-4))).

    distance: |1 - slope| of any shape, dimensionless.  amount: learning rate times penalty weight.
    """
    return (distance - amount * 0.5 / distance.clamp_min(1e-4).sqrt()).clamp_min(0)


def half_threshold(distance: Tensor, amount: float) -> Tensor:
    """Proximal step of amount * sqrt(d):  argmin_x (x - d)^2 / 2 + amount * sqrt(x).

    0 where d <= 1.5 amount^(2/3), else (2/3) d [1 + cos(2 pi/3 - (2/3) arccos((amount/4) (d/3)^(-3/2)))].
    distance: |1 - slope| of any shape, dimensionless.  amount: learning rate times penalty weight.
    Source: Xu et al. 2012, L1/2 regularization, IEEE TNNLS 23:1013.
    """
    edge = 1.5 * amount ** (2 / 3)
    far = distance.clamp_min(max(edge, torch.finfo(distance.dtype).tiny))
    angle = torch.arccos((amount / 4 * (far / 3) ** -1.5).clamp(max=1))
    return torch.where(distance <= edge, 0, 2 / 3 * far * (1 + torch.cos(2 * math.pi / 3 - 2 / 3 * angle)))


_RULES: dict[str, Callable[[Tensor, float], Tensor]] = {"clipped": clipped_step, "half-threshold": half_threshold}


class Linearizer(SlopeOwner):
    """Makes gates linear under a penalty, until exactly `remaining` units are nonlinear or at a fixed penalty weight.

    Each of the first `steps` calls of `step()`: a <- a - eta dL/da (plain SGD); then, while more than `remaining`
    units are active, the threshold step on d = |1 - a| with amount eta * lambda, where
    lambda = strength * 1.25 * 4 / (3 steps eta); a is clamped to [-0.5, 1.5]. Units with d < tolerance freeze at
    exactly 1, the closest to linear first and never more than may still go. Over the last fifth of the ramp a ceiling
    on the active units falls linearly from all units to `remaining`; above it the units closest to linear freeze
    wherever they are. The penalty does not touch the units that are left when `remaining` is reached.
    With `penalty_weight` in place of `remaining`, lambda is that number, there is no ceiling, and during `steps` calls
    every unit with d < tolerance freezes: how many are left is the outcome.
    During the next `settle_steps` calls the survivors move in a straight line to their common slope ("common"), to
    slope 0 ("relu"), or not at all ("keep"). Then `done` is True and the slopes stand still.

    Args:
        remaining: number of units (int), or share of all units (float), not frozen at the end. Layer-wise gates freeze
            as a whole: a share goes to the nearest possible count (the larger of two), a number must be possible.
        penalty_weight: lambda of the penalty lambda * sum sqrt(d), a plain sum over the slopes: a layer-wise gate pays
            once for all its units, as in `slope_penalty`.
        strength: factor on the penalty weight that `steps` asks for; it decides the outcome, so report it.
        rule: "clipped" explicit step or "half-threshold" proximal step.
        learning_rate: eta of the slopes, in units of slope per gradient.
        keep_path: remember the slopes of every call of the ramp, see `path`.

    Raises: ConfigurationError: no gates, an impossible count, a slope that is NaN, a setting out of range, or not
        exactly one of `remaining` and `penalty_weight`.  DivergedTraining: `step` met a slope that became NaN; no slope
        was moved.
    Source: protocol after Mehmeti-Göpel and Disselhoff 2023 (arXiv 2211.17180); schedule and survivor rules our own.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        remaining: int | float | None = None,
        penalty_weight: float | None = None,
        steps: int,
        strength: float = 1.0,
        rule: Rule = "clipped",
        survivors: Survivors = "keep",
        common_slope: float = 0.75,
        settle_steps: int = 0,
        learning_rate: float = 1.0,
        tolerance: float = 0.01,
        keep_path: bool = False,
    ) -> None:
        super().__init__(model, steps=steps, survivors=survivors, common_slope=common_slope, settle_steps=settle_steps)
        if rule not in _RULES:
            raise ConfigurationError(f"Linearizer: rule is {rule!r}; expected one of {', '.join(_RULES)}")
        if (remaining is None) == (penalty_weight is None):
            raise ConfigurationError(
                f"Linearizer: remaining is {remaining} and penalty_weight {penalty_weight}; expected exactly one of "
                "them: a count to reach, or a price per unit"
            )
        if penalty_weight is not None and strength != 1:
            raise ConfigurationError(
                f"Linearizer: strength is {strength} beside penalty_weight={penalty_weight}; expected it only with "
                "remaining; multiply penalty_weight instead"
            )
        for name, value, fits in (
            ("penalty_weight", 0.0 if penalty_weight is None else penalty_weight, (penalty_weight or 0) >= 0),
            ("strength", strength, strength >= 0),
            ("learning_rate", learning_rate, learning_rate > 0),
            ("tolerance", tolerance, tolerance > 0),
        ):
            if not fits or not math.isfinite(value):
                raise ConfigurationError(f"Linearizer: {name} is {value}; expected a positive number")
        if spoilt := self._gates_with_nan(self._slopes.values()):
            raise ConfigurationError(
                f"Linearizer: found slopes that are NaN in gate {spoilt}, expected numbers; load a checkpoint "
                "from before training diverged"
            )
        self._exact = remaining is not None
        self.target = 0 if remaining is None else self._slopes.target(remaining, "Linearizer")
        self.rule = rule
        self.learning_rate = learning_rate
        self.tolerance = tolerance
        if penalty_weight is None:
            penalty_weight = strength * _HEAD_START * 4 / (3 * steps * learning_rate)
        self.penalty_weight = penalty_weight
        self._rows: list[Tensor] | None = [] if keep_path else None

    def _ceiling(self) -> float:
        if not self._exact:
            return math.inf
        late = (self.steps - self.calls) / (self.steps * (1 - 1 / _HEAD_START))
        return self.target + (self._slopes.total - self.target) * min(1.0, late)

    def _ramp(self, values: Tensor, linear: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        moved = torch.where(linear, values, values - self.learning_rate * gradients).clamp(*SLOPE_RANGE)
        if spoilt := self._gates_with_nan(moved):
            raise DivergedTraining(
                f"Linearizer: slopes of gate {spoilt} became NaN in call {self.calls} of the ramp, expected numbers; "
                "lower the learning rate of the weights or of the slopes"
            )
        distance = (1 - moved).abs()
        freeze = torch.zeros_like(linear)
        active = self._slopes.count(~linear)
        if active > self.target:
            pulled = _RULES[self.rule](distance, self.learning_rate * self.penalty_weight)
            freeze = self._choose(distance, pulled, ~linear, active)
            if active - self._slopes.count(freeze) > self.target:
                moved = 1 - torch.sign(1 - moved) * pulled
        moved = torch.where(linear | freeze, 1.0, moved)
        if self._rows is not None:
            self._rows.append(moved.clone())
        return moved, freeze

    def _gates_with_nan(self, values: Tensor) -> str:
        if not bool(values.isnan().any()):
            return ""
        return ", ".join(repr(name) for name, _, part in self._slopes.split(values) if bool(part.isnan().any()))

    def _choose(self, distance: Tensor, pulled: Tensor, active: Tensor, units: int) -> Tensor:
        ceiling, near = self._ceiling(), pulled < self.tolerance
        if units <= ceiling and not bool((near & active).any()):
            return torch.zeros_like(active)
        # Ordered by the distance before the threshold step, which has the same order but no ties where it reaches 0:
        # many units collapse in one call, and ties would go by position in the network.
        order = torch.argsort(distance, stable=True).tolist()
        is_near = near.tolist()
        return self._slopes.closest(order, active, self.target, lambda i, units: not is_near[i] and units <= ceiling)

    @property
    def path(self) -> dict[str, Tensor]:
        """Effective slopes after each call of the ramp, gate -> [calls, channels] (layer-wise: [calls, 1]).

        Raises: ConfigurationError: the Linearizer was not asked to keep its path.
        """
        if self._rows is None:
            raise ConfigurationError("Linearizer: the path was not kept; construct it with keep_path=True")
        rows = torch.stack(self._rows) if self._rows else self._slopes.values()[None][:0]
        return {name: part.clone() for name, part in self._split_rows(rows)}

    def _split_rows(self, rows: Tensor) -> Iterator[tuple[str, Tensor]]:
        parts = torch.split(rows, [gate.slope.numel() for gate in self._slopes.gates.values()], dim=1)
        return zip(self._slopes.gates, parts, strict=True)

    def state_dict(self) -> dict[str, Any]:
        """Calls so far, and the path where it is kept; with the network's state dict it continues bit for bit."""
        return super().state_dict() | ({} if self._rows is None else {"path": self.path})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self._rows is not None:
            if "path" not in state:
                raise ConfigurationError("Linearizer: the state holds no path; expected one, as keep_path=True asks")
            self._rows = list(torch.cat([state["path"][name] for name in self._slopes.gates], dim=1))


class MaskRamp(SlopeOwner):
    """Control: the survivors are given. All other slopes move in a straight line to 1 within `steps` calls and freeze.

    mask: gate -> bool [channels] (layer-wise: [1]), True = survivor, e.g. from random_mask or survivor_mask. Survivors
    move in a straight line to where `survivors` wants them within the same calls, and stand still during settling: a
    survivor that stayed a ReLU all through the ramp would be a milder intervention than the learned one, whose penalty
    pulls survivors too. The loss moves no slope.

    Raises: ConfigurationError: no gates, a mask that does not fit them, or a survivor that is frozen already.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Mapping[str, Tensor],
        *,
        steps: int,
        survivors: Survivors = "keep",
        common_slope: float = 0.75,
        settle_steps: int = 0,
    ) -> None:
        super().__init__(model, steps=steps, survivors=survivors, common_slope=common_slope, settle_steps=settle_steps)
        self._leaving = ~_joined_mask(self._slopes, mask, type(self).__name__)

    def _ramp(self, values: Tensor, linear: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        leaving = self._leaving.to(values.device)
        left = self.steps - self.calls + 1
        surviving = values if self.aim is None else toward(values, self.aim, left)
        return torch.where(leaving, toward(values, 1.0, left), surviving), leaving & (left == 1)


class SlopeReplay(SlopeOwner):
    """Control: the slopes follow a recorded path, e.g. that of another network of the same shape.

    path: gate -> slopes after each call, [steps, channels] (layer-wise: [steps, 1]), as Linearizer.path gives it.
    mask: gate -> bool, True = survivor. A slope that is no survivor freezes in the call from which its path stays at
    exactly 1, where it must end. After the ramp the survivors move as `survivors` says; the loss moves no slope.

    Raises: ConfigurationError: path or mask do not fit the gates or each other.
    """

    def __init__(
        self,
        model: nn.Module,
        path: Mapping[str, Tensor],
        mask: Mapping[str, Tensor],
        *,
        survivors: Survivors = "keep",
        common_slope: float = 0.75,
        settle_steps: int = 0,
    ) -> None:
        caller = type(self).__name__
        lengths = {len(rows) for rows in path.values()}
        if len(lengths) != 1:
            raise ConfigurationError(f"{caller}: the path has gates of {sorted(lengths)} calls; expected one number")
        super().__init__(
            model,
            steps=lengths.pop(),
            survivors=survivors,
            common_slope=common_slope,
            settle_steps=settle_steps,
        )
        for name, gate in self._slopes.gates.items():
            found = tuple(path[name].shape[1:]) if name in path else None
            if found != tuple(gate.slope.shape):
                raise ConfigurationError(
                    f"{caller}: the path of gate {name!r} holds {found} slopes; expected {tuple(gate.slope.shape)}"
                )
        rows = torch.cat([path[name] for name in self._slopes.gates], dim=1)
        leaving = ~_joined_mask(self._slopes, mask, caller).to(rows.device)
        if bool((rows[-1, leaving] != 1).any()):
            raise ConfigurationError(
                f"{caller}: {int((rows[-1, leaving] != 1).sum())} slopes that the mask gives up do not end at 1; "
                "expected path and mask of one finished ramp"
            )
        self._rows = rows
        # True from the call on from which the path stays at 1.
        stays = (rows == 1).flip(0).to(torch.int8).cummin(0).values.flip(0).bool()
        self._freezes = stays & leaving

    def _ramp(self, values: Tensor, linear: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        now = self.calls - 1
        return self._rows[now].to(values), self._freezes[now].to(values.device)


def _joined_mask(slopes: SlopeVector, mask: Mapping[str, Tensor], caller: str) -> Tensor:
    for name in [*slopes.gates, *mask]:
        expected = tuple(slopes.gates[name].slope.shape) if name in slopes.gates else None
        found = tuple(mask[name].shape) if name in mask else None
        if expected != found or mask[name].dtype != torch.bool:
            raise ConfigurationError(
                f"{caller}: the mask of gate {name!r} is {found}; expected {expected} bool, one entry for each slope"
            )
        if bool((mask[name] & slopes.gates[name].frozen.to(mask[name].device)).any()):
            raise ConfigurationError(
                f"{caller}: the mask keeps a unit of gate {name!r} that is frozen; expected survivors that are active; "
                "start from a network in which they are not frozen"
            )
    return slopes.join([mask[name] for name in slopes.gates])


def survivor_mask(model: nn.Module) -> dict[str, Tensor]:
    """Units that are not frozen: gate -> bool [channels] (layer-wise: [1]), True = survivor."""
    return {name: ~linear for name, linear in frozen(model).items()}


def random_mask(model: nn.Module, remaining: int | float, seed: int) -> dict[str, Tensor]:
    """Survivors drawn uniformly without replacement from the units that are not frozen.

    remaining: as in Linearizer. The draw depends on the seed and the shape of the network only, not on the global RNG.

    Raises: ConfigurationError: no gates, or an impossible count.
    """
    slopes = SlopeVector(model, "random_mask")
    target = slopes.target(remaining, "random_mask")
    order = torch.randperm(len(slopes.sizes), generator=torch.Generator().manual_seed(seed)).tolist()
    active = ~slopes.frozen()
    leaving = slopes.closest(order, active, target, lambda index, units: False)
    return {name: part.clone() for name, _, part in slopes.split(active & ~leaving)}
