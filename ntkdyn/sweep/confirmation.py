"""Confirmation: the plan of a sweep once more, unchanged, on seeds that the sweep has not used.

``confirmation.json`` in the sweep's folder says which seeds were taken, so that a confirmation that is deleted is not
followed by one on others. Seeds used in other folders, and copies of this one, cannot be seen.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from ..errors import ConfigurationError, DamagedRecording, RecordingExists
from ..store.files import publish, read
from ..sweep_file import sealed
from .folder import finished_runs, read_plan
from .plan import Plan

FOLDER = "confirmation"
MARKER = "confirmation.json"


def confirmation_of(explored: Path, plan: Plan, *, seeds: int | None = None) -> tuple[Plan, Path]:
    """Return the plan that confirms a sweep, and the folder for it inside the sweep's.

    Args:
        explored: folder of the sweep, finished or not.
        plan: must be that sweep's but for the seeds, with a primary comparison.
        seeds: how many fresh ones, which follow the largest used one. None: the plan's own where they are all fresh; as
            many fresh ones as were used where they are exactly the used ones.

    Raises: MissingRecording: there is no sweep.  ConfigurationError: another plan, one without a primary comparison,
        seeds that were used, or fewer than two.  RecordingExists: it was confirmed on others before.  EditedManifest:
        its plan is not the one that was hashed, or not that of its runs.
    """
    before = read_plan(explored)
    if before.confirms is not None:
        raise ConfigurationError(
            f"{explored}: found a confirmation itself, expected the sweep that it confirms; "
            f"give --out {explored.parent}"
        )
    if before.primary is None:
        raise ConfigurationError(
            f"{explored}: found a plan without a primary comparison, expected one named in [plan] before its first "
            "run; name it in the file and run the sweep into a new folder"
        )
    if before.design != plan.design:
        raise ConfigurationError(
            f"{explored}: holds another plan (design {before.design[:12]}), expected {plan.design[:12]}; "
            "a confirmation changes nothing but the seeds; give the command that began the sweep, and --confirm"
        )
    finished_runs(before, explored)
    used = before.seeds
    following = max(used) + 1
    if seeds is None and set(plan.seeds) != set(used):
        again = sorted(set(plan.seeds) & set(used))
        if again:
            raise ConfigurationError(
                f"{explored}: found seeds {', '.join(map(str, again))} used already, expected fresh ones; give "
                f"--seeds {len(plan.seeds)} for seeds {following} to {following + len(plan.seeds) - 1}"
            )
        fresh = plan.seeds
    else:
        fresh = tuple(range(following, following + (seeds or len(used))))
    if len(fresh) < 2:
        raise ConfigurationError(
            f"{explored}: found 1 seed for a confirmation, expected at least 2, as one allows no test; give --seeds"
        )
    confirmation = replace(plan, seeds=fresh, confirms=before.hash, explored=used)
    refuse_second(confirmation, explored)
    return confirmation, explored / FOLDER


def note(confirmation: Plan, explored: Path, *, new: bool) -> None:
    """Write into the folder of the confirmed sweep that its one confirmation begins.

    Args: new: nothing of the confirmation is there yet.
    Raises: RecordingExists: it was confirmed on other seeds before.
    """
    before = refuse_second(confirmation, explored)
    if before is None:
        begun = datetime.now(UTC).isoformat(timespec="seconds")
        entries = {"plan": confirmation.hash, "confirms": confirmation.confirms, "begun": begun}
        content = sealed(entries | {"seeds": list(confirmation.seeds)})
        publish(explored / MARKER, json.dumps(content, indent=1).encode())
    elif new:
        warnings.warn(
            f"{explored / FOLDER}: the confirmation begun {before} is not there any more; it is made again, on the "
            "same seeds",
            RuntimeWarning,
            stacklevel=2,
        )


def refuse_second(confirmation: Plan, explored: Path) -> str | None:
    """Return when the confirmation was begun, None where it was not.

    Raises: RecordingExists: it was confirmed on other seeds before.  DamagedRecording: what says so.
    """
    file = explored / MARKER
    try:
        content = json.loads(read(file))
        plan, begun, seeds = str(content["plan"]), str(content["begun"]), ", ".join(map(str, content["seeds"]))
        if sealed({name: content[name] for name in content if name != "sha256"}) != content:
            raise ValueError("its SHA-256 is another")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedRecording(
            f"{file} does not say what was confirmed: {type(error).__name__}: {error}; restore it from a copy"
        ) from None
    if plan != confirmation.hash:
        raise RecordingExists(
            f"{explored}: was confirmed on seeds {seeds}, begun {begun}, expected no other confirmation; a plan is "
            "confirmed once; go on with the --seeds that it was begun with"
        )
    return begun
