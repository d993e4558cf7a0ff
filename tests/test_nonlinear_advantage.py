"""The experiment nonlinear-advantage: configuration, branches equal to uninterrupted training, arms and controls."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ntkdyn.checkpoint import Checkpoint, load
from ntkdyn.configuration import configure
from ntkdyn.errors import ConfigurationError, UnknownName
from ntkdyn.experiment import Experiment, run_experiment
from ntkdyn.experiments.advantage_config import AdvantageConfig
from ntkdyn.experiments.networks import GatedMLP
from ntkdyn.experiments.nonlinear_advantage import NonlinearAdvantage
from ntkdyn.gates import gates, nonlinear_units
from ntkdyn.results import Run

SMALL: dict[str, Any] = {
    "width": 8,
    "depth": 2,
    "epochs": 8,
    "pairs": 128,
    "batch_size": 32,
    "test_pairs": 200,
    "probe_per_class": 2,
    "latest_start": 3,
    "ramp_epochs": 2,
    "settle_epochs": 1,
    "remaining": 0.25,
}
STEPS_PER_EPOCH = 4
LAST = 8 * STEPS_PER_EPOCH


def config(**changes: Any) -> AdvantageConfig:
    return configure(AdvantageConfig, SMALL | changes)


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(equal(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


class Outcome:
    """Results, recording and final state of one run."""

    def __init__(self, path: Path, *, start: Checkpoint | None = None, steps: set[int] | None = None, **changes: Any):
        settings = config(**changes)
        last = settings.total_epochs * STEPS_PER_EPOCH
        self.results = run_experiment(
            NonlinearAdvantage(),
            settings,
            seed=1,
            path=path,
            start=start,
            probes=["units", "gates"],
            checkpoint_steps=frozenset({last} | (steps or set())),
        )
        self.path = path
        self.end = load(path / "checkpoints" / str(last))

    def same_training(self, other: Outcome) -> bool:
        return equal(self.end.model, other.end.model) and equal(self.end.optimizer, other.end.optimizer)

    def frozen(self) -> Tensor:
        return torch.cat([value for name, value in self.end.model.items() if name.endswith("frozen")])

    def slopes(self) -> Tensor:
        return torch.cat([value for name, value in self.end.model.items() if name.endswith("slope")])


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    path = tmp_path_factory.mktemp("trunk")
    return Outcome(path, intervention="none", steps={0, STEPS_PER_EPOCH, 3 * STEPS_PER_EPOCH})


@pytest.fixture(scope="module")
def branch(trunk: Outcome, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """Run an arm from the trunk's checkpoint that the experiment asks for; the same arm is run once."""
    made: dict[str, Outcome] = {}

    def run(**changes: Any) -> Outcome:
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            origin = NonlinearAdvantage().trunk(config(**changes))
            assert origin is not None
            start = load(trunk.path / "checkpoints" / str(origin[1]))
            made[key] = Outcome(tmp_path_factory.mktemp("arm"), start=start, **changes)
        return made[key]

    return run


def test_it_is_an_experiment() -> None:
    assert isinstance(NonlinearAdvantage(), Experiment)


ARMS: list[dict[str, Any]] = [
    {"start_epoch": 0},
    {"start_epoch": 3},
    {"start_epoch": 3, "survivors": "keep"},
    {"start_epoch": 3, "granularity": "channel", "mask": "random"},
    {"mask": "late"},
    {"mask": "late-path"},
    {"start_epoch": 1, "budget": "after-switch", "latest_start": 3},
    {"start_epoch": 3, "intervention": "none", "data_order": 1},
    {"start_epoch": 3, "data_order": 2},
    {"intervention": "linear"},
]


