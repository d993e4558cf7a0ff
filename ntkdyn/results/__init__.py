"""Recordings as users open them: one run, or a sweep of many."""

from __future__ import annotations

from pathlib import Path

from .run import Run as Run
from .sweep import Sweep as Sweep


def open_recording(path: str | Path) -> Run | Sweep:
    """Open whatever lies at a path: a sweep where there is a sweep.json, else a run."""
    return Sweep.open(path) if (Path(path) / "sweep.json").is_file() else Run.open(path)
