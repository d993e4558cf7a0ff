"""What an experiment is, and how one run of it is made on disk.

An experiment has a ``name``, a validated ``Config`` and a ``run``; one that branches also says with ``trunk`` which
run, and which step of it, a configuration starts from.
"""

from __future__ import annotations

import io
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import BaseModel
from torch import nn

from . import checkpoint
from .checkpoint import Checkpoint
from .errors import ConfigurationError
from .recorder import Recorder, Watch
from .recorder.state import initial_state
from .schedule import log_spaced
from .store.manifest import read_manifest, refuse_differences
from .trial import Trial, TrialEnded

DEFAULT_PROBES = ("ntk", "gates", "units", "path-length", "outputs")


@runtime_checkable
class Experiment(Protocol):
    """One recorded training run for each configuration and seed.

    An experiment that branches also has ``trunk(config) -> (config of the trunk, step) | None``; one that trains by
    ``fit`` may say with ``steps(config)`` how many steps a run takes that starts from its trunk, for estimates of cost.
    ``results``, names of what ``run`` returns, let a plan be refused whose primary comparison is in none of them.
    """

    name: str
    Config: type[Any]

    def run(
        self, config: Any, *, seed: int, recorder: RecorderFactory, start: Checkpoint | None = None
    ) -> Mapping[str, float]:
        """Train, record with a recorder of the factory, and return the results."""
        ...


class Stage(Protocol):
    """A part of a run that may be done beside those of other runs, such as a ``TrainingLoop``."""

    def run(self) -> None:
        """Do it."""
        ...


Stages = Generator[Stage, None, Mapping[str, float]]
"""A run that yields its trainings, is told what they raise, and returns its results."""


def finish(stages: Stages) -> Mapping[str, float]:
    """Do all stages of a run, one after the other, and return its results."""
    try:
        stage = next(stages)
        while True:
            try:
                stage.run()
            except BaseException as error:
                stage = stages.throw(error)
            else:
                stage = next(stages)
    except StopIteration as end:
        results: Mapping[str, float] = end.value
        return results


class StagedExperiment(ABC):
    """Base of experiments whose runs are stages: those of several seeds may be trained together.

    Between two stages, and in every step, torch's generator and the file of warnings are the run's own. Other global
    states, such as the generators of numpy and random, are shared.
    """

    Config: type[Any]

    @abstractmethod
    def stages(self, config: Any, *, seed: int, recorder: RecorderFactory, start: Checkpoint | None = None) -> Stages:
        """As ``run``, but for the trainings, which are yielded."""

    def trains_together(self, config: Any) -> bool:
        """Whether it pays to train the seeds of a configuration as one, which gives each the numbers it has alone.

        It does for a chain of small linear layers and gates with Adam on the CPU; other networks only take memory. What
        is called after a step finds no gradients of the weights then.
        """
        return False

    def run(
        self, config: Any, *, seed: int, recorder: RecorderFactory, start: Checkpoint | None = None
    ) -> Mapping[str, float]:
        """Train, record with a recorder of the factory, and return the results."""
        return finish(self.stages(config, seed=seed, recorder=recorder, start=start))


def staged_experiment(experiment: Any) -> StagedExperiment | None:
    """The experiment, if its ``run`` is nothing but its stages."""
    if isinstance(experiment, StagedExperiment) and type(experiment).run is StagedExperiment.run:
        return experiment
    return None


@dataclass
class RecorderFactory:
    """Makes the recorder of one run; path, probes and schedule of the user are already set.

    Attributes:
        path: folder of the recording.
        probes: the user's probes; None leaves them to the experiment.
        schedule, log_spaced: the user's schedule, as a function or as a number of log-spaced steps; both None leave
            it to the experiment.
        checkpoint_steps: steps after which ``fit`` saves a checkpoint; the experiment's own are added when it asks for
            its recorder.
        resumed: checkpoint of this very run, from which the experiment must go on; None: begin.
        recorder_state: what the recorder must load to continue the run in ``path``, or one from which this branches.
        manifest: further entries of run.json.
        progress: show a progress bar.
        commit_every: seconds for which the recorder gathers snapshots before it commits them.
        checked_kernels: shared by the recorders of one process, as in ``Recorder``.
        trial: the run is to end after a few steps, as nothing but its cost is asked for.
        recorders: those made so far.
    """

    path: Path
    probes: Sequence[Any] | None = None
    schedule: Callable[[int], bool] | None = None
    log_spaced: int | None = None
    checkpoint_steps: frozenset[int] = frozenset()
    resumed: Checkpoint | None = None
    recorder_state: Mapping[str, Any] | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = False
    commit_every: float = 0.0
    checked_kernels: set[Hashable] | None = None
    trial: Trial | None = None
    recorders: list[Recorder] = field(default_factory=list)

    def __call__(
        self,
        model: nn.Module,
        *,
        sets: Any,
        steps_per_epoch: int,
        total_steps: int,
        schedule: Callable[[int], bool],
        probes: Sequence[Any] = DEFAULT_PROBES,
        calibration: Any = None,
        loss: Any = None,
        forward: Any = None,
        checkpoint_steps: Iterable[int] = (),
        provenance: Mapping[str, Any] | None = None,
    ) -> Recorder:
        """Return the recorder; ``probes`` and ``schedule`` are the experiment's, which the user's win over.

        provenance: of the data, for run.json.
        """
        self.checkpoint_steps |= frozenset(checkpoint_steps)
        users = self.schedule
        if users is None and self.log_spaced is not None:
            users = log_spaced(1, total_steps, self.log_spaced)
        if users is not None:
            schedule = users
            probes = [replace(probe, schedule=None) if isinstance(probe, Watch) else probe for probe in probes]
        if self.probes is not None:
            probes = self.probes
        if self.trial is not None:
            self.trial.begin(probes, schedule, sets, total_steps)
            schedule = self.trial.schedule
            probes = [replace(probe, schedule=None) if isinstance(probe, Watch) else probe for probe in probes]
        recorder = Recorder(
            model,
            list(probes),
            sets,
            path=self.path,
            schedule=schedule,
            forward=forward,
            loss=loss,
            steps_per_epoch=steps_per_epoch,
            calibration=calibration,
            commit_every=self.commit_every,
            checked_kernels=self.checked_kernels,
            manifest=dict(self.manifest) | ({} if provenance is None else {"data": dict(provenance)}),
        )
        if self.recorder_state is not None:
            recorder.load_state_dict(self.recorder_state)
        self.recorders.append(recorder)
        return recorder


