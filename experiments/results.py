"""The results page: what known experiments gave, written from their sweeps into experiments/RESULTS.md.

    python -m ntkdyn.experiments.results runs/digits runs/collapse

Each sweep gets a section between ``<!-- KEY -->`` and ``<!-- /KEY -->``, which is replaced as a whole; everything else
on the page stays. Numbers come from the sweep alone, dates from its recordings: written again, the page is the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DamagedRecording, NtkdynError
from ..plugins import installed, load_study
from ..processor import processor_name
from ..results import Sweep
from ..store.files import make_folder, publish
from ..studies.recorded import Table
from ..sweep import cores, packaged_plan
from ..sweep.cost import duration
from ..sweep.plan_file import read_plan_file
from .known import KNOWN, KnownExperiment

PAGE = Path("experiments/RESULTS.md")
FIGURES = "figures"
MOST_BYTES = 120 * 1024
"""Largest figure; a larger one is drawn with fewer pixels."""

_DPI = (200, 160, 130, 100)
_NOT_RUN = "not-run"

# How the studies say that something is not there, or not to be said.
_NOT_SHOWN = (
    "cannot be judged", "cannot be said", "cannot be compared", "not distinguishable", "is not shown", "not judged",
    "nothing can be judged", "nothing can be told", "no proof", "no interval", "contradicted", "diverged",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and return the exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m ntkdyn.experiments.results", description=__doc__.split("\n")[0])
    parser.add_argument("sweeps", nargs="*", type=Path, metavar="SWEEP", help="folder of a finished sweep")
    parser.add_argument("--page", type=Path, default=PAGE, help=f"page to write (default: {PAGE})")
    parser.add_argument("--partial", action="store_true", help="also sweeps with runs missing, labelled as such")
    parser.add_argument("--machine", metavar="TEXT", help="what ran the sweeps, where recordings do not name it")
    given = parser.parse_args(arguments)
    try:
        keys = write_page(given.sweeps, given.page, partial=given.partial, machine=given.machine)
    except NtkdynError as error:
        print(f"ntkdyn: {error}", file=sys.stderr)
        return 2 if error.usage else 1
    print(f"{given.page}: {', '.join(keys) or 'no section'} written")
    return 0


def write_page(sweeps: Sequence[Path], page: Path, *, partial: bool = False, machine: str | None = None) -> list[str]:
    """Write the sections of sweeps, and what was not run, into a page; return the keys of the sections.

    Nothing is written before all sweeps are read and all sections made.

    Args: page: an existing page; its figures lie in the folder figures beside it. partial: also sweeps with runs
    missing. machine: what ran the sweeps, where recordings do not name it.
    Raises: ConfigurationError: no page, no known experiment, runs missing without ``partial``, or one section twice.
        MissingRecording, DamagedRecording: no sweep.  StorageError.
    """
    if not page.is_file():
        raise ConfigurationError(f"{page}: found no page, expected one to write sections into; give --page")
    text = page.read_text(encoding="utf-8")
    made: dict[str, tuple[str, bytes | None]] = {}
    for path in sweeps:
        sweep = Sweep.open(path)
        known = _known(sweep)
        key = _key(sweep, known)
        if key in made:
            raise ConfigurationError(f"{path}: found a second sweep for the section {key}, expected one; leave one out")
        made[key] = section(sweep, known, partial=partial, machine=machine)
    for key, (content, _) in made.items():
        text = _insert(text, key, content, page)
    text = _insert(text, _NOT_RUN, _missing(text), page)
    for key, (_, image) in made.items():
        if image is not None:
            make_folder(page.parent / FIGURES)
            publish(page.parent / FIGURES / f"{key}.png", image)
    publish(page, text.encode())
    return list(made)


def section(
    sweep: Sweep, known: KnownExperiment, *, partial: bool = False, machine: str | None = None
) -> tuple[str, bytes | None]:
    """Return the text of a sweep's section and its figure, None where no study gives one.

    Raises: ConfigurationError: runs are missing and ``partial`` is not set.
    """
    planned, finished = len(sweep.manifest["plan"]), len(sweep.runs)
    if finished < planned and not (partial and finished):
        raise ConfigurationError(
            f"{sweep.path}: found {finished} of {planned} runs finished, {planned - finished} are missing; go on with "
            "the command that began the sweep, or give --partial to report what is there"
        )
    key = _key(sweep, known)
    confirms = sweep.manifest.get("confirms")
    title = f"{known.experiment}: {known.title}" + (", confirmed on fresh seeds" if confirms else "")
    lines = [f"## {title}", ""]
    if finished < planned:
        lines += [f"**Partial: {finished} of {planned} runs are finished; all of this may change.**", ""]
    lines += [_facts(sweep, machine), "", f"    {known.command}{_more(sweep, known)}", ""]
    differences = _differences(sweep, known)
    if differences:
        lines += [f"Other than the plan {known.plan}: {'; '.join(differences)}.", ""]
    lines += [f"What the source says ({known.source}):", "", *(f"- {_escaped(said)}" for said in known.says)]
    lines += [f"- not known: {_escaped(known.unknown)}", "", *_plan_lines(sweep), ""]
    shown, not_shown, tables, image = _quoted(sweep, known)
    if finished < planned:
        not_shown.insert(0, f"{planned - finished} runs of the plan are missing.")
    lines += ["What was measured:", "", *(f"- {_escaped(sentence)}" for sentence in shown or ["nothing to report."])]
    for table in tables:
        lines += ["", *_table(table)]
    if image is not None:
        lines += ["", f"![{_escaped(title)}]({FIGURES}/{key}.png)"]
    lines += ["", "What did not show, or only in part:", ""]
    lines += [f"- {_escaped(sentence)}" for sentence in not_shown or ["nothing is marked as such by the studies."]]
    if known.earlier:
        lines += ["", f"Before: {_escaped(known.earlier)}."]
    return "\n".join(lines), image


def _known(sweep: Sweep) -> KnownExperiment:
    """The known experiment whose plan a sweep followed, else the only one of its name."""
    name = str(sweep.manifest.get("experiment"))
    found = [known for known in KNOWN if known.experiment == name]
    exact = [known for known in found if not _differences(sweep, known)]
    if len(exact or found) != 1:
        several = f"several of {name}: {', '.join(known.key for known in found)}" if found else f"none of {name}"
        raise ConfigurationError(
            f"{sweep.path}: found no known experiment for this sweep ({several}), expected settings and grids of one "
            f"of the plans {', '.join(known.plan for known in found or KNOWN)}; make it by its command"
        )
    return (exact or found)[0]


def _key(sweep: Sweep, known: KnownExperiment) -> str:
    return f"{known.key}-confirmation" if sweep.manifest.get("confirms") else known.key


def _differences(sweep: Sweep, known: KnownExperiment) -> list[str]:
    """How settings and grids differ from the plan; seeds may."""
    with packaged_plan(f"{known.plan}.toml") as path:
        plan = read_plan_file(path)
    before, now = _plain(plan.settings), _plain(sweep.manifest.get("settings") or {})
    found = [
        f"{name} = {now.get(name, 'not set')} in place of {before.get(name, 'not set')}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if _plain(plan.grids) != _plain(sweep.manifest.get("grids") or []):
        found.append(f"grids {json.dumps(_plain(sweep.manifest.get('grids')))}")
    return found


def _more(sweep: Sweep, known: KnownExperiment) -> str:
    """What stands behind the known command."""
    with packaged_plan(f"{known.plan}.toml") as path:
        seeds = read_plan_file(path).seeds
    count = len(sweep.manifest.get("seeds") or ())
    planned = len(seeds) if isinstance(seeds, tuple) else seeds or 1
    confirm = " --confirm" if sweep.manifest.get("confirms") else ""
    return confirm + (f" --seeds {count}" if count != planned else "")


def _facts(sweep: Sweep, machine: str | None) -> str:
    """Date, machine, versions, runs and time, as far as the recordings know."""
    manifests = [run.manifest for run in sweep.runs.values()]
    begun = [datetime.fromisoformat(str(manifest["created"])) for manifest in manifests]
    seconds = [run.seconds for run in sweep.runs.values()]
    ended = max(begin + timedelta(seconds=one) for begin, one in zip(begun, seconds, strict=True))
    dates = list(dict.fromkeys(day.date().isoformat() for day in (min(begun), ended)))
    versions = [
        f"{name} {', '.join(sorted({str(manifest.get(name)) for manifest in manifests}))}"
        for name in ("torch", "ntkdyn")
    ]
    devices = sorted({str(run.config.get("device") or "cpu") for run in sweep.runs.values()})
    seeds = sorted({int(run.seed) for run in sweep.runs.values() if run.seed is not None})
    return (
        f"{' to '.join(dates)}; {_machine(manifests, machine)}, {', '.join(devices)}; "
        f"{', '.join(versions)}. {len(seconds)} runs, seeds {_ranges(seeds)}: {duration(sum(seconds))} of recorded "
        f"training, summed over runs, and {duration((ended - min(begun)).total_seconds())} from the first snapshot to "
        "the last."
    )


def _plan_lines(sweep: Sweep) -> list[str]:
    """The plan's hash, and its primary comparison with the outcome."""
    import numpy as np

    from ..analysis import equivalence, mean_interval, sign_flip_test
    from ..studies.arms import seeds_of
    from ..studies.comparisons import named_differences, p_words
    from ..studies.over_seeds import finite
    from ..studies.wording import bounds

    digest = str(sweep.manifest.get("hash") or "")[:12]
    head = f"Plan {digest}, hashed before the first run"
    if sweep.manifest.get("confirms"):
        head += (
            f"; it confirms plan {str(sweep.manifest['confirms'])[:12]}, which used seeds "
            f"{_ranges(sweep.manifest.get('explored') or [])}"
        )
    primary = sweep.primary
    if primary is None:
        return [f"{head}. It names no primary comparison: everything here is exploratory."]
    values = finite(named_differences(sweep, primary, seeds_of(sweep)))
    gap, unit = mean_interval(values), primary.unit or "in its own unit"
    lines = [f"{head}. Primary comparison: {_escaped(str(primary))}."]
    if primary.hypothesis:
        lines.append(f"Hypothesis: {_escaped(primary.hypothesis)}.".replace("..", "."))
    if gap.n:
        p = sign_flip_test(values).p
        text = f"Outcome: {gap.mean:+.3g} {unit} ({bounds(gap)}"
        text += f", sign flips {p_words(p)})" if np.isfinite(p) else ")"
    else:
        text = "Outcome: there is no pair of runs yet"
    if primary.margin is not None and gap.n > 1:
        test = equivalence(values, np.zeros(len(values)), margin=primary.margin)
        text += f"; within the margin of {primary.margin:g}: {'yes' if test.equivalent else 'not shown'}"
    return [" ".join([*lines, f"{text}."])]


