"""What gates are worth: a network is made linear early or late in training, down to the same number of gates.

A dense trunk is trained once a seed. An arm leaves it at ``start_epoch``, loses all but a share of its gates during
``ramp_epochs``, brings the survivors to their slope during ``settle_epochs`` and trains on to the end. Controls: the
trunk itself (ReLU reference), a linear network, masks that are random or come from a late arm, another order of data.

Source: protocol after Mehmeti-Göpel and Disselhoff 2023 (arXiv 2211.17180); count schedule, survivor rules and
controls are our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..datasets import TrainingData, digit_pairs, load_npz, probe_batch
from ..errors import ConfigurationError, DivergedTraining, TraceError
from ..experiment import DEFAULT_PROBES, RecorderFactory, adam, evaluate, fit, linear_tail
from ..gates import gates, nonlinear_units
from ..linearization import Linearizer, MaskRamp, SlopeReplay, random_mask, survivor_mask
from ..paths import path_lengths
from ..recorder import Watch
from ..schedule import Schedule, at_epochs, at_steps, paired
from .advantage_config import AdvantageConfig
from .networks import GatedMLP, load_network

SlopeOwner = Linearizer | MaskRamp | SlopeReplay

_CALIBRATION_SAMPLES = 512

# Milliseconds a snapshot; a kernel takes a hundred times that on larger networks.
_CHEAP_PROBES = ("gates", "units", "path-length")


@dataclass(frozen=True)
class _Setting:
    """What one configuration and seed fix before training."""

    config: AdvantageConfig
    seed: int
    data: TrainingData
    steps_per_epoch: int

    @property
    def switch(self) -> int:
        return self.config.start_epoch * self.steps_per_epoch

    @property
    def ramp_steps(self) -> int:
        return self.config.ramp_epochs * self.steps_per_epoch

    @property
    def settle_steps(self) -> int:
        return self.config.effective_settle_epochs * self.steps_per_epoch

    @property
    def last_step(self) -> int:
        return self.config.total_epochs * self.steps_per_epoch

    @property
    def calibration(self) -> Tensor:
        return self.data.train.inputs[:_CALIBRATION_SAMPLES]

    def build(self) -> tuple[nn.Module, torch.optim.Adam]:
        """Return the network at its initial weights, which belong to the seed alone, and its optimizer."""
        config, train = self.config, self.data.train
        torch.manual_seed(self.seed)
        if config.model is not None:
            example = train.inputs[: config.batch_size]
            model = load_network(config.model, example, train.classes, granularity=config.granularity)
        else:
            if not train.inputs.is_floating_point():
                raise ConfigurationError(
                    "data: found integer inputs, which the MLP cannot take; give model=file.py:function"
                )
            model = GatedMLP(
                train.inputs[0].numel(),
                train.classes,
                width=config.width or 0,
                depth=config.depth or 0,
                granularity=config.granularity,
            )
        _learn_slopes(model, False)
        slopes = {id(gate.slope) for gate in gates(model).values()}
        weights = [parameter for parameter in model.parameters() if id(parameter) not in slopes]
        return model, adam(weights, learning_rate=config.learning_rate)

    def fit(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        switch: int,
        first_step: int,
        last_step: int,
        after_step: Callable[[int], None],
        recorder: Any = None,
        factory: RecorderFactory | None = None,
        state: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """Train; the data stream is the trunk's up to ``switch`` and that of ``data_order`` from there on."""
        tail_steps = round(self.config.decay_share * self.config.epochs * self.steps_per_epoch)

        def epoch_data(epoch: int) -> Any:
            order = self.config.data_order if epoch * self.steps_per_epoch >= switch else 0
            return self.data.epoch(seed=self.seed, data_order=order, epoch=epoch)

        fit(
            model,
            optimizer,
            epoch_data=epoch_data,
            batch_size=self.config.batch_size,
            steps_per_epoch=self.steps_per_epoch,
            first_step=first_step,
            last_step=last_step,
            seed=self.seed,
            learning_rate=linear_tail(self.config.learning_rate, total_steps=self.last_step, tail_steps=tail_steps),
            after_step=after_step,
            recorder=recorder,
            factory=factory,
            state=state,
        )


