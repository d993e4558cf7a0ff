"""Comparison: one measure of several runs over training, runs of one setting averaged.

>>> compare([Run.open("runs/a"), Sweep.open("runs/starts")], "kernel-distance", by=["start_epoch"])   # doctest: +SKIP
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ..errors import ConfigurationError, NtkdynError, UndefinedMeasure, UnknownName
from ..results import Run, Sweep
from ..store.files import make_folder, publish, refuse_existing
from .measures import Against, measure_of, placed

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.figure import Figure

MOST_GROUPS = 20
"""Most settings on one figure: more cannot be told apart."""

_LABELS = {
    "step": "training time (optimizer steps)",
    "epoch": "training time (epochs)",
    "lr_time": "training time (sum of learning rates)",
    "train_loss": "mean train loss (nat)",
}
SPREAD = "sample standard deviation over the runs of a group"

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found.

    Attributes:
        measure: name of the study or array, and of the variable.
        unit: of the measure.
        against: the abscissa.
        runs: tidy table, one row a run, probe set and snapshot: group, run, seed, set, step, x, value.
        groups: one row a group, probe set and step that all its runs have: group, set, step, x (mean), runs (their
            number), mean, standard_deviation (over runs, n - 1; NaN for one run), least, greatest.
        left_out: run -> why it is not in the tables.
        pooled: group -> settings other than the seed in which its runs differ.
    """

    measure: str
    unit: str
    against: Against
    runs: pd.DataFrame
    groups: pd.DataFrame
    left_out: Mapping[str, str]
    pooled: Mapping[str, tuple[str, ...]]

    @property
    def last(self) -> pd.DataFrame:
        """The rows of ``groups`` at the last step of each group and probe set."""
        return self.groups.groupby(["group", "set"], sort=False).tail(1).reset_index(drop=True)

    def as_csv(self, table: Literal["runs", "groups"]) -> bytes:
        """A table as CSV, NaN as nothing."""
        return str(getattr(self, table).to_csv(index=False, lineterminator="\n")).encode()

    def as_json(self) -> bytes:
        """Both tables with everything that is known about them; NaN as null."""
        content = {
            "measure": self.measure,
            "unit": self.unit,
            "against": self.against,
            "spread": SPREAD,
            "left_out": dict(self.left_out),
            "pooled": {group: list(settings) for group, settings in self.pooled.items()},
            "runs": _records(self.runs),
            "groups": _records(self.groups),
        }
        return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def compare(
    sources: Sequence[Run | Sweep], measure: str, *, against: Against = "step", by: Sequence[str] = ()
) -> Comparison:
    """Measure all runs and average those of one group, step by step.

    Args:
        sources: runs and sweeps; of a sweep its arms, or its trunks where it has no arms.
        measure: a study of single runs, "kernel-distance" or with a variable of it "kernel-distance:to_end", or a
            recorded array, "outputs/test/loss"; arrays with further axes are averaged over them.
        against: "step", "epoch", "lr_time" (sum of learning rates, recorded as learning_rate/sum) or "train_loss"
            (mean of outputs/train/loss at the same step).
        by: settings that make a group together, or "seed"; all settings in which the runs differ where empty.

    Raises: UnknownName: the measure or a setting.  UndefinedMeasure: no run has it, or the runs have nothing in common.
        ConfigurationError: no runs, too many groups, or another ``against``.
    """
    if against not in get_args(Against):
        raise ConfigurationError(
            f"compare: found against={against!r}, expected one of {', '.join(get_args(Against))}; choose one"
        )
    runs = _runs(sources)
    curve = measure_of(measure, runs)
    found: dict[str, xr.DataArray] = {}
    left_out: dict[str, str] = {}
    for name, run in runs.items():
        try:
            found[name] = placed(run, curve(run), against)
        except (NtkdynError, LookupError) as error:
            left_out[name] = str(error)
    if not found:
        name, reason = next(iter(left_out.items()))
        raise UndefinedMeasure(f"compare {measure!r} against {against}: none of {len(runs)} runs has it; {reason}")
    _refuse_different(measure, found)
    groups = _grouped({name: runs[name] for name in found}, tuple(by))
    if len(set(groups.values())) > MOST_GROUPS:
        raise ConfigurationError(
            f"compare: found {len(set(groups.values()))} groups of runs, expected at most {MOST_GROUPS} on one figure; "
            "choose the setting that makes a group with --by"
        )
    first = next(iter(found.values()))
    table = _tidy(found, runs, groups)
    return Comparison(
        measure=f"{measure}: {first.attrs.get('long_name') or first.name}",
        unit=str(first.attrs.get("units", "1")),
        against=against,
        runs=table,
        groups=_averaged(table),
        left_out=left_out,
        pooled=_pooled({name: runs[name] for name in found}, groups),
    )


