"""Probes measured once, without a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn

from ..kernel.problem import default_forward
from ..probe import Bands, Probe
from .guarded_bands import FailedBands
from .observer import Observer
from .passes import Loss
from .settings import check_model, chosen_batchnorm
from .snapshots import BatchNorm, Forward, fixed_inputs, probe_sets
from .watches import Watch, watches_of


def measure(
    model: nn.Module,
    probes: Sequence[Probe | str | Watch],
    sets: Any,
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
    batchnorm: BatchNorm | None = None,
    calibration: Any = None,
    parameters: Iterable[str] | None = None,
) -> dict[str, np.ndarray[Any, Any]]:
    """Measure probes once, without a file; arguments as for ``Recorder``.

    Returns: arrays by the names that they would have in a recording, e.g. "ntk/test/kernel".
    Raises: ProbeError: a probe failed.  NondeterministicForward, ConfigurationError, UnknownName.
    """
    check_model(model)
    chosen = probe_sets(sets)
    watches = watches_of(probes, None, chosen)
    observer = Observer(
        model,
        chosen,
        forward=forward or default_forward,
        loss=loss,
        batchnorm=chosen_batchnorm(batchnorm, calibration is not None, model),
        calibration=None if calibration is None else fixed_inputs(calibration, "calibration"),
        parameters=parameters,
        on_error="raise",
    )
    records = observer.observe(0, None, watches)
    try:
        return {
            f"{group}/{name}": np.concatenate(list(array)) if isinstance(array, Bands) else array
            for group, arrays in records.items()
            for name, array in arrays.items()
        }
    except FailedBands as failure:
        observer.failed(failure)
        raise
