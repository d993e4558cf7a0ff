"""Accuracy against path length, down to a linear network; and what networks of that depth reach from scratch.

``kind`` "extracted": a dense network, linearized late down to ``remaining``. "scratch": a dense network of ``depth``
trained from the start, for as long. "scratch-wide": the same, widened until it has as many parameters as the network
from which the others are extracted.

Source: Mehmeti-Göpel and Disselhoff (arXiv 2211.17180 v1) for the comparison; protocol our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

import torch
from pydantic import model_validator

from ..checkpoint import Checkpoint
from ..experiment import RecorderFactory, Stages
from .advantage_config import AdvantageConfig
from .networks import build_network
from .nonlinear_advantage import NonlinearAdvantage
from .settings import DataSettings, LinearizationSettings, Natural, Positive, given, implied
from .training import DataExperiment, weight_count
from .training_data import load_data


class CollapseConfig(LinearizationSettings, DataSettings):
    """Settings of one network.

    kind: "extracted", "scratch" or "scratch-wide". shallow_depth: depth of a network from scratch, which takes the
    place of ``depth``; none for an extracted one. A network from scratch is never linearized: the settings of the
    linearization have their defaults.
    """

    start_epoch: Natural = 12
    kind: Literal["extracted", "scratch", "scratch-wide"] = "extracted"
    shallow_depth: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _never_linearized(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind", "extracted") != "extracted":
            return implied(values, "kind", intervention="none")
        return values

    def _without_effect(self) -> Iterator[tuple[str, Any]]:
        yield from super()._without_effect()
        if self.intervention != "linearize":
            yield "start_epoch", 0

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if (self.kind == "extracted") != (self.shallow_depth is None):
            expected = "none" if self.kind == "extracted" else "a depth"
            yield f"setting 'shallow_depth': found {self.shallow_depth}, expected {expected} with kind={self.kind!r}"
        if self.kind != "extracted" and self.network is None:
            yield f"setting 'kind': found {self.kind!r} with model={self.model!r}, expected a network of given depth"

    def trunk(self) -> Self:
        """The dense run from which networks are extracted."""
        return self.dense(kind="extracted", shallow_depth=None)


class Collapse(DataExperiment):
    """Accuracy against path length down to linear, beside shallow networks from scratch."""

    name = "collapse"
    Config = CollapseConfig
    results = NonlinearAdvantage.results

    def trunk(self, config: CollapseConfig) -> tuple[CollapseConfig, int] | None:
        """Return the dense run and the step from which a network is extracted, None for one trained from scratch."""
        origin = NonlinearAdvantage().trunk(_advantage(config))
        if config.kind != "extracted" or origin is None:
            return None
        return config.trunk(), origin[1]

    def steps(self, config: CollapseConfig) -> int:
        """Return how many steps a run takes that starts from its trunk's checkpoint."""
        return NonlinearAdvantage().steps(_advantage(config))

    def stages(
        self, config: CollapseConfig, *, seed: int, recorder: RecorderFactory, start: Checkpoint | None = None
    ) -> Stages:
        """Train one network and return its results, those of ``arm_stages``."""
        return NonlinearAdvantage().stages(_advantage(config), seed=seed, recorder=recorder, start=start)


def _advantage(config: CollapseConfig) -> AdvantageConfig:
    values = given(config.model_dump())
    kind, depth = values.pop("kind"), values.pop("shallow_depth")
    if kind != "extracted":
        values["depth"] = depth
    if kind == "scratch-wide":
        values["width"] = _equal_width(config, depth)
    return AdvantageConfig.model_validate(values)


def _equal_width(config: CollapseConfig, depth: int) -> int:
    """Width at which a network of this depth comes closest to the parameters of the original."""
    train = load_data(config).train
    example = train.inputs[:2]

    def parameters(width: int, depth: int) -> int:
        with torch.random.fork_rng(devices=[]):
            model = build_network(
                config.network or "",
                example,
                train.classes,
                width=width,
                depth=depth,
                granularity=config.granularity,
                options=config.network_options,
            )
        return weight_count(model)

    wanted = parameters(config.width or 1, config.depth or 1)
    low, high = config.width or 1, 2 * (config.width or 1)
    while parameters(high, depth) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(middle, depth) < wanted else (low, middle)
    return min((low, high), key=lambda width: abs(parameters(width, depth) - wanted))
