"""A sweep as users open it: a table of its runs, and studies over them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DamagedRecording, EditedManifest, MissingRecording, UndefinedMeasure, UnknownName
from ..plugins import load_study
from ..primary import PrimaryComparison
from ..store import files
from ..store.manifest import read_manifest
from ..store.reader import files_of
from ..store.verify import MAX_BYTES, MAX_RATIO, validate
from ..sweep_file import check_plan, check_run, confirmed
from .run import Run

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


class Sweep:
    """A sweep on disk: many runs of one experiment, and the trunks they branched from.

    Attributes:
        path: the folder.
        name: its last part.
        manifest: content of sweep.json: experiment, settings, grids, seeds, hash, primary, record, plan, and sources
            where there are some; of a confirmation also confirms, the hash of the plan that it repeats, and explored,
            the seeds of that sweep.
        runs: the finished runs by their path inside the sweep, opened on first use.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], *, trusted: bool, max_bytes: int, max_ratio: float):
        self.path = path
        self.name = path.resolve().name
        self.manifest = manifest
        self._planned = {str(planned["run"]): planned for planned in manifest["plan"]}
        self._finished = {name: found for name in self._planned if (found := _finished_manifest(path / name))}
        for name, found in self._finished.items():
            check_run(path / name, found, self._planned[name], plan=manifest.get("hash"))
        self.runs: Mapping[str, Run] = _LazyRuns(
            {name: path / name for name in self._finished}, trusted=trusted, max_bytes=max_bytes, max_ratio=max_ratio
        )

    @classmethod
    def open(
        cls, path: str | Path, *, trusted: bool = False, max_bytes: int = MAX_BYTES, max_ratio: float = MAX_RATIO
    ) -> Sweep:
        """Open the folder of a sweep; runs that are not finished are left out.

        Args: as in ``Run.open``; the files of all runs are validated together when the first is read.
        Raises: MissingRecording: there is nothing.  DamagedRecording: no sweep, or a plan that is none.
            EditedManifest: run.json of a run differs from its checksum, the plan is not the one that was hashed, or a
            run is not the one that the plan has in its place.
        """
        folder = Path(path)
        if not folder.exists():
            raise MissingRecording(f"{folder}: found nothing, expected the folder of a sweep; check the path")
        try:
            manifest = json.loads(files.read(folder / "sweep.json"))
            for planned in manifest["plan"]:
                for part in str(planned["run"]).split("/"):
                    files.check_name(part, "run")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedRecording(
                f"{folder} is no sweep: {type(error).__name__}: {error}; expected a sweep.json as ntkdyn sweep writes "
                "it; give the folder of the sweep"
            ) from None
        check_plan(folder / "sweep.json", manifest)
        return cls(folder, manifest, trusted=trusted, max_bytes=max_bytes, max_ratio=max_ratio)

    def _repr_html_(self) -> str:
        """What the runs share, and a table of how they differ and end, for notebooks."""
        from ..preview import sweep_html

        return sweep_html(self)

    def __repr__(self) -> str:
        return f"<Sweep {self.name}: {len(self._finished)} of {len(self._planned)} runs finished>"

    @cached_property
    def table(self) -> pd.DataFrame:
        """Tidy table, one row a finished run: kind ("trunk" or "arm"), run, seed, every setting, every result.

        A setting that has the name of one of the first three columns is ``setting_<name>`` here.
        """
        import pandas as pd

        rows = []
        for name, manifest in self._finished.items():
            kind = "trunk" if name.startswith("trunks/") else "arm"
            own = {"kind": kind, "run": name, "seed": manifest.get("seed")}
            settings = {
                f"setting_{name}" if name in own else name: value
                for name, value in (manifest.get("config") or {}).items()
            }
            results = manifest.get("results") or {}
            rows.append({**own, **settings, **results})
        return pd.DataFrame(rows, columns=None if rows else ["kind", "run", "seed"])

    @cached_property
    def primary(self) -> PrimaryComparison | None:
        """The comparison that the plan named before the first run, None where it names none.

        Raises: DamagedRecording: it is no comparison.
        """
        entry = self.manifest.get("primary")
        try:
            return None if entry is None else PrimaryComparison.from_json(entry)
        except TypeError as error:
            raise DamagedRecording(
                f"{self.path / 'sweep.json'}: the primary comparison is none: {error}; restore it from a copy"
            ) from None

    @property
    def confirms(self) -> str | None:
        """Hash of the plan that this sweep repeats on fresh seeds, None where it is no confirmation.

        A confirmation that an older ntkdyn has begun, whose hash does not cover it, counts as none.
        """
        return confirmed(self.manifest)

    def trunk_of(self, run: str) -> str | None:
        """Path of the trunk that a run branched from, None where it has none.

        Raises: UnknownName: the plan has no such run.
        """
        if run not in self._planned:
            raise UnknownName(f"{self.path}: found no run {run!r} in the plan; see sweep.table['run'] for the runs")
        parent = self._planned[run].get("parent")
        return None if parent is None else str(parent).rsplit("/checkpoints/", 1)[0]

    def analyze(self, name: str) -> xr.Dataset:
        """Return a study's numbers: of the whole sweep, or for a study of single runs over (settings, seed, …).

        ``settings`` is the 12-digit name of a configuration, as in the paths of the runs.

        Raises: UnknownName: no such study.  UndefinedMeasure: no run records what it needs.
        """
        import xarray as xr

        study = load_study(name)
        if study.scope == "sweep":
            reason = study.unavailable(self)
            if reason is not None:
                raise UndefinedMeasure(f"{self.path}: {name}: {reason}")
            whole: xr.Dataset = study.measure(self)
            return whole
        measured: dict[str, dict[int, xr.Dataset]] = {}
        for path, run in self.runs.items():
            if study.unavailable(run) is None:
                _, settings, seed = path.split("/")
                measured.setdefault(settings, {})[int(seed)] = study.measure(run)
        if not measured:
            raise UndefinedMeasure(f"{self.path}: {name}: no run of this sweep records what this study needs")
        by_settings = [
            xr.concat(
                list(runs.values()), dim=xr.Variable("seed", list(runs)), join="outer", combine_attrs="drop_conflicts"
            )
            for runs in measured.values()
        ]
        return xr.concat(
            by_settings, dim=xr.Variable("settings", list(measured)), join="outer", combine_attrs="drop_conflicts"
        )


class _LazyRuns(Mapping[str, Run]):
    """Runs by name, opened on first use; their files are validated together, in one process instead of hundreds."""

    def __init__(self, paths: Mapping[str, Path], *, trusted: bool, max_bytes: int, max_ratio: float) -> None:
        self._paths = paths
        self._trusted = trusted
        self._max_bytes = max_bytes
        self._max_ratio = max_ratio
        self._opened: dict[str, Run] = {}

    def __getitem__(self, name: str) -> Run:
        if name not in self._opened:
            if not (self._trusted or self._opened):
                paths = [file for path in self._paths.values() for file in files_of(path)]
                validate(paths, max_bytes=self._max_bytes, max_ratio=self._max_ratio)
            self._opened[name] = Run.open(
                self._paths[name], trusted=self._trusted, max_bytes=self._max_bytes, max_ratio=self._max_ratio
            )
        return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _finished_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = read_manifest(folder)
    except EditedManifest:
        # Its results are there; a table without them would be read as complete.
        raise
    except OSError:  # missing, damaged, or not to be read; one of a later format is said
        return None
    return manifest if manifest.get("status") == "finished" else None
