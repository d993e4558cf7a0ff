"""Plan files: the TOML in which a sweep is written down before it runs."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..plugins import load_probe

_KINDS = ("trunks", "arms")

Grid = dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class PlanFile:
    """What a file says.

    Attributes:
        settings: of every run.
        grids: setting -> values.
        seeds: a number of seeds, a list of them, or None.
        first_seed: of a number of seeds; None: 0.
        plan: the table [plan] as it stands, None where there is none.
        experiment: for which it was written, None where it does not say.
        record: what runs record, in place of what the experiment chooses: see ``record_of``.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    grids: tuple[Grid, ...] = ()
    seeds: int | tuple[int, ...] | None = None
    first_seed: int | None = None
    plan: Any = None
    experiment: str | None = None
    record: dict[str, Any] = field(default_factory=dict)


def read_plan_file(path: Path) -> PlanFile:
    """Read ``seeds``, ``first_seed``, ``[settings]``, ``[[grid]]``, ``[record]`` and ``[plan]``.

    Raises: ConfigurationError: no TOML, other entries, or values of the wrong kind.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: no valid TOML: {error}") from None
    unknown = sorted(set(content) - {"settings", "grid", "seeds", "first_seed", "experiment", "plan", "record"})
    if unknown:
        raise ConfigurationError(
            f"{path}: found {', '.join(unknown)}, expected seeds, first_seed, [settings], [[grid]], [record] and "
            "[plan]; put settings of every run under [settings]"
        )
    settings, experiment = content.get("settings", {}), content.get("experiment")
    if not isinstance(settings, dict):
        raise ConfigurationError(f"{path}: found settings = {settings!r}, expected a table [settings]")
    if experiment is not None and not isinstance(experiment, str):
        raise ConfigurationError(f"{path}: found experiment = {experiment!r}, expected a name")
    grids = content.get("grid", [])
    if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
        raise ConfigurationError(f"{path}: grid must be [[grid]] tables of setting = [values]")
    axes = tuple(
        {name: tuple(values) if isinstance(values, list) else (values,) for name, values in grid.items()}
        for grid in grids
    )
    empty = sorted({name for grid in axes for name, values in grid.items() if not values})
    if empty:
        raise ConfigurationError(
            f"{path}: [[grid]]: found {empty[0]} = [], expected at least one value, as the grid would hold no run"
        )
    seeds, first = _seeds(content.get("seeds"), path), content.get("first_seed")
    if first is not None and not _is_natural(first):
        raise ConfigurationError(f"{path}: found first_seed = {first!r}, expected a whole number from 0 to 2^63 - 1")
    if first is not None and isinstance(seeds, tuple):
        raise ConfigurationError(
            f"{path}: found first_seed = {first} beside a list of seeds, expected one of them; drop first_seed"
        )
    record = _record(content.get("record", {}), "[record]", path)
    return PlanFile(settings, axes, seeds, first, content.get("plan"), experiment, record)


def record_of(record: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What the trunks ("trunk") or arms ("arm") record: ``probes``, and ``every`` or ``log_spaced``, where given.

    ``[record.trunks]`` and ``[record.arms]`` win over ``[record]``.
    """
    own = dict(record.get(f"{kind}s", {}))
    shared = {name: value for name, value in record.items() if name not in _KINDS}
    if {"every", "log_spaced"} & set(own):
        shared = {name: value for name, value in shared.items() if name == "probes"}
    return shared | own


@contextmanager
def packaged_plan(name: str) -> Iterator[Path]:
    """Give the path of a plan file that comes with the experiments."""
    with as_file(files("ntkdyn.experiments") / name) as path:
        yield path


@contextmanager
def find_plan(text: str | None) -> Iterator[Path | None]:
    """Give the path of a plan: a file, or one that comes with the experiments by its name; None for None.

    Raises: ConfigurationError: neither.
    """
    if text is None:
        yield None
    elif Path(text).is_file():
        yield Path(text)
    else:
        plans = sorted(
            entry.name.removesuffix(".toml")
            for entry in files("ntkdyn.experiments").iterdir()
            if entry.name.endswith(".toml")
        )
        if text not in plans:
            raise ConfigurationError(
                f"--config {text}: found neither such a file nor a plan of that name; plans are {', '.join(plans)}"
            )
        with packaged_plan(f"{text}.toml") as path:
            yield path


def _record(table: Any, where: str, path: Path, kinds: tuple[str, ...] = _KINDS) -> dict[str, Any]:
    names = ("probes", "every", "log_spaced", *kinds)
    if not isinstance(table, dict) or not set(table) <= set(names):
        unknown = ", ".join(name for name in table if name not in names) if isinstance(table, dict) else repr(table)
        raise ConfigurationError(f"{path}: {where}: found {unknown}, expected {', '.join(names)}")
    if "every" in table and "log_spaced" in table:
        raise ConfigurationError(
            f"{path}: {where}: found every and log_spaced, expected one schedule; drop one of them"
        )
    for name in ("every", "log_spaced"):
        if name in table and (not _is_natural(table[name]) or table[name] < 1):
            raise ConfigurationError(
                f"{path}: {where}: found {name} = {table[name]!r}, expected a whole number from 1 on"
            )
    probes = table.get("probes", ["ntk"])
    if not isinstance(probes, list) or not probes or not all(isinstance(probe, str) for probe in probes):
        raise ConfigurationError(
            f"{path}: {where}: found probes = {probes!r}, expected a list of names such as ['ntk']"
        )
    for probe in probes:
        load_probe(probe)
    own = {kind: _record(table[kind], f"[record.{kind}]", path, ()) for kind in kinds if kind in table}
    return table | own


def _seeds(value: Any, path: Path) -> int | tuple[int, ...] | None:
    if isinstance(value, list):
        if value and all(_is_natural(seed) for seed in value) and len(set(value)) == len(value):
            return tuple(value)
    elif value is None or (_is_natural(value) and value >= 1):
        return value  # type: ignore[no-any-return]  # checked here
    raise ConfigurationError(
        f"{path}: found seeds = {value!r}, expected a whole number from 1 on, or a list of different seeds from 0 to "
        "2^63 - 1"
    )


def _is_natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
