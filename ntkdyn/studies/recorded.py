"""What a study is, and what the studies read from a run: probe sets, trace kernels, the time axis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from ..results import Run

Datasets = Mapping[str, "xr.Dataset"]
"""One measured dataset per label; ``attrs["series"]`` names the setting that several seeds share."""

KERNEL_NEED = "no tangent kernels are recorded; record with the probe ntk"


@dataclass(frozen=True)
class Table:
    """Numbers to be read one by one: a caption, column headings, rows of texts."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@runtime_checkable
class Study(Protocol):
    """One question to a recording: numbers, sentences and a figure.

    ``title`` heads the figure, ``reading`` says in one sentence how to read it, ``scope`` is "run" or "sweep".
    Optional: ``with_arms = True``, in a sweep also the primary arms at the first and the last start;
    ``verdict(datasets)``, sentences that stand at the head of the report; ``tables(datasets)``, a list of ``Table``;
    ``in_sweep(sweep, task, datasets)``, datasets with what a sweep adds to those of its trunks.
    """

    name: str
    title: str
    reading: str
    scope: str

    def unavailable(self, source: Any, /) -> str | None:
        """Return in one line why this cannot be computed from the source, None where it can."""
        ...

    def measure(self, source: Any, /) -> xr.Dataset:
        """Return the numbers with coordinates, units and long names."""
        ...

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Return what the numbers say."""
        ...

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw the numbers into an empty figure."""
        ...


def path_of(probe: str, probe_set: str, field: str) -> str:
    """Return the name of a recorded field; the level of the unnamed set is left out."""
    return "/".join(part for part in (probe, probe_set, field) if part)


def kernel_sets(run: Run) -> list[str]:
    """Return the probe sets whose tangent kernel is recorded."""
    if "ntk" not in {group.split("/")[0] for group in run.groups()}:
        return []
    return [
        probe_set
        for probe_set in run.sets("ntk")
        if path_of("ntk", probe_set, "kernel") in run or path_of("ntk", probe_set, "layers") in run
    ]


def trace_kernels(run: Run, probe_set: str, snapshots: list[int] | None = None) -> NDArray[np.float64]:
    """Return the trace kernels [S, N, N] of a probe set, whatever reduction was recorded.

    Args: snapshots: read these only, by their indices; None: all.
    """

    def recorded(name: str) -> NDArray[np.float64]:
        return np.asarray(run[name] if snapshots is None else run.lazy(name)[snapshots], dtype=np.float64)

    name = path_of("ntk", probe_set, "kernel")
    if name not in run:
        # Recorded per layer only: the layers add up to the whole.
        return np.asarray(recorded(path_of("ntk", probe_set, "layers")).sum(1))
    kernels = recorded(name)
    if kernels.ndim == 5:
        return np.asarray(np.einsum("snmcc->snm", kernels))
    if kernels.ndim == 4:
        return np.asarray(kernels.sum(1))
    return kernels


def target_columns(targets: NDArray[np.generic]) -> NDArray[np.float64]:
    """Return targets as columns [N, C]: class numbers become one-hot."""
    if np.issubdtype(targets.dtype, np.integer) and targets.ndim == 1:
        return np.asarray(targets[:, None] == np.unique(targets)[None], dtype=np.float64)
    return np.asarray(targets, dtype=np.float64).reshape(len(targets), -1)


def time_axis(run: Run, group: str) -> dict[str, Any]:
    """Return the coordinates ``step`` and ``epoch`` (NaN where unknown) of a recorded group."""
    return {
        "step": ("step", np.asarray(run.steps(group)), {"units": "step", "long_name": "optimizer step"}),
        "epoch": ("step", np.asarray(run.epochs(group), dtype=np.float64), {"units": "epoch", "long_name": "epoch"}),
    }


def variable(dims: Sequence[str] | str, values: ArrayLike, unit: str, long_name: str) -> tuple[Any, ...]:
    """Return a dataset variable with its unit and long name."""
    return (dims, np.asarray(values), {"units": unit, "long_name": long_name})


def by_set(sets: Sequence[str], compute: Callable[[str], xr.Dataset]) -> xr.Dataset:
    """Return the datasets of all probe sets along a new axis ``set``, at the steps that all of them have."""
    import xarray as xr

    parts = [compute(probe_set) for probe_set in sets]
    joined = xr.concat(parts, dim="set", join="inner", coords="minimal", compat="override", combine_attrs="override")
    return joined.assign_coords(set=("set", list(sets)))


def each_set(datasets: Datasets) -> Iterator[tuple[str, list[xr.Dataset]]]:
    """Yield a prefix for sentences and the runs' datasets, once per series and probe set."""
    for series, members in by_series(datasets).items():
        sets = list(members[0]["set"].values) if "set" in members[0].dims else [None]
        for probe_set in sets:
            words = [series, f"probe set {probe_set}" if probe_set else ""]
            prefix = ", ".join(word for word in words if word)
            chosen = [
                one if probe_set is None else one.sel(set=probe_set)
                for one in members
                if probe_set is None or probe_set in one["set"]
            ]
            yield (f"{prefix}: " if prefix else ""), chosen


def by_series(datasets: Datasets) -> dict[str, list[xr.Dataset]]:
    """Return the datasets by the setting that they share; seeds of one setting come together."""
    series: dict[str, list[xr.Dataset]] = {}
    for dataset in datasets.values():
        series.setdefault(str(dataset.attrs.get("series", "")), []).append(dataset)
    return series


def spread(values: ArrayLike, digits: int = 3) -> str:
    """Return "mean (least to greatest)" of one number per run, the number alone where all agree.

    >>> spread([1.0, 2.0])
    '1.5 (1 to 2)'
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    array = array[np.isfinite(array)]
    if len(array) == 0:
        return "undefined"
    mean, least, greatest = (f"{value:.{digits}g}" for value in (array.mean(), array.min(), array.max()))
    return mean if least == greatest else f"{mean} ({least} to {greatest})"
