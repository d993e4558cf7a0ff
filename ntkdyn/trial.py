"""A trial: the begin of a run, from which one learns what its steps and snapshots cost."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from .recorder import Recorder
from .recorder.snapshots import probe_sets
from .recorder.watches import Watched, watches_of
from .schedule import Schedule, at_steps

# The first steps warm up. Snapshots come in their last one and then at every fifth; that of step 0 checks itself, and
# is not timed.
_WARM_UP = 4
_EVERY = 5
_STEPS = 50
# CPU seconds after which a trial ends even where it has seen fewer steps.
_SECONDS = 2.0
_FEWEST = _WARM_UP + 2


class TrialEnded(Exception):
    """Ends the run of a trial; no error."""


class Trial:
    """Counts the snapshots that a run will take, and times its first steps.

    Args: only_count: end before the first step, and time nothing.
    """

    schedule: Schedule = at_steps(range(_WARM_UP, _STEPS + 1, _EVERY))

    def __init__(self, *, only_count: bool = False) -> None:
        self._only_count = only_count
        self._watches: list[Watched] = []
        self._last = 0
        self._times: list[float] = []
        self._shares: list[dict[str, float]] = []

    def begin(self, probes: Sequence[Any], schedule: Callable[[int], bool], sets: Any, total_steps: int) -> None:
        """Take note of what the run would record.  Raises: TrialEnded: nothing else is wanted."""
        self._watches = watches_of(probes, schedule, probe_sets(sets))
        self._last = total_steps
        if self._only_count:
            raise TrialEnded

    def stepped(self, recorder: Recorder | None) -> None:
        """Take note of a training step.  Raises: TrialEnded: enough have been seen."""
        self._times.append(time.process_time())
        step = len(self._times)
        if recorder is not None and self.schedule(step):
            self._shares.append(recorder.probe_seconds)
        spent = self._times[-1] - self._times[0]
        if step >= _STEPS or (step >= _FEWEST and spent > _SECONDS):
            raise TrialEnded

    def _between(self, *, snapshot: bool) -> list[float]:
        """CPU seconds of the timed steps with a snapshot, or of those without."""
        steps = enumerate(itertools.pairwise(self._times), start=2)
        return [
            after - before for step, (before, after) in steps if step >= _WARM_UP and self.schedule(step) is snapshot
        ]

    @property
    def step_seconds(self) -> float:
        """CPU seconds of one training step, the median; NaN where too few were seen."""
        return statistics.median(self._between(snapshot=False) or [float("nan")])

    @property
    def probe_seconds(self) -> dict[str, float]:
        """CPU seconds of one snapshot by probe, the median.

        Those of a step with a snapshot, less those of a step, in the proportions in which its probes took time.
        """
        found: dict[str, list[float]] = {}
        for seconds, shares in zip(self._between(snapshot=True), self._shares, strict=False):
            whole = sum(shares.values())
            for name, share in shares.items():
                found.setdefault(name, []).append(max(0.0, seconds - self.step_seconds) * share / (whole or 1.0))
        return {name: statistics.median(values) for name, values in found.items()}

    def snapshots(self, first_step: int) -> dict[str, int]:
        """Number of snapshots by probe, of a run from a step on; 0 where counting would take too long."""
        return {one.name: one.count_between(first_step, self._last) or 0 for one in self._watches}
