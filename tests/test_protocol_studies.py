"""Studies of one experiment each, on made-up sweeps with known answers: numbers, sentences, what may not be said."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ntkdyn import plots
from ntkdyn.plugins import load_study
from ntkdyn.primary import PrimaryComparison
from ntkdyn.studies.groups import beside, groups

NAMES = ["collapse", "core-network", "layerwise-vs-channelwise", "linearized-training", "translation"]


def said(name: str, sweep: Any) -> tuple[Any, list[str]]:
    study = load_study(name)
    assert study.unavailable(sweep) is None
    dataset = study.measure(sweep)
    return dataset, study.sentences({"sweep": dataset})


@pytest.mark.parametrize("name", NAMES)
def test_another_experiment_s_sweep_is_refused_politely(name: str, synthetic: ModuleType) -> None:
    study = load_study(name)
    for other in (*NAMES, "nonlinear-advantage"):
        source = synthetic.PROTOCOLS[other]() if other in synthetic.PROTOCOLS else synthetic.sweep(seeds=1)
        if other != name:
            assert f"this study needs a sweep of {name}" in study.unavailable(source), other
    for other in ("advantage", "controls", "drift-gap"):
        reason = load_study(other).unavailable(synthetic.PROTOCOLS[name]())
        assert "needs a sweep of nonlinear-advantage" in reason


def test_sentences_use_the_margin_that_the_plan_names_in_their_unit(synthetic: ModuleType) -> None:
    source = synthetic.translation_sweep(noise=0.0)
    source.primary = PrimaryComparison("test_bleu", {}, {}, {}, "a", "b", margin=0.1)
    text = " ".join(said("translation", source)[1])
    assert "differ by no more than 0.1 BLEU" in text
    assert "is kept to within 0.1 BLEU is not shown even at NAPL 2 (-0.2 BLEU" in text
    for name in ("collapse", "linearized-training", "layerwise-vs-channelwise"):
        source = synthetic.PROTOCOLS[name]()
        source.primary = PrimaryComparison("test_accuracy", {}, {}, {}, "a", "b", margin=40.0)
        assert float(said(name, source)[0]["margin"]) == 40
        assert "40 point" in " ".join(said(name, source)[1])
        source.primary = PrimaryComparison("napl", {}, {}, {}, "a", "b", margin=40.0)
        assert float(said(name, source)[0]["margin"]) == 1


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_rectangular_and_one_seed_is_not_judged(name: str, synthetic: ModuleType) -> None:
    study = load_study(name)
    dataset, sentences = said(name, synthetic.PROTOCOLS[name](seeds=1))
    for table in study.tables({"sweep": dataset}):
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}
        assert "nan" not in str(table)
    text = " ".join(sentences)
    assert "nan" not in text
    for claim in ("contradicted", "supported", "end higher", "end lower", "extracted higher", "channels higher"):
        assert claim not in text, claim
    figure = plots.new_figure()
    study.draw(figure, {"sweep": dataset})


def test_collapse_reads_the_curve_at_the_length_of_the_others(synthetic: ModuleType) -> None:
    dataset, sentences = said("collapse", synthetic.collapse_sweep(noise=0.0))
    at = dataset["difference_mean"].sel(group="sum10")
    for kind in ("from scratch", "from scratch, as many parameters"):
        napl = at.sel(length="napl")
        assert float(napl.sel(network=f"{kind}, depth 1")) == pytest.approx(20 + 50 * 0.7 / 1.2 - 50)
        assert float(napl.sel(network=f"{kind}, depth 2")) == pytest.approx(70 + 12.2 / 3 - 60)
        assert not np.isfinite(float(napl.sel(network=f"{kind}, depth 7")))
        # Half the length at the same accuracy: the weighted curve stands between 1.5 and 6 there.
        weighted = at.sel(length="weighted_napl", network=f"{kind}, depth 2")
        assert float(weighted) == pytest.approx(82.2 - 0.2 * 0.5 / 4.5 - 60)
    assert float(dataset["parameters"].sel(network="from scratch, as many parameters, depth 2")[0, 0]) == 5000
    part = [float(dataset[f"steepest_{name}"][0]) for name in ("from", "to", "mean", "parts", "before")]
    assert part == pytest.approx([1.5, 0.3, 50 / 1.2, 3, 12 / 4.5])
    text = " ".join(sentences)
    assert "kept or exceeded, to within 1 point, down to NAPL 3 (+0.2 points" in text
    assert "from NAPL 1.5 (-12.0 points" in text
    assert "at equal NAPL, paired by seed: extracted higher at depth 2; extracted lower at depth 1" in text
    assert "outside of the extracted curve at depth 7" in text
    assert "8 comparisons by max-T, nothing can be told: so few seeds allow no p below 0.12" in text
    _, more = said("collapse", synthetic.collapse_sweep(seeds=8))
    assert "8 comparisons by max-T, p < 0.05 at depth 1, depth 2)" in " ".join(more)


def test_collapse_says_what_is_not_shown(synthetic: ModuleType) -> None:
    _, sentences = said("collapse", synthetic.collapse_sweep(noise=15.0, scratch=False))
    text = " ".join(sentences)
    assert "it cannot be said to be kept to within 1 point" in text
    assert "no network from scratch in this sweep" in text
    _, noisy = said("collapse", synthetic.collapse_sweep(noise=15.0))
    assert "not distinguishable at depth 1, 2" in " ".join(noisy)
    study = load_study("collapse")
    source = synthetic.collapse_sweep()
    for run in source.runs.values():
        run.results["napl"] = float("nan")
    assert "could not be traced" in study.unavailable(source)


def test_collapse_reads_curves_of_other_experiments(synthetic: ModuleType) -> None:
    study = load_study("collapse")
    source = synthetic.sweep(seeds=2, gaps={"cifar-10": 9.0}, data=True)
    for name, run in source.runs.items():
        run.config["remaining"] = 0.1
        if run.config["intervention"] == "none":
            run.results["napl"] = run.results["weighted_napl"] = 2.0
        elif run.config["start_epoch"] == 4 and run.config["survivors"] == "common" and run.config["mask"] == "learned":
            other = synthetic.Run(run.name, {}, run.config | {"remaining": 0.5}, run.seed, run.results | {"napl": 1.5})
            source.runs, source.kinds = source.runs | {f"x{name}": other}, source.kinds | {f"x{name}": "arm"}
            source.parents[f"x{name}"] = source.parents[name]
    dataset, sentences = said("collapse", source)
    (group,) = dataset["group"].values
    assert group.startswith("cifar-10")
    assert "start_epoch = 4" in group
    assert "mask = learned" in group
    assert dataset["network"].values.tolist() == ["dense", "remaining 0.5", "remaining 0.1", "linear from the start"]
    assert int(dataset["loss_n"].sel(network="remaining 0.1")[0]) == 2
    assert "no network from scratch in this sweep" in sentences[-1]
    figure = plots.new_figure()
    study.draw(figure, {"sweep": dataset})


def test_one_share_and_the_dense_network_are_a_curve(synthetic: ModuleType) -> None:
    few = synthetic.collapse_sweep(noise=0.0, scratch=False)
    few.runs = {name: run for name, run in few.runs.items() if run.config["remaining"] in (0.1, 0.25)}
    dataset, sentences = said("collapse", few)
    assert dataset["network"].values.tolist() == ["dense", "remaining 0.25", "linear from the start"]
    assert "already at NAPL 1.5 (-12.0 points" in sentences[0]
    alone = synthetic.sweep(seeds=2)
    for run in alone.runs.values():
        run.config["remaining"] = 0.1
    assert "no two networks differ in the share of units alone" in load_study("collapse").unavailable(alone)


def test_a_diverged_network_is_counted_and_in_no_mean(synthetic: ModuleType) -> None:
    source = synthetic.collapse_sweep(noise=0.0)
    name = next(name for name, run in source.runs.items() if run.config["remaining"] == 0.25)
    # Stopped on its way, so that it has more units than were wanted.
    source.runs[name].results |= {"test_accuracy": float("nan"), "diverged": 1.0, "active_units": 1e6, "napl": 1e3}
    dataset, sentences = said("collapse", source)
    for measure in ("active_units", "napl", "parameters"):
        assert int(np.isfinite(dataset[measure].sel(network="remaining 0.25")).sum()) == 3
    (table,) = load_study("collapse").tables({"sweep": dataset})
    assert {row[0]: row[1] for row in table.rows}["remaining 0.25"] == "3"
    assert "1 runs diverged; they are in no mean and no difference" in sentences[-1]
    assert int(dataset["loss_n"].sel(network="remaining 0.25")[0]) == 3
    # The curve of that seed is one point poorer, so depth 1 lies between the points beside it.
    assert int(dataset["difference_n"].sel(network="from scratch, depth 1", length="napl")[0]) == 4


def test_groups_share_what_trunks_do_not_have_and_part_what_they_have(synthetic: ModuleType) -> None:
    weak, strong = (synthetic.collapse_sweep(seeds=2, settings={"strength": value}) for value in (4.0, 2.0))
    for name, run in strong.runs.items():
        if run.config["intervention"] == "linearize":
            weak.runs[f"x{name}"], weak.kinds[f"x{name}"], weak.parents[f"x{name}"] = run, "arm", strong.parents[name]
    found = groups(weak, compared=("remaining",), setting_kind="extracted", intervention="linearize")
    assert [group.label for group in found] == ["sum10, strength = 4.0", "sum10, strength = 2.0"]
    assert [len(beside(weak, group, setting_kind="scratch")) for group in found] == [6, 6]
    wide = synthetic.collapse_sweep(seeds=2, settings={"width": 128})
    narrow = synthetic.collapse_sweep(seeds=2)
    for name, run in wide.runs.items():
        narrow.runs[f"x{name}"], narrow.kinds[f"x{name}"] = run, wide.kinds[name]
        if name in wide.parents:
            narrow.parents[f"x{name}"] = f"x{wide.parents[name]}"
    found = groups(narrow, compared=("remaining",), setting_kind="extracted", intervention="linearize")
    assert [group.shared for group in found] == [{"width": "64"}, {"width": "128"}]
    assert [set(beside(narrow, group, setting_kind="scratch")["width"]) for group in found] == [{64}, {128}]


def test_core_network_judges_each_outcome_by_itself(synthetic: ModuleType) -> None:
    dataset, sentences = said("core-network", synthetic.core_network_sweep())
    hard = dataset.sel(group="sum10")
    width, depth = "width 256 / 64 at depth 3", "depth 6 / 2 at width 128"
    assert set(dataset["contrast"].values) == {width, depth}
    judged = hard["ratio_judgement"]
    assert str(judged.sel(contrast=width, measure="active_units").values) == "supported"
    assert str(judged.sel(contrast=width, measure="width_per_layer").values) == "supported"
    assert str(judged.sel(contrast=width, measure="napl").values) == "contradicted"
    assert str(judged.sel(contrast=depth, measure="active_units").values) == "contradicted"
    assert str(judged.sel(contrast=depth, measure="width_per_path").values) == "not judged"
    assert float(hard["ratio_mean"].sel(contrast=width, measure="napl")) == pytest.approx(0.25)
    assert float(hard["ratio_mean"].sel(contrast=depth, measure="active_units")) == pytest.approx(3, rel=0.02)
    assert bool(hard["by_construction"])
    text = " ".join(sentences)
    assert "over widths at most one of active units and NAPL can stay the same there" in text
    assert "first / sum10" in text
    ratio = float(dataset["task_ratio_mean"].sel(measure="active_units")[0])
    assert ratio == pytest.approx(0.25, rel=0.05)
    middle = dataset["middle_share"].sel(group="sum10", start="width 64, depth 3").values
    assert middle == pytest.approx([40 / 80, 40 / 81, 40 / 80, 40 / 81])
    shape = dataset["active_of_layer"].sel(group="sum10", start="width 128, depth 2").values
    assert np.isfinite(shape).sum() == 8  # two layers of four seeds; the other layers do not exist


def test_no_core_is_said_where_all_or_none_is_left(synthetic: ModuleType) -> None:
    _, sentences = said("core-network", synthetic.core_network_sweep(tasks={"sum10": 0}))
    text = " ".join(sentences)
    assert "in 20 of 20 runs no unit is left" in text
    assert "contradicted" not in text
    assert "supported" not in text
    source = synthetic.core_network_sweep(tasks={"sum10": 20}, starts=((64, 3), (128, 3)))
    for run in source.runs.values():
        if run.config["width"] == 64 and "units/active" in run.arrays:
            run.arrays["units/active"][-1] = 64
            run.results |= {"active_units": 192.0, "napl": 3.0}
    _, sentences = said("core-network", source)
    text = " ".join(sentences)
    assert "the price takes no unit from width 64, depth 3" in text
    assert "contradicted" not in text


def test_core_network_says_whether_its_counts_came_to_rest(synthetic: ModuleType) -> None:
    source = synthetic.core_network_sweep(tasks={"sum10": 20}, starts=((64, 3), (128, 3)))
    assert "rest" not in " ".join(said("core-network", source)[1])
    for run in source.runs.values():
        if "units/active" in run.arrays:
            final = run.arrays["units/active"][-1]
            # Epochs 0, 4, 5 and 6 of a ramp of 6: three quarters are epoch 4.5.
            run.arrays["units/step"] = np.array([0, 16, 20, 24])
            run.arrays["units/active"] = np.stack([np.full(3, run.config["width"]), final, final, final])
    assert "had come to rest in all 8 runs" in " ".join(said("core-network", source)[1])
    moving = next(run for run in source.runs.values() if "units/active" in run.arrays)
    moving.arrays["units/active"][1] += 3
    dataset, sentences = said("core-network", source)
    assert "in 1 of 8 runs the last quarter of the ramp still took more than 5 %" in " ".join(sentences)
    assert float((dataset["active_before_the_end"] - dataset["active_at_the_end"]).max()) == 9


def test_layers_without_a_pair_get_no_empty_panel(synthetic: ModuleType) -> None:
    source = synthetic.layerwise_vs_channelwise_sweep()
    study = load_study("layerwise-vs-channelwise")

    def panels() -> int:
        figure = plots.new_figure()
        study.draw(figure, {"sweep": study.measure(source)})
        return len(figure.axes)

    assert panels() == 3
    for run in source.runs.values():
        run.config["strength"] = 16.0 if run.config["granularity"] == "layer" else 4.0
    assert panels() == 4


def test_core_network_needs_two_starts_and_their_units(synthetic: ModuleType) -> None:
    study = load_study("core-network")
    assert "began with one width and depth" in study.unavailable(synthetic.core_network_sweep(starts=((64, 3),)))
    source = synthetic.core_network_sweep()
    for run in source.runs.values():
        run.arrays.clear()
    assert "no unit counts are recorded" in study.unavailable(source)


def test_layers_and_channels_at_equal_shares_and_lengths(synthetic: ModuleType) -> None:
    dataset, sentences = said("layerwise-vs-channelwise", synthetic.layerwise_vs_channelwise_sweep(noise=0.0))
    gaps = dataset["gap_mean"].sel(group="sum10")
    assert gaps.sel(matched="share").values == pytest.approx([0, 5, 20])
    # At 0.25 whole layers keep 0.2 of the units, less than any network by channel.
    assert gaps.sel(matched="napl").values == pytest.approx([0, 5, np.nan], nan_ok=True)
    text = " ".join(sentences)
    assert "mean over all shares: networks linearized channel by channel end higher than those layer by layer" in text
    assert "the largest of 3 gaps channel - layer at equal share of units is at 0.25: +20.0 points" in text
    assert all("exploratory" in line for line in sentences if "largest" in line)
    assert "whole layers cannot meet every share; the shares of channels and layers differ at 0.25" in text
    assert "3 comparisons by max-T, nothing can be told" in text
    _, more = said("layerwise-vs-channelwise", synthetic.layerwise_vs_channelwise_sweep(seeds=8))
    assert "channels higher at 0.5, 0.25; not distinguishable at 0.75 (each by its own" in " ".join(more)
    assert "3 comparisons by max-T, p < 0.05 at 0.5, 0.25)" in " ".join(more)
    assert "0.40 by channel and 0.80 by layer" in text
    named = said("layerwise-vs-channelwise", synthetic.layerwise_vs_channelwise_sweep(task=None))[0]
    assert named["group"].values.tolist() == ["cifar-10"]


def test_one_granularity_is_no_comparison(synthetic: ModuleType) -> None:
    source = synthetic.layerwise_vs_channelwise_sweep()
    source.runs = {name: run for name, run in source.runs.items() if run.config["granularity"] == "layer"}
    assert "has not both granularities" in load_study("layerwise-vs-channelwise").unavailable(source)


def test_children_in_weights_and_units_on_one_axis(synthetic: ModuleType) -> None:
    dataset, sentences = said("linearized-training", synthetic.linearized_training_sweep(noise=0.0))
    lost = dataset["advantage_mean"].sel(group="sum10")
    assert lost.sel(child="weights").values == pytest.approx([30, 10, 0.1, 0], abs=1e-9)
    assert lost.sel(child="units").values == pytest.approx([20, np.nan, 5, np.nan], nan_ok=True)
    assert dataset["between_mean"].values[0] == pytest.approx([-10, np.nan, 4.9, np.nan], nan_ok=True)
    assert dataset["drift"].shape == (1, 4, 4)
    assert (dataset["drift"].values[:, :-1] > 0).all()
    text = " ".join(sentences)
    assert "linear in the weights, more than 1 point is lost up to t = 2 (+10.0 points" in text
    assert "no more than 1 point from t = 4 (+0.1 points" in text
    assert "that no more than 1 point is lost is not shown at the latest, t = 4 (+5.0 points" in text
    assert "which alone does not relate them" in text


def test_no_drift_without_kernels_and_no_advantage_without_the_network(synthetic: ModuleType) -> None:
    study = load_study("linearized-training")
    source = synthetic.linearized_training_sweep(kernels=False)
    dataset, sentences = said("linearized-training", source)
    assert not np.isfinite(dataset["drift"].values).any()
    assert "kernel" not in " ".join(sentences)
    figure = plots.new_figure()
    study.draw(figure, {"sweep": dataset})
    assert len(figure.axes) == 2
    source.runs = {name: run for name, run in source.runs.items() if run.config["child"] != "network"}
    assert "add child=network" in study.unavailable(source)


def test_translation_gaps_and_curve_in_bleu(synthetic: ModuleType) -> None:
    dataset, sentences = said("translation", synthetic.translation_sweep(noise=0.0))
    assert dataset["line"].values.tolist() == [
        "multi30k, mask = learned, remaining = 0.1",
        "multi30k, mask = random, remaining = 0.1",
    ]
    assert dataset["gap_mean"].values == pytest.approx([4, 0, 4])
    assert dataset["contrast"].values[2].startswith("interaction: learned - random")
    assert dataset["curve"].values.tolist() == ["multi30k, mask = learned, start_epoch = 4"]
    assert np.isfinite(dataset["curve_mean"].values).all()
    text = " ".join(sentences)
    assert "networks linearized from epoch 4 on end higher than those from epoch 0 on by 4.0 BLEU" in text
    assert "differ by no more than 1 BLEU" in text
    assert "kept or exceeded, to within 1 BLEU, down to NAPL 2 (-0.2 BLEU" in text
    assert "from NAPL 0.5 (-4.0 BLEU" in text
    assert "Reference: dense network" in text
    assert "so few seeds allow no p below 0.12" in text
    more = " ".join(said("translation", synthetic.translation_sweep(seeds=8))[1])
    assert "3 comparisons by max-T, p < 0.05 at multi30k, mask = learned, remaining = 0.1" in more
    source = synthetic.translation_sweep()
    study = load_study("translation")
    for run in source.runs.values():
        run.config |= {"start_epoch": 0, "remaining": 0.1}
    assert "no two linearized arms differ in start or share of units alone" in study.unavailable(source)
