"""Confirmation: the plan of a sweep once more, unchanged, on seeds that the sweep has not used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import ConfigurationError
from .folder import finished_runs, read_plan
from .plan import Plan

FOLDER = "confirmation"


def confirmation_of(explored: Path, plan: Plan, *, seeds: int | None = None) -> tuple[Plan, Path]:
    """Return the plan that confirms a sweep, and the folder for it inside the sweep's.

    Args:
        explored: folder of the sweep, finished or not.
        plan: must be that sweep's but for the seeds, with a primary comparison.
        seeds: how many fresh ones, which follow the largest used one. None: the plan's own where they are all fresh; as
            many fresh ones as were used where they are exactly the used ones.

    Raises: MissingRecording: there is no sweep.  ConfigurationError: another plan, one without a primary comparison, or
        seeds that were used.  EditedManifest: its plan is not the one that was hashed, or not that of its runs.
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
    return replace(plan, seeds=fresh, confirms=before.hash, explored=used), explored / FOLDER
