"""Compaction: a run stays a few files, and nothing but the number of files changes."""

from __future__ import annotations

import errno
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntkdyn.probe import Field
from ntkdyn.store import compact, files
from ntkdyn.store.reader import RunReader, Source
from ntkdyn.store.repair import repair, verify
from ntkdyn.store.writer import RunWriter


def kernel(step: int) -> np.ndarray[Any, Any]:
    features = np.random.default_rng(step).standard_normal((5, 3))
    product = (features @ features.T).astype("f4")
    # Some rows are no triangles.
    product[0, 1] += step % 7 == 3
    return product


def begin(path: Path) -> RunWriter:
    writer = RunWriter(path, {})
    writer.declare("ntk/test", [Field(name="kernel", dims=("sample", "sample_2"), shape=(5, 5))])
    writer.declare("units", [Field(name="active", dtype="i8"), Field(name="total", dtype="i8", static=True),
                             Field(name="note", dtype="str")])  # fmt: skip
    return writer


def record(writer: RunWriter, steps: range) -> None:
    for step in steps:
        records: dict[str, dict[str, Any]] = {"units": {"active": 100 - step, "total": 100, "note": f"é{step}"}}
        if step % 3 == 0:
            records["ntk/test"] = {"kernel": kernel(step)}
        assert writer.commit(step, step / 10, records, seconds={"units": 0.5})


def check(path: Path, steps: int, *, twice: bool = False) -> None:
    reader = RunReader.open(path)
    assert reader.steps("units").tolist() == list(range(steps))
    assert reader.steps("ntk/test").tolist() == list(range(0, steps, 3))
    assert reader.epochs("units").tolist() == [step / 10 for step in range(steps)]
    assert reader.read("units/active").tolist() == [100 - step for step in range(steps)]
    assert reader.read("units/note").tolist() == [f"é{step}" for step in range(steps)]
    assert reader.read("units/total") == 100
    assert np.array_equal(reader.read("ntk/test/kernel"), [kernel(step) for step in range(0, steps, 3)])
    costs = compact.costs_of(reader.sources)["costs"]
    # What lies twice is counted twice, until it is removed.
    assert costs["units"][:2] == [steps, steps / 2] or (twice and costs["units"][0] > steps)


def test_segments_merge_in_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "FAN", 4)
    writer = begin(tmp_path / "run")
    most = 0
    for step in range(90):
        record(writer, range(step, step + 1))
        most = max(most, len(list((tmp_path / "run" / "segments").iterdir())))
    assert most <= 3 * 4
    names = sorted(entry.name for entry in (tmp_path / "run" / "segments").iterdir())
    assert "seg-0-000000000000-000000000063.h5" in names
    check(tmp_path / "run", 90)
    assert verify(tmp_path / "run") == []
    writer.close()
    check(tmp_path / "run", 90)


def test_ten_thousand_snapshots_are_at_most_two_hundred_files() -> None:
    counts = [10_000 // compact.FAN**level % compact.FAN for level in range(5)]
    assert max(3 * (compact.FAN - 1), sum(counts)) + 10 <= 200


@pytest.mark.parametrize("function", ["create", "write", "fsync", "replace", "sync_folder", "unlink"])
def test_a_disk_that_refuses_while_merging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    monkeypatch.setattr(compact, "FAN", 4)
    writer = begin(tmp_path / "run")
    record(writer, range(3))
    real = getattr(files, function)
    merge = compact.merge

    def failing(*arguments: Any, **keywords: Any) -> bool:
        def refuse(*_: Any) -> None:
            raise files.StorageError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(files, function, refuse)
            return merge(*arguments, **keywords)

    monkeypatch.setattr(compact, "merge", failing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        record(writer, range(3, 14))
    assert len(caught) == (function != "unlink")
    assert all("the segments stay as they are, training goes on" in str(one.message) for one in caught)
    monkeypatch.setattr(compact, "merge", merge)
    monkeypatch.setattr(files, function, real)
    record(writer, range(14, 20))
    check(tmp_path / "run", 20, twice=True)
    writer.close(pack=False)
    repair(tmp_path / "run")
    check(tmp_path / "run", 20)


def test_inputs_that_could_not_be_removed_are_found_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "FAN", 4)
    writer = begin(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(files, "unlink", lambda path: None)
        record(writer, range(9))
    writer.close(pack=False)
    check(tmp_path / "run", 9, twice=True)
    problems = verify(tmp_path / "run")
    assert problems
    assert all(one.harmless and "in another file too" in one.problem for one in problems)
    done = repair(tmp_path / "run")
    assert len(done) == len(problems) == 8
    assert repair(tmp_path / "run") == ()
    check(tmp_path / "run", 9)


def test_a_damaged_segment_is_not_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "FAN", 4)
    writer = begin(tmp_path / "run")
    record(writer, range(3))
    segment = tmp_path / "run" / "segments" / "seg-0-000000000001-000000000001.h5"
    content = bytearray(segment.read_bytes())
    content[content.index("é1".encode())] ^= 1
    segment.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"seg-0-000000000001.*the segments stay as they are"):
        record(writer, range(3, 4))
    record(writer, range(4, 8))
    assert len(list((tmp_path / "run" / "segments").glob("*.h5"))) == 8
    writer.close(pack=False)
    done = repair(tmp_path / "run")
    assert any("moved to quarantine" in line for line in done)
    assert RunReader.open(tmp_path / "run").steps("units").tolist() == [0, 2, 3, 4, 5, 6, 7]
    assert (tmp_path / "run" / "quarantine" / segment.name).exists()


def test_merging_wants_one_branch_and_rising_steps(tmp_path: Path) -> None:
    writer = begin(tmp_path / "run")
    record(writer, range(4))
    sources = [Source.open(path) for path in sorted((tmp_path / "run" / "segments").glob("*.h5"))]
    target = tmp_path / "merged.h5"
    # The second source has no static arrays, which would have to be kept.
    compact.merge(sources[1:2], target, level=1, keep=lambda source, step: False)
    assert not target.exists()
    compact.merge(sources[::-1], target, level=1, keep=lambda source, step: step != 2)
    assert Source.open(target).axes["units"][0].tolist() == [0, 1, 3]
