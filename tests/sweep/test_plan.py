"""Plans, their primary comparison and its confirmation on fresh seeds; cost and detectable difference beforehand."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats

from ntkdyn import Sweep
from ntkdyn.errors import (
    ConfigurationError,
    DamagedRecording,
    EditedManifest,
    MissingRecording,
    NtkdynError,
    RecordingExists,
    UnknownName,
)
from ntkdyn.report import analyze
from ntkdyn.sweep import confirmation_of, foresight, make_plan, run_sweep, standing
from ntkdyn.sweep.cost import estimate
from ntkdyn.sweep.plan import Plan
from ntkdyn.sweep.plan_file import record_of
from ntkdyn.sweep_file import sealed

TINY = f"{Path(__file__).parent / 'tiny_experiment.py'}:Tiny"

GRIDS = """
[[grid]]
start = [0, 4]

[[grid]]
start = [4]
rate = [0.2]

[[grid]]
kind = ["trunk"]
"""
PLAN = """
[plan]
hypothesis = "Late is better."
margin = 1
deviation = 4.0
deviation_from = "a guess"

[plan.primary]
measure = "test_accuracy"
of = {start = 4}
minus = {start = 0}
where = {kind = "arm", rate = 0.1}
"""


def planned(folder: Path, text: str = PLAN, *, head: str = "seeds = 2", seeds: int | None = None) -> Plan:
    file = folder / "plan.toml"
    file.write_text(f"{head}\n{GRIDS}{text}")
    return make_plan(TINY, file=file, seeds=seeds)


def refusal(folder: Path, text: str, *, head: str = "seeds = 2") -> str:
    with pytest.raises(ConfigurationError) as refused:
        planned(folder, text, head=head)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_primary_comparison_names_two_arms(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    configurations = {one.runs: one.config for one in plan.configurations}
    assert len(configurations) == 4
    assert plan.primary is not None
    for runs, start in ((plan.primary.of_runs, 4), (plan.primary.minus_runs, 0)):
        assert configurations[runs] == {
            "kind": "arm", "start": start, "length": 6, "rate": 0.1, "flag": False, "broken": False
        }  # fmt: skip
    assert plan.primary.margin == 1.0
    assert plan.primary.unit == "accuracy points"
    assert replace(plan.primary, measure="test_bleu").unit == "BLEU"
    assert not replace(plan.primary, measure="napl").unit
    assert str(plan.primary) == "test_accuracy of start=4 minus start=0 where kind=arm, rate=0.1"


def test_the_hash_covers_the_comparison_and_the_seeds(tmp_path: Path) -> None:
    plan, again = planned(tmp_path), planned(tmp_path)
    without, margin = planned(tmp_path, ""), planned(tmp_path, PLAN.replace("margin = 1", "margin = 2"))
    reverse = PLAN.replace("of = {start = 4}", "of = {start = 0}").replace("minus = {start = 0}", "minus = {start = 4}")
    others = [without, margin, planned(tmp_path, reverse), planned(tmp_path, seeds=3)]
    assert again.hash == plan.hash
    assert len({plan.hash, *(one.hash for one in others)}) == 5
    # Seeds are no part of the design.
    assert others[-1].design == plan.design
    assert len({plan.design, *(one.design for one in others)}) == 4
    # As it was computed before there were primary comparisons.
    runs = [[run.run, run.config, run.seed, run.parent] for run in without.runs]
    assert without.hash == hashlib.sha256(json.dumps([TINY, runs], sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("[plan.primary]", "[plan.secondary]", ["'secondary'", "expected", "primary"]),
        ("margin = 1", "margins = 1", ["'margins'", "'margin'"]),
        ("margin = 1", "margin = -1", ["margin = -1", "positive number"]),
        ("margin = 1", "margin = true", ["margin = True", "positive number"]),
        ("deviation = 4.0", "deviation = inf", ["deviation = inf", "positive number"]),
        ('hypothesis = "Late is better."', "hypothesis = 3", ["hypothesis = 3", "text"]),
        ('measure = "test_accuracy"', "measure = 3", ["measure = 3", "'test_accuracy'"]),
        ('measure = "test_accuracy"', "", ["measure = None"]),
        ("of = {start = 4}", "off = {start = 4}", ["'off'", "did you mean 'of'"]),
        ("of = {start = 4}", "of = {}", ["nothing under of", "start_epoch = 0"]),
        ("of = {start = 4}", "of = 4", ["found 4 under of"]),
        ("of = {start = 4}", "of = {strat = 4}", ["of: setting 'strat' is unknown", "'start'"]),
        ('where = {kind = "arm", rate = 0.1}', "where = {weight = 1}", ["where: setting 'weight' is unknown", "start"]),
        ("of = {start = 4}", "of = {start = 4, rate = 0.1}", ["'rate' in of and in where"]),
        ("of = {start = 4}", "of = {start = 3}", ["of: found no arm with", "start is 0, 4 in this plan"]),
        ("of = {start = 4}", "of = {start = 0}", ["found one arm", "in of and in minus"]),
        ("of = {start = 4}", "of = {start = 4, flag = 0}", ["found no arm", "flag is False in this plan"]),
        ('kind = "arm"', 'kind = "trunk"', ["no arm", "in no arm together"]),
        ('{kind = "arm", rate = 0.1}', "{}", ["of: found 2 arms", "rate (0.1, 0.2)", "under where"]),
        ('{kind = "arm", rate = 0.1}', "{rate = 0.1}", ["minus: found 2 arms", "kind (trunk, arm)", "under where"]),
    ],
)  # fmt: skip
def test_impossible_comparisons_are_refused(tmp_path: Path, old: str, new: str, parts: list[str]) -> None:
    assert old in PLAN
    message = refusal(tmp_path, PLAN.replace(old, new))
    for part in ("plan.toml", *parts):
        assert part in message


def test_a_plan_that_is_no_table_or_names_nothing(tmp_path: Path) -> None:
    assert "[plan]: found 3" in refusal(tmp_path, "", head="seeds = 2\nplan = 3")
    assert "found no primary comparison" in refusal(tmp_path, '[plan]\nhypothesis = "x"')


@pytest.mark.parametrize(
    ("head", "seeds"),
    [("", (0,)), ("seeds = 3", (0, 1, 2)), ("seeds = [4, 2]", (4, 2)), ("seeds = 2\nfirst_seed = 5", (5, 6)),
     ("first_seed = 5", (5,))],
)  # fmt: skip
def test_seeds(tmp_path: Path, head: str, seeds: tuple[int, ...]) -> None:
    assert planned(tmp_path, head=head).seeds == seeds


def test_a_number_of_seeds_wins_over_the_file(tmp_path: Path) -> None:
    assert planned(tmp_path, head="seeds = [7]", seeds=2).seeds == (0, 1)
    assert planned(tmp_path, head="first_seed = 7", seeds=2).seeds == (7, 8)


@pytest.mark.parametrize(
    ("head", "part"),
    [
        ("seeds = 0", "seeds = 0"), ("seeds = []", r"seeds = \[\]"), ("seeds = [1, 1]", r"seeds = \[1, 1\]"),
        ("seeds = [-1]", r"seeds = \[-1\]"), ("seeds = true", "seeds = True"), ("seeds = 1.5", "seeds = 1.5"),
        ("first_seed = -1", "first_seed = -1"), ("seeds = [1]\nfirst_seed = 2", "first_seed = 2 beside a list"),
        ("sedes = 3", "found sedes, expected seeds"),
        # These ended in a traceback, or in a sweep without runs.
        (f"seeds = [{2**63}]", rf"seeds = \[{2**63}\]"), (f"first_seed = {2**63}", f"first_seed = {2**63}"),
        (f"first_seed = {2**63 - 1}\nseeds = 2", f"found 2 of them from {2**63 - 1} on"),
        ("seeds = 1000000000000", "found 1000000000000 of them"), ("settings = 3", "settings = 3, expected a table"),
        ("experiment = 3", "experiment = 3, expected a name"),
        ('experiment = "collapse"', "found the plan of experiment 'collapse', expected one of .*Tiny"),
    ],
)  # fmt: skip
def test_impossible_seeds_are_refused(tmp_path: Path, head: str, part: str) -> None:
    assert re.search(part, refusal(tmp_path, "", head=head))


def test_an_empty_axis_is_refused(tmp_path: Path) -> None:
    assert "found rate = [], expected at least one value" in refusal(tmp_path, "[[grid]]\nrate = []\nstart = [1]")


def test_a_plan_knows_its_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(TINY).parent)
    assert planned(tmp_path, head=f"seeds = 2\nexperiment = '{Path(TINY).name}'").hash == planned(tmp_path).hash


def test_a_measure_that_no_run_has_is_refused(tmp_path: Path) -> None:
    """A typing error in it was hashed, and seen when everything had run."""
    file = tmp_path / "plan.toml"
    file.write_text(
        "[plan.primary]\nmeasure = 'test_acuracy'\nof = {start_epoch = 2}\nminus = {start_epoch = 0}\n"
        "where = {intervention = 'linearize'}\n"
    )
    with pytest.raises(ConfigurationError, match="measure 'test_acuracy' is unknown; did you mean 'test_accuracy'"):
        make_plan("nonlinear-advantage", file=file, grid={"start_epoch": [0, 2]})
    # An experiment that does not say what it measures is stopped at the first arm, however late it is in the plan.
    plan = planned(tmp_path, PLAN.replace("test_accuracy", "test_acuracy"))
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"found no result 'test_acuracy', .*among loss, test_accuracy"):
            run_sweep(plan, tmp_path / "out", jobs=1)
        assert len(list((tmp_path / "out" / "arms").glob("*/*"))) == 1


def test_what_lies_where_a_plan_is_to_run(tmp_path: Path) -> None:
    plan, out = planned(tmp_path), tmp_path / "out"
    assert list(standing(plan, out)) == []
    run_sweep(plan, out, jobs=1)
    assert list(standing(plan, out)) == [f"{out} holds this plan; 8 of 8 runs are finished"]
    (line,) = standing(planned(tmp_path, ""), out)
    assert line.startswith(f"it cannot run there: {out}: holds another sweep (plan {plan.hash[:12]})")


RECORD = """
[record]
probes = ["units", "outputs"]
every = 5

