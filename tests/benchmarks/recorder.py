"""What a step without a snapshot costs: an optimizer's step with a recorder of six schedules, a bare hook, and nothing.

Medians over interleaved rounds. Run: python -P tests/benchmarks/recorder.py
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import ntkdyn as nd

ROUNDS, STEPS = 201, 400


class Nothing(torch.optim.Optimizer):
    """An optimizer whose step does nothing, so that only hooks are measured."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Do nothing."""


class Smallest:
    """A probe of one number."""

    name = "smallest"

    def fields(self, snapshot: nd.Snapshot) -> list[nd.Field]:
        """Declare the number."""
        return [nd.Field(name="zero")]

    def measure(self, snapshot: nd.Snapshot) -> dict[str, float]:
        """Measure nothing."""
        return {"zero": 0.0}


def seconds(optimizer: Nothing) -> float:
    """Time of one step."""
    start = time.perf_counter()
    for _ in range(STEPS):
        optimizer.step()
    return (time.perf_counter() - start) / STEPS


def main() -> None:
    """Print a Markdown row; the goal is at most 3 microseconds."""
    torch.set_num_threads(1)
    model = torch.nn.Linear(2, 2)
    plain, hooked, recorded = (Nothing(list(model.parameters())) for _ in range(3))
    count = 0

    def bare(*_: object) -> None:
        nonlocal count
        count += 1

    hooked.register_step_post_hook(bare)
    far = 10**9
    schedules = [
        nd.every(far), nd.at_steps([far]), nd.log_spaced(far, 2 * far, 3), nd.paired(nd.every(far), dt=far),
        nd.at_epochs([far], 10), lambda step: step == far,
    ]  # fmt: skip
    watches = [nd.Watch(Smallest(), schedule=due, name=f"probe_{index}") for index, due in enumerate(schedules)]
    times: dict[str, list[float]] = {"nothing": [], "bare hook": [], "recorder": []}
    with tempfile.TemporaryDirectory() as folder:
        recorder = nd.Recorder(model, watches, torch.zeros(2, 2), path=Path(folder) / "run")
        with contextlib.redirect_stderr(io.StringIO()), recorder.attach(recorded):
            for _ in range(ROUNDS):
                for name, optimizer in zip(times, (plain, hooked, recorded), strict=True):
                    times[name].append(seconds(optimizer))
        recorder.close()
    # Differences within a round: other work on the machine changes from round to round.
    hook, cost = (
        1e6
        * statistics.median(with_it - without for with_it, without in zip(times[name], times["nothing"], strict=True))
        for name in ("bare hook", "recorder")
    )
    print("| unscheduled step, six schedules | bare hook, µs | recorder, µs | goal, µs |\n|---|---|---|---|")
    print(f"| torch {torch.__version__}, 1 thread, median of {ROUNDS} rounds | {hook:.2f} | {cost:.2f} | 3 |")


if __name__ == "__main__":
    main()
