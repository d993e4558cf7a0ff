"""Linear in the weights or linear in the units: what is lost when either kind of linearization starts at epoch t.

A dense trunk is trained once a seed. A child leaves it at ``start_epoch`` and trains on the same data, with the same
loss, to the end. child "weights": the network's Taylor expansion f(x; w_t) + J_t(x) (w - w_t) in the weights, whose
kernel stands still. child "units": the network with all but a share of its gates linearized, as in nonlinear-advantage.
child "network": the trunk itself.

Source: Fort et al. 2020 (arXiv 2010.15110) for children in the weights; Mehmeti-Göpel and Disselhoff 2023 (arXiv
2211.17180) for those in the units.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.func import functional_call, jvp

from ..checkpoint import Checkpoint
from ..clone import structural_clone
from ..errors import DivergedTraining
from ..experiment import RecorderFactory, Stages
from ..gates import weights
from ..kernel.problem import default_forward
from ..recorder.snapshots import has_running_norms, reestimate
from ..schedule import at_steps
from .advantage_config import AdvantageConfig
from .arm import finite, weight_norm
from .nonlinear_advantage import NonlinearAdvantage
from .settings import DataSettings, LinearizationSettings, given, implied
from .training import DataExperiment, Training, restore
from .training_data import steps_per_epoch


class LinearizedTrainingConfig(LinearizationSettings, DataSettings):
    """Settings of one trunk or child. child: "weights", "units" or "network"; the settings of the linearization belong
    to "units".
    """

    child: Literal["weights", "units", "network"] = "weights"

    @model_validator(mode="before")
    @classmethod
    def _only_units_are_linearized(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return implied(values, "child", intervention="linearize" if values.get("child") == "units" else "none")

    def _without_effect(self) -> Iterator[tuple[str, Any]]:
        yield from super()._without_effect()
        if self.child == "network":
            yield "start_epoch", 0

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.child == "weights" and self.weight_decay:
            yield (
                f"setting 'weight_decay': found {self.weight_decay} with child='weights', expected 0; it would pull "
                "the expansion back to where it begins, not its weights to 0"
            )

    def trunk(self) -> Self:
        """The dense run on the same data with the same network."""
        return self.dense(child="network")

    def advantage(self) -> AdvantageConfig:
        """A child in the units, or the trunk, as a run of nonlinear-advantage."""
        values = given(self.model_dump())
        del values["child"]
        return AdvantageConfig.model_validate(values)


class TaylorNetwork(nn.Module):
    """First-order expansion of a network in its weights:  f(x; w_t) + J_t(x) (w - w_t), in evaluation mode.

    ``shift`` holds w - w_t of every parameter that is no slope of a gate, 0 at first; slopes and buffers stay.

    Args: model: at w_t; a copy is taken.  calibration: batch on which BatchNorm statistics are estimated, once.
    """

    def __init__(self, model: nn.Module, *, calibration: Tensor) -> None:
        super().__init__()
        origin = structural_clone(model, share_parameters=False).eval()
        if has_running_norms(origin):
            reestimate(origin, calibration, default_forward)
        self.names = tuple(weights(origin))
        self.shift = nn.ParameterList(torch.zeros_like(part) for part in weights(origin).values())
        self.origin = origin.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Batches do not change the expansion: its network stays in evaluation mode."""
        super().train(mode)
        self.origin.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        present = dict(self.origin.named_parameters())

        def network(*values: Tensor) -> Tensor:
            result: Tensor = functional_call(self.origin, dict(zip(self.names, values, strict=True)), (inputs,))
            return result

        outputs, change, *_ = jvp(network, tuple(present[name] for name in self.names), tuple(self.shift))
        expanded: Tensor = outputs + change
        return expanded


class LinearizedTraining(DataExperiment):
    """Accuracy of children that are linear in the weights, or in most units, from epoch t on."""

    name = "linearized-training"
    Config = LinearizedTrainingConfig
    results = NonlinearAdvantage.results

    def trunk(self, config: LinearizedTrainingConfig) -> tuple[LinearizedTrainingConfig, int] | None:
        """Return the dense run that a child branches from and the step, or None for the dense run itself."""
        if config.child == "network":
            return None
        return config.trunk(), config.start_epoch * steps_per_epoch(config)

    def steps(self, config: LinearizedTrainingConfig) -> int:
        """Return how many steps a run takes that starts from its trunk's checkpoint."""
        origin = self.trunk(config)
        return config.epochs * steps_per_epoch(config) - (0 if origin is None else origin[1])

    def stages(
        self, config: LinearizedTrainingConfig, *, seed: int, recorder: RecorderFactory, start: Checkpoint | None = None
    ) -> Stages:
        """Train one trunk or child and return its results, those of ``arm_stages``.

        A child in the weights goes on with the state that the trunk's optimizer has at the switch, and records outputs
        only: its kernel stands still.
        """
        if config.child != "weights":
            advantage = NonlinearAdvantage()
            return (yield from advantage.stages(config.advantage(), seed=seed, recorder=recorder, start=start))
        training = Training.of(config, seed)
        model, optimizer = training.build()
        switch = config.start_epoch * training.steps_per_epoch
        results = dict.fromkeys((*training.results, "dense_weight_norm"), math.nan)
        try:
            first_step = 0
            if start is not None:
                first_step = restore(start, model, optimizer, latest=switch, setting_name="start_epoch")
            if first_step < switch:
                training.loop(model, optimizer, first_step=first_step, last_step=switch).run()
            results |= finite(training.at_switch(model) | {"dense_weight_norm": weight_norm(model)})
            diverged = False
        except DivergedTraining:
            # There is nothing to expand: the recording holds the network at its initial weights.
            diverged = True
            model, optimizer = training.build()
        child = TaylorNetwork(model, calibration=training.calibration)
        shifts = training.optimizer(list(child.shift))
        # One shift for each weight, in the same order.
        shifts.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        recording = training.recorder(
            recorder, child, probes=["outputs"], schedule=at_steps({switch, training.last_step})
        )
        if recorder.resumed is not None:
            recorder.resumed.restore(child, shifts)
        if diverged:
            recording.record(0)
        try:
            if not diverged:
                yield training.loop(
                    child,
                    shifts,
                    first_step=switch if recorder.resumed is None else recorder.resumed.step,
                    last_step=training.last_step,
                    recorder=recording,
                    factory=recorder,
                    # Not tried: its passes are transforms of functions.
                    captured=False,
                )
                results |= finite(training.at_end(child))
        except DivergedTraining:
            diverged = True
        return results | training.complexity(model) | {"diverged": float(diverged)}
