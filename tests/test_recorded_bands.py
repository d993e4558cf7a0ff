"""Snapshots larger than memory, as the recorder takes them: the same numbers, charged, guarded, and failing alone."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ntkdyn as nd
from ntkdyn.errors import ConfigurationError, ProbeError, StorageError
from ntkdyn.probes import ntk
from ntkdyn.recorder import passes
from ntkdyn.store import files

X = torch.randn(11, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(11) % 2


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nd.Gate(5), nn.Dropout(0.5), nn.Linear(5, 2)).double()


def train(path: Path, probes: list[Any], model: nn.Module | None = None, **options: Any) -> nd.Recorder:
    model = model or network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    recorder = nd.Recorder(model, probes, {"test": (X, Y)}, path=path, schedule=nd.every(2), **options)
    with recorder.attach(optimizer):
        for _ in range(6):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
    return recorder


class Rows:
    """A matrix in bands of one row; may do something else in a band."""

    name = "rows"

    def __init__(self, act: Any = None, field: Mapping[str, Any] | None = None) -> None:
        self.act = act
        self.field = {"name": "matrix", "dims": ("a", "b"), "shape": (3, 4)} | dict(field or {})

    def fields(self, snapshot: nd.Snapshot) -> list[nd.Field]:
        return [nd.Field(**self.field)]

    def measure(self, snapshot: nd.Snapshot) -> Mapping[str, Any]:
        def make() -> Iterator[Any]:
            for row in range(3):
                if self.act is not None and snapshot.step == 4 and row == 1:
                    yield self.act(snapshot)
                else:
                    torch.rand(3)
                    yield torch.full((1, 4), float(row + snapshot.step))

        return {"matrix": nd.Bands(make)}


@pytest.mark.parametrize(("reduce", "pairs"), [("trace", 1), ("mean", 1), ("full", 4)])
def test_a_kernel_in_bands_is_the_kernel(
    reduce: Any, pairs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = nd.measure(network(), [f"ntk:reduce={reduce}"], X)["ntk/kernel"]
    # So little that a band, an eighth of it, has 2 of the 11 samples; the last one has 1.
    monkeypatch.setattr(ntk, "_MAX_MEMORY", 2 * 11 * 11 * 8 * pairs - 1)
    bands = []
    real = nd.Snapshot.kernel_bands
    monkeypatch.setattr(
        nd.Snapshot, "kernel_bands", lambda self, *a, **k: bands.append(k["samples"]) or real(self, *a, **k)
    )
    recorder = nd.Recorder(network(), [f"ntk:reduce={reduce}"], X, path=tmp_path / "run")
    recorder.record()
    run = nd.Run.open(tmp_path / "run")
    assert bands == [2]
    assert run["ntk/kernel"].dtype == np.float64
    np.testing.assert_allclose(run["ntk/kernel"][0], whole, rtol=1e-12, atol=1e-13)
    # What making the bands took is charged to the probe.
    assert run.costs()["ntk"]["seconds"] > 0.001
    assert run.costs()["ntk"]["share"] <= 1
    assert run.costs()["ntk"]["seconds"] == pytest.approx(run.costs()["ntk"]["share"] * run.seconds)
    recorder.close()


def test_bands_measured_without_a_file_come_as_one_array() -> None:
    found = nd.measure(network(), [Rows()], X)["rows/matrix"]
    assert np.array_equal(found, np.add.outer(np.arange(3.0), np.zeros(4)))


def test_a_kernel_in_bands_is_checked_against_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ntk, "_MAX_MEMORY", 10_000)
    asked = []
    monkeypatch.setattr(passes, "check_ntk", lambda model, inputs, **rest: asked.append((len(inputs), rest["reduce"])))
    nd.measure(network(), ["ntk"], torch.randn(100, 3, dtype=torch.float64))
    assert asked == [(64, "trace")]


def trained(path: Path | None, probes: list[Any], **options: Any) -> list[Any]:
    """Weights and random state after a training, recorded where there is a path."""
    torch.manual_seed(3)
    model = network()
    if path is None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(6):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
    else:
        train(path, probes, model, **options).close()
    return [value.tolist() for value in (*model.state_dict().values(), torch.get_rng_state())]


def test_what_bands_cost_is_told_once_and_without_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ntk, "_MAX_MEMORY", 2 * 11 * 11 * 8 - 1)
    monkeypatch.setattr(passes, "check_ntk", lambda *_, **__: time.sleep(0.6))

    def slow(snapshot: nd.Snapshot) -> torch.Tensor:
        time.sleep(0.3)
        return torch.ones(1, 4)

    probes = [nd.Watch(Rows(slow), name="slow"), nd.Watch(Rows(_fail), name="failing"), "ntk"]
    recorder = nd.Recorder(network(), probes, X, path=tmp_path / "run", on_error="warn")
    with pytest.warns(RuntimeWarning, match="no such row"):
        recorder.record(4)
    seconds = [one.seconds for one in recorder._watches]
    recorder.close()
    assert 0.3 < seconds[0] < 0.5
    assert seconds[2] < 0.5
    assert nd.Run.open(tmp_path / "run").costs()["ntk"]["seconds"] < 0.5


def test_training_is_the_same_with_bands_that_draw_random_numbers(tmp_path: Path) -> None:
    assert trained(tmp_path / "run", [Rows()]) == trained(None, [])
    assert nd.Run.open(tmp_path / "run")["rows/test/matrix"][:, :, 0].tolist() == [
        [step + row for row in range(3)] for step in (0, 2, 4, 6)
    ]


def _fail(snapshot: nd.Snapshot) -> Any:
    raise OSError("no such row")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (_fail, "probe 'rows', set 'test', step 4: OSError: no such row"),
        (lambda snapshot: torch.full((1, 4), float("nan")), "field 'matrix', rows from 1: found NaN in 4 of 4 numbers"),
        (lambda snapshot: torch.ones(1, 5), r"rows from 1: found shape \[1, 5\], expected \[1, 4\] as declared"),
        (lambda snapshot: torch.ones(2, 4), "field 'matrix': found bands of at least 4 rows in all, expected 3"),
    ],
)
@pytest.mark.parametrize("on_error", ["warn", "disable", "raise"])
def test_failing_bands_cost_their_group_only(on_error: Any, act: Any, message: str, tmp_path: Path) -> None:
    probes = [Rows(act), "outputs", nd.Watch(Rows(), name="others")]
    if on_error == "raise":
        with pytest.raises(ProbeError, match=message):
            train(tmp_path / "run", probes, on_error=on_error)
        run = nd.Run.open(tmp_path / "run")
        assert run.steps("outputs/test").tolist() == [0, 2]
        assert run.manifest["status"] == "failed"
        return
    with pytest.warns(RuntimeWarning, match=message):
        train(tmp_path / "run", probes, on_error=on_error).close()
    run = nd.Run.open(tmp_path / "run")
    assert run.steps("outputs/test").tolist() == [0, 2, 4, 6]
    assert run.steps("others/test").tolist() == [0, 2, 4, 6]
    assert run.steps("rows/test").tolist() == ([0, 2, 6] if on_error == "warn" else [0, 2])


class Leaving(Rows):
    """Bands that fail or are left at step 4, and end with what reaches the training if nothing keeps it away."""

    def __init__(self, act: Any, below: bool) -> None:
        super().__init__(act)
        # An iterator that has no close, above a generator.
        self.below = below
        self.ended: list[int] = []

    def measure(self, snapshot: nd.Snapshot) -> Mapping[str, Any]:
        assert self.ended == list(range(0, snapshot.step, 2))

        def make() -> Iterator[Any]:
            with torch.no_grad():
                try:
                    yield self.act() if snapshot.step == 4 else torch.zeros(1, 4)
                    yield torch.zeros(2, 4)
                finally:
                    self.ended.append(snapshot.step)
                    torch.manual_seed(5)

        return {"matrix": nd.Bands(lambda: map(torch.as_tensor, make()) if self.below else make())}


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Refuses the next band where it is set to [True]."""
    full = [False]

    def check(output: Any) -> None:
        if full[0]:
            full[0] = False
            raise StorageError("found no space")

    monkeypatch.setattr(files.OutputFile, "check", check)
    return full


