"""Sweeps: settings times seeds over local processes; arms that share their dense training branch from one trunk.

A sweep folder holds ``sweep.json`` (the plan and its hash), ``trunks/<12 hex>/<seed>/`` and ``arms/<12 hex>/<seed>/``,
each a complete recording; the 12 hex digits are those of the run's configuration. Finished runs are kept, so the same
command goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import threading
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from multiprocessing import connection
from pathlib import Path
from typing import Any

from .configuration import configure, parse_assignment, parse_value
from .errors import ConfigurationError, DamagedRecording, EditedManifest, NtkdynError, RecordingExists
from .experiment import run_experiment
from .plugins import load_experiment
from .progress import progress_bar
from .store.files import make_folder, publish, replace
from .store.manifest import read_manifest

FORMAT = "ntkdyn-sweep-1"


@dataclass(frozen=True)
class PlannedRun:
    """One run of the plan: its folder inside the sweep, configuration, seed, and the checkpoint it starts from."""

    run: str
    config: Mapping[str, Any]
    seed: int
    parent: str | None = None
    checkpoint_steps: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """``"trunk"`` or ``"arm"``."""
        return "trunk" if self.run.startswith("trunks/") else "arm"


@dataclass(frozen=True)
class Plan:
    """Everything a sweep will run, fixed before the first run.

    Attributes:
        experiment: name as given.
        settings: settings of every run.
        grids: each a mapping from setting to values; the plan is the union of their products.
        seeds: seeds of every configuration.
        runs: trunks first, then arms.
    """

    experiment: str
    settings: Mapping[str, Any]
    grids: tuple[Mapping[str, tuple[Any, ...]], ...]
    seeds: tuple[int, ...]
    runs: tuple[PlannedRun, ...]

    @property
    def hash(self) -> str:
        """SHA-256 over experiment, configurations and seeds."""
        return _digest([self.experiment, [[run.run, run.config, run.seed, run.parent] for run in self.runs]])

    def lines(self) -> Iterator[str]:
        """Describe the plan, one configuration a line."""
        axes = sorted({name for grid in self.grids for name in grid})
        trunks = [run for run in self.runs if run.kind == "trunk"]
        yield f"{self.experiment}: {len(trunks)} trunks, {len(self.runs) - len(trunks)} arms, seeds {list(self.seeds)}"
        for run in self.runs:
            if run.seed == self.seeds[0]:
                shown = ", ".join(f"{name}={run.config[name]}" for name in axes if name in run.config)
                yield f"{run.run.rsplit('/', 1)[0]}  {shown}" + (f"  from {run.parent}" if run.parent else "")
        yield f"plan {self.hash[:12]}"


@dataclass
class Summary:
    """What a call of ``run_sweep`` did: finished and kept runs, failed ones with their error line."""

    finished: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """One line for the user."""
        return f"{len(self.finished)} runs finished, {len(self.kept)} kept from before, {len(self.failed)} failed"


def read_grid(axes: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Parse ``("start_epoch=0,8", "survivors=keep")`` into one grid.

    >>> read_grid(["start_epoch=0,8", "survivors=keep"])
    {'start_epoch': (0, 8), 'survivors': ('keep',)}

    Raises: ConfigurationError: no "=", no values, or an axis given twice.
    """
    grid: dict[str, tuple[Any, ...]] = {}
    for text in axes:
        name, separator, values = text.partition("=")
        if not separator or not name or not values:
            raise ConfigurationError(f"--over {text}: found no KEY=V1,V2,...; write e.g. --over start_epoch=0,4,8")
        if name in grid:
            raise ConfigurationError(f"--over {text}: the axis {name!r} is given twice; give all its values at once")
        grid[name] = tuple(parse_value(value) for value in values.split(","))
    return grid


@contextmanager
def packaged_plan(name: str) -> Iterator[Path]:
    """Give the path of a plan file that comes with the experiments."""
    with as_file(files("ntkdyn.experiments") / name) as path:
        yield path


