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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .errors import ConfigurationError
from .gates import Gate, frozen, gates

Rule = Literal["clipped", "half-threshold"]
Survivors = Literal["keep", "common", "relu"]

# Beyond these a gate amplifies its negative side; SGD on slopes at step size 1 can overshoot, the clamp stops it.
SLOPE_RANGE = (-0.5, 1.5)
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


def _reachable(sizes: Sequence[int]) -> int:
    """Bit set of the counts that some subset of the slopes adds up to: bit n is set if n units can remain."""
    ones = sum(size == 1 for size in sizes)
    bits = (1 << (ones + 1)) - 1
    for size in sizes:
        if size > 1:
            bits |= bits << size
    return bits


class _Slopes:
    """All slopes of a network as one vector; each entry stands for one unit, or for a whole layer-wise gate."""

    def __init__(self, model: nn.Module, caller: str) -> None:
        self.gates: dict[str, Gate] = gates(model)
        if not self.gates:
            raise ConfigurationError(
                f"{caller}: {type(model).__name__} has no Gate; expected at least one; "
                "call ntkdyn.gate_network(model) first"
            )
        self.sizes = [gate.units_per_slope for gate in self.gates.values() for _ in range(gate.slope.numel())]
        self.total = sum(self.sizes)
        self.channel_wise = max(self.sizes) == 1

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().to(tensors[0].device) for tensor in tensors])

    def split(self, vector: Tensor) -> Iterator[tuple[str, Gate, Tensor]]:
        parts = vector.split([gate.slope.numel() for gate in self.gates.values()])
        return ((name, gate, part) for (name, gate), part in zip(self.gates.items(), parts, strict=True))

    def values(self) -> Tensor:
        return self.join([gate.slope for gate in self.gates.values()])

    def frozen(self) -> Tensor:
        return self.join([gate.frozen for gate in self.gates.values()])

    def gradients(self) -> Tensor:
        """Gradients that the loss left at the slopes; taken, so that the next backward pass starts from none."""
        owners = list(self.gates.values())
        taken = [torch.zeros_like(gate.slope) if gate.slope.grad is None else gate.slope.grad for gate in owners]
        for gate in owners:
            gate.slope.grad = None
        return self.join(taken)

    @torch.no_grad()
    def write(self, values: Tensor, freeze: Tensor) -> None:
        """Write the slopes; what is frozen, and what freezes now, becomes exactly 1."""
        for (_, gate, part), (_, _, mask) in zip(self.split(values), self.split(freeze), strict=True):
            gate.slope.copy_(part)
            gate.freeze(mask)

    def target(self, remaining: int | float, caller: str) -> int:
        """Number of units that remain: an int exactly, a float as share of all units, to the nearest possible count."""
        active = [size for size, gone in zip(self.sizes, self.frozen().tolist(), strict=True) if not gone]
        share = isinstance(remaining, float)
        if isinstance(remaining, bool) or not 0 <= remaining <= (1 if share else sum(active)):
            raise ConfigurationError(
                f"{caller}: remaining is {remaining}; expected a share in [0.0, 1.0] or a number of units in "
                f"[0, {sum(active)}] ({self.total} in all)"
            )
        wanted = round(self.total * remaining) if share else int(remaining)
        if wanted > sum(active):
            raise ConfigurationError(
                f"{caller}: remaining={remaining} asks for {wanted} units of {self.total}; only {sum(active)} are not "
                "frozen yet; ask for fewer"
            )
        possible = _reachable(active)
        below = next(count for count in range(wanted, -1, -1) if possible >> count & 1)
        above = next(count for count in range(wanted, sum(active) + 1) if possible >> count & 1)
        if below == wanted or share:
            return above if above - wanted <= wanted - below else below
        raise ConfigurationError(
            f"{caller}: remaining is {wanted} units, but layer-wise gates freeze as a whole; the nearest possible "
            f"counts are {below} and {above}; ask for one of them or for a share"
        )

    def closest(self, order: Sequence[int], active: Tensor, target: int, stop: Callable[[int, int], bool]) -> Tensor:
        """Mask of the slopes to freeze now: in the given order, as long as the target stays reachable exactly.

        stop(index, units): called with the next slope and the units still active; True ends the choice.
        """
        chosen = torch.zeros_like(active)
        alive = {index: self.sizes[index] for index, open_ in enumerate(active.tolist()) if open_}
        units = sum(alive.values())
        for index in order:
            if index not in alive:
                continue
            if units <= target or stop(index, units):
                break
            size = alive.pop(index)
            fits = units - size >= target
            if fits and not self.channel_wise:
                fits = bool(_reachable(list(alive.values())) >> target & 1)
            if fits:
                units -= size
                chosen[index] = True
            else:
                alive[index] = size
        return chosen


