"""Lazy arrays: the same numbers as the whole, read snapshot by snapshot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntkdyn.errors import DamagedRecording, UnknownName
from ntkdyn.probe import Field
from ntkdyn.results import Run
from ntkdyn.store import compact, segment
from ntkdyn.store.writer import RunWriter


@pytest.fixture(params=["live", "packed"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(compact, "FAN", 4)
    writer = RunWriter(tmp_path / "run", {})
    fields = [Field(name="kernel", dims=("sample", "sample_2"), shape=(5, 5)), Field(name="note", dtype="str"),
              Field(name="n", static=True)]  # fmt: skip
    writer.declare("ntk", fields)
    for step in range(0, 20, 2):
        kernel = np.full((5, 5), step, "f4")
        writer.commit(step, None, {"ntk": {"kernel": kernel, "note": f"s{step}", "n": 1}})
    writer.close(pack=request.param == "packed")
    return Run.open(tmp_path / "run")


def test_it_indexes_as_the_whole_does(run: Run) -> None:
    whole, lazy = run["ntk/kernel"], run.lazy("ntk/kernel")
    assert lazy.shape == whole.shape == (10, 5, 5)
    assert lazy.dtype == whole.dtype
    assert lazy.dims == ("step", "sample", "sample_2")
    assert (len(lazy), lazy.ndim) == (10, 3)
    cases: list[Any] = [
        0, -1, np.int64(3), slice(None), slice(2, 7), slice(8, 1, -3), slice(4, 4), [5, 1, 5], [], np.array([2, 0]),
        np.arange(10) > 6, (3, 1), (3, slice(1, 3), 2), (slice(1, 4), 0), ([4, 2], slice(None), 1), ..., (..., 0),
    ]  # fmt: skip
    for index in cases:
        assert np.array_equal(lazy[index], whole[index]), index
    assert np.array_equal(np.asarray(lazy), whole)
    assert np.asarray(lazy, dtype="f8").dtype == np.float64
    assert [float(row[0, 0]) for row in lazy] == list(range(0, 20, 2))
    assert run.lazy("ntk/note")[[3, 1]].tolist() == ["s6", "s2"]
    assert repr(lazy) == "<RecordedArray ntk/kernel [step=10, sample=5, sample_2=5] float32>"


def test_steps_are_found(run: Run) -> None:
    lazy = run.lazy("ntk/kernel")
    assert lazy.at(step=6)[0, 0] == 6
    with pytest.raises(UnknownName, match=r"not recorded at step 7; nearest are \[6, 8\]"):
        lazy.at(step=7)
    with pytest.raises(UnknownName, match=r"nearest are \[18\]"):
        lazy.at(step=99)
    with pytest.raises(UnknownName, match="has no steps"):
        run.lazy("ntk/n")
    with pytest.raises(UnknownName, match="found no array"):
        run.lazy("ntk/other")
    for index in (10, -11, [10]):
        with pytest.raises(IndexError):
            lazy[index]


def test_only_what_is_asked_for_is_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = segment.row_crc

    def counting(path: str, field: Field, step: int | None, row: Any) -> int:
        seen.append((path, step))
        return real(path, field, step, row)

    lazy = run.lazy("ntk/kernel")
    monkeypatch.setattr(segment, "row_crc", counting)
    assert lazy[[3, 8]].shape == (2, 5, 5)
    assert sorted(seen) == [("ntk/kernel", 6), ("ntk/kernel", 16)]

    def wrong(path: str, field: Field, step: int | None, row: Any) -> int:
        return real(path, field, step, row) ^ 1

    monkeypatch.setattr(segment, "row_crc", wrong)
    with pytest.raises(DamagedRecording, match="'ntk/kernel' at step 6"):
        lazy[3]
