"""One arm: a network whose slopes are handed to their owner at the switch, measured there and at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..errors import DivergedTraining
from ..experiment import DEFAULT_PROBES, RecorderFactory, Stages
from ..gates import gates, learn_slopes, weights
from ..linearization import Linearizer, MaskRamp, SlopeReplay
from ..recorder import Recorder, Watch
from ..schedule import Schedule, at_epochs, at_steps, paired
from ..training_loop import Batches, TrainingLoop
from .before import BeforeSwitch
from .settings import LinearizationSettings, TrainingSettings
from .training import Objective, restore

SlopeOwner = Linearizer | MaskRamp | SlopeReplay
Begin = Callable[[nn.Module], SlopeOwner]

# Milliseconds a snapshot; a kernel takes a hundred times that on larger networks.
_CHEAP_PROBES = ("gates", "units", "path-length")

OF_EVERY_ARM = (
    *("dense_weight_norm", "active_units", "active_share", "survivor_nonlinearity", "weighted_units"),
    *("napl", "apl", "weighted_napl", "effective_width", "parameters", "diverged"),
)
"""Results of ``arm_stages`` beside what the training measures."""


class Arm:
    """Moves the slopes of one network at the right steps, and measures it at the switch.

    Args:
        model: the network.
        switch: step at which the slopes get their owner.
        ramp_steps: steps after the switch in which the loss moves slopes.
        begin: called by ``prepare``; returns what makes the owner. None where nobody moves the slopes.
        measure: gives the numbers of the network at the switch.
        linear: freeze all gates at the switch.
        at_switch: called last at the switch.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        switch: int,
        ramp_steps: int,
        begin: Callable[[], Begin] | None,
        measure: Callable[[nn.Module], Mapping[str, float]],
        linear: bool = False,
        at_switch: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model
        self._switch = switch
        self._ramp_steps = ramp_steps
        self._prepare = begin
        self._begin: Begin | None = None
        self._measure = measure
        self._linear = linear
        self._at_switch = at_switch
        self._owner: SlopeOwner | None = None
        self.dense: dict[str, float] = {}

    def prepare(self) -> None:
        """Find out who will own the slopes; for some masks that takes a training of its own, which may diverge."""
        if self._prepare is not None:
            self._begin = self._prepare()

    def switch(self) -> None:
        """Measure the dense network, then hand its slopes to their owner."""
        self.dense = dict(self._measure(self._model))
        if self._linear:
            for gate in gates(self._model).values():
                gate.freeze()
        if self._begin is not None:
            self._owner = self._begin(self._model)
            learn_slopes(self._model, isinstance(self._owner, Linearizer))
        self._at_switch()

    def after_step(self, step: int) -> None:
        """Move the slopes; call it after every optimizer step with the number of steps so far."""
        if self._owner is not None and not self._owner.done:
            self._owner.step()
            if step == self._switch + self._ramp_steps:
                learn_slopes(self._model, False)
        elif step == self._switch:
            self.switch()

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside network and optimizer."""
        return {"dense": self.dense, "owner": None if self._owner is None else self._owner.state_dict()}

    def resume(self, step: int, state: Mapping[str, Any]) -> None:
        """Go on from a state; the network is given its own afterwards."""
        self.dense = dict(state["dense"])
        if state["owner"] is not None and self._begin is not None:
            self._owner = self._begin(self._model)
            self._owner.load_state_dict(state["owner"])
            learning = isinstance(self._owner, Linearizer) and step < self._switch + self._ramp_steps
            learn_slopes(self._model, learning)


class ArmTraining(Protocol):
    """What ``arm_stages`` needs of the training of one configuration and seed; steps are applied optimizer steps.

    Attributes:
        steps_per_epoch, last_step: of the run.
        results: names of everything that ``at_switch`` and ``at_end`` measure.
    """

    @property
    def config(self) -> TrainingSettings: ...

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def last_step(self) -> int: ...

    @property
    def results(self) -> tuple[str, ...]: ...

    def build(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the network at its initial weights, and its optimizer."""
        ...

    def recorder(
        self, factory: RecorderFactory, model: nn.Module, *, schedule: Schedule, probes: list[Any]
    ) -> Recorder:
        """Return the recorder, with the probe sets of the data."""
        ...

    def epoch_data(self, epoch: int, *, data_order: int = 0) -> Batches:
        """Return the training samples of one epoch in their order."""
        ...

    def loop(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        first_step: int,
        last_step: int,
        epoch_data: Callable[[int], Batches],
        rate_factor: Callable[[int], float],
        objective: Objective | None,
        after_step: Callable[[int], None],
        recorder: Recorder,
        factory: RecorderFactory,
        state: Callable[[], Mapping[str, Any]],
    ) -> TrainingLoop:
        """Return the training; it raises DivergedTraining."""
        ...

    def at_switch(self, model: nn.Module) -> dict[str, float]:
        """Measure the dense network that is left at the switch."""
        ...

    def at_end(self, model: nn.Module) -> dict[str, float]:
        """Measure the network at the end."""
        ...

    def complexity(self, model: nn.Module) -> dict[str, float]:
        """Return how nonlinear the network is."""
        ...


