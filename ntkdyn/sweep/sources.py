"""What a sweep's runs are made by and from, beside its plan: own files by their SHA-256, versions of ntkdyn and torch.

None of it is part of the plan; that it has changed is said when the sweep goes on.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..store.files import read
from .folder import FILE
from .plan import Plan
from .plan_file import record_of


def sources_of(plan: Plan) -> dict[str, str]:
    """SHA-256 of every file that experiment, settings or probes name as file.py:object or file.npz, by that name."""
    texts = {plan.experiment}
    texts |= {probe for kind in ("trunk", "arm") for probe in record_of(plan.record, kind).get("probes", ())}
    for one in plan.configurations:
        texts |= {value for value in one.config.values() if isinstance(value, str)}
    files = sorted({file for text in texts if (file := _file(text)) is not None})
    return {str(file): _digest(file) for file in files}


def _file(text: str) -> Path | None:
    # Behind the object's name an experiment may have options.
    head, separator, _ = text.partition(".py:")
    file = Path(f"{head}.py" if separator else text)
    return file if (separator or text.endswith(".npz")) and file.is_file() else None


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def warn_of_changes(plan: Plan, out: Path, kept: Mapping[str, Mapping[str, Any]]) -> None:
    """Say in a line each what has changed since a sweep was begun, or its kept runs were made."""
    for line in (*_changed_files(plan, out), *_other_versions(out, kept)):
        warnings.warn(line, RuntimeWarning, stacklevel=3)


def _changed_files(plan: Plan, out: Path) -> Iterator[str]:
    # A confirmation is made by what its exploration was made by.
    place = out if plan.confirms is None else out.parent
    before = json.loads(read(place / FILE)).get("sources", {})
    for name, digest in sources_of(plan).items():
        if before.get(name, digest) != digest:
            yield (
                f"{place}: {name} has changed since the sweep was begun (SHA-256 {before[name][:12]}, now "
                f"{digest[:12]}); runs made with either stand side by side"
            )


def _other_versions(out: Path, kept: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, now in (("ntkdyn", __version__), ("torch", str(torch.__version__))):
        others = [str(manifest[name]) for manifest in kept.values() if manifest.get(name, now) != now]
        if others:
            versions = ", ".join(sorted(set(others)))
            yield f"{out}: {len(others)} of {len(kept)} kept runs were made by {name} {versions}; this is {now}"
