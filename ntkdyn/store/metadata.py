"""The JSON of recordings: valid, with NaN and infinities as texts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigurationError

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
# Without a limit of its own, whether a text can be read depends on how deep the caller stands in Python's stack.
_MOST_LEVELS = 100


def _to_json(value: Any, level: int = 0) -> Any:
    if level > _MOST_LEVELS:
        raise ConfigurationError(f"metadata: found more than {_MOST_LEVELS} levels of nesting, expected fewer")
    if isinstance(value, Mapping):
        return {str(key): _to_json(entry, level + 1) for key, entry in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return _to_json(value.tolist(), level)
    if isinstance(value, (list, tuple)):
        return [_to_json(entry, level + 1) for entry in value]
    if isinstance(value, (set, frozenset)):
        return [_to_json(entry, level + 1) for entry in sorted(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str):
        return f"\\{value}" if value.lstrip("\\") in _NOT_FINITE else value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise ConfigurationError(
        f"metadata: found a value of type {type(value).__name__}, expected numbers, text, lists and mappings of them"
    )


def _from_json(value: Any, level: int = 0) -> Any:
    if level > _MOST_LEVELS:
        raise RecursionError
    if isinstance(value, dict):
        return {key: _from_json(entry, level + 1) for key, entry in value.items()}
    if isinstance(value, list):
        return [_from_json(entry, level + 1) for entry in value]
    if isinstance(value, str) and value.lstrip("\\") in _NOT_FINITE:
        return value[1:] if value.startswith("\\") else _NOT_FINITE[value]
    return value


def dump_json(value: Any, *, indent: int | None = None) -> str:
    """Return valid JSON; NaN and infinities become the strings "NaN", "Infinity" and "-Infinity".

    A text that reads like one of the three gets a backslash in front, so that it stays a text. Halves of surrogate
    pairs, which a file name that is no UTF-8 brings into a command, are escaped.

    Raises: ConfigurationError: a value that JSON cannot hold, an integer of thousands of digits, more than 100 levels.
    """
    plain = _to_json(value)
    try:
        text = json.dumps(plain, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ConfigurationError(f"metadata: JSON cannot hold a value ({error}); store it as text") from error
    # The escape of Python is that of JSON.
    return text.encode(errors="backslashreplace").decode()


def load_json(text: str | bytes) -> Any:
    """Inverse of ``dump_json``: the three strings become floats again.

    Raises: ValueError: no JSON, an integer of thousands of digits, or more than 100 levels.
    """
    try:
        return _from_json(json.loads(text))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
