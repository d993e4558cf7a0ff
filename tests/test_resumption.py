"""A training that is continued from a checkpoint leaves the recording that an uninterrupted one leaves."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ntkdyn as nd
from ntkdyn.errors import ConfigurationError, LockedRecording, MissingRecording, ProbeError, RecordingExists
from ntkdyn.gates import Gate
from ntkdyn.results import Run
from ntkdyn.store import bands, outbox
from ntkdyn.store.repair import verify

INPUTS = torch.randn(5, 4, generator=torch.Generator().manual_seed(7))
TARGETS = torch.tensor([0, 1, 2, 0, 1])


class Change:
    """Distance of the outputs to those of the last snapshot; needs ``previous``."""

    name = "change"

    def fields(self, snapshot: nd.Snapshot) -> list[nd.Field]:
        return [nd.Field(name="outputs", dims=("sample", "class"), shape=(5, 3)), nd.Field(name="distance"),
                nd.Field(name="first", static=True)]  # fmt: skip

    def measure(self, snapshot: nd.Snapshot) -> dict[str, Any]:
        before = snapshot.previous("outputs")
        outputs = snapshot.outputs
        distance = 0.0 if before is None else float((outputs - torch.from_numpy(before)).norm())
        return {"outputs": outputs, "distance": distance} | ({"first": snapshot.step} if before is None else {})


class Training:
    """A small network in training, with a recorder."""

    def __init__(self, path: Path, **changes: Any) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(4, 6), Gate(6), nn.Linear(6, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        settings: dict[str, Any] = {
            "probes": ["ntk", "gates", "units", nd.Watch(Change(), schedule=nd.every(3))],
            "sets": {"test": (INPUTS, TARGETS)},
            "path": path,
            "schedule": nd.every(2),
            "manifest": {"config": {"width": 6}},
        } | changes
        self.recorder = nd.Recorder(self.model, **settings)

    def run(self, first: int, last: int, save_at: int | None = None) -> dict[str, Any] | None:
        saved = None
        with self.recorder.attach(self.optimizer):
            for step in range(first, last):
                generator = torch.Generator().manual_seed(step)
                inputs, targets = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
                self.optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
                self.optimizer.zero_grad()
                nn.functional.cross_entropy(self.model(inputs), targets).backward()
                self.optimizer.step()
                if step + 1 == save_at:
                    saved = {
                        "model": copy.deepcopy(self.model.state_dict()),
                        "optimizer": copy.deepcopy(self.optimizer.state_dict()),
                        "recorder": json.loads(json.dumps(self.recorder.state_dict())),
                    }
        return saved

    def load(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.recorder.load_state_dict(saved["recorder"])


def same(one: Run, other: Run) -> None:
    assert one.names() == other.names()
    for group in one.groups():
        assert one.steps(group).tolist() == other.steps(group).tolist(), group
    for name in one.names():
        assert np.array_equal(one[name], other[name]), name


@pytest.fixture
def whole(tmp_path: Path) -> Run:
    """The recording of a training that was never interrupted."""
    training = Training(tmp_path / "whole")
    training.run(0, 13)
    training.recorder.close()
    return Run.open(tmp_path / "whole")


@pytest.mark.parametrize("save_at", [1, 4, 6, 9])
@pytest.mark.parametrize("status", ["lost", "finished"])
def test_a_continued_training_records_what_an_uninterrupted_one_does(
    tmp_path: Path, whole: Run, save_at: int, status: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Training(tmp_path / "run")
    saved = first.run(0, 11, save_at)
    assert saved is not None
    if status == "finished":
        first.recorder.close()
    else:
        # As after a kill: the lock goes with the writer, and nothing is closed.
        assert first.recorder._recording is not None
        first.recorder._recording._writer._release()  # type: ignore[union-attr]
    second = Training(tmp_path / "run")
    second.load(saved)
    second.run(save_at, 13)
    second.recorder.close()
    found = Run.open(tmp_path / "run")
    same(found, whole)
    np.testing.assert_allclose(found["learning_rate/sum"][-1], 1e-2 * sum(1 / (1 + step) for step in range(13)))
    assert [branch["after"] for branch in found.manifest["branches"]] == [save_at]
    assert found.manifest["final_weights_sha256"] == whole.manifest["final_weights_sha256"]
    assert verify(tmp_path / "run") == []
    first.recorder._closed = True


def test_resuming_again_and_again(tmp_path: Path, whole: Run) -> None:
    training = Training(tmp_path / "run")
    saved = training.run(0, 3, 2)
    training.recorder.close("interrupted")
    for first in (2, 4, 6, 8, 10):
        assert saved is not None
        training = Training(tmp_path / "run")
        training.load(saved)
        saved = training.run(first, 13 if first == 10 else first + 3, first + 2)
        training.recorder.close("finished" if first == 10 else "interrupted")
    same(Run.open(tmp_path / "run"), whole)


def test_a_closed_recorder_goes_on_with_its_own_state(tmp_path: Path, whole: Run) -> None:
    training = Training(tmp_path / "run")
    training.run(0, 6)
    training.recorder.close()
    assert training.recorder.closed
    assert Run.open(tmp_path / "run").manifest["status"] == "finished"
    with pytest.raises(
        ConfigurationError, match=r"after close, .*; load_state_dict\(recorder.state_dict\(\)\) goes on"
    ):
        training.run(6, 7)
    training.recorder.load_state_dict(training.recorder.state_dict())
    assert not training.recorder.closed
    training.run(6, 13)
    training.recorder.close()
    found = Run.open(tmp_path / "run")
    same(found, whole)
    assert found.manifest["status"] == "finished"
    assert found.manifest["final_weights_sha256"] == whole.manifest["final_weights_sha256"]
    assert verify(tmp_path / "run") == []


def test_a_closed_recorder_goes_back_to_an_earlier_state(tmp_path: Path, whole: Run) -> None:
    training = Training(tmp_path / "run")
    saved = training.run(0, 9, 4)
    training.recorder.close("failed")
    assert saved is not None
    training.load(saved)
    training.run(4, 13)
    training.recorder.close()
    same(Run.open(tmp_path / "run"), whole)


def test_record_by_hand_continues(tmp_path: Path, whole: Run) -> None:
    saved = Training(tmp_path / "run").run(0, 7, 5)
    assert saved is not None
    second = Training(tmp_path / "run")
    second.load(saved)
    for step in range(5, 13):
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
        second.optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        second.optimizer.zero_grad()
        nn.functional.cross_entropy(second.model(inputs), targets).backward()
        second.optimizer.step()
        second.recorder.record()
    second.recorder.close()
    found = Run.open(tmp_path / "run")
    assert found.steps("ntk").tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert np.array_equal(found["ntk/test/kernel"], whole["ntk/test/kernel"][:7])


def test_a_checkpoint_newer_than_the_recording_is_told(tmp_path: Path) -> None:
    first = Training(tmp_path / "run")
    saved = first.run(0, 9, 8)
    first.recorder.close("interrupted")
    for file in (tmp_path / "run" / "segments").glob("seg-0-*[6-9].h5"):
        file.unlink()
    second = Training(tmp_path / "run")
    assert saved is not None
    second.load(saved)
    with pytest.warns(RuntimeWarning, match="step 8 is newer .* ntk/test at step 4 instead of 8, .*what lies"):
        second.run(8, 12)
    second.recorder.close()
    assert Run.open(tmp_path / "run").steps("ntk").tolist() == [0, 2, 4, 10, 12]


@pytest.mark.parametrize("left", [0, 5])
@pytest.mark.filterwarnings("error")
def test_the_checkpoint_of_the_last_step_is_continued(tmp_path: Path, left: int) -> None:
    first = Training(tmp_path / "run", schedule=nd.every(4), probes=["ntk"])
    saved = first.run(0, 3, 3)
    assert saved is not None
    # The last snapshot is taken after the state was saved.
    assert saved["recorder"]["watches"]["ntk"]["step"] == 0
    first.recorder.close()
    # A probe that is new has its first snapshot there, and has it still when it is done again.
    for _ in range(2):
        second = Training(tmp_path / "run", schedule=nd.every(4), probes=["ntk", "units"])
        second.load(saved)
        second.run(3, 3 + left)
        second.recorder.close()
    run = Run.open(tmp_path / "run")
    assert run.manifest["status"] == "finished"
    assert run.steps("ntk").tolist() == [0, 3, *([4, 8] if left else [])]
    assert run.steps("units").tolist() == [3, *([4, 8] if left else [])]


@pytest.mark.filterwarnings("error")
def test_after_a_failure_the_step_that_failed_is_recorded(tmp_path: Path, whole: Run) -> None:
    class Once(Change):
        """Fails at step 6 when it is first there."""

        failed = False

        def measure(self, snapshot: nd.Snapshot) -> dict[str, Any]:
            if snapshot.step == 6 and not self.failed:
                self.failed = True
                raise OSError("no memory")
            return super().measure(snapshot)

    training = Training(
        tmp_path / "run", probes=["ntk", "gates", "units", nd.Watch(Once(), schedule=nd.every(3), name="change")]
    )
    with pytest.raises(ProbeError, match="no memory"):
        training.run(0, 13)
    state = training.recorder.state_dict()
    assert (state["step"], state["watches"]["ntk"]["step"], state["watches"]["change"]["step"]) == (6, 4, 3)
    training.recorder.load_state_dict(state)
    training.run(6, 13)
    training.recorder.close()
    same(Run.open(tmp_path / "run"), whole)


@pytest.mark.filterwarnings("error")
def test_an_interruption_while_a_snapshot_is_written_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = outbox.publish_segment

    def publish(path: Path, *rest: Any) -> int:
        if path.name.startswith("seg-0-000000000004"):
            monkeypatch.undo()
            raise KeyboardInterrupt
        return real(path, *rest)

    monkeypatch.setattr(outbox, "publish_segment", publish)
    training = Training(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        training.run(0, 13)
    assert Run.open(tmp_path / "run").steps("ntk").tolist() == [0, 2, 4]
    assert training.recorder.state_dict()["watches"]["ntk"]["step"] == 4


def test_large_arrays_are_not_kept_for_the_next_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "_LARGE_BYTES", 8)
    seen: list[Any] = []

    class Large:
        """A large array and a small one, both static too."""

        name = "large"

        def fields(self, snapshot: nd.Snapshot) -> list[nd.Field]:
            return [nd.Field(name=f"{size}{still}", dims=(f"size_{size}",), shape=(size,), static=bool(still))
                    for size in (2, 3) for still in ("", "still")]  # fmt: skip

        def measure(self, snapshot: nd.Snapshot) -> dict[str, Any]:
            names = ("2", "3", "2still", "3still")
            seen.append([name for name in names if snapshot.previous(name) is not None])
            return {name: np.ones(int(name[0])) for name in names if snapshot.step == 0 or len(name) == 1}

    first = Training(tmp_path / "run", probes=[Large()])
    saved = first.run(0, 4, 4)
    first.recorder.close()
    second = Training(tmp_path / "run", probes=[Large()])
    assert saved is not None
    second.load(saved)
    second.run(4, 6)
    second.recorder.close()
    assert seen == [[], ["2", "2still"], ["2", "2still"], ["2", "2still"]]


Spoil = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"manifest": {"config": {"width": 7}}}, "config.width was 6, is 7"),
        ({"parameters": ["0.weight"]}, r"parameters was \[.*\], is \[\"0.weight\"\]"),
        ({"sets": {"test": (INPUTS + 1, TARGETS)}}, "sets.probe_sets/test was .*, is"),
        ({"sets": {"other": (INPUTS, TARGETS)}}, "sets.probe_sets/test was .*, is null"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_touched(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    first = Training(tmp_path / "run")
    saved = first.run(0, 5, 4)
    first.recorder.close()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    second = Training(tmp_path / "run", **changes)
    assert saved is not None
    second.load(saved)
    with pytest.raises(ConfigurationError, match=message):
        second.run(4, 6)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_another_run_is_refused(tmp_path: Path) -> None:
    saved = Training(tmp_path / "a").run(0, 5, 4)
    assert saved is not None
    other = Training(tmp_path / "b")
    other.run(0, 2)
    other.recorder.close()
    second = Training(tmp_path / "b")
    second.load(saved)
    with pytest.raises(ConfigurationError, match="holds a run of another configuration: run was"):
        second.run(4, 5)
    third = Training(tmp_path / "c")
    third.load(saved)
    with pytest.raises(MissingRecording, match="found no run to continue"):
        third.run(4, 5)
    # Without a state the folder of a run is taken.
    with pytest.raises(RecordingExists, match="already; nothing was touched"):
        Training(tmp_path / "b").run(0, 1)


def test_a_run_that_is_being_written_is_refused(tmp_path: Path) -> None:
    first = Training(tmp_path / "run")
    saved = first.run(0, 5, 4)
    assert saved is not None
    second = Training(tmp_path / "run")
    second.load(saved)
    with pytest.raises(LockedRecording, match="this very process"):
        second.run(4, 5)
    first.recorder.close()


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"step": 3},
        {"format": "x", "run": "a", "step": 1, "watches": {}},
        {"format": "ntkdyn recorder 1", "step": 1, "watches": {}},
        {"format": "ntkdyn recorder 1", "run": "a", "step": "x", "watches": {}},
        {
            "format": "ntkdyn recorder 1",
            "run": "a",
            "step": 1,
            "watches": {"ntk": {"step": "1", "skipped": 0, "disabled": False}},
        },
        {"format": "ntkdyn recorder 1", "run": "a", "step": 1, "watches": 3},
        {"format": "ntkdyn recorder 1", "run": "a", "step": 1, "watches": {}, "learning_rate": {"sum": 0.1}},
        {"format": "ntkdyn recorder 1", "run": "a", "step": 1, "watches": {}, "learning_rate": 0.1},
        {"format": "ntkdyn recorder 1", "run": "a", "step": 1, "watches": {"ntk": {"step": 1}}},
        {"format": "ntkdyn recorder 1", "run": "a", "step": 1, "watches": {"ntk": {"step": "1", "skipped": 0}}},
    ],
)
def test_what_is_no_state_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=re.escape("expected what state_dict() returned")):
        Training(tmp_path / "run").recorder.load_state_dict(state)


def test_a_state_comes_before_recording(tmp_path: Path) -> None:
    training = Training(tmp_path / "run")
    saved = training.run(0, 3, 2)
    assert saved is not None
    with pytest.raises(ConfigurationError, match="after recording began"):
        training.recorder.load_state_dict(saved["recorder"])
    training.recorder.close()
    # Nothing is recorded between the two.
    training.recorder.load_state_dict(training.recorder.state_dict())
    training.recorder.load_state_dict(saved["recorder"])
    with training.recorder.attach(training.optimizer):
        # Closed, but not yet left.
        training.recorder.close()
        with pytest.raises(ConfigurationError, match="after recording began"):
            training.recorder.load_state_dict(saved["recorder"])


def test_a_state_of_nothing_begins_anew(tmp_path: Path) -> None:
    state = Training(tmp_path / "a").recorder.state_dict()
    assert state["run"] is None
    training = Training(tmp_path / "b")
    training.recorder.load_state_dict(state)
    training.run(0, 4)
    training.recorder.close()
    assert Run.open(tmp_path / "b").steps("ntk").tolist() == [0, 2, 4]


def test_a_loaded_state_is_given_back_until_recording_goes_on(tmp_path: Path) -> None:
    first = Training(tmp_path / "run")
    saved = first.run(0, 5, 4)
    assert saved is not None
    first.recorder.close()
    second = Training(tmp_path / "run")
    second.load(saved)
    assert second.recorder.state_dict() == saved["recorder"]
    second.run(4, 6)
    state = second.recorder.state_dict()
    assert (state["run"], state["step"]) == (saved["recorder"]["run"], 6)
    second.recorder.close()