def write(comparison: Comparison, out: Path) -> list[Path]:
    """Write figure (PNG, SVG), tables (CSV) and both with all facts (JSON) into a new folder; return the files.

    Raises: RecordingExists: the folder exists.  StorageError.
    """
    from .. import plots

    refuse_existing(out)
    with plots.style():
        figure = plots.new_figure()
        draw(comparison, figure)
        contents = {
            "comparison.png": plots.png(figure),
            "comparison.svg": plots.svg(figure),
            "comparison.csv": comparison.as_csv("groups"),
            "runs.csv": comparison.as_csv("runs"),
            "comparison.json": comparison.as_json(),
        }
    make_folder(out)
    for name, data in contents.items():
        publish(out / name, data)
    return [out / name for name in contents]


def draw(comparison: Comparison, figure: Figure) -> None:
    """Draw a panel a probe set: means of the groups, with bands of one standard deviation.

    Against the train loss, which does not only fall, single runs are drawn thin instead of a band.
    """
    from .. import plots

    sets = list(dict.fromkeys(comparison.groups["set"]))
    names = list(dict.fromkeys(comparison.groups["group"]))
    for ax, probe_set in zip(plots.panels(figure, len(sets), height=2.0), sets, strict=True):
        for index, name in enumerate(names):
            here = comparison.groups.query("group == @name and set == @probe_set")
            count = int(here["runs"].max()) if len(here) else 0
            label = f"{name or 'all runs'} ({count} run{'s' if count != 1 else ''})"
            x, mean, deviation = (here[column].to_numpy(float) for column in ("x", "mean", "standard_deviation"))
            plots.draw_lines(x, mean, ax=ax, label=label, index=index)
            if comparison.against == "train_loss":
                single = comparison.runs.query("group == @name and set == @probe_set")
                for _, one in single.groupby("run"):
                    plots.draw_thin(one["x"], one["value"], ax=ax, index=index)
            elif count > 1:
                plots.draw_band(x, mean - deviation, mean + deviation, ax=ax, index=index)
        if probe_set:
            plots.title(ax, f"probe set: {probe_set}")
        # A curve's last word is at the right, and training goes from high loss to low.
        if comparison.against == "train_loss":
            ax.invert_xaxis()
        quantity = comparison.measure.partition(": ")[2]
        # matplotlib wraps at the edge of the figure, which is too late for panels one above the other.
        ax.set_ylabel(textwrap.fill(f"{quantity} ({comparison.unit})", 28))
        ax.set_xlabel(_LABELS[comparison.against] if probe_set == sets[-1] else "")
    spread = "thin: single runs" if comparison.against == "train_loss" else "band: ± 1 standard deviation over runs"
    if comparison.groups["runs"].max() > 1:
        ax.plot([], [], " ", label=f"mean; {spread}")
    plots.finish(figure)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    # Not DataFrame.to_json, which writes 15 digits of 17.
    return [{str(k): None if v != v else v for k, v in row.items()} for row in table.to_dict("records")]


def _runs(sources: Sequence[Run | Sweep]) -> dict[str, Run]:
    """All runs by labels of their own."""
    found: dict[str, Run] = {}
    for source in sources:
        if isinstance(source, Sweep):
            arms = [name for name in source.runs if name.startswith("arms/")]
            members = {f"{source.name}/{name}": source.runs[name] for name in arms or source.runs}
        else:
            members = {source.name: source}
        for name, run in members.items():
            label, number = name, 2
            while label in found:
                label, number = f"{name} ({number})", number + 1
            found[label] = run
    if not found:
        raise ConfigurationError(
            "compare: found no finished run, expected at least one; give runs, or a finished sweep"
        )
    return found