def _quoted(sweep: Sweep, known: KnownExperiment) -> tuple[list[str], list[str], list[Table], bytes | None]:
    """Sentences of the studies, those that say that something is not there, their tables and the figure."""
    shown: list[str] = []
    not_shown: list[str] = []
    tables: list[Table] = []
    image = None
    for name in known.studies:
        if name not in installed("ntkdyn.studies"):
            not_shown.append(f"the study {name} is not installed here.")
            continue
        study = load_study(name)
        reason = study.unavailable(sweep)
        if reason is not None:
            not_shown.append(f"the study {name} is not possible: {reason}.")
            continue
        datasets = {"sweep": study.measure(sweep)}
        for sentence in study.sentences(datasets):
            (not_shown if any(words in sentence for words in _NOT_SHOWN) else shown).append(sentence)
        with_tables = getattr(study, "tables", None)
        tables += with_tables(datasets) if with_tables is not None else []
        if name == known.figure:
            image = _image(study, datasets)
    return shown, not_shown, tables, image


def _image(study: Any, datasets: Any) -> bytes:
    from .. import plots

    image = b""
    for dpi in _DPI:
        with plots.style():
            figure = plots.new_figure()
            study.draw(figure, datasets)
            image = plots.png(figure, dpi=dpi)
        if len(image) <= MOST_BYTES:
            break
    return image


