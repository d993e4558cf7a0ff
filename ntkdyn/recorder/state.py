"""The state of a recording in the checkpoint of a training; JSON values only."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from .watches import Watched

_FORMAT = "ntkdyn recorder 1"


def dump_state(run: str | None, step: int, watches: Sequence[Watched]) -> dict[str, Any]:
    """State of a run after so many steps; ``run`` is None before it is in a folder."""
    entries = {one.name: {"step": one.step, "skipped": one.skipped, "disabled": one.disabled} for one in watches}
    return {"format": _FORMAT, "run": run, "step": step, "watches": entries}


def initial_state(run: str) -> dict[str, Any]:
    """State with which a recorder records a run in its folder all over again: everything there is superseded."""
    return dump_state(run, -1, ())


@dataclass(frozen=True)
class State:
    """What ``dump_state`` wrote, checked; ``entries`` are (last recorded step, skipped, disabled) by probe."""

    run: str | None
    step: int
    entries: Mapping[str, tuple[int | None, int, bool]]

    @staticmethod
    def load(state: Mapping[str, Any], path: Path) -> State:
        """Check a state.  Raises: ConfigurationError: it is none."""
        try:
            if state["format"] != _FORMAT:
                raise ValueError(state["format"])
            run = None if state["run"] is None else str(state["run"])
            entries = {
                name: (
                    None if entry["step"] is None else operator.index(entry["step"]),
                    int(entry["skipped"]),
                    bool(entry["disabled"]),
                )
                for name, entry in dict(state["watches"]).items()
            }
            return State(run, operator.index(state["step"]), entries)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"recorder of {path}: found no state of a recorder ({type(error).__name__}: {error}), expected "
                "what state_dict() returned"
            ) from None
