"""An experiment of a few steps on a few numbers, which branches like the large ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from ntkdyn.adam import Adam
from ntkdyn.checkpoint import Checkpoint
from ntkdyn.datasets import Dataset
from ntkdyn.experiment import RecorderFactory
from ntkdyn.gates import Gate
from ntkdyn.schedule import every
from ntkdyn.training_loop import TrainingLoop


class Settings(BaseModel):
    """start: step at which the arm leaves its trunk. kind: "trunk" stays dense. rate: of the arm. broken: arms fail."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["trunk", "arm"] = "arm"
    start: int = 0
    length: int = 6
    rate: float = 0.1
    flag: bool = False
    broken: bool = False


class Tiny:
    """A linear network with a gate."""

    name = "tiny"
    Config = Settings

    def trunk(self, config: Settings) -> tuple[Settings, int] | None:
        """The dense run."""
        return None if config.kind == "trunk" else (Settings(kind="trunk", length=config.length), config.start)

    def steps(self, config: Settings) -> int:
        """Steps of a run that starts from its trunk."""
        return config.length - (config.start if config.kind == "arm" else 0)

    def run(
        self, config: Settings, *, seed: int, recorder: RecorderFactory, start: Checkpoint | None = None
    ) -> Mapping[str, float]:
        """Train on random numbers."""
        if config.broken and config.kind == "arm":
            raise ValueError("this arm is broken")
        generator = torch.Generator().manual_seed(seed)
        data = Dataset(torch.randn(8, 3, generator=generator), torch.arange(8) % 2, 2)
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), Gate(4), nn.Linear(4, 2))
        optimizer = Adam(model.parameters(), learning_rate=config.rate)
        first = 0
        if start is not None:
            start.restore(model, optimizer)
            first = start.step
        recording = recorder(
            model, sets=data[:4], steps_per_epoch=1, total_steps=config.length, schedule=every(2), probes=["units"]
        )
        last: list[float] = []

        def loss(outputs: Any, targets: Any) -> Any:
            value = nn.functional.cross_entropy(outputs, targets)
            last[:] = [value.item()]
            return value

        TrainingLoop(
            model=model,
            optimizer=optimizer,
            epoch_data=lambda epoch: data,
            batch_size=8,
            steps_per_epoch=1,
            first_step=first,
            last_step=config.length,
            loss=loss,
            recorder=recording,
            factory=recorder,
        ).run()
        return {"loss": last[0], "test_accuracy": 0.5}
