"""Runs of several seeds side by side, each with its own stages, randomness and warnings; see ``stack``."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr, suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Any, TextIO, cast

import torch
from torch import Tensor

from .errors import DivergedTraining
from .experiment import Stage, Stages
from .stack import Stack, alike, tell_of_step
from .training_loop import TrainingLoop


class _Member:
    """One run: its stages, its state of torch's generator, and where it writes warnings to."""

    def __init__(self, stages: Stages, said: TextIO) -> None:
        self._stages = stages
        self._said = said
        self._random = torch.get_rng_state()
        self.stage: Stage | None = None
        self.batch: tuple[Any, Tensor] | None = None
        self.failure: BaseException | None = None
        self.outcome: Mapping[str, float] | Exception = {}

    @property
    def loop(self) -> TrainingLoop:
        return cast(TrainingLoop, self.stage)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What is random, and what is said, is this run's own."""
        torch.set_rng_state(self._random)
        try:
            with redirect_stderr(self._said):
                yield
        finally:
            self._random = torch.get_rng_state()

    @contextmanager
    def trying(self) -> Iterator[None]:
        """A turn in which an exception is noted."""
        with self.turn():
            try:
                yield
            except Exception as error:
                self.failure = error

    def do(self, stage: Stage) -> None:
        """Do a stage."""
        with self.trying():
            stage.run()

    def go_on(self) -> None:
        """Go to the next stage or to the end, told how the last stage failed."""
        failure, self.failure = self.failure, None
        with self.turn():
            try:
                self.stage = next(self._stages) if failure is None else self._stages.throw(failure)
            except StopIteration as end:
                self.stage, self.outcome = None, end.value
            except Exception as error:
                self.stage, self.outcome = None, error

    def draw(self) -> None:
        """Draw the batch of the next step, if there is one."""
        with self.trying():
            self.batch = self.loop.batch() if self.loop.step < self.loop.last_step else None

    def leave(self, interruption: BaseException | None) -> None:
        """Tell stages that are not done what interrupts them."""
        if self.stage is None:
            return
        with self.turn(), suppress(BaseException):
            self._stages.throw(self.failure or interruption or GeneratorExit())


def finish_together(runs: Sequence[tuple[Stages, TextIO]]) -> list[Mapping[str, float] | Exception]:
    """Do all stages of several runs, and return the results of each, or what it raised.

    Each has the results that it has alone, to the last bit. torch's global generator is left as it was.

    Args: runs: stages, and the file that takes the run's warnings.
    """
    random = torch.get_rng_state()
    members = [_Member(stages, said) for stages, said in runs]
    interruption: BaseException | None = None
    try:
        for member in members:
            member.go_on()
        while here := [(member, member.stage) for member in members if member.stage is not None]:
            if len(here) > 1 and alike([stage for _, stage in here]):
                _train([member for member, _ in here])
            else:
                # One to its end before the next one: who is interrupted keeps what is done.
                here = here[:1]
                here[0][0].do(here[0][1])
            for member, _ in here:
                member.go_on()
    except BaseException as error:
        interruption = error
        raise
    finally:
        for member in members:
            member.leave(interruption)
        torch.set_rng_state(random)
    return [member.outcome for member in members]


def _train(members: Sequence[_Member]) -> None:
    """Train all loops from begin to end."""
    with _handlers_of_before() as handlers, ExitStack() as contexts:
        begun = []
        for member in members:
            context = member.loop.begun()
            with member.trying():
                context.__enter__()
                # The last one is left first: each has put its handlers of signals over those of the one before.
                contexts.push(partial(_leave, member, context))
                begun.append(member)
        with handlers():
            _advance(begun)


def _leave(
    member: _Member,
    context: AbstractContextManager[None],
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
) -> None:
    failure = member.failure or error
    with member.trying():
        if failure is None:
            context.__exit__(None, None, None)
        else:
            context.__exit__(type(failure), failure, failure.__traceback__)


def _advance(members: Sequence[_Member]) -> None:
    """Take all steps: together as long as that can be, then one after the other."""
    present = list(members)
    stack: Stack | None = None
    try:
        while True:
            for member in present:
                if member.batch is None:
                    member.draw()
            remaining = [member for member in present if member.failure is None]
            loops = [member.loop for member in remaining]
            if stack is not None and (len(remaining) < len(present) or not stack.holds(loops)):
                stack.part()
                stack = None
            present = remaining
            batches = [member.batch for member in present if member.batch is not None]
            if len(present) < 2 or len(batches) < len(present):
                break
            try:
                stack = stack or Stack.of(loops, batches)
                if stack is None:
                    break
                losses, send_back = stack.losses(batches)
            except Exception:
                # Each meets by itself what is wrong with its batch or its loss.
                break
            for member, loss in zip(present, losses, strict=True):
                try:
                    member.loop.check(loss.item())
                except DivergedTraining as error:
                    member.failure = error
            # The others take this step without those that diverge.
            if all(member.failure is None for member in present):
                with _undisturbed():
                    stack.step(send_back)
                    for member in present:
                        member.batch = None
                        with member.trying():
                            tell_of_step(member.loop.optimizer)
                            member.loop.applied()
    finally:
        if stack is not None:
            stack.part()
    for member in present:
        with member.trying():
            while member.loop.step < member.loop.last_step:
                member.loop.advance(member.batch)
                member.batch = None


@contextmanager
def _handlers_of_before() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """What puts the handlers that signals have here in the place of those that come later.

    A recorder keeps a signal until a step of its own network is done, and for good where that step has failed.
    """
    # Python takes handlers of its main thread alone.
    here = threading.current_thread() is threading.main_thread()
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)} if here else {}

    @contextmanager
    def put_back() -> Iterator[None]:
        later = {
            one: signal.signal(one, _end if one == signal.SIGTERM and handler is signal.SIG_DFL else handler)
            for one, handler in before.items()
            if handler is not None
        }
        try:
            yield
        finally:
            for one, handler in later.items():
                signal.signal(one, handler)

    yield put_back


def _end(number: int, frame: FrameType | None) -> None:
    # So that what is open is closed.
    raise SystemExit(128 + number)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals wait: between the step of the stack and the last one that is told of it, some networks are at no step."""
    waiting: list[int] = []
    previous: dict[int, Any] = {}
    # Python takes handlers of its main thread alone.
    if threading.current_thread() is threading.main_thread():
        for one in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(one) not in (None, signal.SIG_IGN):
                previous[one] = signal.signal(one, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number in waiting:
            signal.raise_signal(number)
