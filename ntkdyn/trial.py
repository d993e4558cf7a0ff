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

# The first steps warm up; the second snapshot, which costs what later ones do, is among them.
_WARM_UP = 4
_STEPS = 40
# A trial ends after this even where it has seen fewer steps.
_SECONDS = 2.0


class TrialEnded(Exception):
    """Ends the run of a trial; no error."""


class Trial:
    """Counts the snapshots that a run will take, and times its first steps.

    Args: only_count: end before the first step, and time nothing.
    """

    schedule: Schedule = at_steps([_WARM_UP - 1])

    def __init__(self, *, only_count: bool = False) -> None:
        self._only_count = only_count
        self._watches: list[Watched] = []
        self._recorder: Recorder | None = None
        self._last = 0
        self._times: list[float] = []

    def begin(self, probes: Sequence[Any], schedule: Callable[[int], bool], sets: Any, total_steps: int) -> None:
        """Take note of what the run would record.  Raises: TrialEnded: nothing else is wanted."""
        self._watches = watches_of(probes, schedule, probe_sets(sets))
        self._last = total_steps
        if self._only_count:
            raise TrialEnded

    def stepped(self, recorder: Recorder | None) -> None:
        """Take note of a training step.  Raises: TrialEnded: enough have been seen."""
        self._times.append(time.process_time())
        self._recorder = recorder
        seen = self._times[_WARM_UP:]
        if len(seen) > _STEPS or (len(seen) > 1 and seen[-1] - seen[0] > _SECONDS):
            raise TrialEnded

    @property
    def step_seconds(self) -> float:
        """CPU seconds of one training step, the median; NaN where too few were seen."""
        seen = self._times[_WARM_UP:]
        between = [after - before for before, after in itertools.pairwise(seen)]
        return statistics.median(between or [float("nan")])

    @property
    def probe_seconds(self) -> dict[str, float]:
        """Seconds of one snapshot by probe."""
        return {} if self._recorder is None else self._recorder.probe_seconds

    def snapshots(self, first_step: int) -> dict[str, int]:
        """Number of snapshots by probe, of a run from a step on; 0 where counting would take too long."""
        return {one.name: one.count_between(first_step, self._last) or 0 for one in self._watches}
