"""The configuration of an experiment from texts, tables and TOML files, validated by name."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from .errors import ConfigurationError

ConfigType = TypeVar("ConfigType", bound=BaseModel)


def parse_value(text: str) -> Any:
    """Read a value in TOML syntax; what is none is a plain text.

    >>> [parse_value(text) for text in ("4", "0.5", "true", "[1, 2]", "sum10")]
    [4, 0.5, True, [1, 2], 'sum10']
    """
    try:
        content = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return content["value"] if set(content) == {"value"} else text


def parse_assignment(text: str) -> tuple[str, Any]:
    """Read ``key=value``.

    Raises: ConfigurationError: no "=" or no key.
    """
    name, separator, value = text.partition("=")
    if not separator or not name.strip():
        raise ConfigurationError(f"setting {text!r}: found no KEY=VALUE; write e.g. --set epochs=24")
    return name.strip(), parse_value(value.strip())


def configure(config_type: type[ConfigType], values: Mapping[str, Any]) -> ConfigType:
    """Return the validated configuration.

    Raises: ConfigurationError: one line for all problems, each setting by its name.
    """
    try:
        return config_type.model_validate(dict(values), strict=True)
    except ValidationError as error:
        known = list(config_type.model_fields)
        raise ConfigurationError("; ".join(_problem(dict(item), known) for item in error.errors())) from None


def _problem(item: Mapping[str, Any], known: list[str]) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
        return f"setting {name!r} is unknown; {hint}"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    expected = item["msg"].removeprefix("Input should be ")
    return f"setting {name!r}: found {item['input']!r}, expected {expected}"


def parse_settings(
    config_type: type[ConfigType], toml_file: str | Path | None, assignments: Sequence[str] = ()
) -> ConfigType:
    """Return the configuration of the file's ``[settings]`` table, overruled by ``key=value`` texts.

    Raises: ConfigurationError: the file or a setting is invalid.
    """
    values: dict[str, Any] = {}
    if toml_file is not None:
        try:
            content = tomllib.loads(Path(toml_file).read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{toml_file}: not readable as TOML: {' '.join(str(error).split())}") from None
        others = sorted(set(content) - {"settings", "experiment"})
        if others or not isinstance(content.get("settings", {}), dict):
            raise ConfigurationError(
                f"{toml_file}: found {', '.join(others) or 'settings that are no table'}, expected one [settings] "
                "table; put settings under [settings]; seeds and grids belong to ntkdyn sweep"
            )
        values |= content.get("settings", {})
    values |= dict(parse_assignment(text) for text in assignments)
    return configure(config_type, values)