def make_plan(
    experiment: str,
    *,
    file: Path | None = None,
    settings: Sequence[str] = (),
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: int | None = None,
) -> Plan:
    """Lay out a sweep: every configuration of the grids for every seed, and the trunks they branch from.

    Args:
        experiment: installed name, ``file.py:object`` or ``package.module:object``.
        file: TOML with ``seeds``, ``[settings]`` and ``[[grid]]`` tables.
        settings: ``key=value`` texts, which win over the file's.
        grid: one more grid.
        seeds: seeds 0 to n-1; default the file's, else 1.

    Raises: ConfigurationError: the file or a setting is invalid.
    """
    chosen = load_experiment(experiment)
    base, grids, file_seeds = _read_plan_file(file) if file is not None else ({}, [], None)
    base |= dict(parse_assignment(text) for text in settings)
    if grid:
        grids.append({name: tuple(values) for name, values in grid.items()})
    count = seeds or file_seeds or 1
    combinations = [
        dict(zip(axes, values, strict=True)) for axes in (grids or [{}]) for values in itertools.product(*axes.values())
    ]
    configurations: dict[str, Any] = {}
    for combination in combinations:
        config = configure(chosen.Config, base | combination)
        configurations.setdefault(_digest(_plain(config))[:12], config)

    trunk_of = getattr(chosen, "trunk", lambda config: None)
    trunks: dict[str, tuple[Any, set[int]]] = {}
    arms: list[tuple[str, Any, tuple[str, int] | None]] = []
    for digest, config in configurations.items():
        origin = trunk_of(config)
        if origin is None:
            arms.append((digest, config, None))
            continue
        trunk, step = origin
        name = _digest(_plain(trunk))[:12]
        trunks.setdefault(name, (trunk, set()))[1].add(step)
        if name != digest:  # a configuration that is its own trunk is not run twice
            arms.append((digest, config, (name, step)))
    runs = [
        PlannedRun(f"trunks/{name}/{seed}", _plain(config), seed, None, tuple(sorted(steps)))
        for name, (config, steps) in trunks.items()
        for seed in range(count)
    ]
    for digest, config, origin in arms:
        if digest in trunks:
            continue
        for seed in range(count):
            parent = None if origin is None else f"trunks/{origin[0]}/{seed}/checkpoints/{origin[1]}"
            runs.append(PlannedRun(f"arms/{digest}/{seed}", _plain(config), seed, parent))
    return Plan(experiment, base, tuple(grids), tuple(range(count)), tuple(runs))


def run_sweep(plan: Plan, out: Path, *, jobs: int | None = None, command: str = "", progress: bool = False) -> Summary:
    """Run what is not finished yet, trunks before their arms, one process a run and one thread a process.

    Args:
        plan: from ``make_plan``.
        out: folder of the sweep: new, empty, or holding the same plan.
        jobs: worker processes; default the cores of this process.
        command: the user's command, stored in every run.

    Raises: RecordingExists: ``out`` holds something else; nothing in it was touched.
    """
    _claim(plan, out)
    summary = Summary()
    pending: list[PlannedRun] = []
    for run in plan.runs:
        status = run_status(out / run.run)
        if status == "finished":
            summary.kept.append(run.run)
            continue
        if status is not None:
            _set_aside(out / run.run)
        pending.append(run)
    finished = set(summary.kept)
    workers = jobs or _cores()
    # spawn, not fork: torch and HDF5 keep threads and locks that a forked child must not inherit.
    context = multiprocessing.get_context("spawn")
    with (
        progress_bar(len(plan.runs), what="runs", done=len(finished), shown=progress) as bar,
        ProcessPoolExecutor(min(workers, max(len(pending), 1)), mp_context=context, initializer=_start_worker) as pool,
    ):
        running: dict[Future[str | None], PlannedRun] = {}
        try:
            while pending or running:
                ready = [run for run in pending if _trunk(run) is None or _trunk(run) in finished]
                for run in ready:
                    running[pool.submit(_work, plan.experiment, run, str(out), command)] = run
                pending = [run for run in pending if run not in ready]
                lost = [run for run in pending if _trunk(run) in summary.failed]
                for run in lost:
                    summary.failed[run.run] = f"its trunk {_trunk(run)} failed"
                    bar.update()
                pending = [run for run in pending if run not in lost]
                if not running:
                    continue
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    error = future.result()
                    if error is None:
                        finished.add(run.run)
                        summary.finished.append(run.run)
                    else:
                        summary.failed[run.run] = error
                    bar.update()
        finally:
            for future in running:
                future.cancel()
    return summary