class NonlinearAdvantage:
    """Accuracy after early against late linearization, at the same number of nonlinear units."""

    name = "nonlinear-advantage"
    Config = AdvantageConfig

    def trunk(self, config: AdvantageConfig) -> tuple[AdvantageConfig, int] | None:
        """Return the dense run that a configuration branches from and the step, or None for the dense run itself."""
        if config.is_trunk:
            return None
        epoch = config.latest_start if config.uses_late_ramp else config.start_epoch
        return config.trunk(), epoch * _steps_per_epoch(config)

    def run(
        self, config: AdvantageConfig, *, seed: int, recorder: RecorderFactory, start: Checkpoint | None = None
    ) -> Mapping[str, float]:
        """Train one trunk or arm and return its results; without ``start`` the dense epochs are trained here.

        Results: test_accuracy, test_loss, train_loss at the end; dense_accuracy, dense_loss at the switch (test);
        active_units, active_share, survivor_nonlinearity (mean |1 - slope| of the units that remain), weighted_units;
        napl, apl, weighted_napl (NaN where the graph cannot be traced); diverged (1: accuracies and losses are NaN).
        """
        data = load_data(config)
        setting = _Setting(config, seed, data, _steps_per_epoch(config))
        model, optimizer = setting.build()
        first_step = 0
        if start is not None and not config.uses_late_ramp:
            first_step = _resume(start, model, optimizer, latest=setting.switch, setting_name="start_epoch")
        recording = recorder(
            model,
            sets={
                name: probe_batch(part, per_class=config.probe_per_class, seed=config.split_seed)
                for name, part in (("train", data.train), ("test", data.test))
            },
            steps_per_epoch=setting.steps_per_epoch,
            total_steps=setting.last_step,
            probes=_probes(setting),
            schedule=_schedule(setting, first_step),
            calibration=setting.calibration,
            checkpoint_steps=[epoch * setting.steps_per_epoch for epoch in config.checkpoint_epochs],
        )
        arm = _Arm(setting, model)
        diverged = False
        try:
            arm.begin = _protocol(setting, start)
            if recorder.resumed is not None:
                first_step = recorder.resumed.step
                # Before the network is restored: an owner of slopes counts from the dense network.
                arm.resume(first_step, recorder.resumed.extra["experiment"])
                recorder.resumed.restore(model, optimizer)
            elif first_step == setting.switch:
                arm.switch()
            setting.fit(
                model,
                optimizer,
                switch=setting.switch,
                first_step=first_step,
                last_step=setting.last_step,
                after_step=arm.after_step,
                recorder=recording,
                factory=recorder,
                state=arm.state,
            )
        except DivergedTraining:
            diverged = True
        results = dict.fromkeys(("test_accuracy", "test_loss", "train_loss"), math.nan)
        if not diverged:
            results["test_accuracy"], results["test_loss"] = arm.evaluate(data.test)
            results["train_loss"] = arm.evaluate(data.train)[1]
        return results | arm.dense | _complexity(model, setting.calibration) | {"diverged": float(diverged)}


class _Arm:
    """Moves the slopes of one network at the right steps, and measures it at the switch."""

    def __init__(self, setting: _Setting, model: nn.Module) -> None:
        self._setting = setting
        self._model = model
        self.begin: Callable[[nn.Module], SlopeOwner] | None = None
        self._owner: SlopeOwner | None = None
        self.dense = {"dense_accuracy": math.nan, "dense_loss": math.nan}

    def evaluate(self, data: Any) -> tuple[float, float]:
        return evaluate(self._model, data, calibration=self._setting.calibration)

    def switch(self) -> None:
        """Measure the dense network, then hand its slopes to their owner."""
        accuracy, loss = self.evaluate(self._setting.data.test)
        self.dense = {"dense_accuracy": accuracy, "dense_loss": loss}
        if self._setting.config.intervention == "linear":
            for gate in gates(self._model).values():
                gate.freeze()
        if self.begin is not None:
            self._owner = self.begin(self._model)
            _learn_slopes(self._model, isinstance(self._owner, Linearizer))

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside network and optimizer."""
        return {"dense": self.dense, "owner": None if self._owner is None else self._owner.state_dict()}

    def resume(self, step: int, state: Mapping[str, Any]) -> None:
        """Go on from a state; the network is given its own afterwards."""
        self.dense = dict(state["dense"])
        if state["owner"] is not None and self.begin is not None:
            self._owner = self.begin(self._model)
            self._owner.load_state_dict(state["owner"])
            learning = isinstance(self._owner, Linearizer) and step < self._setting.switch + self._setting.ramp_steps
            _learn_slopes(self._model, learning)

    def after_step(self, step: int) -> None:
        if self._owner is not None and not self._owner.done:
            self._owner.step()
            if step == self._setting.switch + self._setting.ramp_steps:
                # Gradients of slopes that do not learn any more would only cost time.
                _learn_slopes(self._model, False)
        elif step == self._setting.switch:
            self.switch()


def _protocol(setting: _Setting, start: Checkpoint | None) -> Callable[[nn.Module], SlopeOwner] | None:
    """Return what makes the owner of the slopes at the switch, None where nobody moves them."""
    config = setting.config
    if config.intervention != "linearize":
        return None
    if config.uses_late_ramp:
        mask, path = _late_ramp(setting, start)
        if config.mask == "late-path":
            return lambda model: SlopeReplay(
                model,
                path,
                mask,
                survivors=config.survivors,
                common_slope=config.common_slope,
                settle_steps=setting.settle_steps,
            )
        return lambda model: _mask_ramp(setting, model, mask)
    if config.mask == "random":
        return lambda model: _mask_ramp(setting, model, random_mask(model, config.remaining, setting.seed))
    return lambda model: _linearizer(setting, model, keep_path=False)


def _linearizer(setting: _Setting, model: nn.Module, *, keep_path: bool) -> Linearizer:
    config = setting.config
    return Linearizer(
        model,
        remaining=config.remaining,
        steps=setting.ramp_steps,
        strength=config.strength,
        survivors=config.survivors,
        common_slope=config.common_slope,
        settle_steps=setting.settle_steps,
        keep_path=keep_path,
    )


def _mask_ramp(setting: _Setting, model: nn.Module, mask: Mapping[str, Tensor]) -> MaskRamp:
    return MaskRamp(
        model,
        mask,
        steps=setting.ramp_steps,
        survivors=setting.config.survivors,
        common_slope=setting.config.common_slope,
        settle_steps=setting.settle_steps,
    )


def _late_ramp(setting: _Setting, start: Checkpoint | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the survivors that the arm from ``latest_start`` learns, and the path of its slopes."""
    model, optimizer = setting.build()
    switch = setting.config.latest_start * setting.steps_per_epoch
    first_step = 0
    if start is not None:
        first_step = _resume(start, model, optimizer, latest=switch, setting_name="latest_start")
    linearizer = _linearizer(setting, model, keep_path=True)

    def after_step(step: int) -> None:
        if step > switch:
            linearizer.step()

    if first_step < switch:
        setting.fit(model, optimizer, switch=switch, first_step=first_step, last_step=switch, after_step=after_step)
    _learn_slopes(model, True)
    setting.fit(
        model,
        optimizer,
        switch=switch,
        first_step=switch,
        last_step=switch + setting.ramp_steps,
        after_step=after_step,
    )
    return survivor_mask(model), linearizer.path


