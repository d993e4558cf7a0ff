"""A small recording that has everything: two step axes, nested groups, static arrays, text, an empty axis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntkdyn.probe import Field
from ntkdyn.store import verify
from ntkdyn.store.writer import RunWriter

KERNEL_STEPS = [0, 4, 8]
GATE_STEPS = [0, 3, 4, 9]


def _kernel(step: int) -> np.ndarray[Any, Any]:
    features = np.random.default_rng(step).standard_normal((6, 4))
    return (features @ features.T).astype("f4")


@pytest.fixture
def kernel_at() -> Callable[[int], np.ndarray[Any, Any]]:
    """The recorded kernel of a step."""
    return _kernel


@pytest.fixture
def start() -> Callable[[Path], RunWriter]:
    """Open a writer and declare the groups."""

    def begin(path: Path) -> RunWriter:
        writer = RunWriter(path, {"experiment": "demo", "seed": 3, "config": {"width": 8, "api_key": "geheim"}})
        kernel = Field(name="kernel", dims=("sample", "sample_2"), shape=(6, 6), attributes={"reduce": "trace"})
        writer.declare("ntk/test", [kernel], attributes={"engine": "layerwise"})
        names = ["trunk.0", "trunk.2"]
        writer.declare(
            "gates/test",
            [
                Field(name="share", dims=("gate",), shape=(2,), dtype="f8", coordinates={"gate": names}),
                Field(name="trunk.0/slope", dims=("channel",), shape=(3,), long_name="slope"),
                Field(name="trunk.0/frozen", dims=("channel",), shape=(3,), dtype="?"),
                Field(name="trunk.2/slope", dims=("channel",), shape=(5,)),
                Field(name="trunk.2/nothing", dims=("none",), shape=(0,)),
                Field(name="total", dims=("gate",), shape=(2,), dtype="i8", static=True),
                Field(name="mean"),
            ],
        )
        writer.write_arrays(
            {"probe_sets/test": {"targets": np.eye(6, 3), "label": np.array(["a", "ü", "c"])}},
            dims={"probe_sets/test/targets": ("sample", "class"), "probe_sets/test/label": ("class",)},
            attributes={"probe_sets/test": {"dataset": "digits"}},
        )
        return writer

    return begin


def _records(step: int) -> dict[str, dict[str, Any]]:
    records: dict[str, dict[str, Any]] = {}
    if step in KERNEL_STEPS:
        records["ntk/test"] = {"kernel": _kernel(step)}
    if step in GATE_STEPS:
        records["gates/test"] = {
            "share": [step, 0.5],
            "trunk.0/slope": [0.0, 0.1 * step, 1.0],
            "trunk.0/frozen": [False, False, step > 3],
            "trunk.2/slope": np.full(5, step),
            "trunk.2/nothing": [],
            "total": [3, 5],
            "mean": 0.25 * step,
        }
    return records


@pytest.fixture
def records() -> Callable[[int], dict[str, dict[str, Any]]]:
    """What is recorded at a step."""
    return _records


@pytest.fixture
def live(tmp_path: Path, start: Callable[[Path], RunWriter]) -> RunWriter:
    """A writer with all steps committed, not closed."""
    writer = start(tmp_path / "run")
    for step in sorted({*KERNEL_STEPS, *GATE_STEPS}):
        assert writer.commit(step, step / 4, _records(step))
    return writer


@pytest.fixture
def packed(live: RunWriter) -> Path:
    """The folder of a packed run."""
    live.close(results={"accuracy": 0.5, "gap": float("nan")})
    return live.path


@pytest.fixture
def as_stranger() -> Callable[[], None]:
    """Forget which files this process has written or checked."""
    return verify._sound.clear
