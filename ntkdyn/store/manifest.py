"""run.json: how it is read and written, what is masked in it, and what must be the same when a run is continued.

Its entry ``crc32`` covers all others, as ``dump_json`` writes them: a flipped byte of JSON is often JSON again, with
another result, seed or setting in it. Layout and escapes are free. Manifests of before have no such entry.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DamagedRecording, EditedManifest
from . import files
from .metadata import dump_json, load_json
from .segment import refuse_newer

_SECRET = re.compile(r"(token|secret|password|key$)", re.IGNORECASE)
_SECRET_IN_COMMAND = re.compile(r"([^\s=]*(?:token|secret|password|key)[^\s=]*[=\s]+)(\S+)", re.IGNORECASE)
_MASK = "***"
_MOST_DIFFERENCES = 5
_MANIFEST_BYTES = 64 * 2**20
_CHECKSUM = "crc32"


def encode_manifest(entries: Mapping[str, Any]) -> bytes:
    """The content of run.json, with its checksum.

    Raises: ConfigurationError: a value that JSON cannot hold, or an entry that has the name of the checksum.
    """
    if _CHECKSUM in entries:
        raise ConfigurationError(
            f"manifest: found an entry {_CHECKSUM!r}, expected others, as this is where run.json keeps its checksum; "
            "rename it"
        )
    return dump_json({**entries, _CHECKSUM: _checksum(entries)}, indent=1).encode()


def _checksum(entries: Mapping[str, Any]) -> int:
    # As it reads: two halves of a pair of surrogates become one sign on the way.
    return zlib.crc32(dump_json(load_json(dump_json(entries))).encode())


def read_manifest(path: Path, *, edited: bool = False) -> dict[str, Any]:
    """Return run.json of a folder as a mapping, without its checksum.

    Args: edited: also one that differs from its checksum.
    Raises: DamagedRecording: no JSON mapping, or absurdly large.  EditedManifest: it differs from its checksum.
        NewerRecording.  UntrustedFile: a FIFO or device.  StorageError, FileNotFoundError.
    """
    target = path / "run.json"
    problem = None
    manifest: Any = None
    content = files.read(target, most_bytes=_MANIFEST_BYTES + 1)
    if len(content) > _MANIFEST_BYTES:
        problem = f"more than {_MANIFEST_BYTES} bytes, expected fewer"
    else:
        try:
            manifest = load_json(content)
        except ValueError as error:
            problem = f"no valid JSON ({error}), expected the manifest of a run"
        else:
            if not isinstance(manifest, dict):
                problem = f"a JSON {type(manifest).__name__}, expected a mapping"
    if problem is not None:
        raise DamagedRecording(f"{target} is damaged: found {problem}; restore it from a copy")
    refuse_newer(target, manifest.get("format"))
    if _CHECKSUM in manifest:
        expected, found = manifest.pop(_CHECKSUM), _checksum(manifest)
        if found != expected and not edited:
            raise EditedManifest(
                f"{target} is not what ntkdyn wrote: found CRC {found} of its entries, expected {_short(expected)}, as "
                "after an edit by hand or a flipped byte; if its entries are right, accept them by ntkdyn repair "
                f"{path}, else restore it from a copy"
            )
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
    found = differences(recorded, without_secrets(now), names)
    if found:
        raise ConfigurationError(
            f"{path} holds a run of another configuration: {found}; nothing was touched; resume with the same "
            "settings, or choose another folder"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> str:
    """In words the first few entries that differ between two manifests, "" where none does."""
    found = [text for name in names for text in _differences(name, before.get(name), now.get(name))]
    more = f" and {len(found) - _MOST_DIFFERENCES} more" if len(found) > _MOST_DIFFERENCES else ""
    return "; ".join(found[:_MOST_DIFFERENCES]) + more


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
