"""Recording under Lightning: ``Trainer(callbacks=[RecorderCallback(recorder)])``."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
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
    exception closes the recording as "failed".
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._attached: AbstractContextManager[Recorder] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        total = trainer.estimated_stepping_batches
        steps = int(total) if total not in (float("inf"), -1) else None
        self._attached = self.recorder.attach(*trainer.optimizers, total_steps=steps)
        self._attached.__enter__()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._leave(None)
        self.recorder.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._leave(exception)

    def state_dict(self) -> dict[str, Any]:
        return self.recorder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.recorder.load_state_dict(state_dict)

    def _leave(self, error: BaseException | None) -> None:
        attached, self._attached = self._attached, None
        if attached is not None:
            # It is Lightning that raises the exception on.
            attached.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
