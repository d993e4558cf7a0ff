"""Post-training: exact counts, honest measurements, files that load again, and a network of the user's that stays."""

from __future__ import annotations

import copy
import csv
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import ntkdyn as nd
from ntkdyn.gates import gates, nonlinear_units
from ntkdyn.linearization import Linearizer
from ntkdyn.paths import path_lengths
from ntkdyn.store.metadata import load_json

FILES = ["curve.csv", "curve.png", "curve.svg", "model.safetensors", "report.json"]
BRIEF: dict[str, Any] = {"ramp_epochs": 2, "recovery_epochs": 1}


def accuracy(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Share of right predictions, by hand."""
    with torch.no_grad():
        right = [(model(inputs).argmax(1) == targets) for inputs, targets in batches]
    return float(torch.cat(right).double().mean())


def same(first: nn.Module, second: nn.Module) -> bool:
    """Whether two networks have the same state, bit for bit."""
    one, other = first.state_dict(), second.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


class Watching(Linearizer):
    """A Linearizer that notes who is frozen after each call."""

    seen: list[Tensor] = []  # noqa: RUF012

    def step(self) -> None:
        super().step()
        self.seen.append(self._slopes.frozen().clone())


@pytest.fixture
def frozen_after_each_step(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    monkeypatch.setattr(Watching, "seen", [])
    monkeypatch.setattr("ntkdyn.posttraining.training.Linearizer", Watching)
    return Watching.seen


GROUPS = [
    (kind, granularity, survivors)
    for kind in ("mlp", "resnet")
    for granularity in ("channel", "layer")
    for survivors in ("keep", "common", "relu")
]


@pytest.mark.parametrize(
    ("kind", "granularity", "survivors", "seed"),
    [
        # By default one seed of each group, and so each strength and rule of the four too.
        pytest.param(*group, seed, marks=[] if seed == number % 4 else [pytest.mark.slow])
        for number, group in enumerate(GROUPS)
        for seed in range(4)
    ],
)
def test_every_target_is_reached_exactly_and_no_unit_comes_back(
    task: Any,
    trained: Any,
    frozen_after_each_step: list[Tensor],
    kind: str,
    granularity: Any,
    survivors: Any,
    seed: int,
) -> None:
    targets = (0.5, 0.0) if granularity == "layer" else (0.5, 5, 0.04)
    done = nd.linearize(
        trained(kind, seed), task.train[:4], task.test, target=targets, granularity=granularity, survivors=survivors,
        strength=(0.0, 1.0, 4.0, 1.0)[seed], rule=("clipped", "half-threshold")[seed % 2], seed=seed, points=3, **BRIEF,
    )  # fmt: skip
    total = nonlinear_units(done.model).total_total
    # Half of the layers' 4 + 4 + 4 + 6 + 6 units, or of 12 + 12, can be had exactly: 12.
    expected = [12, 0] if granularity == "layer" else [total // 2, 5, round(0.04 * total)]
    assert [end.active_units for end in done.ends] == expected
    assert nonlinear_units(done.model).active_total == expected[-1]
    steps = torch.stack(frozen_after_each_step)
    assert bool((steps[1:] >= steps[:-1]).all()), "a frozen unit was active again"
    counts = [point.active_units for point in done.curve]
    assert counts == sorted(counts, reverse=True)
    for end, asked in zip(done.ends, done.report["targets"], strict=True):
        assert end.target == end.active_units == asked["active_units"] == sum(asked["active_units_of_gates"].values())


def test_the_curve_says_what_the_network_can_do(task: Any, trained: Any) -> None:
    original = trained()
    done = nd.linearize(original, task.train, task.test, target=(0.5, 3))
    first, *_, last = done.curve
    assert (first.step, first.epoch, first.phase, first.active_units, first.napl) == (0, 0.0, "dense", 24, 2.0)
    assert first.test_accuracy == accuracy(original, task.test)
    assert math.isnan(first.train_loss)
    assert last.phase == "end"
    assert last.step == 2 * 8 * 16
    assert last.test_accuracy == accuracy(done.model, task.test)
    loss = sum(functional.cross_entropy(done.model(x), y).item() * len(y) for x, y in task.test) / 256
    assert last.test_loss == pytest.approx(loss, rel=1e-6)
    lengths = path_lengths(done.model, task.test[0][0][:2])
    assert (last.napl, last.apl, last.weighted_napl) == (lengths.normalized, lengths.mean, lengths.weighted)
    units = nonlinear_units(done.model)
    assert (last.active_units, last.weighted_units) == (3, units.weighted_total)
    assert last.survivor_nonlinearity == pytest.approx(units.weighted_total / 3)
    assert [point.phase for point in done.ends] == ["end", "end"]
    assert {point.phase for point in done.curve} == {"dense", "ramp", "recovery", "end"}
    # Along the first ramp the count is seen at several places, and a loss of training is known for each.
    assert len({point.active_units for point in done.curve if point.target == 12}) >= 5
    assert all(point.train_loss > 0 for point in done.curve[1:])
    assert done.ends[0].test_accuracy > 0.8  # chance is 1 / 3


def test_the_users_network_and_the_generator_stay_as_they_were(task: Any, trained: Any) -> None:
    model = copy.deepcopy(trained("resnet")).train()
    model.readout.weight.requires_grad_(False)
    before, state = copy.deepcopy(model), torch.get_rng_state()
    done = nd.linearize(model, task.train[:4], task.test, target=4, **BRIEF)
    assert same(before, model)
    assert model.training
    assert not gates(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not done.model.training
    # What she has fixed stays fixed; slopes are trainable again, as those of any Gate.
    assert torch.equal(done.model.readout.weight, model.readout.weight)
    assert not done.model.readout.weight.requires_grad
    assert all(gate.slope.requires_grad for gate in gates(done.model).values())


def test_gates_of_the_user_stay_and_what_is_frozen_stays_frozen(task: Any, trained: Any) -> None:
    gated = nd.gate_network(trained(), task.test[0][0])
    gates(gated)["2"].freeze(torch.arange(12) < 7)
    with torch.no_grad():
        gates(gated)["4"].slope.fill_(0.3)
    before = copy.deepcopy(gated)
    done = nd.linearize(gated, task.train[:4], task.test, target=0.25, **BRIEF)
    assert same(before, gated)
    assert done.curve[0].active_units == 17
    assert done.ends[0].active_units == 6
    assert bool(gates(done.model)["2"].frozen[:7].all())


@pytest.mark.parametrize(("kind", "granularity"), [("mlp", "channel"), ("resnet", "channel"), ("resnet", "layer")])
def test_files_load_again_to_the_same_outputs_bit_for_bit(
    task: Any, trained: Any, tmp_path: Path, kind: str, granularity: Any
) -> None:
    out, (inputs, _) = tmp_path / "out", task.test[0]
    done = nd.linearize(
        trained(kind), task.train[:8], task.test, target=(0.6, 0.3), granularity=granularity, out=out, record=False,
        survivors="common", **BRIEF,
    )  # fmt: skip
    more = f"model-{done.ends[0].active_units}-units.safetensors"
    assert sorted(file.name for file in out.iterdir()) == sorted([*FILES, more])
    # As the README says it.
    model = nd.gate_network(task.network(kind, seed=9), inputs, granularity=granularity)
    model.load_state_dict(load_file(out / "model.safetensors"))
    model.eval()
    assert torch.equal(model(inputs), done.model(inputs))
    assert nonlinear_units(model).active == nonlinear_units(done.model).active
    assert accuracy(model, task.test) == done.ends[1].test_accuracy
    model.load_state_dict(load_file(out / more))
    assert nonlinear_units(model).active_total == done.ends[0].active_units
    assert accuracy(model, task.test) == done.ends[0].test_accuracy


def test_report_and_table_hold_the_curve(task: Any, trained: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder will do
    done = nd.linearize(
        trained(), task.train[:4], task.test, target=5, out=out, manifest={"command": "mine"}, seed=3, **BRIEF
    )
    report = load_json((out / "report.json").read_bytes())
    assert json.dumps(report, sort_keys=True) == json.dumps(load_json(json.dumps(done.report)), sort_keys=True)
    assert report["status"] == "finished"
    assert report["diverged"] is False
    assert report["command"] == "mine"
    assert report["settings"]["seed"] == 3
    assert report["network"]["units_of_gates"] == {"2": 12, "4": 12}
    assert report["targets"][0]["file"] == "model.safetensors"
    assert report["threads"] == torch.get_num_threads()
    with (out / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["test_accuracy"]) for row in rows] == [point.test_accuracy for point in done.curve]
    assert [int(row["active_units"]) for row in rows] == [point.active_units for point in done.curve]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_report_has_what_was_asked_and_the_units_that_it_is(task: Any, trained: Any) -> None:
    """One key for both had 9 where 0.5 was asked for."""
    done = nd.linearize(trained(), task.train[:4], task.test, target=(0.5, 0.26, 3), **BRIEF)
    told = [(entry["target_asked"], entry["target"], entry["active_units"]) for entry in done.report["targets"]]
    assert told == [(0.5, 12, 12), (0.26, 6, 6), (3, 3, 3)]


def test_recording_has_the_ramp_and_changes_nothing(task: Any, trained: Any, tmp_path: Path) -> None:
    inputs, targets = (torch.cat(part) for part in zip(*task.train, strict=True))
    loader = DataLoader(TensorDataset(inputs, targets), 128, shuffle=True)
    test = DataLoader(TensorDataset(*(torch.cat(part) for part in zip(*task.test, strict=True))), 100, shuffle=True)
    several = []
    for record, points in ((True, 10), (False, 10), (False, 3)):
        out = tmp_path / f"{record}{points}"
        several.append(nd.linearize(trained(), loader, test, target=6, out=out, record=record, points=points, **BRIEF))
    assert same(several[0].model, several[1].model)
    # Nor does looking more or less often.
    assert same(several[0].model, several[2].model)
    assert not (tmp_path / "False10" / "run").exists()
    run = nd.Run.open(tmp_path / "True10" / "run")
    assert run["units/active"].sum(1)[-1] == 6
    assert run["path_length/normalized"][-1] == several[0].ends[0].napl
    assert run["outputs/test/accuracy"].shape == (4,)  # before, and after each epoch
    assert run.manifest["results"]["test_accuracy"] == several[0].ends[0].test_accuracy
    assert run.manifest["status"] == "finished"
    assert run.manifest["config"]["survivors"] == "keep"


def test_the_same_seed_is_the_same_network_and_another_is_another(task: Any, trained: Any) -> None:
    inputs, targets = (torch.cat(part) for part in zip(*task.train, strict=True))
    loader = DataLoader(TensorDataset(inputs, targets), 64, shuffle=True)
    first, again, other = (
        nd.linearize(trained(), loader, task.test, target=4, seed=seed, **BRIEF) for seed in (0, 0, 1)
    )
    assert same(first.model, again.model)
    assert not same(first.model, other.model)


class Regression(nn.Module):
    """A hidden layer of 8 ReLUs, one output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.relu = nn.ReLU()
        self.out = nn.Linear(8, 1)

    def forward(self, wide: Tensor) -> Tensor:
        return self.out(self.relu(self.first(wide)))


def test_her_own_loss_of_real_targets(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    batches = [(part, part.prod(1, keepdim=True)) for part in x.split(16)]
    done = nd.linearize(
        Regression(), batches, batches[:2], target=2, loss=functional.mse_loss, out=tmp_path / "out", **BRIEF
    )
    assert math.isnan(done.ends[0].test_accuracy)
    loss = torch.cat([(done.model(x) - y) ** 2 for x, y in batches[:2]]).mean()
    assert done.ends[0].test_loss == pytest.approx(loss.item(), rel=1e-5)
    recorded = nd.Run.open(tmp_path / "out" / "run")["outputs/test/loss"]
    assert recorded.shape == (4, 16)
    assert recorded[-1] == pytest.approx(((done.model(x[:16]) - batches[0][1]) ** 2).detach().numpy()[:, 0], rel=1e-5)


class Named(nn.Module):
    """Two inputs by name, a ReLU in one branch and a GELU in the other."""

    def __init__(self, *, traceable: bool) -> None:
        super().__init__()
        self.traceable = traceable
        self.left, self.right, self.relu = nn.Linear(4, 8), nn.Linear(2, 8), nn.ReLU()
        self.gelu, self.out = nn.GELU(), nn.Linear(8, 3)

    def forward(self, wide: Tensor, narrow: Tensor) -> Tensor:
        found = self.out(self.relu(self.left(wide)) + self.gelu(self.right(narrow)))
        return found if self.traceable else found.cumsum(1)


@pytest.mark.parametrize("traceable", [False, True])
def test_inputs_by_name(tmp_path: Path, traceable: bool) -> None:
    torch.manual_seed(0)
    net = Named(traceable=traceable)
    batches = [({"wide": torch.randn(16, 4), "narrow": torch.randn(16, 2)}, torch.randint(3, (16,))) for _ in range(4)]
    untraceable = pytest.warns(RuntimeWarning, match="the curve has no path lengths")
    with nullcontext() if traceable else untraceable:
        done = nd.linearize(net, batches, batches, target=3, out=tmp_path / "out", **BRIEF)
    assert done.ends[0].active_units == 3
    assert done.report["network"]["always_active"] == {"gelu": "GELU"}
    assert nd.Run.open(tmp_path / "out" / "run").manifest["status"] == "finished"
    if traceable:
        # Half of the paths meet one of the 3 units of 8 that are left, the other half the GELU.
        assert done.ends[0].napl == pytest.approx(0.5 * 3 / 8 + 0.5)
    else:
        assert math.isnan(done.ends[0].napl)
        assert "no path lengths" in done.report["warnings"][0]


def test_layer_wise_counts_that_cannot_be_reached_any_more_are_said(task: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    gated = nd.gate_network(model, task.test[0][0], granularity="layer")
    with torch.no_grad():
        gates(gated)["2"].slope.fill_(0.0)
        gates(gated)["4"].slope.fill_(0.9)
    # 8 keeps the wide layer, so that 4 cannot be had; the nearest are 0 and 8, and of two the larger.
    with pytest.warns(RuntimeWarning, match="left cannot add up to 4 units; the target is 8"):
        done = nd.linearize(gated, task.train[:2], task.test, target=(8, 4), ramp_epochs=1, recovery_epochs=1)
    assert [end.active_units for end in done.ends] == [8, 8]


def test_statistics_of_batchnorm_are_those_of_the_calibration_batch(task: Any, trained: Any) -> None:
    done = nd.linearize(trained("resnet"), task.train, task.test, target=6, **BRIEF)
    inputs = torch.cat([batch[0] for batch in task.train])[:512]
    found = done.model.conv(inputs)
    torch.testing.assert_close(done.model.norm.running_mean, found.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(done.model.norm.running_var, found.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_sgd_with_momentum_and_decay(task: Any, trained: Any) -> None:
    done = nd.linearize(
        trained(), task.train, task.test, target=4, optimizer="sgd", learning_rate=0.01, momentum=0.8,
        weight_decay=1e-4, **BRIEF,
    )  # fmt: skip
    assert done.ends[0].active_units == 4
    assert done.ends[0].test_accuracy > 0.6
