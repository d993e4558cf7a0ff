"""Recording under Ignite: ``RecorderHandler(recorder, optimizer).attach(trainer)``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from ..errors import MissingPackage
from ..recorder import Recorder

if TYPE_CHECKING:
    from ignite.engine import Engine, Events
else:
    try:
        from ignite.engine import Engine, Events
    except ImportError as error:
        raise MissingPackage(
            f"ntkdyn.integrations.ignite: {error}; pip install -c constraints.txt pytorch-ignite"
        ) from error


class RecorderHandler:
    """Records while an engine runs.

    Args:
        recorder: of the network that the engine trains.
        optimizers: a step is one applied step of the last one.

    A further ``run`` of the engine goes on with the recording. A recorder has ``state_dict`` and ``load_state_dict``,
    so that it goes among the objects of Ignite's Checkpoint.
    """

    def __init__(self, recorder: Recorder, *optimizers: Optimizer) -> None:
        self.recorder = recorder
        self._optimizers = optimizers
        # Holds what `with recorder.attach(...)` would; empty before and after.
        self._attached = ExitStack()

    def attach(self, engine: Engine) -> None:
        """Begin with the engine and end with it, also when it raises."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.COMPLETED, self._complete)
        # Alone where an engine is terminated with skip_completed.
        engine.add_event_handler(Events.TERMINATE, self._complete)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _start(self, engine: Engine) -> None:
        if self.recorder.closed:
            self.recorder.load_state_dict(self.recorder.state_dict())
        length, epochs = engine.state.epoch_length, engine.state.max_epochs
        rest = length * epochs - engine.state.iteration if length is not None and epochs is not None else None
        total = None if rest is None else self.recorder.step + rest
        self._attached.enter_context(self.recorder.attach(*self._optimizers, total_steps=total))

    def _complete(self, engine: Engine) -> None:
        self._attached.close()
        self.recorder.close()

    def _fail(self, engine: Engine, error: BaseException) -> None:
        self._attached.__exit__(type(error), error, error.__traceback__)
        # An engine that has handlers of exceptions leaves raising to them. Where all are recorders', the last one does
        # it; else the user's decide, who would not be asked if we raised.
        handlers = engine._event_handlers[Events.EXCEPTION_RAISED]
        owners = [getattr(handler, "__self__", None) for handler, *_ in handlers]
        if all(isinstance(one, RecorderHandler) for one in owners) and owners[-1] is self:
            raise error
