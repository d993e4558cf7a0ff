"""Recordings for other tools: CSV and Parquet tables, netCDF, and the event files of TensorBoard."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .errors import ConfigurationError, MissingPackage, UnknownName
from .probe import Field
from .results import Run, Sweep
from .store.files import refuse_existing
from .store.metadata import dump_json

# Rows of one table; a spreadsheet ends far below, and a kernel has a row for each pair of samples and step.
MAX_ROWS = 5_000_000
# Entries of an array that become curves of their own in TensorBoard.
MAX_CURVES = 64


@dataclass(frozen=True)
class Export:
    """What was written, and why what was left out is not in it."""

    path: Path
    left_out: Mapping[str, str]


def export(source: Run | Sweep, to: str, out: Path) -> Export:
    """Write all arrays of a run in another format, or of all finished runs of a sweep.

    ``csv`` and ``parquet``: a folder of tables. ``<group>`` has the scalars of a group, a row for each step; every
    other array has a table of its own, a row for each number: step, epoch, the coordinate or index on each axis, value.
    Arrays of more than 5,000,000 numbers are left out. ``netcdf``: one file with a group for each group of the run, as
    packing writes it, which ``xarray.open_datatree`` and ``Run.open`` read. ``tensorboard``: a folder with an event
    file of all scalars, of arrays of up to 64 numbers, and of means over more samples than that (the loss), against
    the step.

    Of a sweep: a folder in which each run has its place as in the sweep, ``arms/<settings>/<seed>``, or for netcdf
    ``arms/<settings>/<seed>.nc``. Beside them lies ``Sweep.table``, the runs with their settings and results: as
    ``runs.parquet`` for parquet, else as ``runs.csv``; lists and mappings in it are JSON.

    Raises: RecordingExists: there is something at ``out``; it stays.  UnknownName: no such format.
        MissingPackage: pyarrow or tensorboard; the message holds the command that installs it.  ConfigurationError: a
        sweep without a finished run.
    """
    if to not in FORMATS:
        raise UnknownName(f"export: found no format {to!r}; there are: {', '.join(FORMATS)}")
    refuse_existing(out)
    # Under another name until it is whole.
    unfinished = out.with_name(f".tmp-{os.getpid()}-{out.name}")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        if isinstance(source, Sweep):
            left_out = _write_sweep(source, to, unfinished)
        else:
            left_out = FORMATS[to](source, unfinished)
        unfinished.rename(out)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)
    return Export(out, left_out)


def _write_sweep(sweep: Sweep, to: str, out: Path) -> dict[str, str]:
    if not sweep.runs:
        raise ConfigurationError(
            f"export: found no finished run in {sweep.path}, expected at least one; finish the sweep, or export a run "
            "of it by its own path"
        )
    out.mkdir()
    reasons: dict[str, list[str]] = {}
    for name, run in sweep.runs.items():
        place = out / f"{name}.nc" if to == "netcdf" else out / name
        place.parent.mkdir(parents=True, exist_ok=True)
        for array, reason in FORMATS[to](run, place).items():
            reasons.setdefault(array, []).append(reason)
    # Parquet takes no column of both numbers and texts.
    table = sweep.table.apply(lambda column: column.map(_text) if column.dtype == object else column)
    if to == "parquet":
        table.to_parquet(out / "runs.parquet", index=False, engine="pyarrow")
    else:
        table.to_csv(out / "runs.csv", index=False)
    left_out = {array: f"{found[0]} ({len(found)} of {len(sweep.runs)} runs)" for array, found in reasons.items()}
    planned = len(sweep.manifest["plan"])
    if planned > len(sweep.runs):
        left_out[f"{planned - len(sweep.runs)} of {planned} runs"] = "not finished"
    return left_out


def _text(value: Any) -> str | None:
    if value is None or value != value:
        return None
    return value if isinstance(value, str) else dump_json(value)


def _tables(run: Run, left_out: dict[str, str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Tables by name; what is too large for one is noted in ``left_out``."""
    stepped = set(run.groups())
    scalars: dict[str, pd.DataFrame] = {}
    for name in run.names():
        group = run.group_of(name)
        field = run.field(name)
        by_step = group in stepped and not field.static
        steps = run.steps(group) if by_step else None
        rows = math.prod(field.shape) * (1 if steps is None else len(steps))
        if rows > MAX_ROWS:
            left_out[name] = f"{rows} numbers, more than the {MAX_ROWS} rows of a table; take --to netcdf"
            continue
        axes = dict(zip(field.dims, _labels(field), strict=True))
        if steps is None:
            yield name, _long(axes, run[name])
        elif field.shape == ():
            table = scalars.setdefault(group, pd.DataFrame({"step": steps, "epoch": run.epochs(group)}))
            table[name.removeprefix(f"{group}/")] = run[name]
        else:
            table = _long({"step": steps} | axes, run[name])
            table.insert(1, "epoch", np.repeat(run.epochs(group), math.prod(field.shape)))
            yield name, table
    yield from scalars.items()


