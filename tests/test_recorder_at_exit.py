"""A recorder that nobody closes: its recording is finished and packed when the process ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ntkdyn as nd

SCRIPT = """
import sys, weakref

class Anything:
    pass

thing = Anything()
# As libraries do: the entry of weakref at exit is then older than that of h5py, and runs after it.
weakref.finalize(thing, int)
import torch
import ntkdyn as nd

model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
recorder = nd.Recorder(model, ["outputs"], torch.ones(4, 3), path=sys.argv[1])
with recorder.attach(optimizer):
    for _ in range(3):
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
"""


def test_the_recording_is_finished_and_packed(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", SCRIPT, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if not line.startswith("ntkdyn: outputs:")] == []
    assert (tmp_path / "run" / "run.h5").exists()
    run = nd.Run.open(tmp_path / "run")
    assert run.manifest["status"] == "finished"
    assert run.steps("outputs").tolist() == [0, 1, 2, 3]
