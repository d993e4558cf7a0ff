"""Recording under the Trainer of Hugging Face: ``with RecorderCallback(recorder) as callback: trainer.train()``."""

from __future__ import annotations

from contextlib import AbstractContextManager
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

_STATE = "ntkdyn"


class RecorderCallback(TrainerCallback):
    """Records while a Trainer trains; the state of the recording goes into its checkpoints and back.

    Args: recorder: of the Trainer's model; made before ``trainer.train``.

    The Trainer does not tell its callbacks of exceptions, so that training goes inside ``with``::

        with RecorderCallback(recorder) as callback:
            Trainer(model, arguments, callbacks=[callback], ...).train()
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._attached: AbstractContextManager[Recorder] | None = None

    def __enter__(self) -> RecorderCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        attached, self._attached = self._attached, None
        if attached is not None:
            attached.__exit__(kind, error, traceback)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        # The state of a Trainer that resumes is the one of its checkpoint.
        if _STATE in state.stateful_callbacks:
            self.recorder.load_state_dict(state.stateful_callbacks[_STATE])
        optimizer = given["optimizer"]
        while hasattr(optimizer, "optimizer"):  # the wrappers of accelerate run no hooks
            optimizer = optimizer.optimizer
        self._attached = self.recorder.attach(optimizer, total_steps=state.max_steps)
        self._attached.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        state.stateful_callbacks[_STATE] = self.recorder.state_dict()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.__exit__(None, None, None)
        self.recorder.close()
