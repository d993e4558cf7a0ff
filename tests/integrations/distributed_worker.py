"""One of several processes that train together; what came of each kind of training, it prints as a line of JSON.

Arguments: folder, rank, number of processes, kinds of training.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from torch import distributed, nn

import ntkdyn as nd
from ntkdyn.errors import ConfigurationError


class Slow:
    """A probe that takes its time."""

    name = "slow"

    def fields(self, snapshot: nd.Snapshot) -> list[nd.Field]:
        return [nd.Field(name="one")]

    def measure(self, snapshot: nd.Snapshot) -> dict[str, float]:
        time.sleep(6.0 if snapshot.step == 0 else 0.0)
        return {"one": 1.0}


def train(folder: Path, rank: int, size: int, kind: str) -> dict[str, object]:
    """Train in a process group of its own."""
    # Made before the process group, as Lightning has it: only when recording begins is it known who is the first.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nd.Gate(6), nn.Linear(6, 3))
    inputs, targets = torch.randn(16, 4), torch.randint(3, (16,))
    probes = ["ntk", "units", *([Slow()] if kind == "slow" else [])]
    path = folder / kind / "run"
    early = nd.Recorder(network, probes, {"test": (inputs[:4], targets[:4])}, path=path, schedule=nd.every(2))
    meeting = distributed.FileStore(str(folder / f"meeting-{kind}"), size)
    distributed.init_process_group(
        "gloo", store=meeting, rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=11 if kind == "slow" else 60),
    )  # fmt: skip
    with ExitStack() as stack:
        stack.callback(distributed.destroy_process_group)
        # By a file, as what goes by the group may still be under way to the other process when this one leaves it.
        stack.callback(meeting.wait, [f"done {one}" for one in range(size)], datetime.timedelta(seconds=60))
        stack.callback(meeting.set, f"done {rank}", "")
        model: nn.Module = network
        if kind == "sharded":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(network, mesh=init_device_mesh("cpu", (size,)))
        elif kind in ("flat", "inner"):
            from torch.distributed.fsdp import FullyShardedDataParallel

            # Of "inner" the recorder gets what is inside the wrapper, under its own names.
            named = kind == "inner"
            model = FullyShardedDataParallel(network, device_id=torch.device("cpu"), use_orig_params=named)
        else:
            model = nn.parallel.DistributedDataParallel(network)
        if kind == "zero":
            from torch.distributed.optim import ZeroRedundancyOptimizer

            optimizer: torch.optim.Optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        recorder = early
        if kind in ("late", "flat"):
            recorder = nd.Recorder(model, probes, {"test": (inputs[:4], targets[:4])}, path=path, schedule=nd.every(2))
        calls: list[str] = []
        for name in ("all_reduce", "all_gather", "broadcast", "barrier", "all_gather_object", "broadcast_object_list"):
            stack.enter_context(mock.patch.object(distributed, name, spied(calls, name)))
        answer: dict[str, object] = {}
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        try:
            with recorder.attach(optimizer) if kind != "without" else torch.enable_grad():
                for step in range(4):
                    optimizer.zero_grad()
                    batch = slice((step * size + rank) % 8, None, 2)
                    nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
                    optimizer.step()
        except ConfigurationError as error:
            answer["error"] = str(error)
        recorder.close()
    if "error" not in answer:
        digest = hashlib.sha256()
        for value in network.state_dict().values():
            digest.update(value.numpy().tobytes())
        answer["weights"] = digest.hexdigest()
    answer["calls"] = calls
    answer["warnings"] = [
        str(one.message) for one in caught if "ntkdyn" in str(one.filename) or "run" in str(one.message)
    ]
    return answer


def spied(calls: list[str], name: str) -> Callable[..., object]:
    """The function of torch.distributed, which notes its name when it is called."""
    original = getattr(distributed, name)

    def called(*arguments: object, **keywords: object) -> object:
        calls.append(name)
        return original(*arguments, **keywords)

    return called


if __name__ == "__main__":
    for kind in sys.argv[4:]:
        print(json.dumps(train(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), kind)), flush=True)
