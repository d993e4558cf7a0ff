"""The results page: sections made of sweeps, replaced as a whole; what is not run; bad input in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ntkdyn.experiments import results
from ntkdyn.experiments.known import KNOWN
from ntkdyn.plan_hash import plan_hash
from ntkdyn.plugins import installed, load_experiment
from ntkdyn.processor import processor_name
from ntkdyn.store.manifest import encode_manifest, read_manifest
from ntkdyn.sweep import make_plan, packaged_plan, run_sweep
from ntkdyn.sweep.plan_file import read_plan_file
from ntkdyn.sweep_file import sealed

pytestmark = pytest.mark.filterwarnings("ignore:start_epoch=:RuntimeWarning")

HAND_WRITTEN = "# Results\n\n## The demo\n\nWritten by hand, with 1 < 2.\n"
PRIMARY = """
[plan]
hypothesis = "More units are better."
margin = 200.0
[plan.primary]
measure = "test_accuracy"
of = {remaining = 0.5}
minus = {remaining = 0.2}
where = {kind = "extracted", intervention = "linearize"}
"""


@pytest.fixture(scope="module")
def finished(small_plan: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real sweep of two seeds, with a primary comparison."""
    file = small_plan("collapse", seeds=2)
    file.write_text(file.read_text() + PRIMARY)
    out = tmp_path_factory.mktemp("finished") / "sweep"
    assert not run_sweep(make_plan("collapse", file=file), out, jobs=1).failed
    return out


def renamed(sweep: Path, to: Path, **changed: Any) -> Path:
    """A copy of a sweep whose recordings have other entries; None removes one."""
    shutil.copytree(sweep, to)
    for file in to.glob("*/*/*/run.json"):
        manifest = {**read_manifest(file.parent), **changed}
        entries = {key: value for key, value in manifest.items() if value is not None}
        file.write_bytes(encode_manifest(entries))
    return to


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "RESULTS.md"
    path.write_text(HAND_WRITTEN)
    return path


