"""The primary comparison: the one difference that a sweep's plan names, and hashes, before its first run.

Every other difference that is found in the sweep is exploratory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

from .errors import ConfigurationError

_WHERE = "[plan.primary]"
_NUMBERS = ("margin", "deviation")
_TEXTS = ("hypothesis", "deviation_from")


@dataclass(frozen=True)
class PrimaryComparison:
    """Two arms of a sweep and the result in which they are compared, paired by seed.

    Attributes:
        measure: column of the results, e.g. "test_accuracy".
        of, minus: settings of the two arms.
        where: settings that both share.
        of_runs, minus_runs: folders of their runs inside the sweep, e.g. "arms/594beeb11aad"; below them lie the seeds.
        margin: largest difference that counts as none, for the equivalence test; None: not set beforehand.
        deviation: expected standard deviation over seeds of the paired differences; None: unknown.
        deviation_from: where the deviation is from.
        hypothesis: what is expected, in words.

    Margin and deviation are in accuracy points (percentage points) for a measure that ends in "accuracy", else in the
    measure's own unit.
    """

    measure: str
    of: Mapping[str, Any]
    minus: Mapping[str, Any]
    where: Mapping[str, Any]
    of_runs: str
    minus_runs: str
    margin: float | None = None
    deviation: float | None = None
    deviation_from: str = ""
    hypothesis: str = ""

    @property
    def unit(self) -> str:
        """Unit of margin and deviation in words; "" for the measure's own."""
        if self.measure.endswith("bleu"):
            return "BLEU"
        return "accuracy points" if self.measure.endswith("accuracy") else ""

    def __str__(self) -> str:
        """The comparison in words of settings."""
        shared = f" where {_words(self.where)}" if self.where else ""
        return f"{self.measure} of {_words(self.of)} minus {_words(self.minus)}{shared}"

    def to_json(self) -> dict[str, Any]:
        """As it stands in sweep.json under "primary"."""
        return asdict(self)

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> PrimaryComparison:
        """Read ``to_json``.  Raises: TypeError: other entries."""
        return PrimaryComparison(**entry)


def read_primary(
    table: Any,
    configurations: Mapping[str, Mapping[str, Any]],
    known: list[str],
    *,
    path: str,
    results: Sequence[str] | None = None,
) -> PrimaryComparison:
    """Return the comparison of a ``[plan]`` table: hypothesis, margin, deviation, deviation_from, [plan.primary].

    Args:
        configurations: those of the sweep by the folder of their runs.
        known: names of all settings.
        path: of the file, for errors.
        results: names of what the experiment's runs measure; None: it does not say.
    Raises: ConfigurationError: another entry, an unknown setting or measure, no arm or several arms of the plan fit, or
        one arm stands on both sides.
    """
    entries = _table(table, "[plan]", (*_NUMBERS, *_TEXTS, "primary"), path)
    if "primary" not in entries:
        raise ConfigurationError(
            f"{path}: [plan]: found no primary comparison, expected a table [plan.primary] with measure, of and minus"
        )
    primary = _table(entries["primary"], _WHERE, ("measure", "of", "minus", "where"), path)
    measure = primary.get("measure")
    if not isinstance(measure, str) or not measure:
        raise ConfigurationError(
            f"{path}: {_WHERE}: found measure = {measure!r}, expected the name of a result such as 'test_accuracy'"
        )
    if results is not None and measure not in results:
        near = get_close_matches(measure, results, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"results are {', '.join(results)}"
        raise ConfigurationError(f"{path}: {_WHERE}: measure {measure!r} is unknown; {hint}")
    where = _settings(primary.get("where", {}), "where", known, path)
    sides: dict[str, dict[str, Any]] = {}
    for side in ("of", "minus"):
        sides[side] = _settings(primary.get(side), side, known, path)
        twice = sorted(set(sides[side]) & set(where))
        if twice:
            raise ConfigurationError(f"{path}: {_WHERE}: found {twice[0]!r} in {side} and in where, expected it once")
    runs = {side: _only_match(where | settings, side, configurations, path) for side, settings in sides.items()}
    if runs["of"] == runs["minus"]:
        raise ConfigurationError(
            f"{path}: {_WHERE}: found one arm, {runs['of']}, in of and in minus, expected two that differ"
        )
    return PrimaryComparison(
        measure=measure,
        of=sides["of"],
        minus=sides["minus"],
        where=where,
        of_runs=runs["of"],
        minus_runs=runs["minus"],
        margin=_positive(entries, "margin", path),
        deviation=_positive(entries, "deviation", path),
        deviation_from=_text(entries, "deviation_from", path),
        hypothesis=_text(entries, "hypothesis", path),
    )


def _table(value: Any, what: str, names: tuple[str, ...], path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{path}: {what}: found {value!r}, expected a table with {', '.join(names)}")
    for name in value:
        if name not in names:
            near = get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(names)}"
            raise ConfigurationError(f"{path}: {what}: found the entry {name!r}; {hint}")
    return dict(value)


def _settings(value: Any, what: str, known: list[str], path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or (what != "where" and not value):
        found = "nothing" if value is None or value == {} else repr(value)
        raise ConfigurationError(
            f"{path}: {_WHERE}: found {found} under {what}, expected settings such as {what} = {{start_epoch = 0}}"
        )
    for name in value:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ConfigurationError(f"{path}: {_WHERE}: {what}: setting {name!r} is unknown; {hint}")
    return dict(value)


def _only_match(
    settings: Mapping[str, Any], side: str, configurations: Mapping[str, Mapping[str, Any]], path: str
) -> str:
    fitting = {
        runs: config
        for runs, config in configurations.items()
        if all(_same(config.get(name), value) for name, value in settings.items())
    }
    if len(fitting) == 1:
        return next(iter(fitting))
    if fitting:
        found = f"{len(fitting)} arms that fit {_words(settings)}"
        differences = "; ".join(_differences(list(fitting.values())))
        raise ConfigurationError(
            f"{path}: {_WHERE}: {side}: found {found}, expected one; they differ in {differences}; name one value of "
            "each under where"
        )
    absent = [
        f"{name} is {', '.join(values)} in this plan"
        for name, wanted in settings.items()
        if not any(_same(config.get(name), wanted) for config in configurations.values())
        for values in [_values(name, configurations.values())]
    ]
    reason = "; ".join(absent) or "each value occurs, but in no arm together"
    raise ConfigurationError(f"{path}: {_WHERE}: {side}: found no arm with {_words(settings)}, expected one; {reason}")


def _differences(configurations: list[Mapping[str, Any]]) -> Iterator[str]:
    for name in configurations[0]:
        values = _values(name, configurations)
        if len(values) > 1:
            yield f"{name} ({', '.join(values)})"


def _values(name: str, configurations: Any) -> list[str]:
    return list(dict.fromkeys(str(config.get(name)) for config in configurations))


def _same(found: Any, wanted: Any) -> bool:
    # 1 == True, but not in words of settings.
    return found == wanted and isinstance(found, bool) == isinstance(wanted, bool)


def _positive(entries: Mapping[str, Any], name: str, path: str) -> float | None:
    value = entries.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigurationError(f"{path}: [plan]: found {name} = {value!r}, expected a positive number")
    return float(value)


def _text(entries: Mapping[str, Any], name: str, path: str) -> str:
    value = entries.get(name, "")
    if not isinstance(value, str):
        raise ConfigurationError(f"{path}: [plan]: found {name} = {value!r}, expected a text")
    return value


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())
