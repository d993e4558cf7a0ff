"""The state of a recording in the checkpoint of a training; JSON values only."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from .learning_rates import LearningRates
from .watches import Watched

_FORMAT = "ntkdyn recorder 1"


def dump_state(
    run: str | None, step: int, watches: Sequence[Watched], rates: Mapping[str, Any] | None
) -> dict[str, Any]:
    """State of a run after so many steps; ``run`` is None before it is in a folder."""
    entries = {one.name: {"step": one.step, "skipped": one.skipped, "disabled": one.disabled} for one in watches}
    return {"format": _FORMAT, "run": run, "step": step, "watches": entries, "learning_rate": rates}


def initial_state(run: str | None, parent: Mapping[str, Any] | None) -> dict[str, Any]:
    """State with which a recorder begins.

    Args:
        run: the run in its folder, of which everything is superseded; None: there is none.
        parent: state of the run from which this one branches, whose learning rates it counts on; None: from none.
    """
    # Behind step -1 lies everything.
    return dump_state(run, 0 if run is None else -1, (), None if parent is None else parent.get("learning_rate"))


@dataclass(frozen=True)
class State:
    """What ``dump_state`` wrote, checked.

    ``entries`` are (last recorded step, skipped, disabled) by probe; ``rates`` is None where none were counted.
    """

    run: str | None
    step: int
    entries: Mapping[str, tuple[int | None, int, bool]]
    rates: LearningRates | None

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
            # A state from before learning rates were recorded has none.
            counted = state.get("learning_rate")
            rates = None if counted is None else LearningRates.load(counted)
            return State(run, operator.index(state["step"]), entries, rates)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"recorder of {path}: found no state of a recorder ({type(error).__name__}: {error}), expected "
                "what state_dict() returned"
            ) from None
