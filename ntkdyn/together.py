"""Runs of several seeds side by side, each with its own stages, randomness and warnings; see ``stack``."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Any, TextIO, cast

import torch
from torch import Tensor

from .errors import DivergedTraining
from .experiment import Stage, Stages
from .stack import Stack, alike, tell_of_step
from .training_loop import TrainingLoop


class _Turn:
    """One run's turn: what is random, and what is said, is its own. Looked after by hand, as every step has one."""

    def __init__(self, said: TextIO) -> None:
        self._said = said
        self._random = torch.default_generator.get_state()

    def __enter__(self) -> None:
        self._stderr, sys.stderr = sys.stderr, self._said
        torch.default_generator.set_state(self._random)

    def __exit__(self, *_: object) -> None:
        self._random = torch.default_generator.get_state()
        sys.stderr = self._stderr


class _Member:
    """One run: its stages, and its turns."""

    def __init__(self, stages: Stages, said: TextIO) -> None:
        self._stages = stages
        self.turn = _Turn(said)
        self.stage: Stage | None = None
        self.batch: tuple[Any, Tensor] | None = None
        self.failure: BaseException | None = None
        self.outcome: Mapping[str, float] | Exception = {}

    @property
    def loop(self) -> TrainingLoop:
        return cast(TrainingLoop, self.stage)

    @contextmanager
    def trying(self) -> Iterator[None]:
        """A turn in which an exception is noted."""
        with self.turn:
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
        with self.turn:
            try:
                self.stage = next(self._stages) if failure is None else self._stages.throw(failure)
            except StopIteration as end:
                self.stage, self.outcome = None, end.value
            except Exception as error:
                self.stage, self.outcome = None, error

    def draw(self) -> None:
        """Draw the batch of the next step, if there is one."""
        with self.trying():
            self.batch = self._drawn()

    def go_along(self) -> None:
        """Do what follows a step that the stack took, and draw the next batch."""
        self.batch = None
        with self.turn:
            # Not by ``trying``: this is every step.
            try:
                tell_of_step(self.loop.optimizer)
                self.loop.applied()
                self.batch = self._drawn()
            except Exception as error:
                self.failure = error

    def _drawn(self) -> tuple[Any, Tensor] | None:
        return self.loop.batch() if self.loop.step < self.loop.last_step else None

    def leave(self, interruption: BaseException | None) -> None:
        """Tell stages that are not done what interrupts them."""
        if self.stage is None:
            return
        with self.turn, suppress(BaseException):
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
    interruptions = _Interruptions()
    with ExitStack() as contexts:
        begun = []
        for member in members:
            context = member.loop.begun()
            with member.trying():
                context.__enter__()
                # The last one is left first: each has put its handlers of signals over those of the one before.
                contexts.push(partial(_leave, member, context))
                begun.append(member)
        with interruptions:
            _advance(begun, interruptions)


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


def _advance(members: Sequence[_Member], interruptions: _Interruptions) -> None:
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
                losses = stack.losses(batches)
            except Exception:
                # Each meets by itself what is wrong with its batch or its loss.
                break
            if not losses.finite:
                for member, loss in zip(present, losses.each(), strict=True):
                    try:
                        member.loop.check(loss.item())
                    except DivergedTraining as error:
                        member.failure = error
            # The others take this step without those that diverge.
            if all(member.failure is None for member in present):
                with interruptions.held():
                    stack.step(losses.send_back)
                    for member in present:
                        member.go_along()
    finally:
        if stack is not None:
            stack.part()
    for member in present:
        with member.trying():
            while member.loop.step < member.loop.last_step:
                member.loop.advance(member.batch)
                member.batch = None


class _Interruptions:
    """The handlers of SIGINT and SIGTERM that there were at first, in the place of those that came later.

    A recorder keeps a signal until a step of its own network is done, and for good where that step has failed. Here a
    signal waits while some networks are at no step: between that of the stack and the last one that is told of it.
    """

    def __init__(self) -> None:
        # Python takes handlers of its main thread alone.
        here = threading.current_thread() is threading.main_thread()
        handlers = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)} if here else {}
        # None: set by another language.
        self._first: dict[int, Any] = {one: handler for one, handler in handlers.items() if handler is not None}
        self._later: dict[int, Any] = {}
        self._held = False
        self._waiting: list[int] = []

    def __enter__(self) -> None:
        for one, handler in self._first.items():
            # Ignored signals stay ignored.
            self._later[one] = signal.signal(one, handler if handler is signal.SIG_IGN else self._receive)

    def __exit__(self, *_: object) -> None:
        for one, handler in self._later.items():
            signal.signal(one, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let signals wait."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            while self._waiting:
                self._hand_on(self._waiting.pop(0), None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._waiting.append(number)
        else:
            self._hand_on(number, frame)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        handler = self._first[number]
        if callable(handler):
            handler(number, frame)
        elif number == signal.SIGTERM:
            # So that what is open is closed.
            raise SystemExit(128 + number)
        else:
            signal.signal(number, handler)
            signal.raise_signal(number)