[record.trunks]
log_spaced = 2
"""


def test_a_plan_says_what_is_recorded(tmp_path: Path) -> None:
    plan = planned(tmp_path, PLAN + RECORD, seeds=1)
    bare = planned(tmp_path, PLAN, seeds=1)
    assert len({plan.hash, bare.hash, planned(tmp_path, PLAN + RECORD.replace("every = 5", ""), seeds=1).hash}) == 3
    assert plan.design != bare.design
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))).hash == plan.hash
    run_sweep(plan, tmp_path / "out", jobs=1)
    sweep = Sweep.open(tmp_path / "out")
    assert sweep.primary == plan.primary
    for run, config in zip(sweep.runs.values(), sweep.table.to_dict("records"), strict=True):
        trunk, start = config["kind"] == "trunk", config["start"] if config["kind"] == "arm" else 0
        # Two log-spaced steps of six, or every fifth; the first and the last in any case.
        assert run.steps("units").tolist() == sorted({start, 1, 6} if trunk else {start, 5, 6})
        assert set(run.groups()) == {"learning_rate", "outputs", "units"}


def test_what_trunks_record_wins(tmp_path: Path) -> None:
    record = planned(tmp_path, RECORD).record
    assert record_of(record, "trunk") == {"probes": ["units", "outputs"], "log_spaced": 2}
    assert record_of(record, "arm") == {"probes": ["units", "outputs"], "every": 5}
    assert record_of({}, "arm") == {}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[record]\nprobe = ['ntk']", ["[record]: found probe", "probes, every, log_spaced"]),
        ("[record.trunks]\narms = 3", ["[record.trunks]: found arms"]),
        ("[record]\ntrunks = 3", ["[record.trunks]: found 3"]),
        ("[record]\nevery = 2\nlog_spaced = 3", ["found every and log_spaced"]),
        ("[record.arms]\nevery = 0", ["[record.arms]: found every = 0"]),
        ("[record]\nlog_spaced = true", ["found log_spaced = True"]),
        ("[record]\nprobes = []", ["found probes = []"]),
        ("[record]\nprobes = 'ntk'", ["found probes = 'ntk'"]),
    ],
)
def test_impossible_recordings_are_refused(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = refusal(tmp_path, text)
    for part in ("plan.toml", *parts):
        assert part in message


def test_an_unknown_probe_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"nkt.*ntk"):
        planned(tmp_path, "[record]\nprobes = ['nkt']")


def test_a_sweep_knows_its_primary_comparison(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    run_sweep(plan, tmp_path / "out", jobs=1)
    sweep = Sweep.open(tmp_path / "out")
    assert sweep.primary == plan.primary
    assert all(run.manifest["plan"] == plan.hash for run in sweep.runs.values())
    for runs in (sweep.primary.of_runs, sweep.primary.minus_runs):
        assert {f"{runs}/{seed}" for seed in plan.seeds} <= set(sweep.runs)


def test_a_plan_reads_back_as_it_was_written(tmp_path: Path) -> None:
    for text in ("", PLAN):
        plan = planned(tmp_path, text)
        read = Plan.from_json(json.loads(json.dumps(plan.to_json())))
        assert (read.hash, read.design, read.primary, read.seeds) == (plan.hash, plan.design, plan.primary, plan.seeds)


def test_a_confirmation_continues_behind_the_used_seeds(tmp_path: Path) -> None:
    plan, out = planned(tmp_path), tmp_path / "out"
    run_sweep(plan, out, jobs=1)
    confirmation, folder = confirmation_of(out, planned(tmp_path))
    assert folder == out / "confirmation"
    assert confirmation.seeds == (2, 3)
    assert (confirmation.confirms, confirmation.explored) == (plan.hash, (0, 1))
    assert confirmation.design == plan.design
    assert confirmation_of(out, plan, seeds=3)[0].seeds == (2, 3, 4)
    assert any("confirms plan" in line for line in confirmation.lines())

    summary = run_sweep(confirmation, folder, jobs=1)
    assert len(summary.finished) == 8
    assert Sweep.open(folder).manifest["explored"] == [0, 1]
    assert set(Sweep.open(folder).table.seed) == {2, 3}
    # The same command goes on with it, and another number of seeds is no second try.
    assert len(run_sweep(confirmation_of(out, plan)[0], folder, jobs=1).kept) == 8
    with pytest.raises(RecordingExists, match=r"was confirmed on seeds 2, 3, .*confirmed once"):
        confirmation_of(out, plan, seeds=3)
    with pytest.raises(ConfigurationError, match="found a confirmation itself"):
        confirmation_of(folder, plan)


def test_a_deleted_confirmation_gives_no_second_try(tmp_path: Path) -> None:
    plan, out = planned(tmp_path), tmp_path / "out"
    run_sweep(plan, out, jobs=1)
    other = confirmation_of(out, plan, seeds=3)[0]
    confirmation, folder = confirmation_of(out, plan)
    run_sweep(confirmation, folder, jobs=1)
    shutil.rmtree(folder)
    for again in (lambda: confirmation_of(out, plan, seeds=3), lambda: run_sweep(other, folder, jobs=1)):
        with pytest.raises(RecordingExists, match=r"was confirmed on seeds 2, 3, begun 2\d{3}-"):
            again()
    assert not folder.exists()
    with pytest.warns(RuntimeWarning, match=f"{folder}: the confirmation begun .* made again, on the same seeds"):
        assert len(run_sweep(confirmation_of(out, plan)[0], folder, jobs=1).finished) == 8
    marker = out / "confirmation.json"
    marker.write_text(marker.read_text().replace("2,", "5,"))
    with pytest.raises(DamagedRecording, match="does not say what was confirmed: ValueError: its SHA-256"):
        confirmation_of(out, plan)


def test_the_hash_of_a_confirmation_covers_what_it_confirms(tmp_path: Path) -> None:
    plan, out = planned(tmp_path), tmp_path / "out"
    run_sweep(plan, out, jobs=1)
    assert Sweep.open(out).confirms is None
    confirmation, folder = confirmation_of(out, plan)
    assert confirmation.hash != replace(confirmation, confirms=None, explored=()).hash
    run_sweep(confirmation, folder, jobs=1)
    assert Sweep.open(folder).confirms == plan.hash
    (sentence, *_) = analyze([Sweep.open(folder)], tmp_path / "report", only=["units"]).sentences
    assert sentence.startswith(
        f"Confirmation of plan {plan.hash[:12]}, unchanged, on seeds that it had not used (it us"
    )
    assert sentence in (tmp_path / "report" / "report.html").read_text()
    file = folder / "sweep.json"
    content = json.loads(file.read_bytes())
    for changes in ({"confirms": "0" * 64}, {"explored": [7]}, {"confirms": None}):
        file.write_text(json.dumps(content | changes))
        with pytest.raises(EditedManifest, match="hashed before the first run"):
            Sweep.open(folder)
    # An exploration that calls itself one, by the entries of before, is none; on its own seeds it is refused.
    file = out / "sweep.json"
    content = json.loads(file.read_bytes())
    file.write_text(json.dumps({k: v for k, v in content.items() if k != "sha256"} | {"confirms": "0", "explored": []}))
    assert Sweep.open(out).confirms is None
    again = sealed(replace(plan, confirms="0" * 64, explored=(1,)).to_json())
    file.write_text(json.dumps(again))
    with pytest.raises(EditedManifest, match=r"found seeds \[1\] in a confirmation"):
        Sweep.open(out)


def test_a_confirmation_takes_two_seeds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = planned(tmp_path, head="seeds = 1")
    run_sweep(plan, out, jobs=1)
    for seeds in (None, 1):
        with pytest.raises(ConfigurationError, match="found 1 seed for a confirmation, expected at least 2"):
            confirmation_of(out, plan, seeds=seeds)
    assert confirmation_of(out, plan, seeds=2)[0].seeds == (1, 2)


def test_a_confirmation_refuses_used_seeds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_sweep(planned(tmp_path, head="seeds = [3, 1]"), out, jobs=1)
    for head, again in (("seeds = [1, 5]", "1"), ("seeds = 5", "1, 3"), ("seeds = 2\nfirst_seed = 3", "3")):
        plan = planned(tmp_path, head=head)
        with pytest.raises(ConfigurationError, match=f"found seeds {again} used already") as refused:
            confirmation_of(out, plan)
        assert f"give --seeds {len(plan.seeds)} for seeds 4 to {3 + len(plan.seeds)}" in str(refused.value)
    assert confirmation_of(out, planned(tmp_path, head="seeds = [0, 8]"))[0].seeds == (0, 8)
    # Unchanged seeds are those of the exploration: the same command with --confirm.
    assert confirmation_of(out, planned(tmp_path, head="seeds = [1, 3]"))[0].seeds == (4, 5)


def test_what_cannot_be_confirmed(tmp_path: Path) -> None:
    plan, out = planned(tmp_path), tmp_path / "out"

    def refused(kind: type[NtkdynError], part: str, plan: Plan = plan) -> None:
        with pytest.raises(kind, match=part) as error:
            confirmation_of(out, plan)
        assert "\n" not in str(error.value)
        assert str(out) in str(error.value)

    refused(MissingRecording, "found no sweep to confirm")
    run_sweep(plan, out, jobs=1)
    refused(ConfigurationError, "holds another plan", planned(tmp_path, PLAN.replace("margin = 1", "margin = 2")))
    file = out / "sweep.json"
    content = json.loads(file.read_bytes())
    file.write_text(json.dumps(content | {"seeds": [0]}))
    refused(EditedManifest, r"found seeds \[0\], expected \[0, 1\]")
    content["plan"][0]["seed"] = 9
    file.write_text(json.dumps(content))
    refused(EditedManifest, "hashed before the first run")
    file.write_text("[]")
    refused(DamagedRecording, "is no plan")
    bare = planned(tmp_path, "")
    run_sweep(bare, tmp_path / "bare", jobs=1)
    with pytest.raises(ConfigurationError, match="without a primary comparison"):
        confirmation_of(tmp_path / "bare", bare)


def test_steps_and_cost_are_told_before_anything_runs(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    cost = estimate(plan)
    assert cost is not None
    # Two seeds of: a trunk of 6 steps, an arm of 6 and two of 2.
    assert cost.steps == 2 * (6 + 6 + 2 + 2)
    assert 0 < cost.recording < 10
    lines = list(foresight(planned(tmp_path, seeds=6), 2))
    assert lines[0].startswith("cost: 24 runs, 96 training steps, roughly")
    assert "on 2 processes" in lines[0]
    assert "primary comparison: test_accuracy of start=4" in lines[1]
    assert lines[2] == "hypothesis: Late is better."
    assert lines[4] == "equivalence margin: 1 accuracy points"
    found = re.search(r"smallest detectable difference: ([0-9.]+) accuracy points with power 0.8", lines[3])
    assert found
    effect, seeds = float(found[1]), 6
    shift, edge = effect * math.sqrt(seeds) / 4.0, stats.t.ppf(0.975, seeds - 1)
    power = stats.nct.sf(edge, seeds - 1, shift) + stats.nct.cdf(-edge, seeds - 1, shift)
    assert power == pytest.approx(0.8, abs=0.01)
    assert "from a guess" in lines[3]


def test_foresight_without_what_it_needs(tmp_path: Path) -> None:
    assert "none is named" in list(foresight(planned(tmp_path, ""), 1))[1]
    unknown = PLAN.replace("deviation = 4.0", "").replace('measure = "test_accuracy"', 'measure = "loss"')
    lines = list(foresight(planned(tmp_path, unknown), 1))
    assert "standard deviations with power" in lines[3]
    assert "give deviation in [plan]" in lines[3]
    assert lines[4] == "equivalence margin: 1"
    assert "one seed allows no test" in list(foresight(planned(tmp_path, head="seeds = 1"), 1))[3]
    lines = list(foresight(make_plan("width-scaling"), 1))
    assert lines[0] == "cost: unknown before the first run; width-scaling does not say how many steps a run takes"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_sweep_for_a_device_is_planned_without_it() -> None:
    plan = make_plan("nonlinear-advantage", settings=["device=cuda"], seeds=3)
    first, second = foresight(plan, 1)
    assert first.startswith("cost: 6 runs, not measured (setting 'device': found 'cuda', expected 'cpu'; torch finds")
    assert first.endswith("; plan it there, or with --set device=cpu")
    assert second.startswith("primary comparison: none is named")


def test_the_demo_names_its_primary_comparison() -> None:
    from ntkdyn.sweep import packaged_plan

    with packaged_plan("demo.toml") as file:
        plan = make_plan("nonlinear-advantage", file=file)
    assert plan.primary is not None
    configurations = {one.runs: one.config for one in plan.configurations}
    of, minus = configurations[plan.primary.of_runs], configurations[plan.primary.minus_runs]
    assert {name for name in of if of[name] != minus[name]} == {"start_epoch"}
    assert (of["start_epoch"], minus["start_epoch"], of["task"], of["survivors"]) == (12, 0, "sum10", "common")
