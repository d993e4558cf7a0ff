"""Kernels in tiles: equal to the whole, to each other however they come about, and refused where they would not be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ntkdyn as nd
from ntkdyn.errors import ConfigurationError, RecordingExists, ShapeError, UndefinedMeasure, UnsupportedLayer
from ntkdyn.kernel import sharded

WORKER = Path(__file__).with_name("sharded_worker.py")


class Memory:
    """A sink that keeps tiles in a dictionary."""

    def __init__(self) -> None:
        self.kernel: dict[str, Any] = {}
        self.tiles: dict[tuple[int, int], np.ndarray[Any, Any]] = {}

    def begin(self, kernel: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keep the first description."""
        self.kernel = self.kernel or dict(kernel)
        json.dumps(self.kernel, allow_nan=False)
        return self.kernel

    def has(self, tile: tuple[int, int]) -> bool:
        """Whether it was written."""
        return tile in self.tiles

    def write(self, tile: tuple[int, int], array: np.ndarray[Any, Any]) -> None:
        """Keep it; once."""
        assert tile not in self.tiles
        self.tiles[tile] = array

    def whole(self) -> np.ndarray[Any, Any]:
        """The kernel put together, mirrored by the formula Θ(x', x)_c'c = Θ(x, x')_cc'."""
        size, shape = self.kernel["tile"], self.kernel["shape"]
        result = np.full(shape, np.nan, dtype=self.kernel["dtype"])
        axis = self.kernel["dims"].index("sample")
        before = (slice(None),) * axis
        for (row, column), block in self.tiles.items():
            rows, columns = (slice(index * size, (index + 1) * size) for index in (row, column))
            result[(*before, rows, columns)] = block
            if self.kernel["symmetric"] and row != column:
                order = {2: (1, 0), 3: (0, 2, 1), 4: (1, 0, 3, 2)}[len(shape)]
                result[(*before, columns, rows)] = block.transpose(order)
        return result


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 9), nd.Gate(9, slope=0.3), nn.Linear(9, 3)).double()


