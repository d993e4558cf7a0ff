"""sweep.json beside its runs, as readers judge it: the plan is the one that was hashed, each run the one of its place.

Entries that an older ntkdyn did not write are unknown, and are not compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import DamagedRecording, EditedManifest
from .plan_hash import digest, plan_hash
from .store.manifest import differences, without_secrets

_SEAL = "sha256"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A content with the SHA-256 of all of it: the hash of a plan covers its runs, not settings, grids and seeds."""
    return {**content, _SEAL: digest(content)}


def confirmed(content: Mapping[str, Any]) -> str | None:
    """Hash of the plan that a sweep confirms, as far as its own hash covers it; None: it is no confirmation."""
    return content.get("confirms") if _SEAL in content else None


def check_plan(file: Path, content: Mapping[str, Any]) -> None:
    """Compare the content of sweep.json with its own hashes.

    Its seeds must be those of its runs, and of a confirmation none of those that it is to be independent of.

    Raises: EditedManifest: they differ.  DamagedRecording: it is no plan.
    """
    if "hash" not in content:
        return
    try:
        confirms = confirmed(content)
        explored = list(content["explored"]) if confirms is not None else []
        found = plan_hash(
            content["experiment"], content["plan"], content.get("primary"), confirms, explored, content.get("record")
        )
        seeds = list(dict.fromkeys(entry["seed"] for entry in content["plan"]))
        expected, named = str(content["hash"]), list(content.get("seeds", seeds))
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedRecording(f"{file} is no plan: {type(error).__name__}: {error}; restore it from a copy") from None
    if found != expected:
        raise EditedManifest(
            f"{file}: found plan {found[:12]}, expected {expected[:12]}, which was hashed before the first run; "
            "it was edited since; restore it from a copy"
        )
    if named != seeds:
        raise EditedManifest(
            f"{file}: found seeds {named}, expected {seeds}, those of its runs; it was edited; restore it from a copy"
        )
    if set(seeds) & set(explored):
        raise EditedManifest(
            f"{file}: found seeds {sorted(set(seeds) & set(explored))} in a confirmation, expected none that the "
            f"confirmed plan {str(confirms)[:12]} has used; what it finds confirms nothing"
        )
    if _SEAL in content and content[_SEAL] != digest({name: content[name] for name in content if name != _SEAL}):
        raise EditedManifest(
            f"{file}: found entries that differ from their SHA-256, expected settings and grids as they were written "
            "before the first run; it was edited since; restore it from a copy"
        )


def check_run(folder: Path, manifest: Mapping[str, Any], entry: Mapping[str, Any], *, plan: str | None) -> None:
    """Compare run.json of a run with the entry of the plan in whose place it lies.

    Args:
        entry: run, config, seed and parent, as in sweep.json.
        plan: hash of the plan.

    Raises: EditedManifest: another configuration, seed, parent or plan.
    """
    expected = without_secrets({name: entry[name] for name in ("config", "seed", "parent") if name in entry})
    expected["plan"] = plan
    found = differences(expected, manifest, [name for name in expected if name in manifest])
    if found:
        raise EditedManifest(
            f"{folder}: found another run than the plan has there ({found}), expected the one that was made there; it "
            "was moved, copied or edited, or belongs to another plan; restore the sweep from a copy, or move this "
            "folder away and have the run made again"
        )
