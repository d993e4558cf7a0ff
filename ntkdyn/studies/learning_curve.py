"""Accuracy and loss of the recorded probe sets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .curves import Panel, draw_curves
from .recorded import Datasets, by_set, each_set, path_of, spread, time_axis, variable

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from ..results import Run


class LearningCurve:
    """Accuracy and mean loss of the recorded probe sets over training."""

    name = "learning-curve"
    title = "Learning curve"
    reading = (
        "Accuracy and loss of the recorded probe sets, which are small: the final accuracy on all test data is a "
        "result of the run."
    )
    scope = "run"

    def unavailable(self, source: Run, /) -> str | None:
        """Need recorded outputs with loss or accuracy."""
        if not _fields(source):
            return "no outputs with targets are recorded; record with the probe outputs and sets as (inputs, targets)"
        return None

    def measure(self, source: Run, /) -> xr.Dataset:
        """Return accuracy in percent and mean loss [set, step]."""
        import xarray as xr

        fields = _fields(source)

        def one(probe_set: str) -> xr.Dataset:
            group = path_of("outputs", probe_set, "")
            measures = {}
            if "accuracy" in fields:
                accuracy = np.asarray(source[path_of("outputs", probe_set, "accuracy")], dtype=np.float64)
                measures["accuracy"] = variable("step", 100 * _mean(accuracy), "percent", "accuracy")
            if "loss" in fields:
                loss = np.asarray(source[path_of("outputs", probe_set, "loss")], dtype=np.float64)
                measures["loss"] = variable("step", _mean(loss), "nat", "mean loss")
            return xr.Dataset(measures, coords=time_axis(source, group))

        return by_set(source.sets("outputs"), one)

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say the last accuracy and loss."""
        lines = []
        for prefix, members in each_set(datasets):
            words = []
            if "accuracy" in members[0]:
                words.append(f"accuracy {spread([one['accuracy'].values[-1] for one in members])} %")
            if "loss" in members[0]:
                words.append(f"loss {spread([one['loss'].values[-1] for one in members])}")
            lines.append(f"{prefix}at the last snapshot {' and '.join(words)}.")
        return lines

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw accuracy and loss, a color a probe set where there is one series."""
        first = next(iter(datasets.values()))
        labels = {"accuracy": "accuracy (%)", "loss": "mean loss (nat)"}
        draw_curves(figure, datasets, [Panel({name: ""}, label) for name, label in labels.items() if name in first])


def _fields(run: Run) -> list[str]:
    if "outputs" not in {group.split("/")[0] for group in run.groups()}:
        return []
    sets = run.sets("outputs")
    return [name for name in ("accuracy", "loss") if sets and all(path_of("outputs", s, name) in run for s in sets)]


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over everything but the step axis: some probes keep one value a sample."""
    return np.asarray(values.reshape(len(values), -1).mean(1))
