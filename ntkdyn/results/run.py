"""A run as users open it: its arrays with labels, its studies and figures."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..errors import DamagedRecording, UndefinedMeasure, UnknownName
from ..plugins import load_study
from ..probe import Field
from ..store.compact import costs_of
from ..store.declare import coordinate_array, folder_of
from ..store.files import refuse_existing
from ..store.pack import write_packed
from ..store.reader import RunReader
from ..store.recorded_array import RecordedArray
from ..store.verify import MAX_BYTES, MAX_RATIO

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..studies.recorded import Study

Array = np.ndarray[Any, Any]


class Run:
    """One recording: arrays by path, steps and epochs by group, manifest, studies.

    >>> run = Run.open("runs/dense")                         # doctest: +SKIP
    >>> run.steps("ntk"), run["ntk/test/kernel"].shape       # doctest: +SKIP
    (array([  0, 100, 200]), (3, 128, 128))
    """

    def __init__(self, reader: RunReader) -> None:
        self._reader = reader

    @classmethod
    def open(
        cls, path: str | Path, *, trusted: bool = False, max_bytes: int = MAX_BYTES, max_ratio: float = MAX_RATIO
    ) -> Run:
        """Open a live folder, a packed folder, or a run.h5 alone; it shows what was committed at that moment.

        Args:
            trusted: skip the checks that a file of a stranger gets in a limited process.
            max_bytes: largest array that is read, in bytes.
            max_ratio: largest declared size over stored size.

        Raises: MissingRecording: nothing there.  DamagedRecording: no recording, or a wrong checksum.
            UntrustedFile: links, filters or sizes that a recording never needs.
        """
        return cls(RunReader.open(path, trusted=trusted, max_bytes=max_bytes, max_ratio=max_ratio))

    @property
    def path(self) -> Path:
        """Folder of the run, or the file that was opened."""
        return self._reader.path

    @property
    def name(self) -> str:
        """Name of the folder; of a run.h5 that was copied out of it, the name of the file."""
        path = self.path.absolute()
        if path.is_dir():
            return path.name
        return path.parent.name if (path.parent / "run.json").exists() else path.stem

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Everything in run.json: versions, configuration, seed, command, status, results."""
        return self._reader.manifest

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the experiment, empty where none was recorded."""
        return dict(self._entry("config", Mapping, "a mapping") or {})

    @property
    def seed(self) -> int | None:
        """Seed of the run, None where none was recorded."""
        seed: int | None = self._entry("seed", int, "a whole number")
        return seed

    @property
    def results(self) -> dict[str, float]:
        """Final numbers of the experiment; NaN where a value does not exist."""
        return dict(self._entry("results", Mapping, "a mapping") or {})

    def _entry(self, name: str, kind: type, words: str) -> Any:
        found = self.manifest.get(name)
        if found is not None and not isinstance(found, kind):
            raise DamagedRecording(
                f"{self.path}: found {name} {reprlib.repr(found)} in the manifest, expected {words}; restore run.json "
                "from a copy, or correct it and accept it by ntkdyn repair"
            )
        return found

    def costs(self) -> dict[str, dict[str, float]]:
        """What recording cost, by group: snapshots, seconds of measuring, bytes, and the share of the run's time.

        The share is of the seconds from the first snapshot to the last, over all resumptions; NaN where these are 0.
        Superseded snapshots have cost their share too.
        """
        noted = costs_of(self._reader.sources)
        elapsed = noted["elapsed"]
        return {
            group: {
                "snapshots": count,
                "seconds": seconds,
                "bytes": size,
                "share": seconds / elapsed if elapsed > 0 else float("nan"),
            }
            for group, (count, seconds, size) in sorted(noted["costs"].items())
        }

    @property
    def seconds(self) -> float:
        """Seconds from the first snapshot to the last, over all resumptions."""
        return float(costs_of(self._reader.sources)["elapsed"])

    def groups(self) -> list[str]:
        """Groups with a step axis: "ntk/test", "units", …"""
        return self._reader.groups()

    def names(self) -> list[str]:
        """Path of every recorded array."""
        return self._reader.names()

    def group_of(self, name: str) -> str:
        """Group to which an array belongs: "ntk/test" of "ntk/test/kernel".  Raises: UnknownName."""
        return self._reader.owner(name)[0].group

    def sets(self, probe: str) -> list[str]:
        """Probe sets on which a probe was recorded; "" for the unnamed one.

        Raises: UnknownName.
        """
        return [group.removeprefix(probe).removeprefix("/") for group in self._groups_of(probe)]

    def steps(self, group: str) -> Array:
        """Recorded steps [S] of "ntk/test", or of "ntk" where all its probe sets have the same.

        Raises: UnknownName: no such group, or its sets have different steps.
        """
        return self._reader.steps(self._group_with_steps(group))

    def epochs(self, group: str) -> Array:
        """Epochs [S] of a group as in ``steps``; NaN where unknown."""
        return self._reader.epochs(self._group_with_steps(group))

    def __getitem__(self, name: str) -> Array:
        return self._reader.read(name)

    def lazy(self, name: str) -> RecordedArray:
        """An array of which only the snapshots are read that are asked for.

        >>> run.lazy("ntk/test/kernel").at(step=100)              # doctest: +SKIP

        Raises: UnknownName: no such array with steps.
        """
        return RecordedArray(self._reader, name)

    def __contains__(self, name: object) -> bool:
        return name in self._reader.names()

    def targets(self, set: str) -> Array:
        """Targets of a probe set, "" for the unnamed one.  Raises: UnknownName."""
        return self[f"probe_sets/{set}/targets" if set else "probe_sets/targets"]

    def field(self, name: str) -> Field:
        """Dims, dtype, unit, coordinates and attributes of an array.  Raises: UnknownName."""
        return self._reader.field(name)

    def attributes(self, group: str) -> dict[str, Any]:
        """Attributes of a group, e.g. the reduction of a kernel.  Raises: UnknownName."""
        return self._reader.attributes(group)

    def __repr__(self) -> str:
        return (
            f"<Run {self.name}: {self.manifest.get('status', 'unknown')}, groups {', '.join(self.groups()) or 'none'}>"
        )

    def _repr_html_(self) -> str:
        """A table of the groups and a small picture, for notebooks."""
        from ..preview import run_html

        return run_html(self)

    def to_xarray(self) -> xr.DataTree:
        """Return all arrays as a tree of labelled datasets, with ``step`` and ``epoch`` as coordinates.

        Raises: DamagedRecording, UntrustedFile.
        """
        import xarray as xr

        arrays = self._reader.read_many(self.names())
        variables: dict[str, dict[str, Any]] = {}
        coordinates: dict[str, dict[str, Any]] = {}
        attributes: dict[str, dict[str, Any]] = {}
        for group, declaration in self._reader.declarations.items():
            attributes[group] = dict(declaration.attributes)
            if declaration.stepped:
                coordinates[group] = {
                    "step": ("step", self._reader.steps(group), {"long_name": "applied optimizer steps", "units": "1"}),
                    "epoch": (
                        "step",
                        self._reader.epochs(group),
                        {"long_name": "epochs of training", "units": "epoch"},
                    ),
                }
            recorded = [field for field in declaration.fields.values() if declaration.path(field) in arrays]
            used = {(folder_of(declaration.path(field)), dim) for field in recorded for dim in field.dims}
            for field in declaration.fields.values():
                folder = folder_of(declaration.path(field))
                for dim, values in field.coordinates.items():
                    if (folder, dim) in used:
                        coordinates.setdefault(folder, {})[dim] = (dim, coordinate_array(values, folder))
            for field in recorded:
                path = declaration.path(field)
                folder = folder_of(path)
                dims = field.dims if declaration.is_static(field) else ("step", *field.dims)
                labels = {
                    **field.attributes,
                    "units": field.unit,
                    "long_name": field.long_name or field.name.split("/")[-1],
                }
                variables.setdefault(folder, {})[path.rpartition("/")[2]] = (dims, arrays[path], labels)
        folders = {*variables, *coordinates, *attributes}
        tree = {
            folder: xr.Dataset(variables.get(folder), coordinates.get(folder), attributes.get(folder))
            for folder in sorted(folders)
        }
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs=dict(self.manifest)), **tree}, name=self.name)

    def to_netcdf(self, path: str | Path) -> None:
        """Write all arrays into one new file that netCDF-4 readers and ``Run.open`` read; a few snapshots at a time.

        Raises: RecordingExists: there is something; it stays.  StorageError.  DamagedRecording: a checksum is wrong.
        """
        refuse_existing(Path(path))
        self._reader.again(lambda: write_packed(self._reader, Path(path)))

    def analyze(self, name: str) -> xr.Dataset:
        """Return the numbers of a study of one run, such as "kernel_distance".

        Raises: UnknownName: no such study.  UndefinedMeasure: this run lacks what it needs.
        """
        return self._measured(self._study(name))

    def plot(self, name: str, ax: Axes | None = None) -> Figure:
        """Draw a study of this run and return the figure; with ``ax``, in the place of these axes.

        Raises: as ``analyze``.
        """
        import matplotlib.pyplot as plt

        study = self._study(name)
        dataset = self._measured(study)
        if ax is None:
            figure = plt.figure(layout="constrained")
            study.draw(figure, {self.name: dataset})
            return figure
        figure = ax.figure.figure
        place = ax.get_subplotspec()
        if place is None:
            raise UndefinedMeasure("plot: found axes outside a grid, expected axes of plt.subplots; leave ax out")
        # A study may need several axes, so it gets the place of these as a figure of its own.
        ax.set_axis_off()
        study.draw(cast("Figure", figure.add_subfigure(place)), {self.name: dataset})
        return figure

    def _study(self, name: str) -> Study:
        study: Study = load_study(name)
        if study.scope != "run":
            raise UndefinedMeasure(f"study {study.name!r} reads a whole sweep, found one run; use Sweep.analyze")
        return study

    def _measured(self, study: Study) -> xr.Dataset:
        reason = study.unavailable(self)
        if reason is not None:
            raise UndefinedMeasure(f"study {study.name!r} of {self.path}: {reason}")
        return study.measure(self)

    def _groups_of(self, probe: str) -> list[str]:
        found = [group for group in self.groups() if group == probe or group.startswith(f"{probe}/")]
        if not found:
            raise UnknownName(f"{self.path}: found no probe {probe!r}; there are: {', '.join(self.groups()) or 'none'}")
        return found

    def _group_with_steps(self, group: str) -> str:
        found = self._groups_of(group)
        steps = self._reader.steps(found[0])
        if any(not np.array_equal(steps, self._reader.steps(other)) for other in found[1:]):
            raise UnknownName(
                f"{self.path}: the probe sets of {group!r} have different steps; name one of: {', '.join(found)}"
            )
        return found[0]