class _SlopeOwner:
    """Owns the slopes of a network: ramp for `steps` calls, settle for `settle_steps` calls, then stand still."""

    def __init__(
        self, model: nn.Module, *, steps: int, survivors: Survivors, common_slope: float, settle_steps: int
    ) -> None:
        caller = type(self).__name__
        if steps < 1 or settle_steps < 0:
            raise ConfigurationError(
                f"{caller}: steps is {steps} and settle_steps {settle_steps}; expected steps >= 1 and settle_steps >= 0"
            )
        if survivors not in get_args(Survivors):
            raise ConfigurationError(
                f"{caller}: survivors is {survivors!r}; expected one of {', '.join(get_args(Survivors))}"
            )
        if not SLOPE_RANGE[0] <= common_slope <= SLOPE_RANGE[1] or common_slope == 1:
            raise ConfigurationError(
                f"{caller}: common_slope is {common_slope}; expected a number in {list(SLOPE_RANGE)} other than 1, "
                "at which a survivor would be linear"
            )
        self._slopes = _Slopes(model, caller)
        self._model = model
        self.steps = steps
        self.settle_steps = settle_steps
        self.survivors = survivors
        self.common_slope = common_slope
        self.calls = 0
        # Whatever backward passes left at the slopes before, e.g. while no optimizer owned them, is no gradient of now.
        self._slopes.gradients()
        self._written: Tensor | None = self._slopes.values().clone()

    def weights(self) -> list[nn.Parameter]:
        """All parameters that are no slopes: what the optimizer of the loop must be given, and nothing else."""
        owned = {id(gate.slope) for gate in self._slopes.gates.values()}
        return [parameter for parameter in self._model.parameters() if id(parameter) not in owned]

    @property
    def done(self) -> bool:
        """True once ramp and settling are over; from then on the slopes stand still."""
        return self.calls >= self.steps + self.settle_steps

    @property
    def active(self) -> int:
        """Units that are not frozen."""
        gone = self._slopes.frozen().tolist()
        return sum(size for size, frozen_ in zip(self._slopes.sizes, gone, strict=True) if not frozen_)

    @torch.no_grad()
    def step(self) -> None:
        """Move the slopes once; call it after each optimizer step.

        The gradients that the backward pass left at the slopes are used and removed. They must be unscaled, which
        torch.amp.GradScaler does only for the parameters of its optimizer.

        Raises: ConfigurationError: somebody else moved a slope since the last call.
        """
        values = self._slopes.values()
        if self._written is not None:
            before = self._written.to(values)
            if not bool(((values == before) | (values.isnan() & before.isnan())).all()):
                raise ConfigurationError(
                    f"{type(self).__name__}: a slope moved between two calls of step(); expected slopes that only the "
                    f"{type(self).__name__} moves; give the optimizer the weights alone: "
                    "optimizer = Adam(linearizer.weights())"
                )
        gradients = self._slopes.gradients()
        self.calls += 1
        freeze = torch.zeros_like(self._slopes.frozen())
        if self.calls <= self.steps:
            values, freeze = self._ramp(values, gradients)
        if self.calls >= self.steps:
            values = self._settle(values, self._slopes.frozen() | freeze)
        self._slopes.write(values, freeze)
        self._written = self._slopes.values().clone()

    def _ramp(self, values: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """New slopes and the mask of those that freeze, for call number self.calls of the ramp."""
        raise NotImplementedError

    def _settle(self, values: Tensor, linear: Tensor) -> Tensor:
        if self.survivors == "keep" or self.calls > self.steps + self.settle_steps:
            return values
        if self.calls == self.steps and self.settle_steps:
            return values
        aim = self.common_slope if self.survivors == "common" else 0.0
        return torch.where(linear, values, _toward(values, aim, self.steps + self.settle_steps - self.calls + 1))

    def state_dict(self) -> dict[str, Any]:
        """State that, with the network's own state dict, continues bit for bit."""
        return {"calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; load the network's own state dict too, before or after."""
        self.calls = int(state["calls"])
        self._slopes.gradients()
        self._written = None


def _toward(values: Tensor, aim: float, calls_left: int) -> Tensor:
    # A straight line without a remembered start: the rest of the way, divided by the calls that are left.
    return torch.full_like(values, aim) if calls_left <= 1 else values + (aim - values) / calls_left


class Linearizer(_SlopeOwner):
    """Makes gates linear under a penalty until exactly `remaining` units are nonlinear.

    Each of the first `steps` calls of `step()`: a <- a - eta dL/da (plain SGD); then, while more than `remaining`
    units are active, the threshold step on d = |1 - a| with amount eta * lambda, where
    lambda = strength * 1.25 * 4 / (3 steps eta); a is clamped to [-0.5, 1.5]. Units with d < tolerance freeze at
    exactly 1, the closest to linear first and never more than may still go. Over the last fifth of the ramp a ceiling
    on the active units falls linearly from all units to `remaining`; above it the units closest to linear freeze
    wherever they are. The penalty does not touch the units that are left when `remaining` is reached.
    During the next `settle_steps` calls the survivors move in a straight line to their common slope ("common"), to
    slope 0 ("relu"), or not at all ("keep"). Then `done` is True and the slopes stand still.

    Args:
        remaining: number of units (int), or share of all units (float), not frozen at the end. Layer-wise gates freeze
            as a whole: a share goes to the nearest possible count (the larger of two), a number must be possible.
        strength: factor on the penalty weight; it decides the outcome, so report it.
        rule: "clipped" explicit step or "half-threshold" proximal step.
        learning_rate: eta of the slopes, in units of slope per gradient.
        keep_path: remember the slopes of every call of the ramp, see `path`.

    Raises: ConfigurationError: no gates, an impossible count, or a setting out of range.
    Source: protocol after Mehmeti-Göpel and Disselhoff 2023 (arXiv 2211.17180); schedule and survivor rules our own.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        remaining: int | float,
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
        for name, value, fits in (
            ("strength", strength, strength >= 0),
            ("learning_rate", learning_rate, learning_rate > 0),
            ("tolerance", tolerance, tolerance > 0),
        ):
            if not fits or not math.isfinite(value):
                raise ConfigurationError(f"Linearizer: {name} is {value}; expected a positive number")
        self.target = self._slopes.target(remaining, "Linearizer")
        self.rule = rule
        self.learning_rate = learning_rate
        self.tolerance = tolerance
        self.penalty_weight = strength * _HEAD_START * 4 / (3 * steps * learning_rate)
        self._rows: list[Tensor] | None = [] if keep_path else None

    def _ceiling(self) -> float:
        late = (self.steps - self.calls) / (self.steps * (1 - 1 / _HEAD_START))
        return self.target + (self._slopes.total - self.target) * min(1.0, late)

    def _ramp(self, values: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        linear = self._slopes.frozen()
        moved = torch.where(linear, values, values - self.learning_rate * gradients).clamp(*SLOPE_RANGE)
        distance = (1 - moved).abs()
        freeze = torch.zeros_like(linear)
        if self.active > self.target:
            pulled = _RULES[self.rule](distance, self.learning_rate * self.penalty_weight)
            freeze = self._choose(distance, pulled, ~linear)
            left = [size for size, gone in zip(self._slopes.sizes, (linear | freeze).tolist(), strict=True) if not gone]
            if sum(left) > self.target:
                moved = 1 - torch.sign(1 - moved) * pulled
        moved = torch.where(linear | freeze, 1.0, moved)
        if self._rows is not None:
            self._rows.append(moved.clone())
        return moved, freeze

    def _choose(self, distance: Tensor, pulled: Tensor, active: Tensor) -> Tensor:
        # Ordered by the distance before the threshold step, which has the same order but no ties where it reaches 0:
        # many units collapse in one call, and ties would go by position in the network.
        order = torch.argsort(distance.nan_to_num(nan=math.inf), stable=True).tolist()
        near = (pulled < self.tolerance).tolist()
        ceiling = self._ceiling()
        return self._slopes.closest(order, active, self.target, lambda i, units: not near[i] and units <= ceiling)

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
        parts = rows.split([gate.slope.numel() for gate in self._slopes.gates.values()], dim=1)
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


class MaskRamp(_SlopeOwner):
    """Control: the survivors are given. All other slopes move in a straight line to 1 within `steps` calls and freeze.

    mask: gate -> bool [channels] (layer-wise: [1]), True = survivor, e.g. from random_mask or survivor_mask. Survivors
    stand still during the ramp, then move as `survivors` says; the loss moves no slope.

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

    def _ramp(self, values: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        leaving = self._leaving.to(values.device)
        left = self.steps - self.calls + 1
        return torch.where(leaving, _toward(values, 1.0, left), values), leaving & (left == 1)


class SlopeReplay(_SlopeOwner):
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

    def _ramp(self, values: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        now = self.calls - 1
        return self._rows[now].to(values), self._freezes[now].to(values.device)


def _joined_mask(slopes: _Slopes, mask: Mapping[str, Tensor], caller: str) -> Tensor:
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
    slopes = _Slopes(model, "random_mask")
    target = slopes.target(remaining, "random_mask")
    order = torch.randperm(len(slopes.sizes), generator=torch.Generator().manual_seed(seed)).tolist()
    active = ~slopes.frozen()
    leaving = slopes.closest(order, active, target, lambda index, units: False)
    return {name: part.clone() for name, _, part in slopes.split(active & ~leaving)}
