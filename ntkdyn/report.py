"""Reports: every study that a recording allows, as figures, numbers and one page that needs no network.

>>> report = analyze([Run.open("runs/dense")], Path("report"))     # doctest: +SKIP
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError, NtkdynError
from .plugins import installed, load_study
from .progress import counted
from .store.files import make_folder, publish
from .studies import arms
from .studies.numbers import as_csv, as_json
from .studies.recorded import Study, Table

if TYPE_CHECKING:
    import xarray as xr

    from .results import Run, Sweep

ORDER = (
    "advantage",
    "controls",
    "relation",
    "collapse",
    "core-network",
    "layerwise-vs-channelwise",
    "linearized-training",
    "translation",
    "drift-gap",
    "reference-levels",
    "learning-curve",
    "kernel-distance",
    "kernel-velocity",
    "target-alignment",
    "cka",
    "spectrum",
    "gates",
    "units",
    "path-length",
)
"""Order of the house's own studies on the page; others follow by name."""


@dataclass(frozen=True)
class Section:
    """One study of one group of runs: what stands under one heading of the page."""

    stem: str
    title: str
    group: str
    reading: str
    sentences: tuple[str, ...]
    verdict: tuple[str, ...]
    tables: tuple[Table, ...]
    image: str


@dataclass(frozen=True)
class Report:
    """What ``analyze`` wrote.

    Attributes:
        path: the page.
        files: every file written, the page last.
        sentences: the verdict, then the first sentence of each study; the page and the JSON files have all.
        unavailable: study (and group) -> why it could not be computed.
    """

    path: Path
    files: tuple[Path, ...]
    sentences: tuple[str, ...]
    unavailable: Mapping[str, str]


@dataclass(frozen=True)
class _Group:
    """Runs (or one sweep) that a study sees together; ``name`` goes into headings and file names."""

    name: str
    members: Mapping[str, Any]
    series: Mapping[str, str] = field(default_factory=dict)
    sweep: Any = None


