"""The study relation on made-up sweeps whose truth is known, and how interventions are kept out of other studies."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import xarray as xr

from ntkdyn import plots, report
from ntkdyn.plugins import load_study
from ntkdyn.studies import arms, comparisons, rivals
from ntkdyn.studies.relation_arms import relation_arms


@pytest.fixture(scope="module")
def mediated(synthetic: ModuleType) -> Any:
    """Ten seeds, seven interventions of five families; accuracy follows the drift before the switch by 40 points."""
    return synthetic.sweep(seeds=10, gaps={"sum10": 15.0}, controls=False, changes=synthetic.CHANGES)


@pytest.fixture(scope="module")
def measured(mediated: Any) -> xr.Dataset:
    dataset: xr.Dataset = load_study("relation").measure(mediated)
    return dataset


def test_true_mediation_is_recovered(measured: xr.Dataset) -> None:
    one = measured.sel(task="sum10")
    assert float(one["pooled"].sel(regressor="before")) == pytest.approx(40.0, abs=1.5)
    assert float(one["consistent"].sel(regressor="before")) == 1
    beside = one.sel(role="drift", regressor="dense_accuracy")
    assert float(beside["b_value"]) == pytest.approx(40.0, abs=1.5)
    assert float(beside["b_low"]) < 40.0 < float(beside["b_high"])
    assert float(beside["b_p"]) == 1 / 2000
    assert (int(one["arms"]), int(one["arms_left_out"]), int(one["seeds"]), int(one["starts"])) == (120, 0, 10, 5)


def test_it_is_said_with_its_rule(measured: xr.Dataset) -> None:
    study = load_study("relation")
    verdict = study.verdict({"s": measured})
    assert "the trunk's drift before the switch S(K_0, K_t0) b = +" in verdict[0]
    assert "beside the dense accuracy, which has c = " in verdict[0]
    assert "consistent with mediation: 5 families agree" in verdict[1]
    assert "power 100% where true ratios scatter by half the pooled one" in verdict[1]
    text = " ".join(study.sentences({"s": measured}))
    assert "p values are from accuracies permuted within start and seed" in text
    assert "rate_before +" in text
    assert "by the same rule" in text


def test_tables_hold_rivals_mediators_and_interventions(measured: xr.Dataset) -> None:
    tables = load_study("relation").tables({"s": measured})
    assert [row[0] for row in tables[2].rows] == [f"{name} = {_plain(value)}" for name, value in _sorted_changes()]
    quantities = {row[0] for row in tables[0].rows}
    assert {"dense accuracy at t0", "weight norm at t0", "gate Hamming distance from the start to t0"} <= quantities
    mediators = {row[0]: row[-1] for row in tables[1].rows}
    assert mediators["the trunk's drift before the switch S(K_0, K_t0)"] == "yes"
    assert mediators["weight norm at t0"] == "cannot be judged: no family moved the weight norm"
    assert "no: " in mediators["the trunk's remaining drift S(K_t0, K_T)"]


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _sorted_changes() -> list[tuple[str, Any]]:
    return [
        ("rate_before", 0.1), ("rate_before", 3.0), ("scale_before", 0.5), ("scale_before", 4.0),
        ("labels_before", "parity"), ("train_before", "readout"), ("anchor_before", 1.0),
    ]  # fmt: skip


def test_the_drift_is_that_of_the_kernels_recorded(synthetic: ModuleType, mediated: Any, measured: xr.Dataset) -> None:
    found = relation_arms(mediated, "sum10")
    assert found is not None
    changes = {
        change: found.changed(change, found.values["before"]).mean()
        for group in found.families().values()
        for change in group
    }
    for change, value in changes.items():
        assert float(measured["drift_change"].sel(task="sum10", change=change)) == pytest.approx(value)
    name = next(name for name, one in mediated.runs.items() if one.config.get("rate_before") == 3.0)
    kernels = mediated.runs[name].arrays["ntk/test/kernel"]
    steps = mediated.runs[name].steps("ntk/test").tolist()
    expected = synthetic.centered_distance(kernels[0], kernels[steps.index(8)])
    rows = [i for i, change in enumerate(found.change) if change == "rate_before = 3" and found.seed[i] == 0]
    assert found.values["before"][rows[0]] == pytest.approx(expected, abs=1e-6)


def test_families_that_disagree_are_said_to(synthetic: ModuleType) -> None:
    source = synthetic.sweep(
        seeds=10, gaps={"sum10": 15.0}, controls=False, changes=synthetic.CHANGES, direct={"labels_before": -9.0}
    )
    study = load_study("relation")
    verdict = study.verdict({"s": study.measure(source)})
    assert "consistent with mediation" not in " ".join(verdict)
    assert "not supported: the families disagree, so the amount of drift before t0 alone" in verdict[1]


def test_an_intervention_that_moves_accuracy_only_is_said_to(synthetic: ModuleType) -> None:
    # The rate of no intervention: the kernel moves as in the trunk.
    changes = dict(synthetic.CHANGES) | {("anchor_before", 1.0): 0.08}
    source = synthetic.sweep(
        seeds=10, gaps={"sum10": 15.0}, controls=False, changes=changes, direct={"anchor_before": 5.0}
    )
    study = load_study("relation")
    dataset = study.measure(source)
    text = " ".join(study.sentences({"s": dataset}))
    assert "anchor_before moved the accuracy without moving the drift before t0" in text
    assert "anchor_before drift not moved (F = 0.0), ratio undefined" in text
    assert float(dataset["consistent"].sel(task="sum10", regressor="before")) == 0


def test_few_seeds_cannot_be_judged_and_changes_are_still_shown(synthetic: ModuleType) -> None:
    source = synthetic.sweep(seeds=4, gaps={"sum10": 15.0}, controls=False, changes=synthetic.CHANGES)
    study = load_study("relation")
    datasets = {"s": study.measure(source)}
    sentences = study.sentences(datasets)
    assert sentences[0] == (
        "sum10: the relation of drift and gap cannot be judged: 4 seeds and 5 start epochs, at least 10 and 5 are "
        "needed; the gap itself is reported with its paired interval."
    )
    assert "mediation cannot be judged: 4 seeds" in sentences[1]
    assert np.isnan(datasets["s"]["b_value"].values).all()
    assert [len(table.rows) for table in study.tables(datasets)] == [7]


def test_few_start_epochs_cannot_be_judged_with_interventions_either(synthetic: ModuleType) -> None:
    source = synthetic.sweep(
        seeds=10, starts=(0, 2, 4), gaps={"sum10": 15.0}, controls=False, changes=synthetic.CHANGES
    )
    study = load_study("relation")
    dataset = study.measure(source)
    sentences = study.sentences({"s": dataset})
    assert "cannot be judged: 10 seeds and 3 start epochs, at least 10 and 5 are needed" in sentences[0]
    assert np.isnan(dataset["b_value"].values).all()


@pytest.mark.parametrize(
    ("seeds", "starts", "found"),
    [(4, (0, 1, 2, 3, 4), "4 seeds and 5 start epochs"), (10, (0, 4), "10 seeds and 2 start epochs")],
)
def test_without_interventions_ten_seeds_and_five_start_epochs_are_needed(
    seeds: int, starts: tuple[int, ...], found: str, synthetic: ModuleType
) -> None:
    study = load_study("relation")
    source = synthetic.sweep(seeds=seeds, starts=starts, gaps={"sum10": 15.0}, controls=False)
    sentences = study.sentences({"s": study.measure(source)})
    assert f"cannot be judged: {found}, at least 10 and 5 are needed" in sentences[0]
    assert "sweep over rate_before, scale_before, labels_before, train_before or anchor_before" in sentences[1]


def test_without_interventions_start_and_seed_leave_nothing_to_relate(synthetic: ModuleType) -> None:
    # Accuracy and drift both follow the start epoch: the trap of a correlation over start epochs.
    source = synthetic.sweep(seeds=10, gaps={"sum10": 15.0}, controls=False)
    study = load_study("relation")
    dataset = study.measure(source)
    one = dataset.sel(task="sum10", regressor="remaining", role="alone")
    assert float(one["b_p"]) > 0.05
    assert float(one["b_adjusted"]) > 0.2
    pooled = load_study("drift-gap").measure(source)["pooled"].sel(task="sum10", set="test", drift="remaining")
    assert float(pooled) < -0.8
    assert "permuted by whole seeds" in " ".join(study.sentences({"s": dataset}))


def test_diverged_arms_are_left_out_and_counted(synthetic: ModuleType) -> None:
    source = synthetic.sweep(
        seeds=11, gaps={"sum10": 15.0}, controls=False, changes=synthetic.CHANGES, diverged=frozenset({("sum10", 2, 3)})
    )
    study = load_study("relation")
    dataset = study.measure(source)
    one = dataset.sel(task="sum10")
    # Seed 3 at start epoch 2: the arm without intervention and its seven interventions.
    assert (int(one["arms"]), int(one["arms_left_out"])) == (11 * 12 - 8, 8)
    assert one["missing"].sel(regressor="before").values.tolist() == [2, 2, 1, 1, 1]
    assert float(one["consistent"].sel(regressor="before")) == 1
    assert "sum10: 8 arms diverged or lack a quantity; they are in no model and no ratio." in study.sentences(
        {"s": dataset}
    )


def test_interventions_may_have_random_masks(synthetic: ModuleType) -> None:
    source = synthetic.sweep(seeds=10, gaps={"sum10": 15.0}, controls=False, changes=synthetic.CHANGES, mask="random")
    study = load_study("relation")
    dataset = study.measure(source)
    assert str(dataset["line"].sel(task="sum10").values) == "survivors common, random masks"
    assert float(dataset["pooled"].sel(task="sum10", regressor="before")) == pytest.approx(40.0, abs=2.0)


def test_other_studies_do_not_see_interventions(synthetic: ModuleType, tmp_path: Path) -> None:
    settings = {"seeds": 2, "gaps": {"sum10": 15.0}, "controls": False}
    source, plain = synthetic.sweep(changes=synthetic.CHANGES, **settings), synthetic.sweep(**settings)
    for name in ("advantage", "drift-gap", "reference-levels"):
        with_them, without = (load_study(name).measure(one) for one in (source, plain))
        assert with_them.sizes == without.sizes
    assert load_study("advantage").measure(source)["line"].values.tolist() == ["survivors common"]
    report.analyze([source], tmp_path, only=["learning-curve"])
    assert len(json.loads((tmp_path / "learning-curve-sum10.json").read_text())["runs"]) == 2


def test_interventions_are_among_the_comparisons(mediated: Any) -> None:
    judged = comparisons.comparisons(mediated)
    primary = [key for key, one in judged.items() if one.primary]
    assert primary == [("sum10", "survivors common"), ("sum10", "learned: late - early")]
    one = judged["sum10", "rate_before = 3"]
    assert one.among == 7
    assert one.p <= one.adjusted <= 0.05
    assert one.low > 0


def test_equal_differences_count_once(synthetic: ModuleType) -> None:
    judged = comparisons.comparisons(synthetic.sweep(seeds=8, gaps={"sum10": 15.0}))
    assert judged["sum10", "learned: late - early"].primary
    assert judged["sum10", "survivors keep"].adjusted == judged["sum10", "survivors keep: late - early"].adjusted
    # Nine labels, of which one is the primary comparison and two are the same differences.
    assert (len(judged), judged["sum10", "survivors keep"].among) == (10, 7)
    assert all(np.isnan(one.adjusted) for one in judged.values() if one.primary)


def test_rivals_of_an_arm(synthetic: ModuleType) -> None:
    run = synthetic.run(config={"start_epoch": 1}, sets=("test",), samples=12)
    labels = np.arange(12) % 2
    block = np.equal.outer(labels, labels).astype(float)
    run.arrays["ntk/test/kernel"][2] = block
    found = rivals.rivals_of(run, run, {"dense_accuracy": 71.0, "dense_weight_norm": 3.5}, "test", 1.0)
    assert found["alignment"] == pytest.approx(1.0)
    assert found["kernel_ridge_error"] < 0.01
    assert (found["dense_accuracy"], found["weight_norm"], found["rate_sum"]) == (71.0, 3.5, 4e-3)
    signs = [
        np.unpackbits(run.arrays[f"gates/test/{gate}/pattern"][[0, 2]], axis=-1, count=units)
        for gate, units in synthetic.GATES.items()
    ]
    assert found["gate_hamming"] == pytest.approx(np.mean([np.concatenate([s[0] != s[1] for s in signs], axis=1)]))


def test_what_was_not_recorded_is_no_rival(synthetic: ModuleType) -> None:
    run = synthetic.run(config={"start_epoch": 1}, sets=("test",))
    for name in [name for name in run.arrays if name.startswith(("gates", "learning_rate", "probe_sets"))]:
        del run.arrays[name]
    assert rivals.rivals_of(run, run, {"dense_accuracy": float("nan")}, "test", 1.0) == {}
    run.arrays["probe_sets/test/targets"] = np.arange(10) % 2
    run.arrays["ntk/test/kernel"][:] = 0.0
    assert rivals.rivals_of(run, None, {}, "test", 1.0) == {}


def test_a_sweep_over_named_data_is_named_by_it(synthetic: ModuleType, tmp_path: Path) -> None:
    source = synthetic.sweep(seeds=2, gaps={"sum10": 5.0}, controls=False)
    for run in source.runs.values():
        run.config |= {"task": None, "data": "folder/pairs.npz"}
    assert arms.tasks(source) == ["pairs.npz"]
    found = report.analyze([source], tmp_path, only=["advantage", "units", "relation"])
    assert found.unavailable == {}
    assert any(sentence.startswith("pairs.npz (survivors common)") for sentence in found.sentences)


def test_kernels_that_are_not_finite_leave_a_gap_and_stop_nothing(synthetic: ModuleType) -> None:
    source = synthetic.sweep(seeds=3, gaps={"sum10": 5.0}, controls=False)
    trunk = next(name for name, kind in source.kinds.items() if kind == "trunk")
    source.runs[trunk].arrays["ntk/test/kernel"][-1] = np.nan
    found = relation_arms(source, "sum10")
    assert found is not None
    broken = np.isnan(found.values["remaining"])
    assert broken.sum() == 5
    assert np.isfinite(found.values["before"]).all()
    for name in ("relation", "drift-gap"):
        assert load_study(name).sentences({"s": load_study(name).measure(source)})


def test_no_trunk_with_kernels(synthetic: ModuleType) -> None:
    source = synthetic.sweep(seeds=2, gaps={"sum10": 5.0}, controls=False)
    for run in source.runs.values():
        for name in [name for name in run.arrays if name.startswith("ntk")]:
            del run.arrays[name]
    reason = load_study("relation").unavailable(source)
    assert reason == "no arm has a trunk with kernels: no tangent kernels are recorded; record with the probe ntk"


def test_figure_names_families_and_quantities(measured: xr.Dataset) -> None:
    study = load_study("relation")
    figure = plots.new_figure()
    with plots.style():
        study.draw(figure, {"s": measured})
        plots.png(figure)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"rate_before", "labels_before", "pooled ratio", "alone", "the drift beside it"} <= set(labels)
    assert figure.axes[0].get_xlabel() == "change of drift before t0 (1)"
    rows = [text.get_text() for text in figure.axes[1].get_yticklabels()]
    assert "dense accuracy" in rows