@pytest.mark.filterwarnings("ignore:.*step 4 could not be written")
@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("refused", [False, True])
def test_bands_that_are_left_end_under_guard(below: bool, refused: bool, tmp_path: Path, full_disk: list[bool]) -> None:
    plain = trained(None, [])

    def act() -> Any:
        full_disk[0] = refused
        return torch.zeros(1, 4) if refused else torch.full((1, 4), torch.nan)

    with pytest.warns(RuntimeWarning, match="found no space" if refused else "found NaN"):
        recorded = trained(tmp_path / "run", [Leaving(act, below)], on_error="warn")
    assert torch.is_grad_enabled()
    assert recorded == plain


def test_random_numbers_run_on_from_band_to_band() -> None:
    def drawn() -> list[float]:
        return [float(torch.rand(())), float(np.random.rand()), random.random()]  # noqa: NPY002

    class Draws(Rows):
        def measure(self, snapshot: nd.Snapshot) -> Mapping[str, Any]:
            return {"matrix": nd.Bands(lambda: (torch.tensor([drawn()]) for _ in range(3)))}

    model = network()
    found = nd.measure(model, [Draws(field={"shape": (3, 3)})], X)["rows/matrix"]
    expected = [drawn() for _ in range(3)]
    np.testing.assert_array_equal(found, np.float32(expected))


