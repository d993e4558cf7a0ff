"""What gates are worth: a network is made linear early or late in training, down to the same number of gates.

A dense trunk is trained once a seed. An arm leaves it at ``start_epoch``, loses all but a share of its gates during
``ramp_epochs``, brings the survivors to their slope during ``settle_epochs`` and trains on to the end. Controls: the
trunk itself (ReLU reference), a linear network, masks that are random or come from a late arm, another order of data,
and interventions on the dense training before the switch.

Source: protocol after Mehmeti-Göpel and Disselhoff 2023 (arXiv 2211.17180); count schedule, survivor rules and
controls are our own.
"""

from __future__ import annotations

from torch import Tensor

from ..checkpoint import Checkpoint
from ..experiment import RecorderFactory, Stages
from ..gates import learn_slopes
from ..linearization import SlopeReplay, random_mask, survivor_mask
from .advantage_config import AdvantageConfig
from .arm import OF_EVERY_ARM, Begin, arm_stages, linearizer, mask_ramp
from .before import Intervention
from .settings import DataSettings
from .training import DataExperiment, Training, restore
from .training_data import steps_per_epoch


class NonlinearAdvantage(DataExperiment):
    """Accuracy after early against late linearization, at the same number of nonlinear units."""

    name = "nonlinear-advantage"
    Config = AdvantageConfig
    results = (*Training.results, *OF_EVERY_ARM)

    def trunk(self, config: AdvantageConfig) -> tuple[AdvantageConfig, int] | None:
        """Return the dense run that a configuration branches from and the step, or None for the dense run itself."""
        if config.is_trunk:
            return None
        epoch = config.latest_start if config.uses_late_ramp else config.start_epoch
        return config.trunk(), epoch * steps_per_epoch(config)

    def steps(self, config: AdvantageConfig) -> int:
        """Return how many steps a run takes that starts from its trunk's checkpoint."""
        origin, per_epoch = self.trunk(config), steps_per_epoch(config)
        whole = config.total_epochs * per_epoch
        if config.uses_late_ramp:
            # Once for mask or slope path, and then from the start.
            return whole + config.ramp_epochs * per_epoch
        return whole if origin is None else whole - origin[1]

    def trains_together(self, config: DataSettings) -> bool:
        """Whether the network is a chain that Adam trains on the CPU, by no objective of its own."""
        own = {"scale_before": 1.0, "train_before": "all", "anchor_before": 0.0}
        return super().trains_together(config) and all(getattr(config, name, one) == one for name, one in own.items())

    def stages(
        self, config: AdvantageConfig, *, seed: int, recorder: RecorderFactory, start: Checkpoint | None = None
    ) -> Stages:
        """Train one trunk or arm and return its results; without ``start`` the dense epochs are trained here.

        Results: those of ``arm_stages``.
        """
        training = Training.of(config, seed)
        switch = config.start_epoch * training.steps_per_epoch
        return arm_stages(
            training,
            recorder,
            # The late ramp, of which the arm itself is no branch, takes the checkpoint.
            start=None if config.uses_late_ramp else start,
            switch=switch,
            ramp_steps=config.ramp_epochs * training.steps_per_epoch,
            settle_steps=config.effective_settle_epochs * training.steps_per_epoch,
            begin=(lambda: _protocol(config, training, start)) if config.intervention == "linearize" else None,
            linear=config.intervention == "linear",
            # Of a trunk under an intervention only its kernels at the ends and at the switch are asked for.
            trunk=config.is_trunk and not config.before,
            data_order=config.data_order,
            new_optimizer=config.optimizer_at_switch == "new",
            before=(lambda model: Intervention(training, config, model, switch=switch)) if config.before else None,
        )


def _protocol(config: AdvantageConfig, training: Training, start: Checkpoint | None) -> Begin:
    """Return what makes the owner of the slopes at the switch."""
    per_epoch = training.steps_per_epoch
    if config.uses_late_ramp:
        mask, path = _late_ramp(config, training, start)
        if config.mask == "late-path":
            return lambda model: SlopeReplay(
                model,
                path,
                mask,
                survivors=config.survivors,
                common_slope=config.common_slope,
                settle_steps=config.effective_settle_epochs * per_epoch,
            )
        return lambda model: mask_ramp(config, model, mask, steps_per_epoch=per_epoch)
    if config.mask == "random":
        return lambda model: mask_ramp(
            config, model, random_mask(model, config.target, training.seed), steps_per_epoch=per_epoch
        )
    return lambda model: linearizer(config, model, steps_per_epoch=per_epoch)


def _late_ramp(
    config: AdvantageConfig, training: Training, start: Checkpoint | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the survivors that the arm from ``latest_start`` learns, and the path of its slopes."""
    model, optimizer = training.build()
    switch = config.latest_start * training.steps_per_epoch
    first_step = 0
    if start is not None:
        first_step = restore(start, model, optimizer, latest=switch, setting_name="latest_start")
    if first_step < switch:
        training.loop(model, optimizer, first_step=first_step, last_step=switch).run()
    owner = linearizer(config, model, steps_per_epoch=training.steps_per_epoch, keep_path=True)
    learn_slopes(model, True)
    training.loop(
        model,
        optimizer,
        first_step=switch,
        last_step=switch + owner.steps,
        epoch_data=lambda epoch: training.epoch_data(epoch, data_order=config.data_order),
        after_step=lambda step: owner.step(),
    ).run()
    return survivor_mask(model), owner.path
