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


def _to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_json(entry) for key, entry in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return _to_json(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_to_json(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return [_to_json(entry) for entry in sorted(value)]
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


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_from_json(entry) for entry in value]
    if isinstance(value, str) and value.lstrip("\\") in _NOT_FINITE:
        return value[1:] if value.startswith("\\") else _NOT_FINITE[value]
    return value


def dump_json(value: Any, *, indent: int | None = None) -> str:
    """Return valid JSON; NaN and infinities become the strings "NaN", "Infinity" and "-Infinity".

    A text that reads like one of the three gets a backslash in front, so that it stays a text.

    Raises: ConfigurationError: a value that JSON cannot hold.
    """
    return json.dumps(_to_json(value), indent=indent, ensure_ascii=False, allow_nan=False)


def load_json(text: str | bytes) -> Any:
    """Inverse of ``dump_json``: the three strings become floats again.

    Raises: ValueError: no JSON, or nested too deeply.
    """
    try:
        return _from_json(json.loads(text))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
