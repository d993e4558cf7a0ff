"""Every installed study on made-up recordings: numbers, sentences, figure, and why it is unavailable."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import xarray as xr

from ntkdyn import plots
from ntkdyn.plugins import installed, load_study
from ntkdyn.primary import PrimaryComparison
from ntkdyn.studies.numbers import as_csv, as_json
from ntkdyn.studies.recorded import Study

STUDIES = sorted(installed("ntkdyn.studies"))


@pytest.fixture(scope="module")
def sweep(synthetic: ModuleType) -> Any:
    return synthetic.sweep()


def test_the_house_brings_all_its_studies() -> None:
    assert set(STUDIES) >= {
        "advantage", "cka", "controls", "drift-gap", "gates", "kernel-distance", "kernel-velocity", "learning-curve",
        "path-length", "reference-levels", "relation", "spectrum", "target-alignment", "units", "width-scaling",
        "collapse", "core-network", "layerwise-vs-channelwise", "linearized-training", "translation",
    }  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_every_study(name: str, synthetic: ModuleType, sweep: Any) -> None:
    study = load_study(name)
    assert isinstance(study, Study)
    assert study.name == name
    assert study.title
    assert study.reading.endswith(".")
    assert study.scope in ("run", "sweep")
    if name == "width-scaling":
        sources = {"seed 0": synthetic.widths_run(seed=0), "seed 1": synthetic.widths_run(seed=1)}
    elif study.scope == "run":
        sources = {"seed 0": synthetic.run(seed=0, moving=True), "seed 1": synthetic.run(seed=1, moving=True)}
    else:
        sources = {"sweep": synthetic.PROTOCOLS[name]() if name in synthetic.PROTOCOLS else sweep}
    datasets = {}
    for label, source in sources.items():
        assert study.unavailable(source) is None
        datasets[label] = study.measure(source)
    for dataset in datasets.values():
        assert isinstance(dataset, xr.Dataset)
        for variable in dataset.data_vars.values():
            assert variable.attrs["units"], variable.name
            assert variable.attrs["long_name"], variable.name
    sentences = study.sentences(datasets)
    assert sentences
    assert all(sentence.endswith(".") and "nan" not in sentence for sentence in sentences)
    figure = plots.new_figure()
    with plots.style():
        study.draw(figure, datasets)
        assert plots.png(figure).startswith(b"\x89PNG")
    for ax in figure.axes:
        if ax.get_label() == "<colorbar>":
            assert "(" in ax.get_ylabel()
            continue
        # A unit on every axis; rows named by words and shared abscissas have none.
        assert "(" in ax.get_xlabel() or ax is not figure.axes[-1]
        assert "(" in ax.get_ylabel() or ax.get_ylabel() == ""
    assert as_csv(datasets) == as_csv({label: study.measure(source) for label, source in sources.items()})
    assert as_json(name, datasets, sentences)


@pytest.mark.parametrize("name", STUDIES)
def test_a_run_without_what_is_needed_says_so_in_one_line(name: str, synthetic: ModuleType) -> None:
    study = load_study(name)
    empty = synthetic.Run("empty", {})
    source = empty if study.scope == "run" else synthetic.Sweep("s", {"arms/a/0": empty}, {"arms/a/0": "arm"}, {})
    reason = study.unavailable(source)
    assert reason
    assert "\n" not in reason


# Nothing happens over time in width-scaling.
OVER_TIME = [name for name in STUDIES if load_study(name).scope == "run" and name != "width-scaling"]


@pytest.mark.parametrize("name", OVER_TIME)
def test_one_unnamed_set_and_no_epochs(name: str, synthetic: ModuleType) -> None:
    study = load_study(name)
    source = synthetic.run(sets=("",), steps_per_epoch=None)
    if name == "kernel-velocity":
        assert "length of an epoch is not known" in study.unavailable(source)
        return
    dataset = study.measure(source)
    figure = plots.new_figure()
    study.draw(figure, {"run": dataset})
    assert any("steps" in ax.get_xlabel() for ax in figure.axes)
    assert "probe set" not in " ".join(study.sentences({"run": dataset}))


def test_kernel_distance_known_answers(synthetic: ModuleType) -> None:
    source = synthetic.run(sets=("test",))
    for step in range(len(source.arrays["ntk/test/kernel"])):
        source.arrays["ntk/test/kernel"][step] = [[2, 0] * 5, [0, 2] * 5] * 5
    source.arrays["ntk/test/kernel"][0] = 2 * np.eye(10)
    dataset = load_study("kernel-distance").measure(source).sel(set="test")
    expected = 1 - 2 * 10 / (np.sqrt(10) * np.sqrt(50) * 2)
    assert dataset["to_start_uncentered"].values[-1] == pytest.approx(expected)
    assert dataset["to_end"].values[-1] == 0
    assert dataset["constant_share"].values[0] == pytest.approx(0.1)


@pytest.mark.parametrize("reduction", ["full", "each", "layers"])
def test_every_reduction_gives_the_trace_kernel(reduction: str, synthetic: ModuleType) -> None:
    source, reference = synthetic.run(sets=("test",)), synthetic.run(sets=("test",))
    kernels = reference.arrays["ntk/test/kernel"]
    parts = np.stack([0.25 * kernels, 0.75 * kernels], axis=1)
    if reduction == "layers":
        del source.arrays["ntk/test/kernel"]
        source.arrays["ntk/test/layers"] = parts
    elif reduction == "each":
        source.arrays["ntk/test/kernel"] = parts
    else:
        full = np.ones((*kernels.shape, 2, 2))
        full[..., 0, 0], full[..., 1, 1] = parts[:, 0], parts[:, 1]
        source.arrays["ntk/test/kernel"] = full
    study = load_study("kernel-distance")
    xr.testing.assert_allclose(study.measure(source), study.measure(reference), atol=1e-6)


def test_velocity_needs_pairs_at_one_dt(synthetic: ModuleType) -> None:
    study = load_study("kernel-velocity")
    source = synthetic.run()
    assert study.measure(source).attrs["dt_epochs"] == 0.25
    source.dt_steps = None
    assert "no paired snapshots at one fixed dt" in study.unavailable(source)
    source.dt_steps = 999
    assert "dt = 999" in study.unavailable(source)


def test_gates_that_never_move_show_what_is_open(synthetic: ModuleType) -> None:
    study = load_study("gates")
    sentences = study.sentences({"run": study.measure(synthetic.run())})
    assert "no slope moved" in sentences[-1]


def test_one_slope_for_a_layer_counts_for_every_channel(synthetic: ModuleType) -> None:
    source = synthetic.run(moving=True)
    for name in [name for name in source.arrays if name.endswith(("/slope", "/frozen"))]:
        source.arrays[name] = source.arrays[name][:, :1]
    assert load_study("gates").measure(source).sizes["unit"] == sum(synthetic.GATES.values())


def test_units_list_what_is_in_no_count(synthetic: ModuleType) -> None:
    study = load_study("units")
    sentences = study.sentences({"run": study.measure(synthetic.run())})
    assert "head.gelu (GELU)" in sentences[1]
    assert "pool (MaxPool2d)" in sentences[1]


def test_advantage_finds_the_gap_that_was_put_in(synthetic: ModuleType, sweep: Any) -> None:
    study = load_study("advantage")
    dataset = study.measure(sweep)
    hard = dataset.sel(task="sum10", line="survivors common")
    assert float(hard["gap"]) == pytest.approx(15, abs=0.7)
    assert bool(hard["primary"])
    assert np.isnan(hard["adjusted_p"])
    for other in (dataset.sel(task="sum10", line="survivors keep"), dataset.sel(task="first", line="survivors common")):
        assert not bool(other["primary"])
        assert float(other["adjusted_p"]) >= float(other["p"])
    verdict = study.verdict({"sweep": dataset})
    assert verdict[0].startswith("sum10")  # nonlinearity is worth most there
    assert "ends higher" in verdict[0]
    assert "primary comparison by default, as no plan names one, sign flips p = " in verdict[0]
    assert "first" in verdict[1]
    assert "exploratory, adjusted over 15 comparisons p = " in verdict[1]
    assert sum("primary comparison" in line for line in study.sentences({"sweep": dataset})) == 1


def _planned(source: Any, of: dict[str, Any], minus: dict[str, Any], margin: float | None) -> PrimaryComparison:
    """A comparison of two arms of the task sum10 as a plan names it."""
    sides = []
    for settings in (of, minus):
        wanted = {"task": "sum10", "intervention": "linearize", "budget": "total", "data_order": 0} | settings
        (folder,) = {
            name.rsplit("/", 1)[0]
            for name, run in source.runs.items()
            if all(run.config[key] == value for key, value in wanted.items())
        }
        sides.append(folder)
    return PrimaryComparison("test_accuracy", of, minus, {}, sides[0], sides[1], margin)


def _one_folder_a_configuration(source: Any) -> Any:
    """The synthetic runs numbered as a real sweep: seeds of one configuration in one folder."""
    folders: dict[str, str] = {}
    names = {}
    for name, run in source.runs.items():
        kind = source.kinds[name]
        key = kind + repr(sorted(run.config.items()))
        names[name] = f"{folders.setdefault(key, f'{kind}s/{len(folders):012x}')}/{run.seed}"
    source.runs = {names[name]: run for name, run in source.runs.items()}
    source.kinds = {names[name]: kind for name, kind in source.kinds.items()}
    source.parents = {names[name]: names[parent] for name, parent in source.parents.items()}
    return source


def test_the_comparison_that_the_plan_names_is_the_primary_one(synthetic: ModuleType) -> None:
    source = _one_folder_a_configuration(synthetic.sweep(seeds=6))
    keep = {"survivors": "keep", "mask": "learned"}
    source.primary = _planned(source, keep | {"start_epoch": 4}, keep | {"start_epoch": 0}, margin=3.0)
    study = load_study("advantage")
    dataset = study.measure(source)
    assert bool(dataset["primary"].sel(task="sum10", line="survivors keep"))
    assert not bool(dataset["primary"].sel(task="sum10", line="survivors common"))
    assert float(dataset["planned_mean"]) == pytest.approx(
        float(dataset["gap"].sel(task="sum10", line="survivors keep"))
    )
    verdict = study.verdict({"s": dataset})
    assert verdict[0].startswith("sum10 (survivors keep;")
    assert "no gap beyond 3 points" in verdict[0]
    assert "primary comparison named in the plan, sign flips p = 0.031" in verdict[0]
    contrasts = load_study("controls").measure(source)
    assert int(np.nansum(contrasts["contrast_primary"].sel(task="sum10"))) == 1


def test_a_planned_comparison_that_is_no_gap_is_said_by_itself(synthetic: ModuleType) -> None:
    source = _one_folder_a_configuration(synthetic.sweep(seeds=6))
    late = {"start_epoch": 4, "survivors": "common"}
    source.primary = _planned(source, late | {"mask": "learned"}, late | {"mask": "random"}, margin=None)
    study = load_study("advantage")
    dataset = study.measure(source)
    assert not dataset["primary"].values[np.isfinite(dataset["primary"].values)].any()
    verdict = study.verdict({"s": dataset})
    assert verdict[0].startswith(f"Primary comparison named in the plan, {source.primary}: +16")
    assert "n = 6; sign flips p = 0.031)" in verdict[0]
    assert "exploratory, adjusted over" in verdict[1]


def test_a_negative_gap_is_said_as_such(synthetic: ModuleType) -> None:
    study = load_study("advantage")
    dataset = study.measure(synthetic.sweep(gaps={"sum10": -9.0}, controls=False))
    assert "ends lower" in study.verdict({"sweep": dataset})[0]


def test_divergence_is_reported_as_divergence(synthetic: ModuleType) -> None:
    study = load_study("advantage")
    dataset = study.measure(synthetic.sweep(seeds=4, controls=False, diverged=frozenset({("sum10", 0, 1)})))
    hard = dataset.sel(task="sum10", line="survivors common")
    assert (int(hard["gap_n"]), int(hard["gap_diverged"])) == (3, 1)
    sentences = study.sentences({"sweep": dataset})
    assert "1 runs on sum10 diverged; they are in no mean and no gap." in sentences


def test_another_varied_setting_splits_the_lines(synthetic: ModuleType) -> None:
    study = load_study("advantage")
    source = synthetic.sweep(controls=False, gaps={"sum10": 5.0})
    for name, one in list(source.runs.items()):
        if source.kinds[name] == "arm":
            other = synthetic.Run(one.name, one.arrays, one.config | {"strength": 8.0}, one.seed, one.results)
            source.runs[f"x{name}"], source.kinds[f"x{name}"] = other, "arm"
    lines = study.measure(source)["line"].values.tolist()
    assert lines == ["survivors common, strength = 4.0", "survivors common, strength = 8.0"]


def test_controls_two_by_two(sweep: Any) -> None:
    study = load_study("controls")
    dataset = study.measure(sweep)
    means = dataset["contrast_mean"].sel(task="sum10")
    assert float(means.sel(contrast="learned: late - early")) == pytest.approx(15, abs=0.7)
    assert float(means.sel(contrast="random: late - early")) == pytest.approx(-1, abs=0.7)
    assert float(means.sel(contrast="interaction: learned - random")) == pytest.approx(16, abs=0.9)
    assert float(means.sel(contrast="equal epochs after switch: late - early")) == pytest.approx(19, abs=0.7)
    assert any("count and nonlinearity are matched" in line for line in study.sentences({"s": dataset}))
    assert study.tables({"s": dataset})[1].rows[0][0] == "learned, early"


def test_drift_gap_prints_its_baseline_and_does_not_judge_few_seeds(synthetic: ModuleType, sweep: Any) -> None:
    study = load_study("drift-gap")
    dataset = study.measure(sweep)
    hard = dataset.sel(task="sum10", set="test")
    assert float(hard["pooled"].sel(drift="remaining")) < -0.8
    assert float(hard["start_only"].sel(drift="remaining")) > 0.8
    text = " ".join(study.sentences({"s": dataset}))
    assert "the start epoch alone gives" in text
    assert "cannot be judged: 3 seeds, at least 10 are needed" in text
    few = study.measure(synthetic.sweep(starts=(0, 4), controls=False))
    assert "no correlation can be judged: 2 start epochs" in study.sentences({"s": few})[0]


def test_reference_levels_stand_beside_the_distances(sweep: Any) -> None:
    dataset = load_study("reference-levels").measure(sweep)
    assert dataset.sizes["pair"] == 3
    assert np.isfinite(dataset["children"].values).any()
    study = load_study("kernel-distance")
    trunk = next(run for name, run in sweep.runs.items() if sweep.kinds[name] == "trunk")
    joined = study.in_sweep(sweep, "sum10", {"trunk": study.measure(trunk)})
    assert {"level_children", "level_seeds"} <= set(joined["trunk"].data_vars)


def test_csv_is_tidy_and_keeps_every_digit() -> None:
    dataset = xr.Dataset(
        {"a": ("step", [0.1 + 0.2, np.nan], {"units": "1/epoch"}), "b": ((), np.float32(0.1))},
        coords={"step": [0, 5], "epoch": ("step", [0.0, 1.25])},
    )
    lines = as_csv({"run, one": dataset}).decode().splitlines()
    assert lines[0] == "run,variable,unit,epoch,step,value"
    assert lines[1] == '"run, one",a,1/epoch,0.0,0,0.30000000000000004'
    assert lines[2] == '"run, one",a,1/epoch,1.25,5,'
    assert lines[3] == '"run, one",b,1,,,0.1'
    assert b'"values":[0.30000000000000004,null]' in as_json("x", {"run": dataset}, [])