def run_stages(
    experiment: Experiment,
    config: BaseModel,
    *,
    seed: int,
    path: str | Path,
    probes: Sequence[Any] | None = None,
    schedule: Callable[[int], bool] | None = None,
    log_spaced: int | None = None,
    checkpoint_steps: frozenset[int] = frozenset(),
    start: Checkpoint | None = None,
    parent: str | None = None,
    plan: str | None = None,
    command: str = "",
    progress: bool = False,
    commit_every: float = 0.0,
    checked_kernels: set[Hashable] | None = None,
    resume: bool = False,
) -> Stages:
    """One complete run on disk: yields its trainings and returns its results.

    An experiment that is not staged does all of it at once. torch's global generator is left as it was.

    Args:
        path: new or empty folder.
        probes, schedule, log_spaced: win over the experiment's own choice.
        checkpoint_steps: steps of which ``path/checkpoints/<step>`` is saved.
        start, parent: checkpoint that the run branches from, and its path inside the sweep.
        plan: hash of the sweep's plan.
        commit_every, checked_kernels: as in ``Recorder``.
        resume: go on with the run in ``path`` from its last checkpoint; a finished one is left as it is. Where there is
            none yet, begin it.

    Raises: RecordingExists: path is not empty. ConfigurationError: the experiment made no recorder.
    """
    manifest = {
        "experiment": experiment.name,
        "config": config.model_dump(mode="json"),
        "seed": seed,
        "command": command,
        "parent": parent,
        "plan": plan,
    }
    factory = RecorderFactory(
        Path(path),
        probes,
        schedule,
        log_spaced,
        checkpoint_steps,
        manifest=manifest,
        progress=progress,
        commit_every=commit_every,
        checked_kernels=checked_kernels,
    )
    parent_state = None if start is None else start.extra.get("recorder")
    if isinstance(parent_state, Mapping):
        factory.recorder_state = initial_state(None, parent_state)
    if resume and (Path(path) / "run.json").exists():
        recorded = read_manifest(Path(path))
        refuse_differences(Path(path), recorded, manifest, ("experiment", "config", "seed"))
        if recorded.get("status") == "finished":
            return dict(recorded.get("results") or {})
        _go_on(factory, str(recorded.get("run")))
    status = "failed"
    try:
        with torch.random.fork_rng():
            staged = staged_experiment(experiment)
            if staged is not None:
                results = dict((yield from staged.stages(config, seed=seed, recorder=factory, start=start)))
            else:
                results = dict(experiment.run(config, seed=seed, recorder=factory, start=start))
        if not factory.recorders:
            raise ConfigurationError(
                f"experiment {experiment.name}: recorded nothing; its run must make a recorder: recorder(model, sets=…)"
            )
        factory.recorders[-1].finish(results)
        status = "finished"
    finally:
        for recorder in factory.recorders:
            recorder.close(status)
    return results


def run_experiment(*arguments: Any, **options: Any) -> Mapping[str, float]:
    """Do one complete run on disk and return its results; arguments and errors are those of ``run_stages``."""
    return finish(run_stages(*arguments, **options))


def try_run(
    experiment: Experiment,
    config: BaseModel,
    *,
    seed: int,
    trial: Trial,
    probes: Sequence[Any] | None = None,
    schedule: Callable[[int], bool] | None = None,
    log_spaced: int | None = None,
) -> None:
    """Begin a run in a temporary folder and end it when the trial has seen enough; nothing of it is kept.

    Args: as in ``run_stages``.
    Raises: what the run raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Not committed one by one, as those of a sweep are not.
        factory = RecorderFactory(Path(folder) / "run", probes, schedule, log_spaced, trial=trial, commit_every=3600.0)
        try:
            with torch.random.fork_rng(), redirect_stderr(io.StringIO()):
                experiment.run(config, seed=seed, recorder=factory)
        except TrialEnded:
            pass
        finally:
            for recorder in factory.recorders:
                recorder.close("failed")


def _go_on(factory: RecorderFactory, run: str) -> None:
    """Let a run go on from its newest checkpoint that can be read, or begin again where it has none."""
    found = checkpoint.latest(factory.path / "checkpoints")
    if found is None:
        factory.recorder_state = initial_state(run, factory.recorder_state)
        where = "its beginning, as it has no checkpoint"
    else:
        state = found.extra.get("recorder")
        if not isinstance(state, Mapping):
            raise ConfigurationError(
                f"{factory.path}: the checkpoint of step {found.step} holds no state of a recorder, expected one that "
                "this run has written; begin anew in another folder"
            )
        factory.resumed, factory.recorder_state = found, state
        where = f"the checkpoint of step {found.step}"
    print(f"ntkdyn: {factory.path}: goes on from {where}; later snapshots are superseded", file=sys.stderr)
