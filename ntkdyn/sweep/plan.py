"""Plans: every configuration of a sweep and every seed, laid out and hashed before the first run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..configuration import configure, parse_assignment, parse_value
from ..errors import ConfigurationError
from ..plan_hash import digest, plan_hash
from ..plugins import kebab, load_experiment
from ..primary import PrimaryComparison, read_primary
from .plan_file import Grid, PlanFile, read_plan_file, record_of

FORMAT = "ntkdyn-sweep-1"
_MOST_SEEDS = 100_000


@dataclass(frozen=True)
class PlannedConfiguration:
    """One configuration of the plan: the folder of its runs, and where they start.

    Attributes:
        runs: folder inside the sweep, "trunks/<12 hex>" or "arms/<12 hex>"; below it lies a folder for each seed.
        config: all settings.
        trunk: folder of the runs of its trunk, None where it has none.
        step: of the trunk's checkpoint from which it branches.
        checkpoint_steps: of a trunk, at which arms branch.
    """

    runs: str
    config: Mapping[str, Any]
    trunk: str | None = None
    step: int = 0
    checkpoint_steps: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """``"trunk"`` or ``"arm"``."""
        return "trunk" if self.runs.startswith("trunks/") else "arm"

    def parent(self, seed: int) -> str | None:
        """Path of the checkpoint that the run of a seed branches from."""
        return None if self.trunk is None else f"{self.trunk}/{seed}/checkpoints/{self.step}"


@dataclass(frozen=True)
class PlannedRun:
    """One run of the plan: its folder, configuration, seed, the checkpoint it starts from, and what it records."""

    run: str
    config: Mapping[str, Any]
    seed: int
    parent: str | None
    checkpoint_steps: tuple[int, ...]
    kind: str
    record: Mapping[str, Any]

    def entry(self) -> dict[str, Any]:
        """The run as it stands in sweep.json."""
        return {"run": self.run, "kind": self.kind, "config": self.config, "seed": self.seed, "parent": self.parent}

    @property
    def trunk(self) -> str | None:
        """Folder of the trunk's run that must be finished before."""
        return None if self.parent is None else self.parent.rsplit("/checkpoints/", 1)[0]