def arm_stages(
    training: ArmTraining,
    factory: RecorderFactory,
    *,
    start: Checkpoint | None,
    switch: int,
    ramp_steps: int = 0,
    settle_steps: int = 0,
    begin: Callable[[], Begin] | None = None,
    linear: bool = False,
    trunk: bool = False,
    data_order: int = 0,
    new_optimizer: bool = False,
    before: Callable[[nn.Module], BeforeSwitch] | None = None,
) -> Stages:
    """One trunk or arm from ``start`` or from its initial weights to the end: yields its training, returns its results.

    Args:
        switch, ramp_steps, settle_steps, linear: as in Arm, in steps.
        begin: as in Arm; None where nobody moves the slopes.
        trunk: record kernels often; an arm does so at its start, the switch, the end of the ramp and the end.
        data_order: of the batches from the switch on.
        new_optimizer: forget the optimizer's state at the switch.
        before: makes the intervention on what comes before the switch, given the network at its initial weights.

    Results: those of the training at the end and at the switch, dense_weight_norm, those of ``complexity``; diverged
    (1: what the training measures is NaN).
    """
    model, optimizer = training.build()
    intervention = BeforeSwitch(training) if before is None else before(model)
    first_step = 0
    if start is not None:
        first_step = restore(start, model, optimizer, latest=switch, setting_name="start_epoch")
    per_epoch = training.steps_per_epoch
    moving = range(switch, switch + ramp_steps + settle_steps + 1)[::per_epoch] if begin else None
    schedule = _often(training) if trunk else at_steps({first_step, switch, switch + ramp_steps, training.last_step})
    recorder = training.recorder(factory, model, probes=_probes(moving), schedule=schedule)

    def measure(network: nn.Module) -> Mapping[str, float]:
        return finite(training.at_switch(network) | {"dense_weight_norm": weight_norm(network)})

    def after_step(step: int) -> None:
        # Before the probes look, which would take numbers that overflow for a fault of theirs.
        if schedule(step) or (moving is not None and step in moving):
            finite({"weight_norm": weight_norm(model)})
        arm.after_step(step)

    results = dict.fromkeys((*training.results, "dense_weight_norm"), math.nan)
    diverged = False
    arm = Arm(
        model,
        switch=switch,
        ramp_steps=ramp_steps,
        begin=begin,
        measure=measure,
        linear=linear,
        at_switch=optimizer.state.clear if new_optimizer else lambda: None,
    )
    try:
        try:
            arm.prepare()
        except DivergedTraining:
            # The network itself has not begun: its recording holds where it would have.
            recorder.record(first_step)
            raise
        if factory.resumed is not None:
            first_step = factory.resumed.step
            # Before the network is restored: an owner of slopes counts from the dense network.
            arm.resume(first_step, factory.resumed.extra["experiment"])
            factory.resumed.restore(model, optimizer)
        elif first_step == switch:
            arm.switch()
        yield training.loop(
            model,
            optimizer,
            first_step=first_step,
            last_step=training.last_step,
            epoch_data=lambda epoch: intervention.epoch_data(
                epoch, data_order=data_order if epoch * per_epoch >= switch else 0
            ),
            rate_factor=intervention.rate_factor,
            objective=intervention.objective,
            after_step=after_step,
            recorder=recorder,
            factory=factory,
            state=arm.state,
        )
        results |= finite(training.at_end(model))
    except DivergedTraining:
        diverged = True
    results |= arm.dense
    return results | training.complexity(model) | {"diverged": float(diverged)}


def finite(measured: dict[str, float]) -> dict[str, float]:
    """Return what was measured of a network.

    Raises: DivergedTraining: a number is not finite; the share of right answers of such a network would be chance.
    """
    spoiled = [name for name, value in measured.items() if not math.isfinite(value)]
    if spoiled:
        raise DivergedTraining(f"training: found {spoiled[0]}={measured[spoiled[0]]}, expected a finite number")
    return measured


def _often(training: ArmTraining) -> Schedule:
    epochs = [0, 0.25, 0.5, 1, 1.5, *range(2, training.config.total_epochs + 1)]
    return paired(at_epochs(epochs, training.steps_per_epoch), max(1, training.steps_per_epoch // 4))


def weight_norm(model: nn.Module) -> float:
    """Return the root of the summed squares of all parameters that are no slopes."""
    return math.sqrt(sum(float((part.detach() ** 2).sum()) for part in weights(model).values()))


def linearizer(
    config: LinearizationSettings, model: nn.Module, *, steps_per_epoch: int, keep_path: bool = False
) -> Linearizer:
    """Return the owner of the slopes that the settings ask for."""
    return Linearizer(
        model,
        remaining=config.target,
        steps=config.ramp_epochs * steps_per_epoch,
        strength=config.strength,
        survivors=config.survivors,
        common_slope=config.common_slope,
        settle_steps=config.effective_settle_epochs * steps_per_epoch,
        keep_path=keep_path,
    )


def mask_ramp(
    config: LinearizationSettings, model: nn.Module, mask: Mapping[str, Tensor], *, steps_per_epoch: int
) -> MaskRamp:
    """Return the owner that brings the slopes to a given mask in the same time."""
    return MaskRamp(
        model,
        mask,
        steps=config.ramp_epochs * steps_per_epoch,
        survivors=config.survivors,
        common_slope=config.common_slope,
        settle_steps=config.effective_settle_epochs * steps_per_epoch,
    )


def _probes(moving: range | None) -> list[str | Watch]:
    """All probes; those that cost little also look at the steps ``moving`` while the gates go linear."""
    if moving is None:
        return list(DEFAULT_PROBES)
    often = at_steps(moving)
    return [Watch(name, schedule=often) if name in _CHEAP_PROBES else name for name in DEFAULT_PROBES]
