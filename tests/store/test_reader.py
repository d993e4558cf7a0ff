"""RunReader: live folder, packed folder, run.h5 alone; and clear words for everything else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from ntkdyn.errors import DamagedRecording, MissingRecording, NtkdynError, UnknownName, UntrustedFile
from ntkdyn.store import files, triangle
from ntkdyn.store.reader import RunReader
from ntkdyn.store.writer import RunWriter


def test_live_folder(live: RunWriter, kernel_at: Callable[[int], Any]) -> None:
    (live.path / "segments" / f"{files.TEMPORARY}1-abc").write_bytes(b"half")
    reader = RunReader.open(live.path)
    assert reader.groups() == ["gates/test", "ntk/test"]
    assert reader.steps("ntk/test").tolist() == [0, 4, 8]
    assert reader.epochs("ntk/test").tolist() == [0.0, 1.0, 2.0]
    assert reader.steps("gates/test").dtype == np.int64
    assert np.array_equal(reader.read("ntk/test/kernel"), [kernel_at(0), kernel_at(4), kernel_at(8)])
    assert reader.read("gates/test/trunk.0/frozen").dtype == bool
    assert reader.read("gates/test/trunk.2/nothing").shape == (4, 0)
    assert reader.read("gates/test/total").tolist() == [3, 5]
    assert reader.read("probe_sets/test/label").tolist() == ["a", "ü", "c"]
    assert reader.field("gates/test/trunk.0/slope").long_name == "slope"
    assert reader.field("gates/test/share").coordinates == {"gate": ["trunk.0", "trunk.2"]}
    assert reader.field("gates/test/total").static
    assert reader.attributes("ntk/test") == {"engine": "layerwise"}
    assert reader.attributes("probe_sets/test") == {"dataset": "digits"}
    assert reader.manifest["status"] == "running"
    assert reader.manifest["config"] == {"width": 8, "api_key": "***"}
    assert len(reader.names()) == 10


def test_packed_equals_live(live: RunWriter, tmp_path: Path, as_stranger: Callable[[], None]) -> None:
    before = RunReader.open(live.path)
    arrays = before.read_many(before.names())
    live.close(results={"gap": float("nan")})
    alone = tmp_path / "copied.h5"
    shutil.copy(live.path / "run.h5", alone)
    as_stranger()
    for path in (live.path, live.path / "run.h5", alone):
        reader = RunReader.open(path)
        assert reader.names() == before.names()
        assert reader.groups() == before.groups()
        assert reader.declarations == before.declarations
        assert np.isnan(reader.manifest["results"]["gap"])
        assert {key: reader.manifest[key] for key in ("seed", "config", "experiment", "status")} == {
            "seed": 3,
            "config": {"width": 8, "api_key": "***"},
            "experiment": "demo",
            "status": "finished",
        }
        for group in before.groups():
            assert np.array_equal(reader.steps(group), before.steps(group))
            assert np.array_equal(reader.epochs(group), before.epochs(group))
        for name, array in reader.read_many(reader.names()).items():
            assert array.dtype == arrays[name].dtype
            assert np.array_equal(array, arrays[name])


def test_reader_survives_packing(live: RunWriter) -> None:
    reader = RunReader.open(live.path)
    live.close()
    assert not list((live.path / "segments").iterdir())
    assert reader.read("ntk/test/kernel").shape == (3, 6, 6)


def test_run_without_snapshots(tmp_path: Path) -> None:
    recording = RunWriter(tmp_path / "run", {"seed": 1})
    assert RunReader.open(tmp_path / "run").names() == []
    recording.close()
    reader = RunReader.open(tmp_path / "run" / "run.h5")
    assert reader.manifest["seed"] == 1
    assert reader.groups() == []


def test_unknown_names(packed: Path) -> None:
    reader = RunReader.open(packed)
    for action in (reader.read, reader.field, reader.steps, reader.epochs, reader.attributes):
        with pytest.raises(UnknownName, match=r"'ntk/test/nothing'.*there are: .*gates/test"):
            action("ntk/test/nothing")


def _empty(path: Path, packed: Path) -> Path:
    (path / "empty").mkdir()
    return path / "empty"


def _no_run(path: Path, packed: Path) -> Path:
    (path / "other").mkdir()
    (path / "other" / "notes.txt").write_text("x")
    return path / "other"


def _text(path: Path, packed: Path) -> Path:
    (path / "a.h5").write_text("no recording")
    return path / "a.h5"


def _foreign(path: Path, packed: Path) -> Path:
    with h5py.File(path / "a.h5", "w") as file:
        file["x"] = np.arange(3)
    return path / "a.h5"


def _truncated(path: Path, packed: Path) -> Path:
    (path / "a.h5").write_bytes((packed / "run.h5").read_bytes()[:-2000])
    return path / "a.h5"


def _manifest(content: str) -> Callable[[Path, Path], Path]:
    def make(path: Path, packed: Path) -> Path:
        (packed / "run.json").write_text(content)
        return packed

    return make


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path, _: path / "nothing", MissingRecording, "found nothing, expected the folder of a run"),
        (_empty, DamagedRecording, "found an empty folder, expected run.json"),
        (_no_run, DamagedRecording, "found a folder without run.json"),
        (_text, DamagedRecording, "is damaged or no recording"),
        (_foreign, DamagedRecording, "found format None, expected 'ntkdyn recording 1'"),
        (_truncated, DamagedRecording, "is damaged"),
        (_manifest("{"), DamagedRecording, "run.json is damaged: found no valid JSON"),
        (_manifest("[1]"), DamagedRecording, "found a JSON list, expected a mapping"),
        (_manifest("[" * 100_000), DamagedRecording, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("trusted", [False, True])
def test_what_is_no_recording(
    tmp_path: Path,
    packed: Path,
    as_stranger: Callable[[], None],
    make: Callable[[Path, Path], Path],
    error: type[NtkdynError],
    message: str,
    trusted: bool,
) -> None:
    as_stranger()
    path = make(tmp_path, packed)
    with pytest.raises(error, match=message) as caught:
        RunReader.open(path, trusted=trusted)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_recording_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RunReader.open(tmp_path / "nothing")


@pytest.mark.parametrize("trusted", [False, True])
def test_damaged_segment_is_named(live: RunWriter, as_stranger: Callable[[], None], trusted: bool) -> None:
    as_stranger()
    segment = live.path / "segments" / "seg-0-000000000004-000000000004.h5"
    content = bytearray(segment.read_bytes())
    kernel = RunReader.open(live.path, trusted=True).read("ntk/test/kernel")[1]
    place = content.find(triangle.pack(kernel).tobytes())
    assert place > 0
    content[place + 40] ^= 1
    segment.write_bytes(content)
    with pytest.raises(
        DamagedRecording, match=r"seg-0-000000000004.*'ntk/test/kernel' at step 4: found CRC .* expected"
    ):
        RunReader.open(live.path, trusted=trusted).read("ntk/test/kernel")


def test_size_of_all_steps_is_limited(packed: Path, as_stranger: Callable[[], None]) -> None:
    as_stranger()
    with pytest.raises(UntrustedFile, match="max_bytes=432"):
        RunReader.open(packed, max_bytes=300)
    as_stranger()
    assert RunReader.open(packed, max_bytes=300, trusted=True).read("ntk/test/kernel").nbytes == 432


def test_segments_that_disagree(live: RunWriter, tmp_path: Path, start: Callable[[Path], RunWriter]) -> None:
    from ntkdyn.probe import Field

    other = RunWriter(tmp_path / "other", {})
    other.declare("ntk/test", [Field(name="kernel", dims=("sample", "sample_2"), shape=(2, 2))])
    other.commit(99, None, {"ntk/test": {"kernel": np.eye(2)}})
    name = "seg-0-000000000099-000000000099.h5"
    shutil.copy(other.path / "segments" / name, live.path / "segments" / name)
    with pytest.raises(DamagedRecording, match=f"{name} declares group 'ntk/test' differently"):
        RunReader.open(live.path, trusted=True)
