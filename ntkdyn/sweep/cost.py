"""What a sweep will cost and what it can find, told before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..configuration import configure
from ..errors import MissingDevice
from ..experiment import try_run
from ..plugins import load_experiment
from ..primary import PrimaryComparison
from ..trial import Trial
from .plan import Plan, PlannedConfiguration
from .plan_file import record_of
from .running import one_thread, recorded


@dataclass(frozen=True)
class Cost:
    """Training steps of all runs, and CPU seconds of one thread for training and for snapshots."""

    steps: int
    training: float
    recording: float


def estimate(plan: Plan) -> Cost | None:
    """Estimate a sweep, roughly, from some training steps and snapshots for each trunk, which take a second or two.

    Medians of CPU seconds of one thread, as a run has it. A step of an arm is taken to cost what one of its trunk
    costs, and each arm to be recorded as often as the trunk's first one. Start-up, evaluation and files are not
    counted. None where the experiment has no ``steps(config)``.

    Raises: whatever a run would raise before its first step.
    """
    experiment = load_experiment(plan.experiment)
    if not hasattr(experiment, "steps"):
        return None
    with one_thread():
        return _estimate(plan, experiment)


def _estimate(plan: Plan, experiment: Any) -> Cost:
    trials: dict[str, Trial] = {}
    snapshots: dict[tuple[str, str], dict[str, int]] = {}
    steps, training, recording = 0, 0.0, 0.0
    for one in plan.configurations:
        config = configure(experiment.Config, one.config)
        # Arms come after their trunks, and so find them tried.
        origin = one.trunk or one.runs
        if origin not in trials:
            trials[origin] = _tried(plan, experiment, one, config, Trial())
        if (one.kind, origin) not in snapshots:
            arm = one.trunk is not None
            counted = _tried(plan, experiment, one, config, Trial(only_count=True)) if arm else trials[origin]
            snapshots[one.kind, origin] = counted.snapshots(one.step)
        own = experiment.steps(config)
        steps += own
        training += own * trials[origin].step_seconds
        seconds = trials[origin].probe_seconds
        recording += sum(count * seconds.get(name, 0.0) for name, count in snapshots[one.kind, origin].items())
    seeds = len(plan.seeds)
    return Cost(steps * seeds, training * seeds, recording * seeds)


def _tried(plan: Plan, experiment: Any, one: PlannedConfiguration, config: Any, trial: Trial) -> Trial:
    probes, schedule, log_spaced = recorded(record_of(plan.record, one.kind))
    try_run(
        experiment,
        config,
        seed=plan.seeds[0],
        trial=trial,
        probes=probes,
        schedule=schedule,
        log_spaced=log_spaced,
    )
    return trial


def foresight(plan: Plan, jobs: int) -> Iterator[str]:
    """Say in words what the sweep will cost, and what its primary comparison can find with so many seeds."""
    yield f"cost: {_cost(plan, jobs)}"
    primary = plan.primary
    if primary is None:
        yield "primary comparison: none is named, every difference will be exploratory; name one in [plan]"
        return
    yield f"primary comparison: {primary}"
    if primary.hypothesis:
        yield f"hypothesis: {primary.hypothesis}"
    yield f"smallest detectable difference: {_detectable(primary, len(plan.seeds))}"
    if primary.margin is not None:
        yield f"equivalence margin: {primary.margin:g} {primary.unit}".rstrip()


def _cost(plan: Plan, jobs: int) -> str:
    try:
        cost = estimate(plan)
    except MissingDevice as error:
        # Planned where one logs in, run where the device is.
        return f"{len(plan.runs)} runs, not measured ({error}); plan it there, or with --set device=cpu"
    if cost is None:
        return f"unknown before the first run; {plan.experiment} does not say how many steps a run takes"
    seconds = cost.training + cost.recording
    shared = f", {duration(seconds / jobs)} on {jobs} processes" if jobs > 1 else ""
    return (
        f"{len(plan.runs)} runs, {cost.steps} training steps, roughly {duration(seconds)} of one core{shared} "
        f"(training {duration(cost.training)}, snapshots {duration(cost.recording)}; from a few steps measured just "
        "now on one thread; start-up, evaluation and files come on top)"
    )


def _detectable(primary: PrimaryComparison, seeds: int) -> str:
    # Imported late: it takes scipy.stats along, which no run needs.
    from ..analysis.power import ADEQUATE_POWER, minimum_detectable_effect

    effect = minimum_detectable_effect(seeds, primary.deviation or 1.0)
    if math.isinf(effect):
        return "none, as one seed allows no test; give --seeds 2 or more"
    if primary.deviation is None:
        amount, source = f"{effect:.3g} standard deviations", "for its unit give deviation in [plan]"
    else:
        amount, source = f"{effect:.3g} {primary.unit}".rstrip(), f"standard deviation {primary.deviation:g}"
        if primary.deviation_from:
            source += f" from {primary.deviation_from}"
    return f"{amount} with power {ADEQUATE_POWER:g} in a paired t test of {seeds} seeds at level 0.05; {source}"


def duration(seconds: float) -> str:
    """Seconds in the unit in which they are read.

    >>> duration(6000), duration(7.25), duration(9360)
    ('100 minutes', '7.2 s', '2.6 hours')
    """
    if math.isnan(seconds):
        return "unknown time"
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{_two_digits(seconds / size)} {unit}"
    return f"{_two_digits(seconds)} s"


def _two_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"