def _labels(field: Field) -> list[list[Any]]:
    """Coordinate, or else index, along each axis."""
    axes = zip(field.dims, field.shape, strict=True)
    return [list(field.coordinates.get(dim, range(size))) for dim, size in axes]


def _long(axes: Mapping[str, Any], values: np.ndarray[Any, Any]) -> pd.DataFrame:
    """One row for each number; the last axis runs fastest."""
    columns = {}
    for number, (name, labels) in enumerate(axes.items()):
        inner = math.prod(values.shape[number + 1 :])
        outer = math.prod(values.shape[:number])
        columns[name] = np.tile(np.repeat(np.asarray(labels), inner), outer)
    return pd.DataFrame({**columns, "value": values.reshape(-1)})


def _write_csv(run: Run, out: Path) -> dict[str, str]:
    left_out: dict[str, str] = {}
    out.mkdir()
    for name, table in _tables(run, left_out):
        table.to_csv(out / f"{name.replace('/', '.')}.csv", index=False)
    return left_out


def _write_parquet(run: Run, out: Path) -> dict[str, str]:
    try:
        importlib.import_module("pyarrow")  # pandas takes it by itself
    except ImportError as error:
        raise _missing("parquet", error) from error
    left_out: dict[str, str] = {}
    out.mkdir()
    for name, table in _tables(run, left_out):
        table.to_parquet(out / f"{name.replace('/', '.')}.parquet", index=False, engine="pyarrow")
    return left_out


def _write_netcdf(run: Run, out: Path) -> dict[str, str]:
    run.to_netcdf(out)
    return {}


def _write_tensorboard(run: Run, out: Path) -> dict[str, str]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard", error) from error
    left_out: dict[str, str] = {}
    writer = SummaryWriter(str(out))
    try:
        for group in run.groups():
            for name in (name for name in run.names() if run.group_of(name) == group):
                field = run.field(name)
                tags = _tags(name, field)
                if not tags:
                    left_out[name] = f"no numbers a step, or more than {MAX_CURVES}; TensorBoard shows curves"
                    continue
                values = np.asarray(run[name], dtype=np.float64).reshape(len(run.steps(group)), -1)
                if len(tags) < values.shape[1]:
                    values = values.mean(1, keepdims=True)
                for tag, column in zip(tags, values.T, strict=True):
                    for step, value in zip(run.steps(group).tolist(), column.tolist(), strict=True):
                        writer.add_scalar(tag, value, step)
    finally:
        writer.close()
    return left_out


def _tags(name: str, field: Field) -> list[str]:
    """Names of the curves of an array: one a number, one for the mean over many samples, none where there are none."""
    if field.static or field.dtype == "str":
        return []
    if math.prod(field.shape) > MAX_CURVES:
        return [f"{name}/mean"] if field.dims == ("sample",) else []
    return ["/".join([name, *map(str, labels)]) for labels in itertools.product(*_labels(field))]


def _missing(to: str, error: ImportError) -> MissingPackage:
    return MissingPackage(f"export to {to}: {error}; pip install -c constraints.txt '.[export]'")


FORMATS: dict[str, Callable[[Run, Path], dict[str, str]]] = {
    "csv": _write_csv,
    "parquet": _write_parquet,
    "netcdf": _write_netcdf,
    "tensorboard": _write_tensorboard,
}