def _missing(text: str) -> str:
    """The section of what has none."""
    lines = ["## Not run yet", "", "Planned, and without a section on this page:", ""]
    absent = [known for known in KNOWN if f"<!-- {known.key} -->" not in text]
    lines += [
        f"- {known.experiment}, {known.title}: `{known.command}`; {known.cost or 'cost not known before --plan'}."
        for known in absent
    ]
    return "\n".join(lines if absent else [*lines[:2], "Every known experiment has a section."])


def _insert(text: str, key: str, content: str, page: Path) -> str:
    """Replace a section as a whole, or put it where its place among the known ones is, else at the end."""
    begin, end = f"<!-- {key} -->", f"<!-- /{key} -->"
    if text.count(begin) != text.count(end) or text.count(begin) > 1 or text.find(begin) > text.find(end):
        raise DamagedRecording(
            f"{page}: found {text.count(begin)} {begin} and {text.count(end)} {end}, expected one of each in this "
            "order, or none; mend the page by hand"
        )
    block = f"{begin}\n{content}\n{end}"
    if begin in text:
        return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: block, text, flags=re.DOTALL)
    if key != _NOT_RUN:
        place = _order().index(key)
        for before in reversed(_order()[:place]):
            end = f"<!-- /{before} -->"
            if end in text:
                return text.replace(end, f"{end}\n\n{block}", 1)
        for after in (*_order()[place + 1 :], _NOT_RUN):
            begin = f"<!-- {after} -->"
            if begin in text:
                return text.replace(begin, f"{block}\n\n{begin}", 1)
    return f"{text.rstrip()}\n\n{block}\n"


