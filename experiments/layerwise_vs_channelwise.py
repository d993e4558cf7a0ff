"""Slopes of single channels against slopes of whole layers: which units go is chosen finely or coarsely.

The same dense network, at the same initial weights, is linearized late to the same share of units, with one slope a
channel or one a layer. The dense trunks of both are equal; each is trained for itself, as their checkpoints hold other
slopes.

A layer pays once for all its units, while the loss pulls at its slope with all of them: at one strength a layer is
under less pressure than a channel. The plan varies the strength of layers, so that a difference can be told from that.

Source: follow-up of Mehmeti-Göpel and Disselhoff (arXiv 2506.14386) for the comparison; protocol our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..checkpoint import Checkpoint
from ..experiment import RecorderFactory, Stages
from .advantage_config import AdvantageConfig
from .nonlinear_advantage import NonlinearAdvantage
from .settings import DataSettings, LinearizationSettings, Natural, given
from .training import DataExperiment


class LayerwiseConfig(LinearizationSettings, DataSettings):
    """Settings of one trunk or arm; granularity "channel" or "layer" is what is compared."""

    start_epoch: Natural = 12

    def _without_effect(self) -> Iterator[tuple[str, Any]]:
        yield from super()._without_effect()
        if self.intervention != "linearize":
            yield "start_epoch", 0

    def advantage(self) -> AdvantageConfig:
        """The same run as one of nonlinear-advantage."""
        return AdvantageConfig.model_validate(given(self.model_dump()))


class LayerwiseVsChannelwise(DataExperiment):
    """Accuracy at equal numbers of units, linearized channel by channel or layer by layer."""

    name = "layerwise-vs-channelwise"
    Config = LayerwiseConfig
    results = NonlinearAdvantage.results

    def trunk(self, config: LayerwiseConfig) -> tuple[LayerwiseConfig, int] | None:
        """Return the dense run that a configuration branches from and the step, or None for the dense run itself."""
        origin = NonlinearAdvantage().trunk(config.advantage())
        return None if origin is None else (config.dense(), origin[1])

    def steps(self, config: LayerwiseConfig) -> int:
        """Return how many steps a run takes that starts from its trunk's checkpoint."""
        return NonlinearAdvantage().steps(config.advantage())

    def stages(
        self, config: LayerwiseConfig, *, seed: int, recorder: RecorderFactory, start: Checkpoint | None = None
    ) -> Stages:
        """Train one trunk or arm and return its results, those of ``arm_stages``."""
        return NonlinearAdvantage().stages(config.advantage(), seed=seed, recorder=recorder, start=start)
