"""A run at a glance: loss, accuracy, kernel drift and units, read sparsely, and read on while it is recorded."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .analysis import kernel_distance_centered
from .errors import DamagedRecording, LockedRecording, MissingRecording, StorageError, UndefinedMeasure
from .results import Run
from .store.lock import owner_of, refuse_locked
from .store.reader import files_of
from .studies.recorded import kernel_sets, path_of, trace_kernels

MOST_POINTS = 120
"""Most snapshots that one refresh reads of a curve; of more, that many at equal distance."""

MOST_BYTES = 2**28
"""Most bytes that one refresh reads of a curve; a kernel that is larger by itself has no drift at a glance."""

_BATCH = 2**25

Array = np.ndarray[Any, Any]


@dataclass
class Curve:
    """One number over the snapshots that were read.

    Attributes:
        name: "loss", "accuracy", "kernel drift" or "active units".
        set: probe set, "" for the unnamed one and for what needs none.
        unit: "nat", "percent", "1" or "units".
        of: what the number is out of, None where that says nothing.
        left_out: why there are no values, "" where there are some.
    """

    name: str
    set: str
    unit: str
    of: float | None = None
    left_out: str = ""
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


class Glance:
    """The curves of a run that may still be recorded; ``refresh`` reads snapshots that it has not read before.

    Args:
        run: the run, as opened.
        points: most snapshots that one refresh reads of a curve.
        most_bytes: most bytes that it reads of one.
        names: read curves of these names only; None: all.
        trusted: skip the checks of new files, as in ``Run.open``.

    Attributes:
        run: the run as it was at the last refresh.
        path: its folder, or its run.h5.
    """

    def __init__(
        self,
        run: Run,
        *,
        points: int = MOST_POINTS,
        most_bytes: int = MOST_BYTES,
        names: Container[str] | None = None,
        trusted: bool = False,
    ) -> None:
        self.run = run
        self.path = run.path
        self._points = points
        self._most_bytes = most_bytes
        self._names = names
        self._trusted = trusted
        self._branches: list[Any] = []
        self._curves: dict[tuple[str, str], Curve] = {}
        self._first_kernels: dict[str, Array] = {}
        self._read()

    @property
    def curves(self) -> list[Curve]:
        """What is recorded of loss, accuracy, kernel drift (centered, to the first snapshot) and active units."""
        return list(self._curves.values())

    @property
    def status(self) -> str:
        """Status of run.json: running, finished, ...; "abandoned" where it runs and its process is gone."""
        status = str(self.run.manifest.get("status", "unknown"))
        return "abandoned" if status == "running" and self._is_gone() else status

    @property
    def step(self) -> int | None:
        """Last recorded step of all groups, None before the first snapshot."""
        return max((int(steps[-1]) for steps in map(self.run.steps, self.run.groups()) if len(steps)), default=None)

    @property
    def epoch(self) -> float:
        """Epoch of that step, NaN where unknown."""
        for group in self.run.groups():
            steps = self.run.steps(group)
            if len(steps) and steps[-1] == self.step:
                return float(self.run.epochs(group)[-1])
        return math.nan

    @property
    def age(self) -> float:
        """Seconds since the newest file of the recording was written; NaN where there is none."""
        newest = max(self._written(), default=math.nan)
        # A clock that was set back would make it negative.
        return max(0.0, time.time() - newest) if newest == newest else math.nan

    def refresh(self) -> bool:
        """Read what is new; return whether there was anything.

        Raises: StorageError: the run has vanished.  Else as ``Run.open``.
        """
        before = self._state()
        try:
            self.run = Run.open(self.path, trusted=self._trusted)
            self._read()
        except (MissingRecording, DamagedRecording, FileNotFoundError) as error:
            if self.path.is_file() or (self.path / "run.json").exists():
                raise
            raise StorageError(
                f"{self.path} vanished while it was watched: found nothing after step {before[0]}, expected the folder "
                "of the run; look where it was moved to, and watch it there"
            ) from error
        return before != self._state()

    def _state(self) -> tuple[Any, ...]:
        return self.step, self.run.manifest.get("status"), [len(self.run.steps(group)) for group in self.run.groups()]

    def _read(self) -> None:
        branches = list(self.run.manifest.get("branches") or ())
        if branches != self._branches:
            # Resumed: steps read before may be superseded by others of the same number.
            self._curves, self._first_kernels, self._branches = {}, {}, branches
        for curve, array, measured in self._sources():
            if self._names is None or curve.name in self._names:
                known = self._curves.setdefault((curve.name, curve.set), curve)
                self._continue(known, array, measured)

    def _sources(self) -> Iterator[tuple[Curve, str, Callable[[list[int]], Array]]]:
        """What there is to read: an empty curve, its array, and the values [k] of some snapshots of that."""
        run = self.run
        outputs = run.sets("outputs") if any(group.split("/")[0] == "outputs" for group in run.groups()) else []
        for probe_set in outputs:
            for name, unit, factor in (("loss", "nat", 1.0), ("accuracy", "percent", 100.0)):
                path = path_of("outputs", probe_set, name)
                if path in run:
                    yield Curve(name, probe_set, unit), path, _mean_of(run, path, factor)
        for probe_set in kernel_sets(run):
            kernel = path_of("ntk", probe_set, "kernel")
            path = kernel if kernel in run else path_of("ntk", probe_set, "layers")
            yield Curve("kernel drift", probe_set, "1"), path, self._drift(probe_set)
        if "units/active" in run:
            total = float(run["units/total"].sum()) if "units/total" in run else None
            yield (
                Curve("active units", "", "units", total),
                "units/active",
                lambda rows: run.lazy("units/active")[rows].sum(1),
            )

    def _continue(self, curve: Curve, array: str, measured: Callable[[list[int]], Array]) -> None:
        recorded = self.run.lazy(array)
        size = math.prod(recorded.shape[1:]) * recorded.dtype.itemsize
        if size > self._most_bytes:
            curve.left_out = f"a snapshot is {size / 2**20:.3g} MiB, more than {self._most_bytes / 2**20:.3g}"
            return
        known = int(np.searchsorted(recorded.steps, curve.steps[-1], side="right")) if curve.steps else 0
        chosen = np.arange(known, len(recorded))
        most = min(self._points, self._most_bytes // max(size, 1))
        if len(chosen) > most:
            chosen = np.unique(np.linspace(chosen[-1], chosen[0], most).round().astype(int))
        count = max(1, _BATCH // max(size, 1))
        for start in range(0, len(chosen), count):
            rows = chosen[start : start + count].tolist()
            curve.values += [float(value) for value in measured(rows)]
            curve.steps += recorded.steps[rows].tolist()

    def _drift(self, probe_set: str) -> Callable[[list[int]], Array]:
        def measured(rows: list[int]) -> Array:
            if probe_set not in self._first_kernels:
                self._first_kernels[probe_set] = trace_kernels(self.run, probe_set, [0])[0]
            first = self._first_kernels[probe_set]
            return np.array([_distance(kernel, first) for kernel in trace_kernels(self.run, probe_set, rows)])

        return measured

    def _written(self) -> Iterator[float]:
        for file in files_of(self.path):
            try:
                yield file.stat().st_mtime
            except FileNotFoundError:  # merged into another one meanwhile, which is newer
                continue

    def _is_gone(self) -> bool:
        """Whether the process that records here has ended without a word, as far as that can be seen from this host."""
        try:
            refuse_locked(self.path)
        except LockedRecording:
            return False
        owner = owner_of(self.path)
        return owner is None or owner.get("host") == platform.node()


def _distance(kernel: Array, first: Array) -> float:
    try:
        return float(kernel_distance_centered(kernel, first))
    except UndefinedMeasure:  # a kernel that is zero or not finite
        return math.nan


def _mean_of(run: Run, path: str, factor: float) -> Callable[[list[int]], Array]:
    def measured(rows: list[int]) -> Array:
        values = np.asarray(run.lazy(path)[rows], dtype=np.float64)
        return np.asarray(factor * values.reshape(len(values), -1).mean(1))

    return measured
