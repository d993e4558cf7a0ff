"""run.json: what is masked before it is written, and what must be the same when a run is continued."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from .segment import dump_json

_SECRET = re.compile(r"(token|secret|password|key$)", re.IGNORECASE)
_SECRET_IN_COMMAND = re.compile(r"([^\s=]*(?:token|secret|password|key)[^\s=]*[=\s]+)(\S+)", re.IGNORECASE)
_MASK = "***"
_MOST_DIFFERENCES = 5


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
