"""run.json: its checksum, and what becomes of one that was edited."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ntkdyn.errors import ConfigurationError, DamagedRecording, EditedManifest
from ntkdyn.probe import Field
from ntkdyn.results import Sweep
from ntkdyn.store import prune, repair
from ntkdyn.store.manifest import encode_manifest, read_manifest
from ntkdyn.store.reader import RunReader
from ntkdyn.store.writer import RunWriter
from ntkdyn.sweep import run_status

ENTRIES = {"config": {"rate": 0.25, "note": "é NaN"}, "seed": 3, "results": {"gap": float("nan")}}


def record(path: Path, *, pack: bool = True) -> Path:
    writer = RunWriter(path, ENTRIES)
    writer.declare("p", [Field(name="x")])
    for step in range(3):
        writer.commit(step, None, {"p": {"x": step}})
    writer.close(pack=pack, results={"gap": 0.5})
    return path


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    entries = json.loads((path / "run.json").read_text())
    change(entries)
    (path / "run.json").write_text(json.dumps(entries))


def test_every_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    content = encode_manifest(ENTRIES)
    target = tmp_path / "run.json"
    target.write_bytes(content)
    expected = read_manifest(tmp_path)
    noticed = older = 0
    for bit in range(8 * len(content)):
        spoiled = bytearray(content)
        spoiled[bit // 8] ^= 1 << bit % 8
        target.write_bytes(spoiled)
        try:
            found = read_manifest(tmp_path)
        except DamagedRecording:
            noticed += 1
            continue
        if repr(found) != repr(expected):
            # The name of the checksum was hit, so that it reads like one of before, with a strange entry more.
            older += 1
            assert [repr(found.pop(name)) for name in expected] == [repr(value) for value in expected.values()]
            assert len(found) == 1
    assert noticed > 7 * len(content)
    assert older <= 8 * len("crc32")


def test_layout_is_free(tmp_path: Path) -> None:
    record(tmp_path / "run")
    edit(tmp_path / "run", lambda entries: None)
    assert RunReader.open(tmp_path / "run").manifest["config"] == ENTRIES["config"]
    assert repair.verify(tmp_path / "run") == []


def test_manifests_of_before_have_none(tmp_path: Path) -> None:
    record(tmp_path / "run")
    edit(tmp_path / "run", lambda entries: entries.pop("crc32"))
    edit(tmp_path / "run", lambda entries: entries.update(seed=4))
    assert RunReader.open(tmp_path / "run").manifest["seed"] == 4
    assert repair.verify(tmp_path / "run") == []
    assert repair.repair(tmp_path / "run") == ()


@pytest.mark.parametrize("packed", [True, False])
def test_an_edited_manifest_is_refused_until_it_is_accepted(tmp_path: Path, packed: bool) -> None:
    path = record(tmp_path / "run", pack=packed)
    edit(path, lambda entries: entries.update(seed=4))
    before = {entry: entry.read_bytes() for entry in path.rglob("*") if entry.is_file()}
    message = re.escape(f"accept them by ntkdyn repair {path}, else restore it from a copy")
    for refused in (
        RunReader.open,
        lambda path: RunWriter(path, {**ENTRIES, "seed": 4}, after=1, same=("seed",)),
        lambda path: prune.prune(path, every=2),
        run_status,
    ):
        with pytest.raises(EditedManifest, match=message) as caught:
            refused(path)
        assert "\n" not in str(caught.value)
    (finding,) = repair.verify(path)
    assert not finding.harmless
    assert re.search(message, finding.problem)
    assert before == {entry: entry.read_bytes() for entry in path.rglob("*") if entry.is_file()}
    (line,) = repair.repair(path)
    assert "run.json: accepted as it stands" in line
    assert ("against run.h5 seed was 3, is 4" if packed else "no other file holds its entries") in line
    assert RunReader.open(path).manifest["seed"] == 4
    assert repair.verify(path) == []
    assert repair.repair(path) == ()


def test_an_edit_that_leaves_no_manifest_is_put_aside(tmp_path: Path) -> None:
    path = record(tmp_path / "run")
    edit(path, lambda entries: entries.update(branches=3))
    (line,) = repair.repair(path)
    assert "made again from run.h5" in line
    assert (path / "quarantine" / "run.json").exists()
    assert RunReader.open(path).manifest["seed"] == 3
    edit(path, lambda entries: entries.pop("crc32"))
    edit(path, lambda entries: entries.update(branches=3))
    assert [finding.path.name for finding in repair.verify(path)] == ["run.json"]
    (line,) = repair.repair(path)
    assert "made again from run.h5" in line


def test_a_sweep_leaves_no_edited_run_out(tmp_path: Path) -> None:
    name = "arms/0123456789ab/0"
    record(tmp_path / name)
    (tmp_path / "sweep.json").write_text(json.dumps({"plan": [{"run": name}]}))
    assert len(Sweep.open(tmp_path).table) == 1
    edit(tmp_path / name, lambda entries: entries["results"].update(gap=0.75))
    with pytest.raises(EditedManifest, match="arms/0123456789ab/0"):
        Sweep.open(tmp_path)
    repair.repair(tmp_path / name)
    assert Sweep.open(tmp_path).table["gap"].tolist() == [0.75]


def test_two_halves_of_a_pair_of_surrogates_are_read_as_one_sign(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", {"config": {"name": "\ud83d\ude00"}}).close()
    assert read_manifest(tmp_path / "run")["config"] == {"name": "\U0001f600"}


def test_the_name_of_the_checksum_is_taken(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'crc32'.*rename it"):
        RunWriter(tmp_path / "run", {"crc32": 1})
    assert not (tmp_path / "run").exists()
