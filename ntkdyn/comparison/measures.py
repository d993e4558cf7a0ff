"""Measures of single runs as curves, and what they are drawn against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import UndefinedMeasure, UnknownName
from ..plugins import installed, kebab, load_study
from ..results import Run
from ..studies.recorded import path_of

if TYPE_CHECKING:
    import xarray as xr

Against = Literal["step", "epoch", "lr_time", "train_loss"]

LR_TIME = "learning_rate/sum"
"""Recorded array [S] with the sum of the learning rates of all applied steps up to each snapshot."""


def measure_of(name: str, runs: Mapping[str, Run]) -> Callable[[Run], xr.DataArray]:
    """Return what takes the measure of one run, [step] or [set, step]: a recorded array or a curve of a study.

    Raises: UnknownName: neither a study nor an array of any run.
    """
    if any(name in run for run in runs.values()):
        return lambda run: _recorded(run, name)
    text, _, variable = name.rpartition(":")
    if not text or kebab(text) not in installed("ntkdyn.studies"):
        text, variable = name, ""
    try:
        study = load_study(text)
    except UnknownName as error:
        arrays = sorted({array for run in runs.values() for array in run.names() if not run.field(array).shape})
        raise UnknownName(
            f"compare: the measure {name!r} is neither a study nor an array of these runs; {error}; recorded numbers: "
            f"{', '.join(arrays) or 'none'}"
        ) from None
    if study.scope != "run":
        raise UndefinedMeasure(f"compare: the study {name!r} reads a whole sweep, expected one of single runs")

    def measured(run: Run) -> xr.DataArray:
        dataset = run.analyze(text)
        curves = [str(one) for one in dataset.data_vars if {"step"} <= set(dataset[one].dims) <= {"set", "step"}]
        chosen = variable or next(iter(curves), "")
        if chosen not in curves:
            raise UnknownName(
                f"study {text!r} has no curve {chosen!r} over steps; it has: {', '.join(curves) or 'none'}"
            )
        return dataset[chosen]

    return measured


def _recorded(run: Run, name: str) -> xr.DataArray:
    """A recorded array as a curve, averaged over axes other than the steps."""
    import xarray as xr

    array = run.lazy(name)
    field = run.field(name)
    values = np.asarray(array, dtype=np.float64).reshape(len(array), -1)
    quantity = field.long_name or field.name.split("/")[-1]
    over = f", mean over {', '.join(field.dims)}" if field.dims else ""
    epochs = np.asarray(run.epochs(run.group_of(name)), dtype=np.float64)
    return xr.DataArray(
        values.mean(1),
        dims="step",
        coords={"step": array.steps, "epoch": ("step", epochs)},
        name=name,
        attrs={"units": field.unit, "long_name": f"{quantity}{over}"},
    )


def placed(run: Run, curve: xr.DataArray, against: Against) -> xr.DataArray:
    """Return the curve at the steps where its abscissa is known too, which becomes its coordinate ``x``.

    Raises: UndefinedMeasure: the run lacks the abscissa, or the two have no step in common.
    """
    if "step" not in curve.coords:
        raise UndefinedMeasure(f"{run.path}: the study says no steps")
    steps = np.asarray(curve["step"].values)
    known = steps
    if against == "step":
        x = steps.astype(np.float64)
    elif against == "epoch":
        x = np.asarray(curve["epoch"].values, dtype=np.float64)
        if not np.isfinite(x).any():
            raise UndefinedMeasure(
                f"{run.path} records no epochs; record with steps_per_epoch, or compare against steps"
            )
    else:
        name = LR_TIME if against == "lr_time" else path_of("outputs", "train", "loss")
        if name not in run:
            need = "learning rates" if against == "lr_time" else "train loss"
            raise UndefinedMeasure(f"{run.path} records no {need} ({name}); compare against step or epoch")
        abscissa = _recorded(run, name)
        known = np.asarray(abscissa["step"].values)
        common = np.intersect1d(steps, known)
        if not len(common):
            raise UndefinedMeasure(
                f"{run.path}: {name} and {curve.name} have no step in common; give both one schedule"
            )
        curve = curve.sel(step=common)
        x = abscissa.sel(step=common).values
    return curve.assign_coords(x=("step", x))