def _order() -> list[str]:
    """Keys of all sections that may stand on the page."""
    return [name for known in KNOWN for name in (known.key, f"{known.key}-confirmation")]


def _table(table: Table) -> list[str]:
    rows = [table.columns, ("---",) * len(table.columns), *table.rows]
    return [f"{_escaped(table.caption)}:", "", *(f"| {' | '.join(map(_cell, row))} |" for row in rows)]


def _cell(text: str) -> str:
    return _escaped(text).replace("|", "\\|")


def _escaped(text: str) -> str:
    """One line without markup: names of settings and tasks come from recordings."""
    return " ".join(text.split()).replace("<", "&lt;")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _machine(manifests: Sequence[Mapping[str, Any]], told: str | None) -> str:
    """What the runs ran on; recordings of earlier versions do not name it."""
    named = [
        " with ".join(str(manifest[key]) for key in ("processor", "accelerator") if manifest.get(key))
        for manifest in manifests
    ]
    if all(named):
        return _escaped(", ".join(dict.fromkeys(named)))
    if told is not None:
        return f"{_escaped(told)} (by --machine, as the recordings do not name it)"
    if all(manifest.get("host") == platform.node() for manifest in manifests):
        return f"{processor_name()}, {cores()} cores (the machine that wrote this page; recordings do not name it)"
    return "a machine that the recordings do not name, not the one that wrote this page"


def _ranges(seeds: Sequence[int]) -> str:
    """Seeds as first-last, or one by one where there are gaps."""
    if len(seeds) > 1 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ", ".join(map(str, seeds))


if __name__ == "__main__":
    sys.exit(main())