def analyze(sources: Sequence[Run | Sweep], out: Path, *, only: Sequence[str] = (), progress: bool = False) -> Report:
    """Apply the installed studies to recordings and write figures, numbers and ``report.html`` into ``out``.

    Run studies overlay all given runs; of a sweep they see the trunks, task by task. A study that cannot be computed
    is listed with its reason and stops no other.

    Args:
        sources: runs, or one sweep, as opened by ``Run.open`` and ``Sweep.open``.
        out: folder; existing results in it are replaced.
        only: names of studies; all where empty.
        progress: show a bar.

    Raises: UnknownName: a name in ``only`` is not installed.  ConfigurationError: nothing to analyze, or runs and
        sweeps mixed.  StorageError: a file could not be written.
    """
    sweeps = [source for source in sources if _is_sweep(source)]
    if not sources or (sweeps and len(sources) > 1):
        raise ConfigurationError(
            f"analyze: found {len(sweeps)} sweeps and {len(sources) - len(sweeps)} runs, expected runs or one sweep; "
            "analyze each sweep by itself"
        )
    studies = _studies(only)
    runs = _runs(sources)
    work = [(study, group) for study in studies for group in _groups(study, sources, runs)]
    make_folder(out)
    sections: list[Section] = []
    files: list[Path] = []
    unavailable: dict[str, str] = {}
    for study, group in counted(work, what="studies", shown=progress):
        label = f"{study.name}, {group.name}" if group.name else study.name
        measured, reasons = _measure(study, group)
        for name, reason in reasons.items():
            alone = len(group.members) == 1 or (len(set(reasons.values())) == 1 and not measured)
            unavailable[label if alone else f"{label}, {name}"] = reason
        if not measured:
            continue
        try:
            section, written = _write(study, group, measured, out)
        except (NtkdynError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            # A study of somebody else may fail on a recording it does not expect: the others must still appear.
            unavailable[label] = f"{type(error).__name__}: {error}"
            continue
        sections.append(section)
        files += written
    page = out / "report.html"
    publish(page, _page(sources, runs, sections, unavailable).encode())
    sentences = [*_confirmation(sources), *(sentence for section in sections for sentence in section.verdict)]
    for section in sections:
        head = f"{section.title}, {section.group}" if section.group else section.title
        rest = [sentence for sentence in section.sentences if sentence not in section.verdict]
        if rest and not section.verdict:
            sentences.append(f"{head}: {rest[0]}")
    return Report(page, (*files, page), tuple(sentences), unavailable)


def _studies(only: Sequence[str]) -> list[Study]:
    rank = {name: place for place, name in enumerate(ORDER)}
    studies = {study.name: study for study in map(load_study, only or installed("ntkdyn.studies"))}
    return sorted(studies.values(), key=lambda study: (rank.get(study.name, len(ORDER)), study.name))


def _is_sweep(source: Any) -> bool:
    return hasattr(source, "table")


def _runs(sources: Sequence[Any]) -> dict[str, Run]:
    """Every run by a label of its own: its name, numbered where two have the same."""
    if _is_sweep(sources[0]):
        return dict(sources[0].runs)
    found: dict[str, Run] = {}
    for run in sources:
        label, number = run.name, 2
        while label in found:
            label, number = f"{run.name} ({number})", number + 1
        found[label] = run
    return found


def _groups(study: Study, sources: Sequence[Any], runs: Mapping[str, Run]) -> Iterator[_Group]:
    if not _is_sweep(sources[0]):
        if study.scope == "run":
            yield _Group("", runs, _series(runs))
        return
    sweep = sources[0]
    if study.scope == "sweep":
        yield _Group("", {"sweep": sweep}, sweep=sweep)
        return
    table = sweep.table
    # Trunks of interventions before the switch would be a curve each: the study relation is about those.
    trunks = [str(name) for name in table.loc[(table["kind"] == "trunk") & ~arms.altered(table), "run"]]
    chosen = {name: runs[name] for name in trunks} or dict(runs)
    tasks: dict[str, dict[str, Run]] = {}
    for name, run in chosen.items():
        tasks.setdefault(arms.task_of(run.config), {})[name] = run
    for task, members in sorted(tasks.items()):
        series = _series(members)
        if getattr(study, "with_arms", False) and arms.need(sweep) is None and task in arms.tasks(sweep):
            series = {name: text or "dense" for name, text in series.items()}
            for name, start in arms.first_and_last(sweep, task).items():
                members[name], series[name] = runs[name], f"start {start:g}"
        labels = {
            name: ", ".join(part for part in (series[name], f"seed {run.seed}") if part)
            for name, run in members.items()
        }
        yield _Group(
            task,
            {labels[name]: run for name, run in members.items()},
            {labels[name]: series[name] for name in members},
            sweep,
        )


def _series(runs: Mapping[str, Run]) -> dict[str, str]:
    """What distinguishes the settings of runs; runs that differ by their seed only share a series."""
    configs = {label: {key: json.dumps(value) for key, value in run.config.items()} for label, run in runs.items()}
    keys = sorted({key for config in configs.values() for key in config})
    differing = [key for key in keys if len({config.get(key) for config in configs.values()}) > 1]
    if not keys:
        return {label: label if len(runs) > 1 else "" for label in runs}
    return {
        label: ", ".join(f"{key} = {config[key].strip(chr(34))}" for key in differing if key in config)
        for label, config in configs.items()
    }


def _measure(study: Study, group: _Group) -> tuple[dict[str, xr.Dataset], dict[str, str]]:
    """Datasets of the runs for which the study can be computed, and the reason for each of the others."""
    measured: dict[str, xr.Dataset] = {}
    reasons: dict[str, str] = {}
    for label, source in group.members.items():
        try:
            reason = study.unavailable(source)
            if reason is None:
                dataset = study.measure(source)
                measured[label] = dataset.assign_attrs(series=group.series.get(label, ""))
            else:
                reasons[label] = reason
        except (NtkdynError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            reasons[label] = f"{type(error).__name__}: {error}"
    return measured, reasons


def _write(study: Study, group: _Group, measured: dict[str, xr.Dataset], out: Path) -> tuple[Section, list[Path]]:
    """Draw and write one study of one group of runs."""
    from . import plots

    in_sweep = getattr(study, "in_sweep", None)
    if in_sweep is not None and group.sweep is not None:
        measured = in_sweep(group.sweep, group.name, measured)
    sentences = tuple(study.sentences(measured))
    with plots.style():
        figure = plots.new_figure()
        study.draw(figure, measured)
        image, vector = plots.png(figure), plots.svg(figure)
    stem = study.name + (f"-{_safe(group.name)}" if group.name else "")
    contents = {
        f"{stem}.png": image,
        f"{stem}.svg": vector,
        f"{stem}.csv": as_csv(measured),
        f"{stem}.json": as_json(study.name, measured, sentences),
    }
    for name, data in contents.items():
        publish(out / name, data)
    verdict, tables = getattr(study, "verdict", None), getattr(study, "tables", None)
    section = Section(
        stem=stem,
        title=study.title,
        group=group.name,
        reading=study.reading,
        sentences=sentences,
        verdict=tuple(verdict(measured)) if verdict is not None else (),
        tables=tuple(tables(measured)) if tables is not None else (),
        image="data:image/png;base64," + base64.b64encode(image).decode(),
    )
    return section, [out / name for name in contents]


def _safe(text: str) -> str:
    return "".join(character if character.isalnum() or character in "._-" else "-" for character in text).strip(".")


def _page(
    sources: Sequence[Any], runs: Mapping[str, Run], sections: Sequence[Section], unavailable: Mapping[str, str]
) -> str:
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    from . import __version__

    # Autoescape for everything: names, settings and errors come from recordings, which may come from strangers.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("ntkdyn") / "report.html").read_text(encoding="utf-8"))
    return template.render(
        title=_title(sources, runs),
        version=__version__,
        verdict=[*_confirmation(sources), *(sentence for section in sections for sentence in section.verdict)],
        facts=_facts(sources, runs),
        sections=sections,
        unavailable=unavailable,
    )


def _confirmation(sources: Sequence[Any]) -> list[str]:
    """Sentence that says so of a sweep that is a confirmation."""
    if not _is_sweep(sources[0]) or sources[0].confirms is None:
        return []
    used = ", ".join(map(str, sources[0].manifest["explored"]))
    return [
        f"Confirmation of plan {sources[0].confirms[:12]}, unchanged, on seeds that it had not used (it used {used})."
    ]


def _title(sources: Sequence[Any], runs: Mapping[str, Run]) -> str:
    experiments = sorted({str(run.manifest.get("experiment") or "recording") for run in runs.values()})
    kind = "sweep" if _is_sweep(sources[0]) else ("run" if len(runs) == 1 else "runs")
    return (
        f"{', '.join(experiments)}: {len(runs)} runs of a sweep"
        if kind == "sweep"
        else (f"{', '.join(experiments)}: {len(runs)} {kind}")
    )


def _facts(sources: Sequence[Any], runs: Mapping[str, Run]) -> dict[str, str]:
    """What was recorded, as name -> text; what differs between runs is given with all its values."""
    manifests = [run.manifest for run in runs.values()]
    facts: dict[str, str] = {}
    if _is_sweep(sources[0]):
        kinds = sources[0].table["kind"].value_counts()
        facts["runs"] = ", ".join(f"{kinds[kind]} {kind}s" for kind in ("trunk", "arm") if kind in kinds)
    else:
        facts["runs"] = ", ".join(runs)
    facts["seeds"] = _values(run.seed for run in runs.values())
    for key, name in (("ntkdyn", "ntkdyn"), ("torch", "torch"), ("git", "git"), ("status", "status")):
        facts[name] = _values(manifest.get(key) for manifest in manifests)
    groups = sorted({group for run in runs.values() for group in run.groups()})
    facts["recorded"] = ", ".join(groups)
    keys = sorted({key for run in runs.values() for key in run.config})
    settings = {key: _values(run.config.get(key) for run in runs.values() if key in run.config) for key in keys}
    facts["configuration"] = "; ".join(f"{key} = {value}" for key, value in settings.items() if value)
    facts["command"] = _values((manifest.get("command") for manifest in manifests), most=3)
    diverged = [label for label, run in runs.items() if run.results.get("diverged")]
    if diverged:
        facts["diverged"] = ", ".join(diverged)
    return {name: text for name, text in facts.items() if text}


def _values(values: Any, *, most: int = 20) -> str:
    """The distinct values in their order, shortened."""
    distinct = list(dict.fromkeys(str(value) for value in values if value not in (None, "")))
    if all(_number(text) is not None for text in distinct):
        distinct.sort(key=lambda text: _number(text) or 0.0)
    more = f" and {len(distinct) - most} more" if len(distinct) > most else ""
    return ", ".join(distinct[:most]) + more


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
