"""Ctrl-C and SIGTERM during training: not inside an optimizer step, and as an exception that closes the recording."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interruption:
    """Context manager that delivers SIGINT and SIGTERM between optimizer steps.

    A signal that arrives while ``stepping`` waits until the step is applied: half-updated weights are at no step.
    SIGINT goes to the handler that was there before. SIGTERM goes to it too, if it is the user's own; else it raises
    SystemExit(143), so that what is open is closed. Handlers are put back on every way out. Outside the main thread,
    where Python allows no handlers, nothing is done.
    """

    def __init__(self) -> None:
        self.stepping = False
        self.pending: list[int] = []
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                previous = signal.getsignal(number)
                # None: set by another language; ignored signals stay ignored.
                if previous is not None and previous is not signal.SIG_IGN:
                    self._previous[number] = previous
                    signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            # Somebody who came later keeps the handler.
            if signal.getsignal(number) == self._receive:
                signal.signal(number, previous)
        self._previous = {}

    def enter(self, optimizer: Any, arguments: Any, keywords: Any) -> None:
        """Hook before an optimizer step."""
        self.stepping = True

    def leave(self, *_: Any) -> None:
        """Hook after an optimizer step."""
        self.stepping = False
        if self.pending:
            self.deliver()

    def deliver(self) -> None:
        """Hand on the signal that has waited."""
        number = self.pending.pop(0)
        self._hand_on(number, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A forked worker must end as if nobody had caught the signal.
            signal.signal(number, self._previous.get(number, signal.SIG_DFL))
            os.kill(os.getpid(), number)
        elif self.stepping:
            self.pending.append(number)
        else:
            self._hand_on(number, frame)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(number)
        if callable(previous):
            previous(number, frame)
        elif number == signal.SIGTERM:
            raise SystemExit(128 + number)
        else:
            raise KeyboardInterrupt
