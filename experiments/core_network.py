"""The core that a fixed price per unit leaves: is its shape the same whatever width and depth the network began with?

A dense network is trained to ``start_epoch``. For ``ramp_epochs`` every unit then pays ``penalty_weight`` times the
root of its distance to linear, a plain sum over all units, and freezes once it is linear; how many are left is the
outcome.
The survivors keep their slopes, and training goes on to the end.

Source: Mehmeti-Göpel and Disselhoff 2023 (arXiv 2211.17180) for the question; the schedule is our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from ..checkpoint import Checkpoint
from ..experiment import RecorderFactory, Stages
from ..linearization import Linearizer
from .arm import OF_EVERY_ARM, arm_stages
from .settings import DataSettings, Natural, Positive
from .training import DataExperiment, Training
from .training_data import steps_per_epoch


class CoreNetworkConfig(DataSettings):
    """Settings of one trunk or core.

    intervention: "linearize" or "none". start_epoch: dense epochs before. ramp_epochs: epochs under the penalty.
    penalty_weight: loss per unit at slope 0; slopes move by plain SGD of step 1, so that without a gradient of the loss
    a unit takes 4 / (3 penalty_weight) steps from slope 0 to 1.
    """

    intervention: Literal["linearize", "none"] = "linearize"
    start_epoch: Natural = 12
    ramp_epochs: Positive = 6
    penalty_weight: Annotated[float, Field(ge=0)] = 0.02

    _OF_THE_ARM: ClassVar[tuple[str, ...]] = ("start_epoch", "ramp_epochs", "penalty_weight")

    def _without_effect(self) -> Iterator[tuple[str, Any]]:
        yield from super()._without_effect()
        if self.intervention == "none":
            for name in self._OF_THE_ARM:
                yield name, type(self).model_fields[name].default

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.intervention == "linearize" and self.start_epoch + self.ramp_epochs > self.epochs:
            yield (
                f"setting 'start_epoch': found {self.start_epoch}, expected at most {self.epochs - self.ramp_epochs}: "
                f"start_epoch + ramp_epochs={self.ramp_epochs} must end within epochs={self.epochs}"
            )

    def _warnings(self) -> Iterator[str]:
        yield from super()._warnings()
        allowed = int((1 - self.decay_share) * self.epochs + 1e-9) - self.ramp_epochs
        if self.intervention == "linearize" and self.start_epoch > allowed:
            yield (
                f"start_epoch={self.start_epoch}: the penalty ends after the learning rate begins to fall (the last "
                f"{self.decay_share:g} of epochs={self.epochs}), so this arm has no time to recover; at most {allowed} "
                "leaves time"
            )

    def trunk(self) -> Self:
        """The dense run on the same data with the same network."""
        values = {name: value for name, value in self.model_dump().items() if name not in self._OF_THE_ARM}
        return type(self).model_validate(values | {"intervention": "none"})


class CoreNetwork(DataExperiment):
    """Units that a fixed price per unit leaves, over starting widths and depths."""

    name = "core-network"
    Config = CoreNetworkConfig
    results = (*Training.results, *OF_EVERY_ARM)

    def trunk(self, config: CoreNetworkConfig) -> tuple[CoreNetworkConfig, int] | None:
        """Return the dense run that a configuration branches from and the step, or None for the dense run itself."""
        if config.intervention == "none":
            return None
        return config.trunk(), config.start_epoch * steps_per_epoch(config)

    def steps(self, config: CoreNetworkConfig) -> int:
        """Return how many steps a run takes that starts from its trunk's checkpoint."""
        origin = self.trunk(config)
        return config.epochs * steps_per_epoch(config) - (0 if origin is None else origin[1])

    def stages(
        self, config: CoreNetworkConfig, *, seed: int, recorder: RecorderFactory, start: Checkpoint | None = None
    ) -> Stages:
        """Train one trunk or core and return its results, those of ``arm_stages``."""
        training = Training.of(config, seed)
        linearizes = config.intervention == "linearize"
        ramp_steps = config.ramp_epochs * training.steps_per_epoch
        return arm_stages(
            training,
            recorder,
            start=start,
            switch=config.start_epoch * training.steps_per_epoch if linearizes else 0,
            ramp_steps=ramp_steps,
            begin=(
                (lambda: lambda model: Linearizer(model, penalty_weight=config.penalty_weight, steps=ramp_steps))
                if linearizes
                else None
            ),
            trunk=not linearizes,
        )