def samples(count: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pair", [False, True], ids=["x1", "x1-x2"])
@pytest.mark.parametrize("reduce", ["trace", "mean", "each", "full", nd.Projection(2, 7), nd.SummedOutputs()], ids=str)
def test_tiles_make_the_whole(reduce: Any, pair: bool) -> None:
    model, x1, x2 = network(), samples(11), samples(7, 6) if pair else None
    whole = nd.empirical_ntk(model, x1, x2, reduce=reduce).numpy()
    for tile in (4, 11, 100):
        sink = Memory()
        count = sharded.sharded_ntk(model, x1, x2, sink=sink, tile=tile, reduce=reduce)
        assert count == len(sink.tiles) == _tiles(11, 7 if pair else None, min(tile, 11))
        found = sink.whole()
        assert list(found.shape) == sink.kernel["shape"] == list(whole.shape)
        assert np.abs(found - whole).max() <= 1e-10 * np.abs(whole).max()


def _tiles(n: int, n_2: int | None, tile: int) -> int:
    rows = -(-n // tile)
    return rows * (rows + 1) // 2 if n_2 is None else rows * -(-n_2 // tile)


def test_oracle(oracles: Any) -> None:
    model, x = network(), samples(5)
    sink = Memory()
    sharded.sharded_ntk(model, x, sink=sink, tile=1, reduce="full")
    exact = oracles.ntk_by_loop(model, x, reduce="full").numpy()
    assert np.abs(sink.whole() - exact).max() <= 1e-10 * np.abs(exact).max()


def test_further_arguments_reach_the_engine() -> None:
    model, x = network().float(), {"a": samples(6).float()}
    further: dict[str, Any] = {
        "forward": lambda model, inputs: model(inputs["a"]),
        "parameters": ["2.*"],
        "metric": {"2.weight": 0.25},
        "engine": "reference",
        "dtype": torch.float64,
        "max_memory": 2**30,
    }
    sink = Memory()
    sharded.sharded_ntk(model, x, sink=sink, tile=4, **further)
    whole = nd.empirical_ntk(model, x, **further).numpy()
    assert sink.kernel["dtype"] == "<f8"
    assert np.abs(sink.whole() - whole).max() <= 1e-10 * np.abs(whole).max()


def test_default_tile() -> None:
    assert sharded._default_tile(4) == 1024
    assert sharded._default_tile(400) == 579
    assert 579**2 * 400 <= 128 * 2**20 < 580**2 * 400
    assert sharded._default_tile(10**9) == 1
    sink = Memory()
    sharded.sharded_ntk(network(), samples(5), sink=sink)
    assert sink.kernel["tile"] == 5


@pytest.mark.parametrize("tile", [0, -3, 2.5, True, "4"])
def test_impossible_tile(tile: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"tile is .*expected a number of samples, at least 1"):
        sharded.sharded_ntk(network(), samples(5), sink=Memory(), tile=tile)


def test_bad_input_leaves_the_sink_alone() -> None:
    model, x, sink = network(), samples(5), Memory()
    with pytest.raises(ShapeError, match="at least 1"):
        sharded.sharded_ntk(model, x[:0], sink=sink)
    with pytest.raises(ShapeError, match="same number of samples"):
        sharded.sharded_ntk(model, {"a": x, "b": x[:4]}, sink=sink)
    with pytest.raises(UndefinedMeasure, match="x2 holds NaN"):
        sharded.sharded_ntk(model, x, torch.full_like(x, torch.nan), sink=sink)
    with pytest.raises(ConfigurationError, match=r"float16.*give dtype=torch.float32"):
        sharded.sharded_ntk(model, x, sink=sink, dtype=torch.float16)
    with pytest.raises(UnsupportedLayer, match="'1'"):
        sharded.sharded_ntk(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double(), x, sink=sink)
    assert not sink.kernel


def test_resumes_bit_identically() -> None:
    model, x, whole, sink = network(), samples(10), Memory(), Memory()
    sharded.sharded_ntk(model, x, sink=whole, tile=3)

    class Interrupted(Memory):
        def write(self, tile: tuple[int, int], array: np.ndarray[Any, Any]) -> None:
            if len(self.tiles) == 4:
                raise KeyboardInterrupt
            super().write(tile, array)

    interrupted = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        sharded.sharded_ntk(model, x, sink=interrupted, tile=3)
    sink.kernel, sink.tiles = interrupted.kernel, interrupted.tiles
    assert sharded.sharded_ntk(model, x, sink=sink, tile=3) == 6
    assert sharded.sharded_ntk(model, x, sink=sink, tile=3) == 0
    assert np.array_equal(sink.whole(), whole.whole())


def test_other_circumstances_are_said() -> None:
    model, x, sink = network(), samples(6), Memory()
    sharded.sharded_ntk(model, x, sink=sink, tile=3)
    del sink.tiles[0, 1]
    sink.kernel["made_with"]["threads"] = 64
    with pytest.warns(RuntimeWarning, match="threads 64 -> 1; the rest equals them up to rounding"):
        sharded.sharded_ntk(model, x, sink=sink, tile=3)


def test_another_forward_pass_is_refused() -> None:
    model, x, sink = network(), samples(6), Memory()
    sharded.sharded_ntk(model, x, sink=sink, tile=3)
    with pytest.raises(ConfigurationError, match="the forward pass is another one"):
        sharded.sharded_ntk(model, x, sink=sink, tile=3, forward=lambda model, inputs: 1.01 * model(inputs))


def _other_weights(model: nn.Module) -> None:
    next(model.parameters()).data[0, 0] += 1e-7


def _other_buffer(model: nn.Module) -> None:
    next(model.buffers()).fill_(True)


def _other_layer(model: Any) -> None:
    model[1] = nn.ReLU()


def _nothing(model: nn.Module) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "further", "named"),
    [
        (_other_weights, {}, "network"),
        (_other_buffer, {}, "network"),
        (_other_layer, {}, "network"),
        (_nothing, {"x1": samples(6, 9)}, "inputs x1"),
        (_nothing, {"x2": samples(6)}, "inputs x2"),
        (_nothing, {"reduce": nd.Projection(1, 0)}, "settings"),
        (_nothing, {"parameters": ["0.weight"]}, "settings"),
        (_nothing, {"metric": {"0.weight": 0.5}}, "settings"),
        (_nothing, {"engine": "reference"}, "settings"),
        (_nothing, {"dtype": torch.float32}, "precision"),
        (_nothing, {"reduce": "each"}, "settings"),
        (_nothing, {"tile": 2}, "tile size"),
    ],
)
def test_another_kernel_is_refused(tmp_path: Path, change: Any, further: dict[str, Any], named: str) -> None:
    model, arguments = network(), {"x1": samples(6), "tile": 3}
    nd.sharded_ntk(model, sink=nd.TileWriter(tmp_path / "k"), **arguments)
    before = {path: path.read_bytes() for path in (tmp_path / "k").rglob("*") if path.is_file()}
    assert nd.sharded_ntk(network(), sink=nd.TileWriter(tmp_path / "k"), **arguments) == 0
    change(model)
    with pytest.raises(RecordingExists, match=f"holds a kernel of another {named}.*nothing was touched"):
        nd.sharded_ntk(model, sink=nd.TileWriter(tmp_path / "k"), **{**arguments, **further})
    assert {path: path.read_bytes() for path in (tmp_path / "k").rglob("*") if path.is_file()} == before