def _resume(
    start: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, *, latest: int, setting_name: str
) -> int:
    if start.step > latest:
        raise ConfigurationError(
            f"start: found a checkpoint of step {start.step}, expected step {latest} ({setting_name}) or earlier"
        )
    start.restore(model, optimizer)
    return start.step


def load_data(config: AdvantageConfig) -> TrainingData:
    """Return the digit pairs of the configuration, or the user's data.

    Raises: ConfigurationError, ShapeError: the user's file does not fit.
    """
    if config.data is not None:
        return load_npz(config.data)
    # Fixed pairs of training digits for train loss and probes: as many as test pairs. None only beside `data`.
    count = config.test_pairs or 0
    return digit_pairs(
        config.task or "sum10",
        pairs=config.pairs or 0,
        test_pairs=count,
        train_pairs=count,
        split_seed=config.split_seed,
    )


def _steps_per_epoch(config: AdvantageConfig) -> int:
    samples = len(load_npz(config.data).train) if config.data is not None else config.pairs or 0
    if samples < config.batch_size:
        raise ConfigurationError(
            f"data {config.data}: found {samples} training samples, expected at least batch_size={config.batch_size}; "
            "lower batch_size"
        )
    return samples // config.batch_size


def _schedule(setting: _Setting, first_step: int) -> Schedule:
    """Return when to record: often on the trunk, at the switch, the end of the ramp and the end on an arm."""
    config, per_epoch = setting.config, setting.steps_per_epoch
    if not config.is_trunk:
        return at_steps({first_step, setting.switch, setting.switch + setting.ramp_steps, setting.last_step})
    epochs = [0, 0.25, 0.5, 1, 1.5, *range(2, config.total_epochs + 1)]
    return paired(at_epochs(epochs, per_epoch), max(1, per_epoch // 4))


def _probes(setting: _Setting) -> list[str | Watch]:
    """Return all probes; on an arm those that cost little also look once an epoch while the gates go linear."""
    if setting.config.intervention != "linearize":
        return list(DEFAULT_PROBES)
    moving = range(setting.switch, setting.switch + setting.ramp_steps + setting.settle_steps + 1)
    often = at_steps(moving[:: setting.steps_per_epoch])
    return [Watch(name, schedule=often) if name in _CHEAP_PROBES else name for name in DEFAULT_PROBES]


def _learn_slopes(model: nn.Module, learn: bool) -> None:
    for gate in gates(model).values():
        gate.slope.requires_grad_(learn)


def _complexity(model: nn.Module, example: Tensor) -> dict[str, float]:
    units = nonlinear_units(model)
    try:
        paths = path_lengths(model, example[:2])
        lengths = {"napl": paths.normalized, "apl": paths.mean, "weighted_napl": paths.weighted}
    except TraceError:
        lengths = dict.fromkeys(("napl", "apl", "weighted_napl"), math.nan)
    active = units.active_total
    return {
        "active_units": float(active),
        "active_share": units.active_share,
        "survivor_nonlinearity": units.weighted_total / active if active else math.nan,
        "weighted_units": units.weighted_total,
        **lengths,
    }
