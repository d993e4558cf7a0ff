"""The experiment width-scaling: what it records, with and without the analytic kernel."""

from __future__ import annotations

import importlib.util
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ntkdyn as nd
from ntkdyn.configuration import configure
from ntkdyn.datasets import stream_seed
from ntkdyn.errors import ConfigurationError
from ntkdyn.experiment import run_experiment
from ntkdyn.experiments.networks import GatedMLP
from ntkdyn.experiments.width_scaling import WidthScaling, WidthScalingConfig
from ntkdyn.results import Run

SMALL = {"widths": [8, 16, 32], "fit_from": 8, "initializations": 4, "probe_per_class": 1}
INSTALLED = all(importlib.util.find_spec(name) for name in ("jax", "neural_tangents"))


def record(path: Path, seed: int = 0, **settings: Any) -> Run:
    config = configure(WidthScalingConfig, SMALL | settings)
    run_experiment(WidthScaling(), config, seed=seed, path=path)
    return Run.open(path)


@pytest.fixture
def without_theory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "neural_tangents"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "neural_tangents", None)


@pytest.mark.usefixtures("without_theory")
def test_without_the_extra_the_spread_is_measured_and_it_says_so(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"spread over initializations only, .* pip install --no-deps neural-tan"):
        run = record(tmp_path / "run", parametrization="standard")
    assert run["widths/hidden_units"][0].tolist() == [8, 16, 32]
    assert run["widths/kernel"].shape == (1, 3, 4, 10, 10)
    assert "widths/analytic" not in run
    # The recorded network is number 0 of the widest.
    np.testing.assert_allclose(run["widths/kernel"][0, -1, 0], run["ntk/kernel"][0], rtol=1e-5)
    assert -1.5 < run.results["spread_slope"] < 0
    assert run.results["spread_slope_low"] < run.results["spread_slope"] < run.results["spread_slope_high"]
    assert math.isnan(run.results["deviation_slope"])
    assert "no analytic kernel" in " ".join(_sentences(run))


@pytest.mark.usefixtures("without_theory")
def test_seeds_draw_other_networks_and_the_same_again(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, again, other = (record(tmp_path / str(n), seed) for n, seed in enumerate((0, 0, 1)))
        gated = record(tmp_path / "gated", slope=0.5)
    assert np.array_equal(first["widths/kernel"], again["widths/kernel"])
    assert not np.isclose(first["widths/kernel"], other["widths/kernel"]).any()
    assert not np.isclose(first["widths/kernel"], gated["widths/kernel"]).any()
    draws = first["widths/kernel"][0, :, :, 0, 0].ravel()
    assert len(np.unique(draws)) == len(draws)


@pytest.mark.usefixtures("without_theory")
def test_ntk_parametrization_weighs_the_layers(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = record(tmp_path / "ntk")
        standard = record(tmp_path / "standard", parametrization="standard")
    assert run.field("widths/kernel").attributes["parametrization"] == "ntk"
    inputs = torch.from_numpy(run["probe_sets/inputs"])
    torch.manual_seed(stream_seed(0, 16, 2))
    model = GatedMLP(128, 10, width=16, depth=3)
    parts = nd.empirical_ntk(model, inputs, per="parameter")
    weights = {name: part for name, part in parts.items() if name.endswith("weight")}
    scaled = sum(2 / (128 if name.startswith("linear1") else 16) * part.numpy() for name, part in weights.items())
    np.testing.assert_allclose(run["widths/kernel"][0, 1, 2], scaled, rtol=1e-4)
    whole = sum(part.numpy() for name, part in parts.items() if not name.endswith("slope"))
    np.testing.assert_allclose(standard["widths/kernel"][0, 1, 2], whole, rtol=1e-4)


@pytest.mark.skipif(not INSTALLED, reason="needs the extra theory and neural-tangents")
def test_deviation_from_the_analytic_kernel(tmp_path: Path) -> None:
    run = record(tmp_path / "run", widths=[32, 128, 512], fit_from=32, initializations=8, slope=0.25)
    assert run["widths/analytic"].shape == (1, 3, 10, 10)
    values = run.analyze("width_scaling")
    assert float(values["deviation_slope"]) == pytest.approx(run.results["deviation_slope"])
    # Both fall alike: the mean over draws goes to the analytic kernel.
    assert values["deviation"].values == pytest.approx(values["spread"].values, rel=0.5)
    assert run.results["deviation_slope"] == pytest.approx(-0.5, abs=0.25)
    assert "falls as width to the power" in _sentences(run)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": [16]}, "setting 'widths': found [16], expected two or more widths, increasing from 1 on"),
        ({"widths": [32, 16]}, "expected two or more widths, increasing from 1 on"),
        ({"widths": [0, 16, 64, 128]}, "setting 'widths': found [0, 16, 64, 128], expected two or more widths"),
        ({"widths": [16, 32, 64]}, "setting 'fit_from': found 64, expected at most the second largest width, 32"),
        ({"initializations": 2}, "setting 'initializations': found 2, expected greater than or equal to 3"),
        ({"slope": 1.0}, "setting 'slope': found 1.0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        configure(WidthScalingConfig, settings)
    assert message in str(caught.value)


def _sentences(run: Run) -> list[str]:
    from ntkdyn.studies.width_scaling import WidthScaling as Study

    study = Study()
    return study.sentences({"run": study.measure(run)})
