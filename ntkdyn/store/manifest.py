"""run.json: how it is read, what is masked in it, and what must be the same when a run is continued."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DamagedRecording
from . import files
from .metadata import dump_json, load_json
from .segment import refuse_newer

_SECRET = re.compile(r"(token|secret|password|key$)", re.IGNORECASE)
_SECRET_IN_COMMAND = re.compile(r"([^\s=]*(?:token|secret|password|key)[^\s=]*[=\s]+)(\S+)", re.IGNORECASE)
_MASK = "***"
_MOST_DIFFERENCES = 5
_MANIFEST_BYTES = 64 * 2**20


def read_manifest(path: Path) -> dict[str, Any]:
    """Return run.json of a folder as a mapping.

    Raises: DamagedRecording: no JSON mapping, or absurdly large.  NewerRecording.  FileNotFoundError.
    """
    target = path / "run.json"
    problem = None
    manifest: Any = None
    if target.stat().st_size > _MANIFEST_BYTES:
        problem = f"{target.stat().st_size} bytes, expected at most {_MANIFEST_BYTES}"
    else:
        try:
            manifest = load_json(files.read(target))
        except ValueError as error:
            problem = f"no valid JSON ({error}), expected the manifest of a run"
        else:
            if not isinstance(manifest, dict):
                problem = f"a JSON {type(manifest).__name__}, expected a mapping"
    if problem is not None:
        raise DamagedRecording(f"{target} is damaged: found {problem}; restore it from a copy")
    refuse_newer(target, manifest.get("format"))
    return dict(manifest)


def resumed_after(manifest: Mapping[str, Any]) -> list[int]:
    """Steps after which a run was resumed, as its manifest has them.

    Raises: DamagedRecording: the manifest is none that ntkdyn writes.
    """
    try:
        return [int(branch["after"]) for branch in manifest.get("branches", ())]
    except (TypeError, ValueError, KeyError, OverflowError):
        raise DamagedRecording(
            "the manifest is damaged: found branches that are no list of {'after': step}; restore run.json from a copy"
        ) from None


def without_secrets(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Mask texts under secret-looking keys of ``config`` and secret-looking settings of ``command``."""
    safe = dict(entries)
    if "config" in safe:
        safe["config"] = _masked(safe["config"])
    if isinstance(safe.get("command"), str):
        safe["command"] = _SECRET_IN_COMMAND.sub(rf"\g<1>{_MASK}", safe["command"])
    return safe


def _masked(value: Any, *, secret: bool = False) -> Any:
    if isinstance(value, Mapping):
        return {key: _masked(entry, secret=secret or bool(_SECRET.search(str(key)))) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_masked(entry, secret=secret) for entry in value]
    return _MASK if secret and isinstance(value, str) and value else value


def refuse_differences(path: Path, recorded: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]) -> None:
    """Compare entries of the manifest of a run with those of the run that wants to continue it.

    Raises: ConfigurationError: names what differs, with both values.
    """
    safe = without_secrets(now)
    found = [text for name in names for text in _differences(name, recorded.get(name), safe.get(name))]
    if found:
        more = f" and {len(found) - _MOST_DIFFERENCES} more" if len(found) > _MOST_DIFFERENCES else ""
        raise ConfigurationError(
            f"{path} holds a run of another configuration: {'; '.join(found[:_MOST_DIFFERENCES])}{more}; nothing was "
            "touched; resume with the same settings, or choose another folder"
        )


def _differences(name: str, recorded: Any, now: Any) -> Iterator[str]:
    if isinstance(recorded, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*recorded, *now]):
            yield from _differences(f"{name}.{key}", recorded.get(key), now.get(key))
    # As JSON, because that is what was stored: tuples are lists there, and NaN equals itself.
    elif dump_json(recorded) != dump_json(now):
        yield f"{name} was {_short(recorded)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = dump_json(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