class WithFirst(Rows):
    """A static field beside the bands, which comes until it is recorded."""

    def fields(self, snapshot: nd.Snapshot) -> list[nd.Field]:
        return [*super().fields(snapshot), nd.Field(name="first", static=True)]

    def measure(self, snapshot: nd.Snapshot) -> Mapping[str, Any]:
        first = {"first": snapshot.step} if snapshot.previous("first") is None else {}
        return {**super().measure(snapshot), **first}


@pytest.mark.filterwarnings("ignore:.*step 4 could not be written")
@pytest.mark.parametrize("refused", [False, True])
def test_a_static_field_comes_with_the_first_bands_that_are_written(
    refused: bool, tmp_path: Path, full_disk: list[bool]
) -> None:
    def act(snapshot: nd.Snapshot) -> Any:
        full_disk[0] = refused
        return torch.ones(1, 4) if refused else _fail(snapshot)

    recorder = nd.Recorder(network(), [WithFirst(act)], X, path=tmp_path / "run", on_error="warn")
    with pytest.warns(RuntimeWarning, match="found no space" if refused else "no such row"):
        recorder.record(4)
    recorder.record(5)
    recorder.record(6)
    recorder.close()
    run = nd.Run.open(tmp_path / "run")
    assert run.steps("rows").tolist() == [5, 6]
    assert run["rows/first"] == 5


def _interrupt(snapshot: nd.Snapshot) -> Any:
    raise KeyboardInterrupt


def test_interrupted_bands_are_made_again(tmp_path: Path) -> None:
    tries: list[int] = []

    def act(snapshot: nd.Snapshot) -> Any:
        tries.append(snapshot.step)
        return _interrupt(snapshot) if len(tries) == 1 else torch.ones(1, 4)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", [Rows(act), "outputs"])
    run = nd.Run.open(tmp_path / "run")
    assert run.steps("rows/test").tolist() == run.steps("outputs/test").tolist() == [0, 2, 4]
    assert run.steps("learning_rate").tolist() == [0, 2, 4]
    assert run.manifest["status"] == "interrupted"


def test_a_state_names_no_step_whose_bands_were_interrupted(tmp_path: Path) -> None:
    recorder = nd.Recorder(network(), [Rows(_interrupt), "outputs"], X, path=tmp_path / "run")
    recorder.record(2)
    with pytest.raises(KeyboardInterrupt):
        recorder.record(4)
    assert {entry["step"] for entry in recorder.state_dict()["watches"].values()} == {2}
    recorder.close()


@pytest.mark.filterwarnings("ignore:probe 'rows'")
def test_learning_rates_stand_beside_something(tmp_path: Path) -> None:
    train(tmp_path / "run", [Rows(_fail)], on_error="warn").close()
    run = nd.Run.open(tmp_path / "run")
    assert run.steps("learning_rate").tolist() == run.steps("rows/test").tolist() == [0, 2, 6]


@pytest.mark.parametrize("field", [{"static": True}, {"dims": (), "shape": ()}, {"dtype": "str"}])
def test_bands_are_for_numbers_of_each_step(field: dict[str, Any]) -> None:
    with pytest.raises(ProbeError, match="field 'matrix': found Bands, expected an array; they are for numbers"):
        nd.measure(network(), [Rows(field=field)], X)


@pytest.mark.parametrize("options", [{"reduce": "each"}, {"per": "layer"}, {"max_memory": 0}])
def test_memory_goes_with_kernels_that_have_bands(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"probe ntk: max_memory is .*; expected at least 1 byte, and reduce"):
        ntk.EmpiricalNTK(**{"max_memory": 100, **options})


def test_too_little_memory_is_refused_with_the_least_that_works(tmp_path: Path) -> None:
    inputs = torch.randn(300, 3, dtype=torch.float64)
    with pytest.raises(ProbeError, match="probe 'ntk', step 0: max_memory is 1000 bytes; this kernel needs at least"):
        nd.measure(network(), ["ntk:max_memory=1000"], inputs)