@pytest.mark.parametrize("changes", ARMS, ids=str)
def test_a_branch_equals_training_without_interruption(
    changes: dict[str, Any], branch: Callable[..., Outcome], tmp_path: Path
) -> None:
    assert branch(**changes).same_training(Outcome(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "others"),
    [
        ({"intervention": "none"}, {"start_epoch": 3}),
        ({"mask": "random"}, {"strength": 1.0}),
        ({"survivors": "keep"}, {"settle_epochs": 3, "common_slope": 0.5}),
        ({"survivors": "relu"}, {"common_slope": 0.5}),
        ({"start_epoch": 1}, {"latest_start": 2}),
        ({"start_epoch": 3}, {"budget": "after-switch"}),
        ({"intervention": "none"}, {"optimizer_at_switch": "new"}),
    ],
    ids=str,
)
def test_equal_runs_have_one_configuration(changes: dict[str, Any], others: dict[str, Any]) -> None:
    assert config(**changes) == config(**changes, **others)


def test_a_new_optimizer_at_the_switch(branch: Callable[..., Outcome], trunk: Outcome, tmp_path: Path) -> None:
    kept, new = branch(start_epoch=3), branch(start_epoch=3, optimizer_at_switch="new")
    assert not equal(kept.end.model, new.end.model)
    # Adam counts its steps: those since the switch, and all.
    assert {int(state["step"]) for state in new.end.optimizer["state"].values()} == {LAST - 3 * STEPS_PER_EPOCH}
    assert {int(state["step"]) for state in kept.end.optimizer["state"].values()} == {LAST}
    assert new.same_training(Outcome(tmp_path, start_epoch=3, optimizer_at_switch="new"))


def test_training_is_repeatable_and_seeded(trunk: Outcome, tmp_path: Path) -> None:
    torch.manual_seed(5)
    assert Outcome(tmp_path / "again", intervention="none").same_training(trunk)
    run_experiment(NonlinearAdvantage(), config(intervention="none"), seed=2, path=tmp_path / "other", probes=["units"])
    assert Run.open(tmp_path / "other").results != Run.open(tmp_path / "again").results


@pytest.mark.parametrize(
    "changes", [arm for arm in ARMS if arm.get("intervention", "linearize") == "linearize"], ids=str
)
def test_exactly_the_asked_number_of_units_remains(changes: dict[str, Any], branch: Callable[..., Outcome]) -> None:
    arm = branch(**changes)
    assert arm.results["active_units"] == 4  # a quarter of 2 x 8
    assert arm.results["active_share"] == 0.25
    assert int((~arm.frozen()).sum()) == 4
    assert (arm.slopes()[arm.frozen()] == 1).all()
    if changes.get("survivors", "common") == "common":
        assert (arm.slopes()[~arm.frozen()] == 0.75).all()
        assert arm.results["survivor_nonlinearity"] == 0.25
        assert arm.results["weighted_units"] == 1.0


def test_survivor_rules(branch: Callable[..., Outcome]) -> None:
    relu = branch(start_epoch=3, survivors="relu")
    assert (relu.slopes()[~relu.frozen()] == 0).all()
    assert relu.results["survivor_nonlinearity"] == 1
    keep = branch(start_epoch=3, survivors="keep")
    assert torch.equal(keep.frozen(), relu.frozen())  # the ramp is the same, only what follows differs
    assert len(keep.slopes()[~keep.frozen()].unique()) > 1


def test_masks(branch: Callable[..., Outcome]) -> None:
    learned = branch(start_epoch=3)
    assert torch.equal(branch(mask="late").frozen(), learned.frozen())
    assert torch.equal(branch(mask="late-path").frozen(), learned.frozen())
    early, late = branch(mask="random"), branch(start_epoch=3, mask="random")
    assert torch.equal(early.frozen(), late.frozen())
    assert not torch.equal(early.frozen(), learned.frozen())
    kept = branch(mask="late-path", survivors="keep")
    assert torch.equal(kept.slopes(), branch(start_epoch=3, survivors="keep").slopes())


def test_another_order_of_data_parts_at_the_switch(branch: Callable[..., Outcome], trunk: Outcome) -> None:
    sibling = branch(start_epoch=3, intervention="none", data_order=1)
    assert sibling.results["dense_loss"] == branch(start_epoch=3).results["dense_loss"]
    assert not sibling.same_training(trunk)
    assert sibling.results["active_units"] == 16


