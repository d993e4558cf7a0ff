"""Who moves the slopes of a network: all slopes as one vector, and the calls in which they ramp, settle and rest."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .errors import ConfigurationError
from .gates import Gate, gates, weights

Survivors = Literal["keep", "common", "relu"]

# Beyond these a gate amplifies its negative side; SGD on slopes at step size 1 can overshoot, the clamp stops it.
SLOPE_RANGE = (-0.5, 1.5)


def reachable(sizes: Sequence[int]) -> int:
    """Bit set of the counts that some subset of the slopes adds up to: bit n is set if n units can remain."""
    ones = sum(size == 1 for size in sizes)
    bits = (1 << (ones + 1)) - 1
    for size in sizes:
        if size > 1:
            bits |= bits << size
    return bits


class SlopeVector:
    """All slopes of a network as one vector; each entry stands for one unit, or for a whole layer-wise gate."""

    def __init__(self, model: nn.Module, caller: str) -> None:
        self.gates: dict[str, Gate] = gates(model)
        if not self.gates:
            raise ConfigurationError(
                f"{caller}: {type(model).__name__} has no Gate; expected at least one; "
                "call ntkdyn.gate_network(model) first"
            )
        self._counts = [gate.slope.numel() for gate in self.gates.values()]
        self.sizes = [gate.units_per_slope for gate in self.gates.values() for _ in range(gate.slope.numel())]
        self.total = sum(self.sizes)
        self.channel_wise = max(self.sizes) == 1

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        devices = {tensor.device for tensor in tensors}
        # In every step of a ramp, several times: moving tensors to where they are takes longer than joining them.
        here = [tensor.to(tensors[0].device) for tensor in tensors] if len(devices) > 1 else list(tensors)
        return torch.cat(here).detach()

    def split(self, vector: Tensor) -> Iterator[tuple[str, Gate, Tensor]]:
        parts = vector.split_with_sizes(self._counts)
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

    def write(self, values: Tensor, linear: Tensor, freeze: Tensor) -> None:
        """Write the slopes; what is frozen (``linear``), and what freezes now, becomes exactly 1."""
        written = torch.where(linear | freeze, 1.0, values)
        torch._foreach_copy_([gate.slope for gate in self.gates.values()], written.split_with_sizes(self._counts))
        if bool(freeze.any()):
            for _, gate, mask in self.split(freeze):
                gate.freeze(mask)

    def count(self, mask: Tensor) -> int:
        """Units of the slopes in a mask."""
        if self.channel_wise:
            return int(mask.sum())
        return sum(size for size, chosen in zip(self.sizes, mask.tolist(), strict=True) if chosen)

    def target(self, remaining: int | float, caller: str) -> int:
        """Number of units that remain: an int exactly, a float as share of all units, to the nearest possible count."""
        active = [size for size, gone in zip(self.sizes, self.frozen().tolist(), strict=True) if not gone]
        share = isinstance(remaining, float)
        if isinstance(remaining, bool) or not 0 <= remaining <= (1 if share else sum(active)):
            raise ConfigurationError(
                f"{caller}: remaining is {remaining}; expected a share in [0.0, 1.0] or a number of units in "
                f"[0, {sum(active)}] ({self.total} in all)"
            )
        wanted = self.total * remaining if share else int(remaining)
        if wanted > sum(active):
            raise ConfigurationError(
                f"{caller}: remaining={remaining} asks for {wanted:g} units of {self.total}; only {sum(active)} are "
                "not frozen yet; ask for fewer"
            )
        possible = reachable(active)
        below = next(count for count in range(math.floor(wanted), -1, -1) if possible >> count & 1)
        above = next(count for count in range(math.ceil(wanted), sum(active) + 1) if possible >> count & 1)
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
                fits = bool(reachable(list(alive.values())) >> target & 1)
            if fits:
                units -= size
                chosen[index] = True
            else:
                alive[index] = size
        return chosen


class SlopeOwner(ABC):
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
        self._slopes = SlopeVector(model, caller)
        self._model = model
        self.steps = steps
        self.settle_steps = settle_steps
        self.survivors = survivors
        self.common_slope = common_slope
        self.calls = 0
        # Whatever backward passes left at the slopes before, e.g. while no optimizer owned them, is no gradient of now.
        self._slopes.gradients()
        self._written: Tensor | None = self._slopes.values()

    def weights(self) -> list[nn.Parameter]:
        """All parameters that are no slopes: what the optimizer of the loop must be given, and nothing else."""
        return list(weights(self._model).values())

    @property
    def done(self) -> bool:
        """True once ramp and settling are over; from then on the slopes stand still."""
        return self.calls >= self.steps + self.settle_steps

    @property
    def active(self) -> int:
        """Units that are not frozen."""
        return self._slopes.count(~self._slopes.frozen())

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
            # The first is the quicker one, and wrong where both are NaN.
            if not torch.equal(values, before) and not torch.allclose(values, before, 0, 0, equal_nan=True):
                raise ConfigurationError(
                    f"{type(self).__name__}: a slope moved between two calls of step(); expected slopes that only the "
                    f"{type(self).__name__} moves; give the optimizer the weights alone: "
                    "optimizer = Adam(linearizer.weights())"
                )
        gradients = self._slopes.gradients()
        self.calls += 1
        linear = self._slopes.frozen()
        freeze = torch.zeros_like(linear)
        if self.calls <= self.steps:
            values, freeze = self._ramp(values, linear, gradients)
        if self.calls >= self.steps:
            values = self._settle(values, linear | freeze)
        self._slopes.write(values, linear, freeze)
        self._written = self._slopes.values()

    @abstractmethod
    def _ramp(self, values: Tensor, linear: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """New slopes and the mask of those that freeze, for call number self.calls of the ramp; linear: frozen ones."""

    @property
    def aim(self) -> float | None:
        """Slope to which the survivors are brought, None where they are kept as they are."""
        return {"keep": None, "common": self.common_slope, "relu": 0.0}[self.survivors]

    def _settle(self, values: Tensor, linear: Tensor) -> Tensor:
        if self.aim is None or self.calls > self.steps + self.settle_steps:
            return values
        if self.calls == self.steps and self.settle_steps:
            return values
        return torch.where(linear, values, toward(values, self.aim, self.steps + self.settle_steps - self.calls + 1))

    def state_dict(self) -> dict[str, Any]:
        """State that, with the network's own state dict, continues bit for bit."""
        return {"calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; load the network's own state dict too, before or after."""
        self.calls = int(state["calls"])
        self._slopes.gradients()
        self._written = None


def toward(values: Tensor, aim: float, calls_left: int) -> Tensor:
    """One call's share of a straight line to the aim, which the last call reaches exactly."""
    # Without a remembered start, so that nothing but the number of calls needs to be saved.
    return torch.full_like(values, aim) if calls_left <= 1 else values + (aim - values) / calls_left
