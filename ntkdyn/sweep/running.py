"""Running a sweep: trunks before their arms, over local processes; finished runs are kept."""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from .. import schedule as schedules
from ..checkpoint import Checkpoint, load
from ..configuration import configure
from ..errors import ConfigurationError, NtkdynError
from ..experiment import Experiment, Stages, run_stages, staged_experiment
from ..plugins import load_experiment, load_probe
from ..progress import progress_bar
from ..store.files import publish
from ..store.manifest import read_manifest
from ..together import finish_together
from .confirmation import note, refuse_second
from .folder import FILE, claimed, finished_runs, set_aside
from .plan import Plan, PlannedRun
from .sources import sources_of, warn_of_changes

# Seconds; a run that was cut off begins anew, so that single snapshots need not survive it.
_COMMIT_EVERY = 10.0
# More at once take more memory than a cache has: with 15 a sweep takes a tenth longer than with 5.
_MOST_TOGETHER = 8
# Of the runs of this process, which differ in seeds and settings; hundreds of them need not check one network anew.
_checked_kernels: set[Hashable] = set()


@dataclass
class Summary:
    """What a call of ``run_sweep`` did: finished and kept runs, failed ones with their error line."""

    finished: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """One line for the user."""
        return f"{len(self.finished)} runs finished, {len(self.kept)} kept from before, {len(self.failed)} failed"


def run_sweep(plan: Plan, out: Path, *, jobs: int | None = None, command: str = "", progress: bool = False) -> Summary:
    """Run what is not finished yet, trunks before their arms, one thread a process.

    Args:
        plan: from ``make_plan``.
        out: folder of the sweep: new, empty, or holding the same plan.
        jobs: worker processes; default the cores of this process. One job runs in this process, which so imports
            everything once.
        command: the user's command, stored in every run.

    Raises: RecordingExists: ``out`` holds something else, or another process runs the sweep; nothing was touched.
        EditedManifest: a finished run is not the one that the plan has in its place.  ConfigurationError: an arm of
        the primary comparison has no such result.
    """
    new = not (out / FILE).exists()
    if plan.confirms is not None:
        refuse_second(plan, out.parent)
    with claimed(plan, out, sources=sources_of(plan)):
        if plan.confirms is not None:
            note(plan, out.parent, new=new)
        return _run(plan, out, jobs=jobs, command=command, progress=progress)


def _run(plan: Plan, out: Path, *, jobs: int | None, command: str, progress: bool) -> Summary:
    kept = finished_runs(plan, out)
    for name in kept:
        _check_measure(plan, out, name)
    warn_of_changes(plan, out, kept)
    summary = Summary(kept=list(kept))
    experiment = load_experiment(plan.experiment)
    finished = set(kept)
    # Arms of the primary comparison come first, so that a measure that they do not have is known at once.
    pending = [run for run in plan.runs if run.run not in finished]
    pending.sort(key=lambda run: not _is_primary(plan, run.run))
    for run in pending:
        if (out / run.run).exists():
            set_aside(out / run.run)
    workers = min(jobs or cores(), max(len(pending), 1))
    with (
        progress_bar(len(plan.runs), what="runs", done=len(finished), shown=progress) as bar,
        _executor(workers) as executor,
    ):
        running: dict[Future[list[str | None]], list[PlannedRun]] = {}
        try:
            while pending or running:
                ready = [run for run in pending if run.trunk is None or run.trunk in finished]
                while ready and len(running) < workers:
                    runs = _together(experiment, ready, workers)
                    running[executor.submit(_work, plan.experiment, runs, str(out), command, plan.hash)] = runs
                    ready = [run for run in ready if run not in runs]
                    pending = [run for run in pending if run not in runs]
                for run in [run for run in pending if run.trunk in summary.failed]:
                    summary.failed[run.run] = f"its trunk {run.trunk} failed"
                    pending.remove(run)
                    bar.update()
                if not running:
                    continue
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    for run, error in zip(running.pop(future), future.result(), strict=True):
                        if error is None:
                            _check_measure(plan, out, run.run)
                            finished.add(run.run)
                            summary.finished.append(run.run)
                        else:
                            summary.failed[run.run] = error
                        bar.update()
        finally:
            for future in running:
                future.cancel()
    return summary


def _is_primary(plan: Plan, run: str) -> bool:
    return plan.primary is not None and run.rsplit("/", 1)[0] in (plan.primary.of_runs, plan.primary.minus_runs)


