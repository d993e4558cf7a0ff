"""What snapshots cost and may cost: told at the begin, thinned by max_overhead, warned of where others wait."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigurationError
from .watches import Watched


class Budget:
    """Seconds that snapshots take of the wall time of training.

    Args: max_overhead: largest share, None: any.

    Attributes: timeout: seconds after which the collective calls of waiting processes fail, None where nobody waits.

    Raises: ConfigurationError: no share.
    """

    def __init__(self, path: Path, max_overhead: float | None) -> None:
        if max_overhead is not None and not 0 < max_overhead < 1:
            raise ConfigurationError(f"Recorder: found max_overhead={max_overhead}, expected a share between 0 and 1")
        self.max_overhead = max_overhead
        self.timeout: float | None = None
        self._path = path
        self.restart()

    def restart(self) -> None:
        """Training begins now, and nothing is spent."""
        self._since = time.perf_counter()
        self._spent = 0.0

    def affords(self, watched: Watched, step: int) -> bool:
        """Whether a probe may be measured now; a pair of snapshots is kept or left whole."""
        if self.max_overhead is None:
            return True
        dt = watched.schedule.dt if watched.schedule is not None else None
        affordable = watched.step is not None and dt is not None and watched.step == step - dt
        elapsed = time.perf_counter() - self._since
        cost = self._spent + watched.seconds
        if not affordable:
            affordable = cost <= self.max_overhead * (elapsed + watched.seconds)
        watched.skipped += not affordable
        return affordable

    @contextmanager
    def spending(self, step: int) -> Iterator[None]:
        """Charge a snapshot; one that takes more than half of the timeout is warned of once."""
        started = time.perf_counter()
        yield
        taken = time.perf_counter() - started
        self._spent += taken
        if self.timeout is not None and taken > self.timeout / 2:
            warnings.warn(
                f"{self._path}: the snapshot of step {step} took {taken:.3g} s, more than half of the "
                f"{self.timeout:.3g} s after which collective calls of the waiting processes fail; record less or "
                "fewer samples, or raise the timeout of init_process_group",
                RuntimeWarning,
                stacklevel=5,
            )
            self.timeout = None

    def tell(self, watches: Sequence[Watched], first: int, total: int | None) -> None:
        """Print what each probe will cost, from the snapshots of the first step."""
        for one in watches:
            seconds = f"{one.seconds:.0f}" if one.seconds >= 10 else f"{one.seconds:.2g}"
            count = None if total is None else one.count_between(first, total)
            amount = f"per snapshot, {one.text}" if count is None else f"× {count} snapshots"
            print(f"ntkdyn: {one.name}: {seconds} s {amount}", file=sys.stderr)

    def tell_skipped(self, watches: Sequence[Watched]) -> dict[str, int]:
        """Print and return how many scheduled snapshots of each probe were left out."""
        skipped = {one.name: one.skipped for one in watches if one.skipped}
        for name, count in skipped.items():
            print(
                f"ntkdyn: {name}: {count} scheduled snapshots skipped, max_overhead={self.max_overhead}",
                file=sys.stderr,
            )
        return skipped