def complaint(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    status = results.main([str(argument) for argument in arguments])
    message = capsys.readouterr().err.strip()
    assert message.startswith("ntkdyn: ")
    assert "\n" not in message
    return status, message


def test_a_section_of_a_real_sweep(finished: Path, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main([str(finished), "--page", str(page)]) == 0
    assert "collapse" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith(HAND_WRITTEN)
    section = text.split("<!-- collapse -->")[1].split("<!-- /collapse -->")[0]
    manifest = json.loads((finished / "sweep.json").read_text())
    created = json.loads((finished / manifest["plan"][0]["run"] / "run.json").read_text())["created"]
    for expected in (
        "    ntkdyn sweep collapse --config collapse --out runs/collapse --seeds 2",
        created[:10],
        "torch 2.",
        "seeds 0-1",
        "10 runs",
        f"Plan {manifest['hash'][:12]}",
        "width = 6 in place of 64",
        "collapses rapidly (abstract, v1)",
        "Primary comparison: test_accuracy of remaining=0.5 minus remaining=0.2",
        "Hypothesis: More units are better. Outcome: ",
        "n = 2, sign flips p = ",
        "| network | seeds (1) | parameters (1) |",
        "![collapse: accuracy against path length, and shallow networks from scratch](figures/collapse.png)",
        "What did not show, or only in part:",
    ):
        assert expected in section, expected
    assert str(finished) not in text
    image = (page.parent / "figures" / "collapse.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) <= results.MOST_BYTES
    rest = text.split("<!-- not-run -->")[1]
    assert "`ntkdyn sweep nonlinear-advantage --config digits --out runs/digits`; 756 runs" in rest
    assert "sweep collapse" not in rest


def test_twice_the_same_bytes_and_replaced_as_a_whole(finished: Path, page: Path) -> None:
    assert results.write_page([finished], page) == ["collapse"]
    first, image = page.read_bytes(), (page.parent / "figures" / "collapse.png").read_bytes()
    results.write_page([finished], page)
    assert page.read_bytes() == first
    assert (page.parent / "figures" / "collapse.png").read_bytes() == image
    changed = first.decode().replace("What was measured:", "Somebody wrote here:") + "\n## More by hand\n"
    page.write_text(changed)
    results.write_page([finished], page)
    assert page.read_text() == first.decode() + "\n## More by hand\n"
    # Without sweeps only what is not run is written again; the section stays.
    results.write_page([], page)
    assert page.read_text() == first.decode() + "\n## More by hand\n"


def test_a_confirmation_has_a_section_of_its_own_behind_the_other(finished: Path, page: Path, tmp_path: Path) -> None:
    other = tmp_path / "confirmation"
    shutil.copytree(finished, other)
    content = json.loads((other / "sweep.json").read_text()) | {"confirms": "ab" * 32, "explored": [5, 6]}
    del content["sha256"]
    content["hash"] = plan_hash(
        content["experiment"], content["plan"], content["primary"], content["confirms"], content["explored"]
    )
    (other / "sweep.json").write_text(json.dumps(sealed(content)))
    for run in content["plan"]:
        folder = other / run["run"]
        (folder / "run.json").write_bytes(encode_manifest(read_manifest(folder) | {"plan": content["hash"]}))
    assert results.write_page([other, finished], page) == ["collapse-confirmation", "collapse"]
    text = page.read_text()
    assert (
        text.index("<!-- collapse -->") < text.index("<!-- collapse-confirmation -->") < text.index("<!-- not-run -->")
    )
    assert "confirmed on fresh seeds" in text
    assert "--out runs/collapse --confirm --seeds 2" in text
    assert "it confirms plan abababababab, which used seeds 5-6" in text


def test_the_machine_is_that_of_the_recordings(finished: Path, page: Path, tmp_path: Path) -> None:
    def line(sweep: Path, **further: str) -> str:
        results.write_page([sweep], page, **further)
        return next(line for line in page.read_text().splitlines() if "; torch 2." in line)

    assert f"; {processor_name()}, cpu; torch" in line(finished)
    there = renamed(finished, tmp_path / "there", processor="Fast <9>", accelerator="Faster")
    assert "; Fast &lt;9> with Faster, cpu; torch" in line(there, machine="not asked for")
    older = renamed(finished, tmp_path / "older", processor=None)
    assert f"; {processor_name()}, {results.cores()} cores (the machine that wrote this page; rec" in line(older)
    assert "; Old One (by --machine, as the recordings do not name it), cpu" in line(older, machine="Old One")
    elsewhere = renamed(finished, tmp_path / "elsewhere", processor=None, host="elsewhere")
    assert "; a machine that the recordings do not name, not the one that wrote this page, cpu" in line(elsewhere)


def test_missing_runs_are_refused_or_labelled(
    finished: Path, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "part"
    shutil.copytree(finished, part)
    runs = [run["run"] for run in json.loads((part / "sweep.json").read_text())["plan"]]
    with_half = [run for run in runs if json.loads((part / run / "run.json").read_text())["config"]["remaining"] == 0.5]
    shutil.rmtree(part / runs[-1])
    status, message = complaint(capsys, part, "--page", page)
    assert status == 2
    assert "found 9 of 10 runs finished, 1 are missing; go on with" in message
    assert page.read_text() == HAND_WRITTEN
    assert not (page.parent / "figures").exists()
    assert results.main([str(part), "--page", str(page), "--partial"]) == 0
    text = page.read_text()
    assert "**Partial: 9 of 10 runs are finished; all of this may change.**" in text
    assert "- 1 runs of the plan are missing." in text
    for run in with_half:
        shutil.rmtree(part / run)
    results.write_page([part], page, partial=True)
    assert "Outcome: there is no pair of runs yet." in page.read_text()
    assert "nan" not in page.read_text().split("<!-- collapse -->")[1].split("<!-- /collapse -->")[0]
    for run in runs:
        shutil.rmtree(part / run, ignore_errors=True)
    assert "found 0 of 10 runs finished" in complaint(capsys, part, "--page", page, "--partial")[1]


def test_bad_input_in_one_line(finished: Path, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert complaint(capsys, tmp_path / "nowhere", "--page", page)[0] == 2
    status, message = complaint(capsys, tmp_path, "--page", page)
    assert status == 1
    assert "is no sweep" in message
    status, message = complaint(capsys, finished, "--page", tmp_path / "none.md")
    assert status == 2
    assert "found no page, expected one to write sections into; give --page" in message
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    assert "found a second sweep for the section collapse" in complaint(capsys, finished, again, "--page", page)[1]
    for name, words in (
        ("width-scaling", "none of width-scaling"),
        ("nonlinear-advantage", "several of nonlinear-advantage: digits, fashion, cifar, resnet56"),
    ):
        (again / "sweep.json").write_text(json.dumps({"experiment": name, "plan": []}))
        assert f"found no known experiment for this sweep ({words}" in complaint(capsys, again, "--page", page)[1]
    page.write_text(HAND_WRITTEN + "<!-- collapse -->\nhalf\n")
    status, message = complaint(capsys, finished, "--page", page)
    assert "found 1 <!-- collapse --> and 0 <!-- /collapse -->, expected one of each in this order, or none" in message
    assert page.read_text() == HAND_WRITTEN + "<!-- collapse -->\nhalf\n"
    page.write_text(HAND_WRITTEN + "<!-- /collapse -->\n<!-- collapse -->\n")
    assert "mend the page by hand" in complaint(capsys, finished, "--page", page)[1]


def test_a_sweep_is_known_by_its_plan(tmp_path: Path) -> None:
    for known in KNOWN:
        with packaged_plan(f"{known.plan}.toml") as file:
            plan = read_plan_file(file)
        folder = tmp_path / known.key
        folder.mkdir()
        manifest = {"experiment": known.experiment, "settings": plan.settings, "grids": plan.grids, "plan": []}
        (folder / "sweep.json").write_text(json.dumps(manifest))
        assert results._known(results.Sweep.open(folder)) is known


def test_a_large_figure_gets_fewer_pixels(finished: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results.write_page([finished], page)
    first = (page.parent / "figures" / "collapse.png").stat().st_size
    monkeypatch.setattr(results, "MOST_BYTES", first - 1)
    results.write_page([finished], page)
    assert (page.parent / "figures" / "collapse.png").stat().st_size < first


def test_names_from_recordings_are_no_markup() -> None:
    assert results._escaped("a <!-- /collapse -->\nb") == "a &lt;!-- /collapse --> b"
    assert results._cell("|1 - slope|") == "\\|1 - slope\\|"


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.key)
def test_what_is_known_holds(known: Any) -> None:
    assert load_experiment(known.experiment).name == known.experiment
    assert set(known.studies) <= set(installed("ntkdyn.studies"))
    assert known.figure in known.studies
    # Every statement says how sure it is.
    marks = ("(abstract", "(author's page)", "(author's summary)", "(second-hand)")
    assert all(any(mark in said for mark in marks) for said in known.says)


def test_keys_are_unique() -> None:
    assert len({known.key for known in KNOWN}) == len(KNOWN)