def run_status(folder: Path) -> str | None:
    """Status in a run's manifest: "finished", "running", …; None where there is no run.

    Raises: EditedManifest: training it again because of an edit would be for its owner to decide.  NewerRecording.
    """
    try:
        status = read_manifest(folder).get("status")
    except FileNotFoundError:
        return "unfinished" if folder.exists() else None
    except EditedManifest:
        raise
    except DamagedRecording:
        return "damaged"
    return status if isinstance(status, str) else "damaged"


def _cores() -> int:
    # The cores this process may use; macOS and Windows know only those of the machine.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    import torch

    # One run a process: more threads would only fight over the cores.
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A worker whose sweep was killed would go on writing where the restarted sweep writes.
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _work(experiment: str, run: PlannedRun, out: str, command: str) -> str | None:
    """Do one run in a worker process; return None or the error's line. What it says goes to log.txt in its folder."""
    from .checkpoint import load

    chosen = load_experiment(experiment)
    folder = Path(out) / run.run
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            run_experiment(
                chosen,
                configure(chosen.Config, run.config),
                seed=run.seed,
                path=folder,
                checkpoint_steps=frozenset(run.checkpoint_steps),
                start=None if run.parent is None else load(Path(out) / run.parent),
                parent=run.parent,
                command=command,
            )
    except NtkdynError as error:
        return str(error)
    except Exception as error:  # a user's model may raise anything; the other runs go on
        return f"{type(error).__name__}: {error}"
    finally:
        if said.getvalue() and folder.is_dir():
            publish(folder / "log.txt", said.getvalue().encode())
    return None


def _trunk(run: PlannedRun) -> str | None:
    return None if run.parent is None else run.parent.rsplit("/checkpoints/", 1)[0]


def _claim(plan: Plan, out: Path) -> None:
    """Write sweep.json into a new folder, or accept one that holds this very plan."""
    manifest = out / "sweep.json"
    if manifest.exists():
        found = json.loads(manifest.read_bytes()).get("hash")
        if found != plan.hash:
            raise RecordingExists(
                f"{out}: holds another sweep (plan {str(found)[:12]}), expected plan {plan.hash[:12]}; "
                "nothing was touched; choose a new --out"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecordingExists(f"{out}: holds something that is no sweep; nothing was touched; choose a new --out")
    make_folder(out)
    content = {
        "format": FORMAT,
        "experiment": plan.experiment,
        "settings": plan.settings,
        "grids": plan.grids,
        "seeds": plan.seeds,
        "hash": plan.hash,
        "plan": [
            {"run": run.run, "kind": run.kind, "config": run.config, "seed": run.seed, "parent": run.parent}
            for run in plan.runs
        ],
    }
    publish(manifest, json.dumps(content, indent=1).encode())


def _set_aside(folder: Path) -> None:
    """Rename an unfinished run, so that it is neither lost nor mistaken for a finished one."""
    for number in itertools.count(1):
        target = folder.with_name(f"{folder.name}.unfinished-{number}")
        if not target.exists():
            replace(folder, target)
            return


def _read_plan_file(path: Path) -> tuple[dict[str, Any], list[dict[str, tuple[Any, ...]]], int | None]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: no valid TOML: {error}") from None
    unknown = sorted(set(content) - {"settings", "grid", "seeds", "experiment"})
    if unknown:
        raise ConfigurationError(
            f"{path}: found {', '.join(unknown)}, expected seeds, [settings] and [[grid]] tables; "
            "put settings of every run under [settings]"
        )
    grids = content.get("grid", [])
    seeds = content.get("seeds")
    if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
        raise ConfigurationError(f"{path}: grid must be [[grid]] tables of setting = [values]")
    if seeds is not None and (not isinstance(seeds, int) or seeds < 1):
        raise ConfigurationError(f"{path}: found seeds = {seeds!r}, expected a whole number from 1 on")
    axes = [
        {name: tuple(values) if isinstance(values, list) else (values,) for name, values in grid.items()}
        for grid in grids
    ]
    return dict(content.get("settings", {})), axes, seeds


def _plain(config: Any) -> dict[str, Any]:
    plain: dict[str, Any] = config.model_dump(mode="json")
    return plain


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()
