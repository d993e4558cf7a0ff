"""A trial times steps and snapshots in CPU seconds of one thread, and takes medians of several."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from ntkdyn import trial
from ntkdyn.recorder import Recorder
from ntkdyn.sweep import cost, make_plan
from ntkdyn.trial import Trial, TrialEnded


class Recorded:
    """A recorder whose kernel takes nine times what the rest takes, by a clock that runs ten times too fast."""

    probe_seconds = {"ntk": 9.0, "units": 1.0}  # noqa: RUF012  # never changed


def timed(monkeypatch: pytest.MonkeyPatch, steps: dict[int, float], snapshots: dict[int, float]) -> Trial:
    """A trial that sees steps of 0.01 s and snapshots of 0.1 s, but for those given by step."""
    clock = [0.0]
    monkeypatch.setattr(trial.time, "process_time", lambda: clock[0])
    found = Trial()
    for step in range(1, 100):
        clock[0] += steps.get(step, 0.01)
        if found.schedule(step):
            clock[0] += snapshots.get(step, 0.1)
        try:
            found.stepped(cast("Recorder", Recorded()))
        except TrialEnded:
            return found
    pytest.fail("the trial does not end")


def test_steps_and_snapshots_are_told_apart_by_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    """One snapshot, timed by the clock on the wall while others worked, stood for all."""
    found = timed(monkeypatch, steps={1: 3.0, 2: 3.0, 7: 0.4}, snapshots={9: 0.7})
    assert found.step_seconds == pytest.approx(0.01)
    assert found.probe_seconds == pytest.approx({"ntk": 0.09, "units": 0.01})


def test_a_trial_of_dear_snapshots_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    found = timed(monkeypatch, steps={}, snapshots={4: 30.0})
    assert found.step_seconds == pytest.approx(0.01)
    assert sum(found.probe_seconds.values()) == pytest.approx(30.0)


def test_a_trial_takes_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def noted(*arguments: Any, **named: Any) -> None:
        seen.append(torch.get_num_threads())

    monkeypatch.setattr(cost, "try_run", noted)
    plan = make_plan("nonlinear-advantage", settings=["intervention=none"])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        cost.estimate(plan)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1]
