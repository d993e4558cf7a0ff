"""One process of several: goes through the scenarios it is given and writes what came of each.

Run with RANK and WORLD_SIZE in the environment: sharded_worker.py FOLDER SCENARIO ...
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ntkdyn as nd
from ntkdyn.errors import NtkdynError, StorageError
from ntkdyn.store import files


def network(seed: int = 0) -> torch.nn.Module:
    """A small gated network."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 16), nd.Gate(16, slope=0.2), torch.nn.Linear(16, 3))


def inputs() -> torch.Tensor:
    """Twenty samples: tiles of six leave a smaller one at the end."""
    return torch.randn(20, 5, generator=torch.Generator().manual_seed(1))


class Failing(nd.TileWriter):
    """Fails at its second tile, or does something else there."""

    def __init__(self, path: Path, failure: Callable[[], None]) -> None:
        super().__init__(path)
        self._failure = failure
        self._written = 0

    def write(self, tile: tuple[int, int], array: Any) -> None:
        """Write the first tile."""
        self._written += 1
        if self._written == 2:
            self._failure()
        super().write(tile, array)


def refuse() -> None:
    """What a full disk says."""
    raise StorageError("cannot write a tile: No space left on device")


def end_before_rename() -> None:
    """End the process as the kernel would, when the next tile is written and not yet renamed."""
    files.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]


def run(scenario: str, folder: Path, rank: int) -> int:
    """Compute one kernel."""
    model, x = network(), inputs()
    sink: Any = nd.TileWriter(folder / scenario)
    timeout = 60.0
    if scenario == "weights" and rank == 1:
        model = network(seed=1)
    if scenario == "nan" and rank == 1:
        x[7, 2] = torch.nan
    if scenario == "separate":
        sink = nd.TileWriter(folder / f"{scenario}-{rank}")
    if scenario == "full" and rank == 1:
        sink = Failing(folder / scenario, refuse)
    if scenario == "killed" and rank == 1:
        sink = Failing(folder / scenario, end_before_rename)
    if scenario == "hanging":
        timeout = 1.0
        if rank == 1:
            sink = Failing(folder / scenario, lambda: time.sleep(1.5))
    return nd.sharded_ntk(model, x, sink=sink, tile=6, reduce="full", timeout=timeout)


def main() -> None:
    """Go through the scenarios."""
    torch.set_num_threads(1)
    folder, scenarios = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    rank = dist.get_rank()
    for scenario in scenarios:
        try:
            result: Any = run(scenario, folder, rank)
        except NtkdynError as error:
            result = f"{type(error).__name__}: {error}"
        (folder / f"{scenario}-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
