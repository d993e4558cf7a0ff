"""The folder of a sweep: the plan it holds, who runs it now, and how its runs stand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import DamagedRecording, EditedManifest, MissingRecording, NtkdynError, RecordingExists
from ..store import files
from ..store.files import make_folder, publish, read
from ..store.lock import NAME as LOCK
from ..store.lock import Lock
from ..store.manifest import read_manifest
from ..sweep_file import check_plan, check_run, confirmed, sealed
from .plan import Plan

FILE = "sweep.json"


def read_plan(folder: Path) -> Plan:
    """Read the plan of a sweep and compare it with its hashes.

    Raises: MissingRecording, DamagedRecording, EditedManifest.
    """
    file = folder / FILE
    if not file.exists():
        raise MissingRecording(
            f"{folder}: found no sweep to confirm, expected the folder of one; run it without --confirm first"
        )
    try:
        content = json.loads(read(file))
        plan = Plan.from_json(content)
        if confirmed(content) is None:
            plan = replace(plan, confirms=None, explored=())
        named = content["hash"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DamagedRecording(f"{file} is no plan: {type(error).__name__}: {error}; restore it from a copy") from None
    check_plan(file, content)
    if plan.hash != named:
        raise DamagedRecording(f"{file} is no plan: its runs are not all those of its seeds; restore it from a copy")
    return plan


def run_status(folder: Path) -> str | None:
    """Status in a run's manifest: "finished", "running", …; None where there is no run.

    Raises: EditedManifest: training it again because of an edit would be for its owner to decide.  NewerRecording.
    """
    try:
        status = read_manifest(folder).get("status")
    except FileNotFoundError:
        return "unfinished" if folder.exists() else None
    except EditedManifest:
        raise
    except DamagedRecording:
        return "damaged"
    return status if isinstance(status, str) else "damaged"


def finished_runs(plan: Plan, out: Path) -> dict[str, dict[str, Any]]:
    """Manifests of the finished runs of a plan, by run.

    Raises: EditedManifest: a run is not the one that the plan has in its place.  NewerRecording.
    """
    found = {}
    for run in plan.runs:
        if run_status(out / run.run) == "finished":
            found[run.run] = read_manifest(out / run.run)
            check_run(out / run.run, found[run.run], run.entry(), plan=plan.hash)
    return found


def refuse_other(plan: Plan, out: Path) -> None:
    """Refuse a folder that is neither new, empty, nor that of this very plan.

    Raises: RecordingExists: nothing was touched.  DamagedRecording, EditedManifest: its sweep.json.
    """
    if (out / FILE).exists():
        found = read_plan(out).hash
        if found != plan.hash:
            remedy = "choose a new --out"
            if plan.confirms is not None:
                remedy = "a plan is confirmed once; go on with the --seeds that it was begun with"
            raise RecordingExists(
                f"{out}: holds another sweep (plan {found[:12]}), expected plan {plan.hash[:12]}; "
                f"nothing was touched; {remedy}"
            )
    # A sweep that was killed at once leaves its lock.
    elif out.exists() and (not out.is_dir() or any(entry.name != LOCK for entry in out.iterdir())):
        raise RecordingExists(f"{out}: holds something that is no sweep; nothing was touched; choose a new --out")


def standing(plan: Plan, out: Path) -> Iterator[str]:
    """Say what is in the folder where a plan is to run; nothing of a new one."""
    try:
        refuse_other(plan, out)
        if (out / FILE).exists():
            yield f"{out} holds this plan; {len(finished_runs(plan, out))} of {len(plan.runs)} runs are finished"
    except NtkdynError as error:
        yield f"it cannot run there: {error}"


@contextmanager
def claimed(plan: Plan, out: Path, *, sources: Mapping[str, str]) -> Iterator[None]:
    """Hold the folder of a plan for this process alone; a new one gets its sweep.json.

    Args: sources: SHA-256 of files that the runs are made by, which are written beside the plan.

    Raises: LockedRecording: another process runs the sweep.  RecordingExists, DamagedRecording, EditedManifest: as
        ``refuse_other``.
    """
    refuse_other(plan, out)
    make_folder(out)
    lock = Lock(out)
    try:
        # Another process may have begun its plan meanwhile.
        refuse_other(plan, out)
        if not (out / FILE).exists():
            content = plan.to_json() | ({"sources": dict(sources)} if sources else {})
            publish(out / FILE, json.dumps(sealed(content), indent=1).encode())
        yield
    finally:
        lock.release()


def set_aside(folder: Path) -> None:
    """Rename an unfinished run, so that it is neither lost nor mistaken for a finished one.

    Raises: LockedRecording: somebody writes into it.
    """
    Lock(folder).release()
    for number in itertools.count(1):
        target = folder.with_name(f"{folder.name}.unfinished-{number}")
        if not target.exists():
            files.replace(folder, target)
            return