def test_torchrun_without_a_process_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigurationError, match=r"torchrun with 4 processes and no process group.*init_process_group"):
        sharded.sharded_ntk(network(), samples(5), sink=Memory())
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert sharded.sharded_ntk(network(), samples(5), sink=Memory()) == 1


def test_copy_for_the_device_of_a_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.DataParallel(nn.Linear(4, 3)), nn.BatchNorm1d(3), nn.Linear(3, 2))
    names = ("0.module.bias", "2.weight")
    assert sharded._on_own_device(model, names) == (model, names, None)
    asked = []
    meta = torch.device("meta")  # stands for the GPU
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_backend", lambda: "nccl")
        patch.setattr(torch.distributed, "get_rank", lambda: 9)
        patch.setattr(torch.distributed, "get_node_local_rank", lambda fallback_rank: 1)
        patch.setattr(torch, "device", lambda *name: asked.append(name) or meta)
        clone, clone_names, device = sharded._on_own_device(model, names)
        assert sharded._on_own_device(clone, clone_names)[0] is clone
    assert asked == [("cuda", 1)] * 2
    assert device == meta
    assert clone_names == ("0.bias", "2.weight")
    assert all(tensor.device == meta for tensor in [*clone.parameters(), *clone.buffers()])
    assert all(tensor.device.type == "cpu" for tensor in [*model.parameters(), *model.buffers()])


def _environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MASTER_", "RANK", "WORLD_SIZE"))}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def _results(folder: Path, scenario: str) -> list[Any]:
    return [json.loads((folder / f"{scenario}-{rank}.json").read_text()) for rank in range(2)]


def _alone(path: Path) -> int:
    """What the worker computes, in this process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nd.Gate(16, slope=0.2), nn.Linear(16, 3))
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    return nd.sharded_ntk(model, x, sink=nd.TileWriter(path), tile=6, reduce="full")


def _contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "tiles").glob("*.h5")}


def test_two_processes(tmp_path: Path) -> None:
    scenarios = ["equal", "weights", "nan", "separate", "full", "hanging", "killed"]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path), *scenarios],
            env=_environment(RANK=str(rank), WORLD_SIZE="2"),
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    complaints = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, -signal.SIGKILL], complaints

    assert _results(tmp_path, "equal") == [5, 5]
    assert _alone(tmp_path / "alone") == 10
    whole = _contents(tmp_path / "alone")
    assert len(whole) == 10
    assert _contents(tmp_path / "equal") == whole

    for rank in range(2):
        assert _results(tmp_path, "weights")[rank].startswith(
            "ConfigurationError: sharded_ntk: rank 1 differs from rank 0 in network; expected"
        )
        assert "each process sees another folder" in _results(tmp_path, "separate")[rank]

    first, second = _results(tmp_path, "nan")
    assert second.startswith("UndefinedMeasure: x1 holds NaN")
    assert first.startswith("ProcessFailure: rank 0 of 2 ends because rank 1 failed: UndefinedMeasure: x1 holds NaN")
    assert not (tmp_path / "nan").exists()

    first, second = _results(tmp_path, "full")
    assert second.startswith("StorageError: cannot write a tile: No space left on device")
    assert first.startswith("ProcessFailure: rank 0 of 2 ends because rank 1 failed: StorageError: cannot write")
    assert len(_contents(tmp_path / "full")) == 6  # five of rank 0, one of rank 1

    for rank in range(2):
        assert "another process ended, or has not answered for 1 s" in _results(tmp_path, "hanging")[rank]

    message = json.loads((tmp_path / "killed-0.json").read_text())
    assert message.startswith("ProcessFailure: rank 0 of 2: another process ended")
    assert "start all processes again to go on" in message
    # The tile that was being written is a temporary, which no reader sees.
    assert len(list((tmp_path / "killed" / "tiles").glob(".tmp-*"))) == 1
    kept = _contents(tmp_path / "killed")
    assert len(kept) == 6
    assert kept.items() <= whole.items()
    assert _alone(tmp_path / "killed") == 4
    assert _contents(tmp_path / "killed") == whole


def test_benchmark_at_a_small_size(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "sharded.py"
    done = subprocess.run(
        [sys.executable, str(script), "--samples", "48", "--tile", "20", "--width", "16", "--processes", "2"],
        env=_environment(TMPDIR=str(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 2
    assert all(row.endswith("| equal | equal |") for row in rows[1:]), done.stdout
    assert not list(tmp_path.iterdir())
