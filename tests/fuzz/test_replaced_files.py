"""Something else in the place of a file: a folder, a FIFO, a link to nowhere or to a device without end, 100 MB."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ntkdyn import checkpoint
from ntkdyn.probe import Field
from ntkdyn.store import lock, repair, verify
from ntkdyn.store.reader import RunReader
from ntkdyn.store.writer import RunWriter


def _large(path: Path) -> None:
    path.write_bytes(b'{"a": "' + b"x" * 100_000_000 + b'"}')


SUBSTITUTES: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "fifo": os.mkfifo,
    "link to nowhere": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "empty": Path.touch,
    "100 MB": _large,
    "deep": lambda path: path.write_bytes(b'{"a":' * 100_000),
}
RUN: dict[str, Callable[[Path], object]] = {
    "open": RunReader.open,
    "verify": repair.verify,
    "resume": lambda path: RunWriter(path, {}, after=1).close(pack=False),
    "repair": repair.repair,
    "open again": RunReader.open,
}
SAVED: dict[str, Callable[[Path], object]] = {
    "load": lambda path: checkpoint.load(path / "3"),
    "latest": checkpoint.latest,
}


@pytest.mark.parametrize("substitute", SUBSTITUTES)
@pytest.mark.parametrize("name", ["run.json", lock.NAME, "segments/seg-0-000000000001-000000000001.h5", "run.h5",
                                  "3/checkpoint.json", "3/tensors.safetensors"])  # fmt: skip
def test_what_is_no_file_is_refused_or_harmless(harness: Any, tmp_path: Path, name: str, substitute: str) -> None:
    root = tmp_path / "run"
    if name.startswith("3/"):
        actions = SAVED
        checkpoint.save(root, 3, nn.Linear(2, 2))
        torch.manual_seed(0)
    else:
        actions = RUN
        writer = RunWriter(root, {"seed": 1})
        writer.declare("p", [Field(name="x")])
        for step in range(3):
            writer.commit(step, None, {"p": {"x": step}})
        writer.close(pack=name == "run.h5")
    target = root / name
    target.unlink(missing_ok=True)
    SUBSTITUTES[substitute](target)
    verify._sound.clear()

    def act(index: int) -> str:
        action = list(actions.values())[index]
        found: str = harness.judged(lambda folder, data: repr(action(folder)), root, b"")
        return found

    for action, verdict in zip(actions, harness.in_child(len(actions), act), strict=True):
        assert verdict not in ("crash", "hang"), (action, verdict)
        assert not verdict.startswith("fault"), (action, verdict)
    shutil.rmtree(root)
