"""Files and versions that runs are made by: written beside the plan, compared when a sweep goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from ntkdyn import Sweep
from ntkdyn.store.manifest import encode_manifest, read_manifest
from ntkdyn.sweep import make_plan, run_sweep
from ntkdyn.sweep.sources import sources_of

TINY = Path(__file__).parent / "tiny_experiment.py"


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_changed_file_is_told_when_a_sweep_goes_on(tmp_path: Path) -> None:
    """Runs of two versions of somebody's own network stood side by side without a word."""
    file, out = tmp_path / "own.py", tmp_path / "out"
    shutil.copy(TINY, file)
    plan = make_plan(f"{file}:Tiny", settings=["kind=trunk"], seeds=2)
    run_sweep(plan, out, jobs=1)
    before = sha256(file)
    assert json.loads((out / "sweep.json").read_bytes())["sources"] == {str(file): before}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(run_sweep(plan, out, jobs=1).kept) == 2
    file.write_text(file.read_text() + "\n")
    with pytest.warns(RuntimeWarning, match=f"{file} has changed .* {before[:12]}, now {sha256(file)[:12]}") as said:
        run_sweep(make_plan(f"{file}:Tiny", settings=["kind=trunk"], seeds=2), out, jobs=1)
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    assert len(Sweep.open(out).runs) == 2


def test_other_versions_are_told(tmp_path: Path) -> None:
    plan, out = make_plan(f"{TINY}:Tiny", settings=["kind=trunk"], seeds=2), tmp_path / "out"
    run_sweep(plan, out, jobs=1)
    run = out / plan.runs[0].run
    (run / "run.json").write_bytes(encode_manifest(read_manifest(run) | {"torch": "1.0", "ntkdyn": "0.0.1"}))
    with pytest.warns(RuntimeWarning) as said:
        run_sweep(plan, out, jobs=1)
    lines = [str(one.message) for one in said]
    assert len(lines) == 2
    assert "1 of 2 kept runs were made by ntkdyn 0.0.1; this is" in lines[0]
    assert "1 of 2 kept runs were made by torch 1.0; this is" in lines[1]


def test_models_and_arrays_are_sources_too(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {name: generator.normal(size=(8, 3)).astype(np.float32) for name in ("x_train", "x_test")}
    arrays |= {name: np.arange(8) % 2 for name in ("y_train", "y_test")}
    np.savez(tmp_path / "own.npz", **arrays)
    (tmp_path / "net.py").write_text("def build(inputs, outputs): ...\n")
    settings = ["batch_size=4", f"data={tmp_path / 'own.npz'}", f"model={tmp_path / 'net.py'}:build"]
    plan = make_plan("nonlinear-advantage", settings=settings)
    assert sources_of(plan) == {str(file): sha256(file) for file in (tmp_path / "net.py", tmp_path / "own.npz")}
    assert sources_of(make_plan("nonlinear-advantage")) == {}


def test_own_probes_are_sources_too(tmp_path: Path) -> None:
    probe, file = tmp_path / "probe.py", tmp_path / "plan.toml"
    probe.write_text("class Mine:\n    name = 'mine'\n    def fields(self, s): ...\n    def measure(self, s): ...\n")
    file.write_text(f"[record]\nprobes = ['ntk']\n[record.trunks]\nprobes = ['{probe}:Mine']\n")
    assert sources_of(make_plan(f"{TINY}:Tiny", file=file)) == {str(one): sha256(one) for one in sorted((TINY, probe))}
