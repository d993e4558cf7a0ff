"""The hash under which a sweep's plan is fixed; writers and readers of sweep.json compute it alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any


def digest(value: Any) -> str:
    """SHA-256 of JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()


def plan_hash(
    experiment: str,
    runs: Iterable[Mapping[str, Any]],
    primary: Mapping[str, Any] | None,
    confirms: str | None = None,
    explored: Iterable[int] = (),
    record: Mapping[str, Any] | None = None,
) -> str:
    """SHA-256 over experiment, runs (run, config, seed, parent) and primary comparison, as they stand in sweep.json.

    Of a confirmation also over the hash of the plan that it confirms, and the seeds of that one; where the plan says
    what is recorded, over that.
    """
    content: list[Any] = [experiment, [[run["run"], run["config"], run["seed"], run["parent"]] for run in runs]]
    # Plans without a primary comparison keep the hash that they had before there was one, and so those without record.
    if primary is not None or confirms is not None:
        content.append(primary)
    if confirms is not None:
        content += [confirms, list(explored)]
    if record:
        content.append({"record": record})
    return digest(content)