def _refuse_different(measure: str, found: Mapping[str, xr.DataArray]) -> None:
    sets = {
        name: [str(one) for one in curve["set"].values] if "set" in curve.dims else [""]
        for name, curve in found.items()
    }
    if not set.intersection(*map(set, sets.values())):
        texts = [f"{name} has {', '.join(map(repr, members))}" for name, members in sets.items()]
        raise UndefinedMeasure(
            f"compare {measure!r}: the runs have no probe set in common; {'; '.join(texts[:4])}; compare them "
            "one by one"
        )


def _grouped(runs: Mapping[str, Run], by: tuple[str, ...]) -> dict[str, str]:
    """Group of each run: its values of the settings ``by``, or of all settings in which the runs differ."""
    settings = {name: {key: json.dumps(value) for key, value in run.config.items()} for name, run in runs.items()}
    for key in by:
        if key != "seed" and not any(key in one for one in settings.values()):
            known = sorted({key for one in settings.values() for key in one})
            raise UnknownName(f"compare: no run has a setting {key!r}; there are: seed, {', '.join(known) or 'none'}")
    if not by and not any(settings.values()):
        # Runs of somebody's own loop: nothing says which belong together.
        return {name: name for name in runs}
    keys = by or tuple(_differing(list(settings.values())))
    seeds = {name: str(run.seed) for name, run in runs.items()}
    return {
        name: ", ".join(
            f"{key} = {(seeds[name] if key == 'seed' else one.get(key, 'not set')).strip(chr(34))}" for key in keys
        )
        for name, one in settings.items()
    }


def _differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    keys = sorted({key for one in settings for key in one})
    return [key for key in keys if len({one.get(key) for one in settings}) > 1]


def _pooled(runs: Mapping[str, Run], groups: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    found = {}
    for group in dict.fromkeys(groups.values()):
        members = [
            {key: json.dumps(value) for key, value in run.config.items()}
            for name, run in runs.items()
            if groups[name] == group
        ]
        if differing := _differing(members):
            found[group] = tuple(differing)
    return found


def _tidy(found: Mapping[str, xr.DataArray], runs: Mapping[str, Run], groups: Mapping[str, str]) -> pd.DataFrame:
    import pandas as pd

    shared = set.intersection(
        *({str(one) for one in curve["set"].values} if "set" in curve.dims else {""} for curve in found.values())
    )
    parts = []
    for name in sorted(found, key=lambda one: (_natural(groups[one]), one)):
        curve = found[name]
        for probe_set in sorted(shared):
            one = curve.sel(set=probe_set) if "set" in curve.dims else curve
            parts.append(
                pd.DataFrame(
                    {
                        "group": groups[name],
                        "run": name,
                        "seed": runs[name].seed,
                        "set": probe_set,
                        "step": np.asarray(one["step"].values),
                        "x": np.asarray(one["x"].values, dtype=np.float64),
                        "value": np.asarray(one.values, dtype=np.float64),
                    }
                )
            )
    return pd.concat(parts, ignore_index=True)


def _natural(group: str) -> list[tuple[int, float, str]]:
    """Order in which 2 comes before 12."""
    parts = []
    for entry in group.split(", "):
        text = entry.rpartition(" = ")[2]
        try:
            parts.append((0, float(text), entry))
        except ValueError:
            parts.append((1, 0.0, entry))
    return parts


def _averaged(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread of each group at the steps that all its runs have.

    Raises: UndefinedMeasure: the runs of a group have no step in common.
    """
    import pandas as pd

    parts = []
    for (group, probe_set), members in table.groupby(["group", "set"], sort=False):
        count = members["run"].nunique()
        steps = members.groupby("step")
        summary = pd.DataFrame(
            {
                "group": group,
                "set": probe_set,
                "step": steps["x"].mean().index,
                "x": steps["x"].mean().to_numpy(),
                "runs": steps["run"].nunique().to_numpy(),
                "mean": steps["value"].mean().to_numpy(),
                "standard_deviation": steps["value"].std(ddof=1).to_numpy(),
                "least": steps["value"].min().to_numpy(),
                "greatest": steps["value"].max().to_numpy(),
            }
        )
        common = summary[summary["runs"] == count]
        if common.empty:
            raise UndefinedMeasure(
                f"compare: the {count} runs of the group {group or 'of all'!r} have no step in common; make groups of "
                "runs with one schedule with --by"
            )
        parts.append(common)
    return pd.concat(parts, ignore_index=True)
