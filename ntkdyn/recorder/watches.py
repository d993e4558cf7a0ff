"""Watches: which probe is shown which probe sets at which steps, under which name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigurationError, UnknownName
from ..plugins import load_probe, snake
from ..probe import Bands, Field, Probe
from ..schedule import Schedule
from ..store.bands import is_large
from .snapshots import ProbeSet

Due = Schedule | Callable[[int], bool]


@dataclass(frozen=True)
class Watch:
    """A probe with a schedule, probe sets and a name of its own.

    Args:
        probe: a probe or the name of one, as in ``ntkdyn.Recorder``.
        schedule: step -> bool; None takes the recorder's.
        sets: names of the recorder's probe sets; None takes all.
        name: group in the recording; None takes the probe's name.
    """

    probe: Probe | str
    schedule: Due | None = None
    sets: Sequence[str] | None = None
    name: str | None = None


@dataclass
class Watched:
    """One probe under observation.

    Attributes:
        name: group name in the recording.
        due: step -> whether it wants a snapshot; schedule is what the user gave, for its description.
        sets: names of its probe sets; [""] or the first one for a probe that does not look at inputs.
        fields: what it declared, by group; last: its last recorded arrays, by group, None for bands and large ones.
        step: the last step at which it was recorded; seconds: how long measuring took.
        skipped: scheduled snapshots left out because of max_overhead.
    """

    probe: Probe
    name: str
    schedule: Schedule | None
    due: Callable[[int], bool]
    sets: tuple[str, ...]
    uses_inputs: bool
    fields: dict[str, dict[str, Field]] = field(default_factory=dict)
    last: dict[str, dict[str, np.ndarray[Any, Any] | None]] = field(default_factory=dict)
    step: int | None = None
    seconds: float = 0.0
    skipped: int = 0
    disabled: bool = False

    def group(self, set_name: str) -> str:
        """Where the arrays of a probe set lie: "ntk/test", or "ntk" for the unnamed set and probes without inputs."""
        return f"{self.name}/{set_name}" if set_name and self.uses_inputs else self.name

    @property
    def text(self) -> str:
        """The schedule in words."""
        if self.schedule is not None:
            return self.schedule.text
        return "every(1)" if self.due(1) and self.due(2) and self.due(3) else "a function"

    def recorded(self, step: int, records: Mapping[str, Mapping[str, np.ndarray[Any, Any] | Bands]]) -> None:
        """Take note of a step that is in the run, and of its arrays by group."""
        self.step = step
        for set_name in self.sets:
            group = self.group(set_name)
            self.last.setdefault(group, {}).update(
                {
                    name: None if isinstance(array, Bands) or is_large(self.fields[group][name]) else array
                    for name, array in records.get(group, {}).items()
                }
            )

    def facts(self, steps_per_epoch: int | None) -> dict[str, Any]:
        """Attributes of its groups."""
        facts: dict[str, Any] = {"schedule": self.text}
        if self.schedule is not None and self.schedule.dt is not None:
            facts["dt_steps"] = self.schedule.dt
        if steps_per_epoch is not None:
            facts["steps_per_epoch"] = steps_per_epoch
        return facts

    def count_between(self, first: int, last: int) -> int | None:
        """Snapshots from first to last, both included; None where counting would take too long."""
        if self.schedule is not None and self.schedule.steps is not None:
            return len({step for step in self.schedule.steps if first <= step <= last} | {first, last})
        if last - first > 1_000_000:
            return None
        return len({first, last} | {step for step in range(first, last + 1) if self.due(step)})


def watches_of(
    probes: Sequence[Probe | str | Watch], schedule: Due | None, sets: Mapping[str, ProbeSet]
) -> list[Watched]:
    """Return what is to be watched; ``schedule`` serves the probes without their own, None means every step.

    Raises: ConfigurationError: no probe, no probe object, two of one name, or a schedule that is no function of the
        step.  UnknownName: no such probe or probe set.
    """
    watches: list[Watched] = []
    for probe, name, due, wanted in [_entry(item, schedule, sets) for item in _listed(probes)]:
        if name in {one.name for one in watches}:
            raise ConfigurationError(
                f"probes: found two with the name {name!r}, expected different names; use Watch(name=...)"
            )
        if due is not None and not callable(due):
            raise ConfigurationError(
                f"probe {name!r}: found schedule={due!r}, expected a function of the step, e.g. ntkdyn.every(100)"
            )
        uses_inputs = bool(getattr(probe, "uses_inputs", True))
        chosen = tuple(sets if wanted is None else wanted)
        watches.append(
            Watched(
                probe=probe,
                name=name,
                schedule=due if isinstance(due, Schedule) else None,
                # The bare function: a Schedule called as an object costs a second call a step.
                due=due.due if isinstance(due, Schedule) else due or _always,
                sets=chosen if uses_inputs else chosen[:1],
                uses_inputs=uses_inputs,
            )
        )
    return watches


def _always(step: int) -> bool:
    return True


def _entry(
    item: Probe | str | Watch, schedule: Due | None, sets: Mapping[str, ProbeSet]
) -> tuple[Probe, str, Due | None, Sequence[str] | None]:
    watch = item if isinstance(item, Watch) else Watch(item)
    probe = load_probe(watch.probe) if isinstance(watch.probe, str) else watch.probe
    if isinstance(probe, type):
        raise ConfigurationError(f"probes: found the class {probe.__name__}, expected an object: {probe.__name__}()")
    for member in ("name", "fields", "measure"):
        if not hasattr(probe, member):
            raise ConfigurationError(
                f"probes: found {type(probe).__name__} without {member}, expected a name, a probe or a Watch"
            )
    name = snake(watch.name or probe.name)
    if not name:
        raise ConfigurationError(f"probe {type(probe).__name__}: found an empty name, expected letters")
    wanted = [watch.sets] if isinstance(watch.sets, str) else watch.sets
    for one in wanted or ():
        if one not in sets:
            near = get_close_matches(one, list(sets), n=1)
            known = repr(near[0]) if near else ", ".join(map(repr, sets))
            raise UnknownName(f"Watch of {name!r}: there is no probe set {one!r}; expected {known}")
    if wanted is not None and not wanted:
        raise ConfigurationError(
            f"Watch of {name!r}: found no probe set, expected at least one; leave sets out for all"
        )
    return probe, name, schedule if watch.schedule is None else watch.schedule, wanted


def _listed(probes: Any) -> list[Any]:
    if isinstance(probes, (str, Watch)) or not isinstance(probes, Iterable):
        raise ConfigurationError(f"probes: found {type(probes).__name__}, expected a list of probes: [{probes!r}]")
    chosen = list(probes)
    if not chosen:
        raise ConfigurationError("probes: found none, expected at least one, e.g. ['ntk']")
    return chosen


def merged(watches: Sequence[Watched]) -> tuple[Callable[[int], bool], ...]:
    """Few functions that together are due when a watch is: one for all listed steps, each other one once."""
    # Measured with six schedules, three of them lists: 0.68 microseconds a step, 0.79 with one call each.
    listed = [one.schedule.steps for one in watches if one.schedule is not None and one.schedule.steps is not None]
    others = [one.due for one in watches if one.schedule is None or one.schedule.steps is None]
    union = [frozenset().union(*listed).__contains__] if listed else []
    return (*union, *dict.fromkeys(others))


def give_back(
    watches: Sequence[Watched], recorded: Mapping[str, tuple[int, dict[str, Any]]], step: int, path: Path
) -> None:
    """Give watches what the run in a folder holds up to a checkpoint, group -> (its last step, arrays).

    Warns of groups that end before the checkpoint says.
    """
    missing = []
    for one in watches:
        known = one.step
        for name in one.sets:
            group = one.group(name)
            last, one.last[group] = recorded.get(group, (None, {}))
            if known is not None and not one.disabled and (last is None or last < known):
                missing.append(f"{group} at step {last} instead of {known}")
            if last is not None:
                # Later than the checkpoint says where a last snapshot was taken after it, at the same step.
                one.step = last if one.step is None else max(one.step, last)
    if missing:
        warnings.warn(
            f"{path}: the checkpoint of step {step} is newer than the recording, which ends for {', '.join(missing)}; "
            "training goes on, what lies between is missing",
            RuntimeWarning,
            stacklevel=5,
        )
