"""Recording under the Trainer of Hugging Face: ``with RecorderCallback(recorder) as callback: trainer.train()``."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import MissingPackage
from ..recorder import Recorder

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise MissingPackage(
            f"ntkdyn.integrations.huggingface: {error}; pip install -c constraints.txt transformers accelerate"
        ) from error


class RecorderCallback(TrainerCallback):
    """Records while a Trainer trains; the state of the recording goes into its checkpoints and back.

    Args: recorder: of the Trainer's model; made before ``trainer.train``.

    The Trainer does not tell its callbacks of exceptions, so that training goes inside ``with``::

        with RecorderCallback(recorder) as callback:
            Trainer(model, arguments, callbacks=[callback], ...).train()

    A further ``train`` goes on with the recording.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        # Holds what `with recorder.attach(...)` would; empty before and after.
        self._attached = ExitStack()
        # Several recorders have their states side by side.
        self._key = f"ntkdyn {recorder.path.name}"

    def __enter__(self) -> RecorderCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._attached.__exit__(kind, error, traceback)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        # The state of a Trainer that resumes is the one of its checkpoint.
        if self._key in state.stateful_callbacks:
            self.recorder.load_state_dict(state.stateful_callbacks[self._key])
        elif self.recorder.closed:
            self.recorder.load_state_dict(self.recorder.state_dict())
        first = self.recorder.step or state.global_step
        # A further train() begins at 0.
        total = first + state.max_steps - state.global_step
        self._attached.enter_context(self.recorder.attach(given["optimizer"], first_step=first, total_steps=total))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        state.stateful_callbacks[self._key] = self.recorder.state_dict()
        self._leave_at_the_last_step(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._leave_at_the_last_step(control)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._leave_at_the_last_step(control)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._leave_at_the_last_step(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._attached.close()
        self.recorder.close()

    def _leave_at_the_last_step(self, control: Any) -> None:
        # Not in on_train_end: load_best_model_at_end has put other weights into the network by then.
        if control.should_training_stop:
            self._attached.close()
