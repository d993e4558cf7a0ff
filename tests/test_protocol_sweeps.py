"""Real sweeps of the experiments that have a study of their own, tiny: what `ntkdyn analyze` makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ntkdyn import report
from ntkdyn.plugins import installed, load_study
from ntkdyn.results import Sweep

# Arms of such short runs have no time to recover, as the settings say.
pytestmark = pytest.mark.filterwarnings("ignore:start_epoch=:RuntimeWarning")

SIZES = {
    "collapse": {"network": 5},
    "core-network": {"start": 2, "contrast": 1},
    "layerwise-vs-channelwise": {"granularity": 2, "remaining": 1},
    "linearized-training": {"child": 2, "start_epoch": 2},
}
OF_SWEEPS = [name for name in sorted(installed("ntkdyn.studies")) if load_study(name).scope == "sweep"]


def analyzed(experiment: str, sweep: Sweep, out: Path, only: list[str]) -> None:
    dataset = sweep.analyze(experiment)
    assert {name: dataset.sizes[name] for name in SIZES[experiment]} == SIZES[experiment]
    written = report.analyze([sweep], out, only=only)
    assert (out / f"{experiment}.png").stat().st_size > 1000
    for name, reason in written.unavailable.items():
        # Said politely, and never for a mistake of ours.
        assert "\n" not in reason
        assert "Error: " not in reason, name
    assert "What was recorded" in written.path.read_text(encoding="utf-8")


@pytest.mark.parametrize("experiment", SIZES)
def test_a_report_of_each(experiment: str, small_sweep: Callable[[str], Path], tmp_path: Path) -> None:
    sweep = Sweep.open(small_sweep(experiment))
    analyzed(experiment, sweep, tmp_path, OF_SWEEPS)
    # Both are there although an experiment has a setting of the same name.
    assert set(sweep.table["kind"]) == {"trunk", "arm"}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", SIZES)
def test_a_report_of_each_with_all_studies(experiment: str, small_sweep: Callable[[str], Path], tmp_path: Path) -> None:
    analyzed(experiment, Sweep.open(small_sweep(experiment)), tmp_path, [])


def test_known_answers_of_real_sweeps(small_sweep: Callable[[str], Path]) -> None:
    collapse = Sweep.open(small_sweep("collapse")).analyze("collapse").sel(group="sum10")
    napl = dict(zip(collapse["network"].values.tolist(), collapse["napl"].values[:, 0], strict=True))
    assert napl["dense"] == pytest.approx(2)
    assert napl["remaining 0.5"] == pytest.approx(1)
    assert napl["from scratch, depth 1"] == pytest.approx(1)
    assert np.isfinite(collapse["difference_mean"].sel(length="napl", network="from scratch, depth 1"))
    drift = Sweep.open(small_sweep("linearized-training")).analyze("linearized-training")["drift"]
    assert (drift.values > 0).all()
    core = Sweep.open(small_sweep("core-network")).analyze("core-network")
    np.testing.assert_array_equal(core["active_of_layer"].sum("layer").values, core["active_units"].values)
