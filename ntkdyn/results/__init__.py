"""Recordings as users open them: one run, or a sweep of many."""

from __future__ import annotations

from pathlib import Path

from .run import Run as Run
from .sweep import Sweep as Sweep


def open_recording(path: str | Path, *, trusted: bool = False) -> Run | Sweep:
    """Open whatever lies at a path: a sweep where there is a sweep.json, else a run; arguments as ``Run.open``."""
    kind = Sweep if (Path(path) / "sweep.json").is_file() else Run
    return kind.open(path, trusted=trusted)
