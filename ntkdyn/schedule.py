"""When to record: a schedule is any function ``step -> bool``; the ones made here also describe themselves.

Steps count applied optimizer steps; step 0 is the network before training.

>>> due = every(100)
>>> [step for step in range(301) if due(step)]
[0, 100, 200, 300]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral

from .errors import ConfigurationError


@dataclass(frozen=True)
class Schedule:
    """A function ``step -> bool`` with a description.

    ``steps`` holds the due steps where there are finitely many, ``dt`` the fixed distance of paired snapshots.
    """

    due: Callable[[int], bool]
    text: str
    steps: frozenset[int] | None = None
    dt: int | None = None

    def __call__(self, step: int) -> bool:
        return self.due(step)


def every(n: int) -> Schedule:
    """Return the schedule of all multiples of n steps, step 0 included.

    Raises: ConfigurationError: n is no whole number, or below 1.
    """
    if not isinstance(n, Integral) or n < 1:
        raise ConfigurationError(
            f"every(n): found n={n!r}, expected a whole number from 1 on; use every(1) for every step"
        )
    return Schedule(lambda step: step % n == 0, f"every({n})")


def at_steps(steps: Iterable[int]) -> Schedule:
    """Return the schedule of exactly these steps.

    Raises: ConfigurationError: a step is negative or no whole number.
    """
    listed = list(steps)
    for step in listed:
        if int(step) != step:
            raise ConfigurationError(f"at_steps: found step {step}, expected whole numbers; see at_epochs for epochs")
    due = frozenset(int(step) for step in listed)
    if due and min(due) < 0:
        raise ConfigurationError(f"at_steps: found step {min(due)}, expected steps from 0 on")
    return Schedule(due.__contains__, f"{len(due)} steps", due)


def log_spaced(first: int, last: int, count: int) -> Schedule:
    """Return step 0 and ``count`` steps from ``first`` to ``last`` in geometric progression, rounded; doubles merge.

    >>> sorted(log_spaced(1, 1000, 4).steps)
    [0, 1, 10, 100, 1000]

    Raises: ConfigurationError: first < 1, last < first or count < 1.
    """
    if first < 1 or last < first or count < 1:
        raise ConfigurationError(
            f"log_spaced: found first={first}, last={last}, count={count}, expected 1 <= first <= last and count >= 1"
        )
    ratio = (last / first) ** (1 / max(count - 1, 1))
    points = {round(first * ratio**index) for index in range(count)} | {0, last}
    return Schedule(points.__contains__, f"log_spaced({first}, {last}, {count})", frozenset(points))


def at_epochs(epochs: Iterable[float], steps_per_epoch: int) -> Schedule:
    """Return the steps nearest to the given epochs (fractions allowed).

    >>> sorted(at_epochs([0, 0.5, 2], steps_per_epoch=10).steps)
    [0, 5, 20]

    Raises: ConfigurationError: an epoch is negative or steps_per_epoch is below 1.
    """
    if steps_per_epoch < 1:
        raise ConfigurationError(f"at_epochs: found steps_per_epoch={steps_per_epoch}, expected at least 1")
    return at_steps(round(epoch * steps_per_epoch) for epoch in epochs)


def paired(schedule: Callable[[int], bool], dt: int) -> Schedule:
    """Return ``schedule`` with a partner dt steps after each of its steps.

    The kernel's velocity S(t, t+dt)/dt depends on dt, so one run has one dt; it is stored with the recording.

    >>> sorted(paired(at_steps([0, 10]), 2).steps)
    [0, 2, 10, 12]

    Raises: ConfigurationError: dt is below 1.
    """
    if dt < 1:
        raise ConfigurationError(f"paired: found dt={dt}, expected at least 1 step")
    first = getattr(schedule, "steps", None)
    steps = None if first is None else first | {step + dt for step in first}
    text = f"paired({getattr(schedule, 'text', 'a function')}, dt={dt})"
    return Schedule(lambda step: schedule(step) or (step >= dt and schedule(step - dt)), text, steps, dt)
