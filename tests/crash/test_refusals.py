"""A disk that refuses any one call, or all from some call on: training ends as without a recorder."""

from __future__ import annotations

import errno
import gc
import os
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ntkdyn as nd
from ntkdyn.gates import Gate
from ntkdyn.store import compact, files
from ntkdyn.store.reader import RunReader
from ntkdyn.store.writer import RunWriter

FUNCTIONS = ("create", "write", "truncate", "fsync", "replace", "link", "unlink", "sync_folder", "make_folder")
STEPS = 8
INPUTS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def trained(path: Path | None) -> bytes:
    """Weights after a small training, with a recorder where there is a path."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Gate(4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters())

    def steps() -> None:
        for step in range(STEPS):
            optimizer.zero_grad()
            model(torch.randn(5, 3, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()

    if path is None:
        steps()
    else:
        recorder = nd.Recorder(model, ["outputs", "units"], INPUTS, path=path, on_error="raise")
        with recorder.attach(optimizer):
            steps()
        recorder.close()
    return b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())


class Refusing:
    """Fails calls of ``files``, counted over all its functions, from number ``first`` to ``last``."""

    def __init__(self, patch: pytest.MonkeyPatch, first: int, last: float, code: int) -> None:
        # The locks of earlier recorders go now, and are not counted.
        gc.collect()
        self.calls = 0
        for name in FUNCTIONS:
            real = getattr(files, name)

            # These two tell of the system's errors themselves.
            told = files.storage_errors if name in ("unlink", "make_folder") else lambda *_: nullcontext()

            def act(*given: Any, real: Any = real, told: Any = told) -> Any:
                self.calls += 1
                if first <= self.calls <= last:
                    with told("change", given[0]):
                        raise OSError(code, os.strerror(code))
                return real(*given)

            patch.setattr(files, name, act)


def calls_before_the_first_snapshot(monkeypatch: pytest.MonkeyPatch, path: Path) -> int:
    with monkeypatch.context() as patch:
        counting = Refusing(patch, 10**9, 0, 0)
        RunWriter(path, {})
        return counting.calls


def test_training_ends_well_whichever_call_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compact, "FAN", 3)
    start = calls_before_the_first_snapshot(monkeypatch, tmp_path / "start")
    expected = trained(None)
    with monkeypatch.context() as patch:
        counting = Refusing(patch, 10**9, 0, 0)
        assert trained(tmp_path / "whole") == expected
    whole = RunReader.open(tmp_path / "whole")
    everything = request.config.getoption("--long")
    numbers = range(start + 1, counting.calls + 1, 1 if everything else 97)
    runs = 0
    for code in (errno.ENOSPC, errno.EIO):
        for forever in (False, True):
            for number in numbers:
                runs += 1
                path = tmp_path / f"{errno.errorcode[code]}-{forever}-{number}"
                with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    Refusing(patch, number, float("inf") if forever else number, code)
                    assert trained(path) == expected
                said = [str(one.message) for one in caught]
                reader = RunReader.open(path, trusted=True)
                steps = reader.steps("outputs").tolist() if "outputs" in reader.groups() else []
                for index, step in enumerate(steps):
                    assert (reader.read("outputs/logits")[index] == whole.read("outputs/logits")[step]).all()
                missing = sorted(set(range(STEPS + 1)) - set(steps))
                named = [line for line in said if "could not be written" in line]
                # Named once, and by number. A step may be there although its fsync failed: that is named too.
                assert len(named) <= 1
                if missing:
                    numbers_named = named[0].split("step", 1)[1].split(" could")[0].lstrip("s ").split(", ")
                    assert {str(step) for step in missing} <= set(numbers_named)
                elif not forever:
                    assert not named
    with capsys.disabled():
        print(f"\n{runs} trainings on a disk that refuses: weights identical in all, every skipped step named once")
