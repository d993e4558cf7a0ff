"""A plan is the one that was hashed before the first run, and every run the one that the plan has in its place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ntkdyn import Sweep
from ntkdyn.errors import DamagedRecording, EditedManifest, NtkdynError
from ntkdyn.store.manifest import encode_manifest, read_manifest
from ntkdyn.sweep import confirmation_of, make_plan, run_sweep
from ntkdyn.sweep.plan import Plan
from ntkdyn.sweep_file import sealed

TINY = f"{Path(__file__).parent / 'tiny_experiment.py'}:Tiny"
FILE = """
seeds = 2
[[grid]]
start = [0, 4]
[plan]
margin = 1
[plan.primary]
measure = "test_accuracy"
of = {start = 4}
minus = {start = 0}
where = {kind = "arm"}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "plan.toml").write_text(FILE)
    plan = make_plan(TINY, file=folder / "plan.toml")
    run_sweep(plan, folder / "out", jobs=1)
    return plan, folder / "out"


@pytest.fixture
def sweep(whole: tuple[Plan, Path], tmp_path: Path) -> tuple[Plan, Path]:
    return whole[0], Path(shutil.copytree(whole[1], tmp_path / "out"))


def refused(action: Callable[[], Any], part: str, kind: type[NtkdynError] = EditedManifest) -> None:
    with pytest.raises(kind, match=part) as error:
        action()
    assert "\n" not in str(error.value)


def edit(out: Path, **entries: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "sweep.json").read_bytes())
    content |= entries
    (out / "sweep.json").write_text(json.dumps(content))
    return content


def everywhere(plan: Plan, out: Path, part: str) -> None:
    """Nobody takes the sweep: not its readers, not who goes on with it, not who confirms it."""
    refused(lambda: Sweep.open(out), part)
    refused(lambda: run_sweep(plan, out, jobs=1), part)
    if plan.primary is not None:
        refused(lambda: confirmation_of(out, plan), part)


def test_the_primary_comparison_cannot_be_removed_after_the_runs(sweep: tuple[Plan, Path]) -> None:
    """Sweep.primary compared hashes only where there was a comparison, so "primary": null made another one primary."""
    plan, out = sweep
    content = edit(out, primary=None)
    everywhere(plan, out, "hashed before the first run")
    del content["sha256"]
    bare = replace(plan, primary=None)
    (out / "sweep.json").write_text(json.dumps(content | {"hash": bare.hash}))
    refused(lambda: Sweep.open(out), "plan was")
    refused(lambda: run_sweep(bare, out, jobs=1), "plan was")
    (out / "sweep.json").write_text(json.dumps({name: content[name] for name in ("experiment", "plan")}))
    refused(lambda: Sweep.open(out), "plan was null")


def test_an_edited_comparison_is_refused(sweep: tuple[Plan, Path]) -> None:
    plan, out = sweep
    assert plan.primary is not None
    edit(out, primary=plan.primary.to_json() | {"margin": 9.0})
    everywhere(plan, out, "hashed before the first run")
    # One that gives itself a new hash is not the plan of the runs.
    reverse = replace(
        plan.primary, of=plan.primary.minus, minus=plan.primary.of,
        of_runs=plan.primary.minus_runs, minus_runs=plan.primary.of_runs,
    )  # fmt: skip
    reversed_plan = replace(plan, primary=reverse)
    (out / "sweep.json").write_text(json.dumps(sealed(reversed_plan.to_json())))
    everywhere(reversed_plan, out, "trunks/.*plan was")


@pytest.mark.parametrize(("name", "value"), [("settings", {"rate": 3}), ("grids", []), ("format", "other")])
def test_edited_settings_are_refused(sweep: tuple[Plan, Path], name: str, value: Any) -> None:
    plan, out = sweep
    edit(out, **{name: value})
    everywhere(plan, out, "differ from their SHA-256")


def test_edited_seeds_are_refused(sweep: tuple[Plan, Path]) -> None:
    plan, out = sweep
    edit(out, seeds=[0, 1, 2])
    everywhere(plan, out, r"found seeds \[0, 1, 2\], expected \[0, 1\]")


def test_swapped_arms_are_noticed(sweep: tuple[Plan, Path]) -> None:
    """Finished runs were known by the name of their folder alone, so the comparison changed its sign unnoticed."""
    plan, out = sweep
    assert plan.primary is not None
    first, second = out / plan.primary.of_runs, out / plan.primary.minus_runs
    os.rename(first, out / "aside")
    os.rename(second, first)
    os.rename(out / "aside", second)
    everywhere(plan, out, r"arms/.*: found another run .*config.start was")


def test_a_seed_that_is_copied_over_another_is_noticed(sweep: tuple[Plan, Path]) -> None:
    plan, out = sweep
    assert plan.primary is not None
    shutil.rmtree(out / plan.primary.of_runs / "1")
    shutil.copytree(out / plan.primary.of_runs / "0", out / plan.primary.of_runs / "1")
    everywhere(plan, out, r"/1: found another run .*seed was 1, is 0")


def test_a_run_from_outside_the_plan_is_noticed(sweep: tuple[Plan, Path]) -> None:
    plan, out = sweep
    run = out / plan.runs[0].run
    (run / "run.json").write_bytes(encode_manifest(read_manifest(run) | {"plan": None}))
    everywhere(plan, out, 'plan was "[0-9a-f.]+, is null')


def test_sweeps_of_before_still_open(sweep: tuple[Plan, Path]) -> None:
    """Their sweep.json has no SHA-256 of its own and no comparison, and their runs name no plan."""
    plan, out = sweep
    bare = replace(plan, primary=None)
    content = bare.to_json()
    del content["primary"]
    (out / "sweep.json").write_text(json.dumps(content))
    for run in plan.runs:
        manifest = read_manifest(out / run.run)
        del manifest["plan"]
        (out / run.run / "run.json").write_text(json.dumps(manifest))
    opened = Sweep.open(out)
    assert len(opened.runs) == 6
    assert opened.primary is None
    assert len(run_sweep(bare, out, jobs=1).kept) == 6


def test_a_plan_that_is_none(sweep: tuple[Plan, Path]) -> None:
    """``ntkdyn sweep`` on a damaged sweep.json ended in a traceback, and believed the hash that stood in it."""
    plan, out = sweep
    content = edit(out)
    for text in ("{", "[]", "3", '{"hash": "x"}', json.dumps(content | {"plan": [{"run": "arms/a/0"}]})):
        (out / "sweep.json").write_text(text)
        refused(lambda: Sweep.open(out), "is no", DamagedRecording)
        refused(lambda: run_sweep(plan, out, jobs=1), "is no plan", DamagedRecording)
    content["plan"][0]["config"]["rate"] = 9.0
    (out / "sweep.json").write_text(json.dumps(content))
    refused(lambda: run_sweep(plan, out, jobs=1), "hashed before the first run")