def _check_measure(plan: Plan, out: Path, run: str) -> None:
    """Refuse to go on where a finished arm of the primary comparison has not what is compared."""
    if plan.primary is None or not _is_primary(plan, run):
        return
    results = read_manifest(out / run).get("results") or {}
    if plan.primary.measure not in results:
        raise ConfigurationError(
            f"{out / run}: found no result {plan.primary.measure!r}, which the primary comparison is about, expected "
            f"it among {', '.join(results) or 'none'}; the sweep was stopped; name another in [plan.primary] and run "
            "it into a new folder"
        )


def recorded(record: Mapping[str, Any]) -> tuple[list[Any] | None, schedules.Schedule | None, int | None]:
    """Probes, schedule and number of log-spaced steps that a plan asks for; None leaves them to the experiment."""
    probes = [load_probe(text) for text in record.get("probes", ())] or None
    every = record.get("every")
    return probes, None if every is None else schedules.every(every), record.get("log_spaced")


def cores() -> int:
    """Cores that this process may use; macOS and Windows know only those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch work in one thread, as every run of a sweep does: more would only fight over the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """What was there before is no garbage of the runs: to look through torch for some takes a tenth of a second."""
    thresholds, frozen = gc.get_threshold(), gc.get_freeze_count()
    _look_for_garbage_rarely()
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if not frozen:  # else the caller has done it too
            gc.unfreeze()


def _look_for_garbage_rarely() -> None:
    gc.freeze()
    # Each step makes and drops as many objects as the default waits for, none of them in a cycle.
    gc.set_threshold(10_000, *gc.get_threshold()[1:])


@contextmanager
def _executor(workers: int) -> Iterator[Executor]:
    """Processes that do many runs each, or for one worker this process."""
    if workers == 1:
        with one_thread(), _old_objects_left_alone():
            yield _Here()
        return
    # spawn, not fork: torch and HDF5 keep threads and locks that a forked child must not inherit.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        yield pool


class _Here(Executor):
    """Does at once, in this process, what is submitted."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **keywords))
        return future


def _start_worker() -> None:
    torch.set_num_threads(1)
    _look_for_garbage_rarely()
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A worker whose sweep was killed would go on writing where the restarted sweep writes.
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _start(run: PlannedRun, out: Path) -> Checkpoint | None:
    """Return the checkpoint a run branches from; None for a trunk, and where the trunk diverged before it.

    Training its own dense epochs such an arm diverges where its trunk did, and says so.
    """
    if run.parent is None:
        return None
    if not (out / run.parent).exists():
        trunk = run.parent.rsplit("/checkpoints/", 1)[0]
        results = read_manifest(out / trunk).get("results") or {}
        if results.get("diverged"):
            return None
    return load(out / run.parent)


def _together(experiment: Experiment, ready: Sequence[PlannedRun], workers: int) -> list[PlannedRun]:
    """The first run, and what is trained with it: other seeds of its configuration, as many as leave no worker idle."""
    first, staged = ready[0], staged_experiment(experiment)
    # What the configuration has to say it says in the run, and of all that is wrong with it.
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        if staged is not None and staged.trains_together(configure(staged.Config, first.config)):
            same = [run for run in ready if run.config == first.config and run.kind == first.kind]
            groups = -(-len(same) // _MOST_TOGETHER)
            return same[: min(-(-len(ready) // workers), -(-len(same) // groups))]
    return [first]


def _work(experiment: str, runs: Sequence[PlannedRun], out: str, command: str, plan: str) -> list[str | None]:
    """Do runs side by side and return of each None or the error's line. What it says goes to log.txt in its folder."""
    chosen = load_experiment(experiment)
    said = [io.StringIO() for _ in runs]
    try:
        outcomes = finish_together(
            [(_stages(chosen, run, Path(out), command, plan), text) for run, text in zip(runs, said, strict=True)]
        )
    finally:
        for run, text in zip(runs, said, strict=True):
            if text.getvalue() and (Path(out) / run.run).is_dir():
                publish(Path(out) / run.run / "log.txt", text.getvalue().encode())
    return [_error_line(outcome) if isinstance(outcome, Exception) else None for outcome in outcomes]


def _stages(experiment: Experiment, run: PlannedRun, out: Path, command: str, plan: str) -> Stages:
    probes, schedule, log_spaced = recorded(run.record)
    return (
        yield from run_stages(
            experiment,
            configure(experiment.Config, run.config),
            seed=run.seed,
            path=out / run.run,
            probes=probes,
            schedule=schedule,
            log_spaced=log_spaced,
            checkpoint_steps=frozenset(run.checkpoint_steps),
            start=_start(run, out),
            parent=run.parent,
            command=command,
            plan=plan,
            commit_every=_COMMIT_EVERY,
            checked_kernels=_checked_kernels,
        )
    )


def _error_line(error: Exception) -> str:
    # A user's model may raise anything; the other runs go on.
    return str(error) if isinstance(error, NtkdynError) else f"{type(error).__name__}: {error}"