def test_a_linear_network_is_affine(branch: Callable[..., Outcome]) -> None:
    arm = branch(intervention="linear")
    assert arm.results["active_units"] == 0
    assert arm.results["napl"] == 0
    assert math.isnan(arm.results["survivor_nonlinearity"])
    model = GatedMLP(128, 10, width=8, depth=2)
    model.load_state_dict(arm.end.model)
    x, y = torch.randn(5, 128), torch.randn(5, 128)
    torch.testing.assert_close(model((x + y) / 2), (model(x) + model(y)) / 2)


def test_budget_after_the_switch(tmp_path: Path) -> None:
    arm = Outcome(tmp_path, start_epoch=1, budget="after-switch")
    assert arm.end.step == 6 * STEPS_PER_EPOCH
    assert config(start_epoch=3, budget="after-switch").total_epochs == config(start_epoch=3).total_epochs


def test_results_of_the_trunk(trunk: Outcome, branch: Callable[..., Outcome]) -> None:
    results = trunk.results
    assert set(results) == {
        "test_accuracy", "test_loss", "train_loss", "dense_accuracy", "dense_loss", "dense_weight_norm", "active_units",
        "active_share", "survivor_nonlinearity", "weighted_units", "napl", "apl", "weighted_napl", "effective_width",
        "parameters", "diverged",
    }  # fmt: skip
    assert results["active_units"] == 16
    assert results["napl"] == results["apl"] == 2
    assert results["effective_width"] == 8
    assert results["parameters"] == 128 * 8 + 8 + 8 * 8 + 8 + 8 * 10 + 10
    assert results["diverged"] == 0
    assert results["dense_loss"] == branch(start_epoch=0).results["dense_loss"]


def test_recorded_steps_sets_and_fields(tmp_path: Path) -> None:
    run_experiment(NonlinearAdvantage(), config(intervention="none"), seed=0, path=tmp_path / "trunk",
                   checkpoint_steps=frozenset({3 * STEPS_PER_EPOCH}))  # fmt: skip
    start = load(tmp_path / "trunk" / "checkpoints" / str(3 * STEPS_PER_EPOCH))
    run_experiment(NonlinearAdvantage(), config(start_epoch=3), seed=0, path=tmp_path / "arm", start=start,
                   parent="trunks/0/0/checkpoints/12")  # fmt: skip
    trunk, arm = Run.open(tmp_path / "trunk"), Run.open(tmp_path / "arm")
    epochs = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, *[k + f for k in range(2, 8) for f in (0, 0.25)], 8]
    assert trunk.epochs("ntk/test").tolist() == epochs
    assert arm.steps("ntk/test").tolist() == [12, 20, 32]
    assert set(arm.groups()) == set(trunk.groups()) >= {"ntk/train", "ntk/test", "units", "path_length"}
    same = trunk.steps("ntk/test").tolist().index(12)
    np.testing.assert_array_equal(arm["ntk/test/kernel"][0], trunk["ntk/test/kernel"][same])
    np.testing.assert_array_equal(arm.targets("test"), np.repeat(np.arange(10), 2))
    # The arm's time goes on from the trunk's.
    sums = trunk["learning_rate/sum"][np.isin(trunk.steps("learning_rate"), arm.steps("learning_rate"))]
    assert arm["learning_rate/sum"][0] == sums[0] == pytest.approx(12 * 1e-3)
    assert arm.attributes("learning_rate")["since_step"] == 0
    # What costs little also looks once an epoch while the gates go linear.
    assert arm.steps("units").tolist() == arm.steps("gates").tolist() == [12, 16, 20, 24, 32]
    active = arm["units/active"].sum(axis=1).tolist()
    assert active == sorted(active, reverse=True)
    assert (active[0], active[2:]) == (16, [4, 4, 4])
    assert trunk["ntk/test/kernel"].shape == (len(epochs), 20, 20)


def test_probe_sets_are_those_of_the_split(tmp_path: Path) -> None:
    kernels = []
    for seed, split in ((0, 0), (1, 0), (0, 1)):
        path = tmp_path / f"{seed}{split}"
        run_experiment(
            NonlinearAdvantage(),
            config(intervention="none", split_seed=split),
            seed=seed,
            path=path,
            probes=["outputs"],
        )
        run = Run.open(path)
        name = next(name for name in ("probe_sets/test/inputs", "probe_sets/test/input") if name in run)
        kernels.append(run[name])
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])