@dataclass(frozen=True)
class Plan:
    """Everything a sweep will run, fixed before the first run.

    Attributes:
        experiment: name as given.
        settings: settings of every run.
        grids: each a mapping from setting to values; the plan is the union of their products.
        seeds: seeds of every configuration.
        configurations: trunks first, then arms.
        primary: the comparison that is named beforehand, if any.
        record: what runs record, as in ``PlanFile``.
        confirms: hash of the plan that this one repeats on fresh seeds; explored: the seeds of that one.
    """

    experiment: str
    settings: Mapping[str, Any]
    grids: tuple[Mapping[str, tuple[Any, ...]], ...]
    seeds: tuple[int, ...]
    configurations: tuple[PlannedConfiguration, ...]
    primary: PrimaryComparison | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    confirms: str | None = None
    explored: tuple[int, ...] = ()

    @cached_property
    def runs(self) -> tuple[PlannedRun, ...]:
        """Every run, trunks first."""
        return tuple(
            PlannedRun(
                run=f"{one.runs}/{seed}",
                config=one.config,
                seed=seed,
                parent=one.parent(seed),
                checkpoint_steps=one.checkpoint_steps,
                kind=one.kind,
                record=record_of(self.record, one.kind),
            )
            for one in self.configurations
            for seed in self.seeds
        )

    @property
    def hash(self) -> str:
        """SHA-256 over experiment, configurations, seeds, primary comparison, what it confirms and what it records."""
        return plan_hash(self.experiment, self.entries(), self._named(), self.confirms, self.explored, self.record)

    @property
    def design(self) -> str:
        """SHA-256 over the same but for the seeds: a confirmation has that of what it confirms."""
        configurations = [[one.runs, one.config, one.trunk, one.step] for one in self.configurations]
        return digest([self.experiment, configurations, self._named(), self.record])

    def _named(self) -> dict[str, Any] | None:
        return None if self.primary is None else self.primary.to_json()

    def entries(self) -> list[dict[str, Any]]:
        """The runs as they stand in sweep.json."""
        return [run.entry() for run in self.runs]

    def to_json(self) -> dict[str, Any]:
        """Content of sweep.json."""
        content = {
            "format": FORMAT,
            "experiment": self.experiment,
            "settings": self.settings,
            "grids": self.grids,
            "seeds": self.seeds,
            "hash": self.hash,
            "primary": self._named(),
            "record": self.record,
            "plan": self.entries(),
        }
        if self.confirms is not None:
            content |= {"confirms": self.confirms, "explored": self.explored}
        return content

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Plan:
        """Read ``to_json`` but for the steps of checkpoints.  Raises: KeyError, TypeError, ValueError: no plan."""
        # Those of the runs, which are hashed.
        seeds = tuple(dict.fromkeys(int(entry["seed"]) for entry in content["plan"]))
        primary = content.get("primary")
        configurations = []
        for entry in content["plan"]:
            if entry["seed"] == seeds[0]:
                trunk, _, step = str(entry["parent"] or "").partition("/checkpoints/")
                configurations.append(
                    PlannedConfiguration(
                        runs=str(entry["run"]).rsplit("/", 1)[0],
                        config=dict(entry["config"]),
                        trunk=trunk.rsplit("/", 1)[0] if trunk else None,
                        step=int(step or 0),
                    )
                )
        return Plan(
            experiment=str(content["experiment"]),
            settings=dict(content["settings"]),
            grids=tuple({name: tuple(values) for name, values in grid.items()} for grid in content["grids"]),
            seeds=seeds,
            configurations=tuple(configurations),
            primary=None if primary is None else PrimaryComparison.from_json(primary),
            record=dict(content.get("record") or {}),
            confirms=content.get("confirms"),
            explored=tuple(content.get("explored", ())),
        )

    def lines(self) -> Iterator[str]:
        """Describe the plan, one configuration a line."""
        axes = sorted({name for grid in self.grids for name in grid})
        trunks, arms = (sum(run.kind == kind for run in self.runs) for kind in ("trunk", "arm"))
        yield f"{self.experiment}: {trunks} trunks, {arms} arms, seeds {list(self.seeds)}"
        for one in self.configurations:
            shown = ", ".join(f"{name}={one.config[name]}" for name in axes if name in one.config)
            origin = one.parent(self.seeds[0])
            yield f"{one.runs}  {shown}" + (f"  from {origin}" if origin else "")
        if self.confirms is not None:
            yield f"confirms plan {self.confirms[:12]}, which used seeds {list(self.explored)}"
        yield f"plan {self.hash[:12]}"


def read_grid(axes: Sequence[str]) -> Grid:
    """Parse ``("start_epoch=0,8", "survivors=keep")`` into one grid.

    >>> read_grid(["start_epoch=0,8", "survivors=keep"])
    {'start_epoch': (0, 8), 'survivors': ('keep',)}

    Raises: ConfigurationError: no "=", no values, or an axis given twice.
    """
    grid: Grid = {}
    for text in axes:
        name, separator, values = text.partition("=")
        if not separator or not name or not values:
            raise ConfigurationError(f"--over {text}: found no KEY=V1,V2,...; write e.g. --over start_epoch=0,4,8")
        if name in grid:
            raise ConfigurationError(f"--over {text}: the axis {name!r} is given twice; give all its values at once")
        grid[name] = tuple(parse_value(value) for value in values.split(","))
    return grid


