"""Recorder: probes, a schedule and a file, attached to an optimizer; training goes as if it were not there."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from ..errors import ConfigurationError, DivergedTraining
from ..kernel.problem import default_forward
from ..probe import Probe
from ..store.files import check_name
from .arrays import shared_attributes
from .budget import Budget
from .distributed import collective_timeout, is_first_process, refuse_sharded
from .guarded_bands import FailedBands
from .interruption import Interruption
from .learning_rates import LearningRates
from .measurement import measure as measure
from .observer import Observer, OnError
from .optimizers import applying_optimizer, overflowed
from .passes import Loss
from .recording import Recording, Records, weights_digest
from .settings import check_choice, check_model, chosen_batchnorm
from .snapshots import BatchNorm, Forward, fixed_inputs, probe_sets
from .state import State, dump_state
from .watches import Due, Watched, give_back, merged, watches_of
from .watches import Watch as Watch


class Recorder:
    """Records probes during training into a folder of its own; weights, optimizer and random states stay bit-identical.

    Args:
        model: the network that is trained.
        probes: names ("ntk", "ntk:reduce=full", "my.py:MyProbe"), probes, or Watch.
        sets: a tensor, (inputs, targets), or {"train": (x, y), "test": ...}; stored in the run.
        path: new or empty folder; that of a run only to continue it, after ``load_state_dict``.
        schedule: step -> bool for probes without their own; None records at every step. The first and the last step
            are always recorded.
        forward: forward(model, inputs) -> outputs [N, ...]; the default is model(inputs), or its .logits.
        loss: loss(outputs, targets) -> [N]; the default is cross-entropy for class numbers and mean squared error over
            the outputs for real targets.
        steps_per_epoch: makes epochs out of steps.
        batchnorm: "reestimate" gives every BatchNorm of the clone the statistics of the calibration batch, "running"
            takes its running ones; None: "reestimate" where calibration is given, else "running" with one warning.
        calibration: inputs of that batch; stored in the run.
        parameters: names or patterns of the parameters of the kernel; None: all weights and biases, that is every
            parameter with requires_grad that is not a Gate's slope. Resolved once, at the first snapshot.
        on_error: what a failing probe does: "raise" ends the recording and raises, "warn" leaves the value out,
            "disable" switches the probe off.
        max_overhead: largest share of the wall time that snapshots may take, e.g. 0.1; scheduled ones beyond it are
            skipped and reported at the end.
        commit_every: seconds for which snapshots are gathered in memory before they are committed together, which costs
            less than many small commits; a process that is killed loses those. 0: each at once.
        checked_kernels: a set that recorders of networks that are built alike share in one process, so that their
            kernels are checked against plain autograd once for all of them; None: each recorder checks its own.
        manifest: further entries of run.json.

    Under an optimizer every snapshot also has ``learning_rate/value`` and ``learning_rate/sum``: the rate of the last
    applied step and the sum over all of them, of the optimizer's first parameter group and, of several optimizers, the
    last one listed; the sum is NaN behind steps that were applied while nothing was attached. A probe of yours with the
    name learning_rate takes their place.

    In a process group of torch.distributed only rank 0 records, and without collective calls; a warning says when a
    snapshot takes more than half of their timeout. Sharded parameters (FSDP) are refused.

    Raises: ConfigurationError, UnknownName: settings.  RecordingExists: the folder holds something.
    """

    def __init__(
        self,
        model: nn.Module,
        probes: Sequence[Probe | str | Watch],
        sets: Any,
        *,
        path: str | Path,
        schedule: Due | None = None,
        forward: Forward | None = None,
        loss: Loss | None = None,
        steps_per_epoch: int | None = None,
        batchnorm: BatchNorm | None = None,
        calibration: Any = None,
        parameters: Iterable[str] | None = None,
        on_error: OnError = "raise",
        max_overhead: float | None = None,
        commit_every: float = 0.0,
        checked_kernels: set[Hashable] | None = None,
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        check_model(model)
        check_choice("on_error", on_error, get_args(OnError))
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise ConfigurationError(f"Recorder: found steps_per_epoch={steps_per_epoch}, expected at least 1")
        if not 0 <= commit_every < math.inf:
            raise ConfigurationError(f"Recorder: found commit_every={commit_every}, expected seconds from 0 on")
        self.path = Path(path)
        self._budget = Budget(self.path, max_overhead)
        self.step = 0
        self._model = model
        self._sets = probe_sets(sets)
        for name in self._sets:
            if name:
                check_name(name, "probe set")
        self._watches = watches_of(probes, schedule, self._sets)
        self._calibration = None if calibration is None else fixed_inputs(calibration, "calibration")
        self._observer = Observer(
            model,
            self._sets,
            forward=forward or default_forward,
            loss=loss,
            batchnorm=chosen_batchnorm(batchnorm, calibration is not None, model),
            calibration=self._calibration,
            parameters=parameters,
            on_error=on_error,
            checked_kernels=checked_kernels,
        )
        self._steps_per_epoch = steps_per_epoch
        self._recording = (
            Recording(self.path, self._sets, self._calibration, dict(manifest or {}), commit_every)
            if is_first_process()
            else None
        )
        self._rates = LearningRates()
        self._hooks = ExitStack()
        self._counting = self._attached = self._closed = self._settled = False
        self._state: State | None = None

    @contextmanager
    def attach(
        self, *optimizers: torch.optim.Optimizer, first_step: int | None = None, total_steps: int | None = None
    ) -> Iterator[Recorder]:
        """Record now, after each applied optimizer step that is due, and the last step once at the end.

        With several optimizers one training step is one applied step of the last one listed. Steps that
        torch.amp.GradScaler skips do not count. Without optimizers, call ``record()`` after each step yourself.

        Ctrl-C and SIGTERM give a last snapshot and close the recording as "interrupted", another exception closes it
        as "failed"; both go on to the caller. DivergedTraining goes on too, without a last snapshot. After it, and
        after a normal end, the recording stays open for ``finish`` and a further ``attach`` until ``close``, or until
        the recorder is gone.

        Args:
            first_step: number of steps applied before; None: 0, or where the last ``attach`` ended.
            total_steps: step at which training ends, for the estimate of costs that is printed here.
        Raises: ConfigurationError: closed, or attached already.  NondeterministicForward, ProbeError: see Recorder.
        """
        self._refuse_closed("attach")
        if self._attached:
            raise ConfigurationError(
                f"recorder of {self.path}: found it attached already, expected one attach at a time"
            )
        applying = [applying_optimizer(one, self.path) for one in optimizers]
        self._settle_who_records()
        first = self.step if first_step is None else first_step
        self._refuse_earlier(first)
        interruption = Interruption()
        self._attached = True
        try:
            with interruption if self._recording is not None else ExitStack():
                try:
                    self.step = first
                    self._budget.restart()
                    self._begin(applying)
                    if self._recording is not None:
                        self._budget.tell(self._watches, first, total_steps)
                    self._hook(applying, interruption)
                    yield self
                    self._hooks.close()
                    self._take(self._watches)
                except DivergedTraining:
                    # A result, not a failure of the recording: it stays open for finish. No last snapshot: most probes
                    # have no value at weights that are not finite.
                    self._hooks.close()
                    raise
                except BaseException as error:
                    self._hooks.close()
                    if not isinstance(error, Exception) and not interruption.stepping:
                        self._take_at_interruption()
                    self._end("failed" if isinstance(error, Exception) else "interrupted")
                    raise
        finally:
            self._hooks.close()
            self._rates.leave()
            self._attached = self._counting = False
            if self._recording is not None and self._recording.is_open:
                self._recording.final_weights = weights_digest(self._model)
                self._recording.close_after(self)

    def record(self, step: int | None = None, epoch: float | None = None) -> None:
        """Record what is due at this step; for LBFGS, several optimizers, or a loop of your own.

        Args:
            step: applied steps so far; None counts the calls, the first being step 0; under ``attach(optimizer)`` it is
                the present step. A step that is recorded already is not recorded again.
            epoch: None: step / steps_per_epoch.
        Raises: ConfigurationError: closed, or a step before the last one.  ProbeError, NondeterministicForward.
        """
        self._refuse_closed("record")
        self._settle_who_records()
        self._continue()
        started = any(watched.step is not None for watched in self._watches)
        if step is None:
            step = self.step + 1 if started and not self._counting else self.step
        self._refuse_earlier(step)
        self.step = step
        self._take_or_fail([one for one in self._watches if not started or one.due(step)], epoch)

    def state_dict(self) -> dict[str, Any]:
        """State of the recording at this step, for the checkpoint of the training; JSON values only.

        Save it after the optimizer step, together with model and optimizer.
        """
        if self._recording is not None:
            # No checkpoint may be newer than its recording.
            self._recording.flush()
        # Before the first snapshot of a run that is continued, it is still the one that was loaded.
        run = self._state.run if self._state is not None else self._recording.run if self._recording else None
        return dump_state(run, self.step, self._watches, self._rates.dump())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run in this recorder's folder behind the step of a state; before ``attach`` or ``record``.

        A closed recorder is open again: with its own ``state_dict()`` it goes on where it ended. What ``finish`` has
        stored are results of a training that had ended; a run that goes on has none until it is called again.

        Steps that were recorded after the checkpoint are superseded by those of the new branch: none is lost from the
        disk, none doubled among those that readers see. Model, probes and sets must be those of the run.

        Raises: ConfigurationError: no state of a recorder, or recording has begun.
        """
        loaded = State.load(state, self.path)
        begun = not self._closed and self._state is None and any(one.step is not None for one in self._watches)
        if self._attached or begun:
            raise ConfigurationError(
                f"recorder of {self.path}: found load_state_dict() after recording began, expected it before attach"
            )
        if self._closed:
            self._closed = False
            self._recording = None if self._recording is None else self._recording.reopened()
        self.step = loaded.step
        for one in self._watches:
            one.step, one.skipped, one.disabled = loaded.entries.get(one.name, (None, 0, False))
        # Of a state from before there were rates nothing is known, not what this recorder has counted since.
        self._rates = loaded.rates or LearningRates()
        self._state = None if loaded.run is None else loaded

    def finish(self, results: Mapping[str, float]) -> None:
        """Store the results of the run in its run.json.

        Raises: ConfigurationError: closed, or nothing recorded yet.
        """
        self._refuse_closed("finish")
        if self._recording is None:
            return
        if not self._recording.is_open:
            raise ConfigurationError(
                f"recorder of {self.path}: found nothing recorded, expected attach or record first"
            )
        self._recording.finish(results)

    @property
    def probe_seconds(self) -> dict[str, float]:
        """Seconds that the last snapshot of each probe took, without self-checks and files."""
        return {one.name: one.seconds for one in self._watches}

    @property
    def closed(self) -> bool:
        """Whether the recording has ended, by ``close`` or an exception."""
        return self._closed

    def close(self, status: str = "finished") -> None:
        """End the recording with that status and pack it into run.h5.

        A further call does nothing, unless the disk has refused a part: then it is tried again.
        """
        self._hooks.close()
        if not self._closed:
            self._end(status)
        elif self._recording is not None:
            self._recording.close(status)

    def _settle_who_records(self) -> None:
        """Leave recording to the first process; not before it begins, as the process group may be made after us."""
        if self._settled:
            return
        # In every process, so that none waits for one that has been refused.
        refuse_sharded(self._model)
        if not is_first_process():
            self._recording = None
        self._budget.timeout = collective_timeout()
        self._settled = True

    def _hook(self, optimizers: Sequence[torch.optim.Optimizer], interruption: Interruption) -> None:
        if not optimizers:
            return
        self._counting = True
        dues = merged(self._watches) if self._recording is not None else ()
        rates = self._rates

        def entered(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
            interruption.stepping = True
            rates.before_step(optimizer)

        take = self._take_or_fail
        # Where the step of an optimizer is compiled, its hooks are traced with it. The optimizers of torch have loaded
        # its compiler already; where nobody has, it would take a second.
        if "torch._dynamo" in sys.modules:
            take = torch.compiler.disable(take)  # type: ignore[no-untyped-call]

        def applied(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
            interruption.stepping = False
            if not overflowed(optimizer):
                self.step = step = self.step + 1
                rates.applied()
                for due in dues:
                    if due(step):
                        here = [one for one in self._watches if one.due(step)]
                        take([one for one in here if self._budget.affords(one, step)])
                        break
            if interruption.pending:
                interruption.deliver()

        for optimizer in optimizers[:-1]:
            if optimizer is not optimizers[-1]:
                self._hooks.callback(optimizer.register_step_pre_hook(interruption.enter).remove)
                self._hooks.callback(optimizer.register_step_post_hook(interruption.leave).remove)
        self._hooks.callback(optimizers[-1].register_step_pre_hook(entered).remove)
        self._hooks.callback(optimizers[-1].register_step_post_hook(applied).remove)

    def _begin(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Take the first snapshot, or continue a run: then what is due and not recorded, or was not there before."""
        continued = self._state is not None
        self._continue()
        if optimizers and all(one.name != self._rates.group for one in self._watches):
            self._rates.follow(optimizers[-1], self.step, self.path)
        self._take([one for one in self._watches if not continued or one.step is None or one.due(self.step)])

    def _continue(self) -> None:
        """Open the run that ``load_state_dict`` announced, and give the probes back what they recorded last."""
        state = self._state
        if state is None or self._recording is None or self._closed:
            return
        self._observer.resolve()
        self._recording.open(self._opening_facts(), after=state.step, run=state.run)
        self._state = None
        recorded = self._recording.last_arrays()
        self._rates.recorded, _ = recorded.get(self._rates.group, (None, {}))
        give_back(self._watches, recorded, state.step, self.path)

    def _opening_facts(self) -> dict[str, Any]:
        return {
            "parameters": list(self._observer.parameters or ()),
            "schedules": {one.name: one.text for one in self._watches},
            "batchnorm": self._observer.batchnorm,
        }

    def _take_or_fail(self, watches: Sequence[Watched], epoch: float | None = None) -> None:
        try:
            self._take(watches, epoch)
        except Exception:
            # Also where the caller catches it inside the with block.
            self._hooks.close()
            self._end("failed")
            raise

    def _take(self, watches: Sequence[Watched], epoch: float | None = None) -> None:
        due = [one for one in watches if one.step != self.step and not one.disabled]
        if not due or self._recording is None or self._closed:
            return
        if epoch is None and self._steps_per_epoch is not None:
            epoch = self.step / self._steps_per_epoch
        with self._budget.spending(self.step):
            records = self._observer.observe(self.step, epoch, due)
            if not self._recording.is_open:
                self._recording.open(self._opening_facts())
            declarations = {
                group: (list(fields.values()), one.facts(self._steps_per_epoch) | shared_attributes(fields.values()))
                for one in due
                for group, fields in one.fields.items()
            }
            rates = self._rates
            rated = rates.at(self.step) if records else {}
            if rated:
                records[rates.group] = rated
                declarations[rates.group] = (list(rates.fields), rates.attributes)

            def written(records: Records) -> None:
                for one in due:
                    one.recorded(self.step, records)
                if rates.group in records:
                    rates.recorded = self.step

            while True:
                try:
                    self._recording.write(self.step, epoch, records, declarations, self._observer.seconds, written)
                    break
                except FailedBands as failure:
                    del records[failure.group]
                    # Nothing is left that they would stand beside.
                    if len(records) == 1 and records.get(rates.group) is rated:
                        records.clear()
                    self._observer.failed(failure)

    def _take_at_interruption(self) -> None:
        try:
            self._take(self._watches)
        except Exception as error:
            warnings.warn(f"no snapshot at the interruption: {error}", RuntimeWarning, stacklevel=2)

    def _end(self, status: str) -> None:
        if self._closed:
            return
        self._closed = True
        skipped = self._budget.tell_skipped(self._watches)
        if self._recording is not None and self._recording.is_open:
            if skipped:
                self._recording.note(skipped=skipped, max_overhead=self._budget.max_overhead)
            self._recording.final_weights = self._recording.final_weights or weights_digest(self._model)
            self._recording.close(status)

    def _refuse_closed(self, action: str) -> None:
        if self._closed:
            raise ConfigurationError(
                f"recorder of {self.path}: found {action}() after close, expected an open recorder; "
                "load_state_dict(recorder.state_dict()) goes on with the recording"
            )

    def _refuse_earlier(self, step: int) -> None:
        last = max((one.step for one in self._watches if one.step is not None), default=0)
        if step < last or step < 0:
            raise ConfigurationError(
                f"recorder of {self.path}: found step {step} after step {last}, expected later steps"
            )