def test_divergence_is_a_result_not_a_gap(tmp_path: Path) -> None:
    results = run_experiment(
        NonlinearAdvantage(), config(learning_rate=1e30), seed=0, path=tmp_path, probes=["units", "outputs"]
    )
    assert results["diverged"] == 1
    assert math.isnan(results["test_accuracy"])
    assert math.isnan(results["train_loss"])
    run = Run.open(tmp_path)
    assert run.manifest["status"] == "finished"
    assert run.results["diverged"] == 1


def test_a_late_mask_whose_training_diverges_is_divergence(tmp_path: Path) -> None:
    results = run_experiment(NonlinearAdvantage(), config(mask="late", learning_rate=1e30), seed=0, path=tmp_path)
    assert results["diverged"] == 1
    assert Run.open(tmp_path).manifest["status"] == "finished"


@pytest.mark.parametrize("probes", [["units", "outputs"], None], ids=["cheap probes", "all probes"])
def test_weights_that_are_no_numbers_are_divergence(probes: Any, tmp_path: Path) -> None:
    # A step of these rates makes weights whose kernel, or whose loss at the end, is no number; before, it was one.
    for number, (rate, epochs) in enumerate(((1e30, 8), (1e38, 8))):
        results = run_experiment(
            NonlinearAdvantage(),
            config(intervention="none", learning_rate=rate, epochs=epochs, optimizer="sgd", momentum=0.0),
            seed=0,
            path=tmp_path / str(number),
            probes=probes,
        )
        assert results["diverged"] == 1
        assert math.isnan(results["test_accuracy"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_epoch": 6}, "setting 'start_epoch': found 6, expected at most 5: start_epoch + ramp_epochs=2 + "),
        ({"start_epoch": 7, "survivors": "keep"}, "setting 'start_epoch': found 7, expected at most 6"),
        ({"ramp_epochs": 8}, "setting 'start_epoch': found 0, expected fewer epochs of ramp and settling"),
        ({"mask": "late", "latest_start": 6}, "setting 'latest_start': found 6, expected at most 5"),
        ({"mask": "late-path", "start_epoch": 1}, "setting 'start_epoch': found 1, expected 0 with mask='late-path'"),
        ({"mask": "late", "survivors": "keep"}, "setting 'survivors': found 'keep' with mask='late'"),
        ({"settle_epochs": 0}, "setting 'settle_epochs': found 0, expected at least 1"),
        ({"intervention": "linear", "start_epoch": 2}, "setting 'start_epoch': found 2, expected 0"),
        (
            {"intervention": "none", "start_epoch": 9, "data_order": 1},
            "setting 'start_epoch': found 9, expected at most epochs=8",
        ),
        ({"mask": "late", "budget": "after-switch"}, "setting 'budget': found 'after-switch' with mask='late'"),
        ({"start_epoch": 3, "labels_before": "sum"}, "setting 'labels_before': found 'sum' with task='sum10'"),
        ({"budget": "after-switch", "latest_start": 1, "start_epoch": 2}, "expected at most latest_start=1"),
        ({"budget": "after-switch", "latest_start": 6}, "must end within the 2 epochs of this run"),
        ({"batch_size": 129}, "setting 'batch_size': found 129, expected at most pairs=128"),
        ({"remaining": -0.1}, "setting 'remaining': found -0.1, expected greater than or equal to 0"),
        ({"remaining": 1.5}, "setting 'remaining': found 1.5, expected a share of at most 1 or a whole number"),
        ({"network": "mpl"}, "setting 'network': found 'mpl', expected one of "),
        ({"samples": 64}, "setting 'samples': found 64 without 'data'"),
        ({"augment": "flip-crop"}, "setting 'augment': found 'flip-crop' without 'data'"),
        ({"rate_before": 3.0}, "setting 'rate_before': found 3.0 with start_epoch=0, expected a later start"),
        (
            {"start_epoch": 3, "rate_before": 3.0, "scale_before": 2.0},
            "setting 'scale_before': found 2.0 together with rate_before=3.0, expected one intervention",
        ),
        ({"common_slope": 1.0}, "setting 'common_slope': found 1.0, expected less than 1"),
        ({"learning_rate": math.nan}, "setting 'learning_rate': found nan, expected a finite number"),
        ({"task": "product"}, "setting 'task': found 'product', expected 'first', 'parity', 'sum' or 'sum10'"),
        ({"task": None}, "setting 'task': found none, expected a value, as 'data' is not given"),
        ({"data": "x.npz"}, "setting 'pairs': found 128 together with data='x.npz', which replaces it"),
        ({"model": "x.py:f"}, "setting 'width': found 8 together with model='x.py:f'"),
        ({"start_epochs": 3}, "setting 'start_epochs' is unknown; did you mean 'start_epoch'?"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        config(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_defaults_fit() -> None:
    default = AdvantageConfig()
    assert configure(AdvantageConfig, {"start_epoch": 12}).total_epochs == default.total_epochs == 24
    assert (default.width, default.depth) == (64, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_epoch": 4}, r"start_epoch=4: start_epoch \+ ramp_epochs=2 \+ settle_epochs=1 ends .* at most 3 l"),
        ({"start_epoch": 5, "survivors": "keep"}, "start_epoch=5: .* at most 4 leaves time"),
        ({"ramp_epochs": 7}, "start_epoch=0: .* no time to recover; more epochs or a shorter ramp leave time"),
        ({"mask": "late", "latest_start": 4}, "latest_start=4: .* at most 3 leaves time"),
    ],
    ids=str,
)
def test_a_ramp_that_leaves_no_recovery_is_warned_of(changes: dict[str, Any], message: str) -> None:
    with pytest.warns(RuntimeWarning, match=message):
        config(**changes)


def test_a_configuration_survives_its_dump() -> None:
    for settings in (
        AdvantageConfig(),
        AdvantageConfig(data="x.npz", model="net.py:f"),
        config(intervention="none", strength=1.0),
    ):
        plain = json.loads(json.dumps(settings.model_dump(mode="json")))
        assert configure(AdvantageConfig, plain) == settings


def test_arms_of_one_network_share_a_trunk() -> None:
    experiment = NonlinearAdvantage()
    trunks = [experiment.trunk(config(**changes)) for changes in ARMS]
    assert len({trunk[0].model_dump_json() for trunk in trunks if trunk}) == 1
    assert {trunk[1] for trunk in trunks if trunk} == {0, 4, 12}
    assert experiment.trunk(config(intervention="none")) is None
    assert config(intervention="none", strength=9.0, ramp_epochs=5) == config(intervention="none")
    layerwise = experiment.trunk(config(granularity="layer"))
    assert layerwise is not None
    assert layerwise[0].granularity == "layer"


def test_a_start_beyond_the_switch_is_refused(trunk: Outcome, tmp_path: Path) -> None:
    start = load(trunk.path / "checkpoints" / "12")
    with pytest.raises(ConfigurationError, match=r"found a checkpoint of step 12, expected step 4 \(start_epoch\)"):
        Outcome(tmp_path, start=start, start_epoch=1)


def write_data(folder: Path, *, dtype: Any = np.float32, samples: int = 96) -> Path:
    generator = np.random.default_rng(0)
    labels = np.arange(samples) % 3
    inputs = generator.normal(size=(samples, 1, 4, 4)) + labels[:, None, None, None]
    np.savez(
        folder / "mine.npz",
        x_train=inputs.astype(dtype),
        y_train=labels,
        x_test=inputs[:60].astype(dtype),
        y_test=labels[:60],
    )
    return folder / "mine.npz"


NETWORK = """
from torch import nn

def build(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs.shape[1], 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(96, 10), nn.ReLU(), nn.Dropout(0.1), nn.Linear(10, outputs),
    )

def wrong(inputs, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, outputs + 1))

def nothing(inputs, outputs):
    return None

def narrow(inputs, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(3, outputs))

def failing(inputs, outputs):
    raise ZeroDivisionError("oops")

number = 3
"""


def own(folder: Path, **changes: Any) -> dict[str, Any]:
    (folder / "net.py").write_text(NETWORK)
    settings = {name: SMALL[name] for name in ("epochs", "batch_size", "latest_start", "ramp_epochs", "settle_epochs",
                                               "remaining", "probe_per_class")}  # fmt: skip
    return settings | {"data": str(write_data(folder)), "model": f"{folder / 'net.py'}:build"} | changes


def test_own_data_and_model(tmp_path: Path) -> None:
    settings = configure(AdvantageConfig, own(tmp_path, start_epoch=2))
    assert settings.task is None
    assert settings.width is None
    origin = NonlinearAdvantage().trunk(settings)
    assert origin is not None
    assert origin[1] == 6  # two epochs of 96 // 32 steps
    run_experiment(
        NonlinearAdvantage(), origin[0], seed=0, path=tmp_path / "trunk", checkpoint_steps=frozenset({6, 24})
    )
    start = load(tmp_path / "trunk" / "checkpoints" / "6")
    for name, given in (("branch", start), ("whole", None)):
        results = run_experiment(
            NonlinearAdvantage(), settings, seed=0, path=tmp_path / name, start=given, checkpoint_steps=frozenset({24})
        )
        assert results["active_units"] == 4  # a quarter of 6 channels + 10 units
        assert results["test_accuracy"] > 0.5
    ends = [load(tmp_path / name / "checkpoints" / "24") for name in ("branch", "whole")]
    assert equal(ends[0].model, ends[1].model)  # Dropout included


def test_own_data_for_the_mlp(tmp_path: Path) -> None:
    settings = own(tmp_path, width=8, depth=2)
    del settings["model"]
    results = run_experiment(
        NonlinearAdvantage(), configure(AdvantageConfig, settings), seed=0, path=tmp_path / "run", probes=["units"]
    )
    assert results["active_units"] == 4


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("net.py", "expected file.py:object"),
        ("absent.py:build", "there is no file"),
        ("net.py:built", "net.py has no 'built'; did you mean 'build'?"),
        ("net.py:number", "found a int, expected function(inputs, outputs)"),
        ("net.py:wrong", "found outputs [32, 4], expected [32, 3]"),
        ("net.py:nothing", "found a NoneType, expected a torch.nn.Module"),
        ("net.py:narrow", "its forward pass fails on a batch [32, "),
        ("net.py:failing", "failed: ZeroDivisionError: oops"),
        ("broken.py:build", "broken.py line 1: SyntaxError"),
    ],
)
def test_bad_models_are_named(model: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def build(")
    settings = configure(AdvantageConfig, own(tmp_path, model=str(tmp_path / model)))
    with pytest.raises((ConfigurationError, UnknownName)) as caught:
        run_experiment(NonlinearAdvantage(), settings, seed=0, path=tmp_path / "run")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_used(tmp_path: Path) -> None:
    settings = own(tmp_path, batch_size=97)
    with pytest.raises(ConfigurationError, match="found 96 training samples, expected at least batch_size=97"):
        NonlinearAdvantage().trunk(configure(AdvantageConfig, settings))
    settings = own(tmp_path, width=8, depth=2)
    del settings["model"]
    write_data(tmp_path, dtype=np.int64)
    with pytest.raises(ConfigurationError, match="found integer inputs, which network='mlp' cannot take"):
        run_experiment(NonlinearAdvantage(), configure(AdvantageConfig, settings), seed=0, path=tmp_path / "run")


def test_the_mlp_is_he_initialized_and_gated() -> None:
    torch.manual_seed(0)
    model = GatedMLP(200, 10, width=400, depth=3)
    assert list(gates(model)) == ["gate1", "gate2", "gate3"]
    assert nonlinear_units(model).total_total == 1200
    assert float(model.linear2.weight.var()) == pytest.approx(2 / 400, rel=0.02)
    assert float(model.linear1.bias.abs().max()) == 0
    assert model(torch.zeros(2, 8, 25)).shape == (2, 10)
    assert nonlinear_units(GatedMLP(4, 2, width=5, depth=2, granularity="layer")).total_total == 10
