"""Recording under Lightning: ``Trainer(callbacks=[RecorderCallback(recorder)])``."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ..errors import MissingPackage
from ..recorder import Recorder

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    try:
        # One framework under two names, whose classes are not each other's.
        if "lightning.pytorch" in sys.modules:
            from lightning.pytorch import Callback
        else:
            from pytorch_lightning import Callback
    except ImportError as error:
        raise MissingPackage(
            f"ntkdyn.integrations.lightning: {error}; pip install -c constraints.txt pytorch-lightning"
        ) from error


class RecorderCallback(Callback):
    """Records while a Trainer fits; the state of the recording goes into Lightning's checkpoints and back.

    Args: recorder: of the LightningModule, or of a network in it; made before ``trainer.fit``.

    A step is one applied step of the last optimizer. Ctrl-C and Lightning's end on SIGTERM give a last snapshot, an
    exception closes the recording as "failed". A further ``fit`` goes on with it. Where a training goes on that was not
    recorded before, steps are counted from Lightning's own.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        # Holds what `with recorder.attach(...)` would; empty before and after.
        self._attached = ExitStack()
        self._state: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        # Lightning refuses two callbacks of one key, and networks are recorded beside their averages.
        return self._generate_state_key(path=self.recorder.path.name)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._state = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        state, self._state = self._state, None
        if state is None and self.recorder.closed:
            state = self.recorder.state_dict()
        if state is not None:
            self.recorder.load_state_dict(state)
        # Lightning counts the steps of all optimizers, and a new Trainer begins at 0.
        before = trainer.global_step // max(len(trainer.optimizers), 1)
        first = self.recorder.step or before
        total = trainer.estimated_stepping_batches
        steps = first + int(total) - before if total not in (float("inf"), -1) else None
        self._attached.enter_context(self.recorder.attach(*trainer.optimizers, first_step=first, total_steps=steps))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._attached.close()
        self.recorder.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        # It is Lightning that raises it on.
        self._attached.__exit__(type(exception), exception, exception.__traceback__)

    def state_dict(self) -> dict[str, Any]:
        return self.recorder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Kept until training starts: Lightning loads checkpoints for testing too, when there is nothing to continue.
        self._state = state_dict