def make_plan(
    experiment: str,
    *,
    file: Path | None = None,
    settings: Sequence[str] = (),
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: int | Sequence[int] | None = None,
) -> Plan:
    """Lay out a sweep: every configuration of the grids for every seed, and the trunks they branch from.

    Args:
        experiment: installed name, ``file.py:object`` or ``package.module:object``.
        file: TOML with ``seeds``, ``first_seed``, ``[settings]``, ``[[grid]]``, ``[record]`` and ``[plan]``.
        settings: ``key=value`` texts, which win over the file's.
        grid: one more grid.
        seeds: a number of seeds, from the file's ``first_seed`` (else 0) on, or the seeds; default the file's, else 1.

    Raises: ConfigurationError: the file or a setting is invalid, or the file is that of another experiment.
    """
    chosen = load_experiment(experiment)
    written = PlanFile() if file is None else read_plan_file(file)
    if written.experiment is not None and _place(written.experiment) != _place(experiment):
        raise ConfigurationError(
            f"{file}: found the plan of experiment {written.experiment!r}, expected one of {experiment!r}; give that "
            "experiment, or another file"
        )
    base = written.settings | dict(parse_assignment(text) for text in settings)
    grids = [*written.grids]
    if grid:
        grids.append({name: tuple(values) for name, values in grid.items()})
    planned = tuple(_configurations(chosen, base, grids))
    primary = None
    if written.plan is not None:
        by_runs = {one.runs: one.config for one in planned}
        primary = read_primary(
            written.plan,
            by_runs,
            list(chosen.Config.model_fields),
            path=str(file),
            results=getattr(chosen, "results", None),
        )
    wanted = written.seeds or 1 if seeds is None else seeds
    first = written.first_seed or 0
    if isinstance(wanted, int) and not (1 <= wanted <= _MOST_SEEDS and first + wanted <= 2**63):
        raise ConfigurationError(
            f"seeds: found {wanted} of them from {first} on, expected 1 to {_MOST_SEEDS}, all below 2^63"
        )
    listed = tuple(range(first, first + wanted)) if isinstance(wanted, int) else tuple(wanted)
    return Plan(experiment, base, tuple(grids), listed, planned, primary, written.record)


def _place(experiment: str) -> str:
    source, _, name = experiment.rpartition(":")
    return f"{Path(source).resolve()}:{name}" if source.endswith(".py") else kebab(experiment)


def _configurations(chosen: Any, base: Mapping[str, Any], grids: Sequence[Grid]) -> Iterator[PlannedConfiguration]:
    combinations = [
        dict(zip(axes, values, strict=True)) for axes in (grids or [{}]) for values in itertools.product(*axes.values())
    ]
    configurations: dict[str, Any] = {}
    for combination in combinations:
        config = configure(chosen.Config, dict(base) | combination)
        configurations.setdefault(digest(_plain(config))[:12], config)

    trunk_of = getattr(chosen, "trunk", lambda config: None)
    trunks: dict[str, tuple[Any, set[int]]] = {}
    arms: list[tuple[str, Any, tuple[str, int] | None]] = []
    for name, config in configurations.items():
        origin = trunk_of(config)
        if origin is None:
            arms.append((name, config, None))
            continue
        trunk, step = origin
        trunk_name = digest(_plain(trunk))[:12]
        trunks.setdefault(trunk_name, (trunk, set()))[1].add(step)
        if trunk_name != name:  # a configuration that is its own trunk is not run twice
            arms.append((name, config, (trunk_name, step)))
    for name, (config, steps) in trunks.items():
        yield PlannedConfiguration(f"trunks/{name}", _plain(config), checkpoint_steps=tuple(sorted(steps)))
    for name, config, origin in arms:
        if name not in trunks:
            trunk_runs, step = (None, 0) if origin is None else (f"trunks/{origin[0]}", origin[1])
            yield PlannedConfiguration(f"arms/{name}", _plain(config), trunk_runs, step)


def _plain(config: Any) -> dict[str, Any]:
    plain: dict[str, Any] = config.model_dump(mode="json")
    return plain
