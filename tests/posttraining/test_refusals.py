"""What post-training refuses, in one line each and with nothing written, and what it warns of."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ntkdyn as nd
from ntkdyn.errors import ConfigurationError, ConversionError, DivergedTraining, NtkdynError, RecordingExists
from ntkdyn.gates import gates
from ntkdyn.posttraining.batches import endless
from ntkdyn.posttraining.settings import read_target
from ntkdyn.store.metadata import load_json

BRIEF: dict[str, Any] = {"ramp_epochs": 1, "recovery_epochs": 1}


def refusal(
    task: Any, folder: Path, error: type[NtkdynError] = ConfigurationError, *, model: Any = None, train: Any = None,
    test: Any = None, **settings: Any,
) -> str:  # fmt: skip
    """The one line; nothing is left in the folder."""
    out = folder / "out"
    with pytest.raises(error) as caught:
        nd.linearize(
            model or task.network(), task.train[:2] if train is None else train, task.test if test is None else test,
            out=out, **{**BRIEF, **settings},
        )  # fmt: skip
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (1.5, "target 1.5: found more units than there are, expected a share of at most 1.0"),
        (38.0, "expected a share of at most 1.0; 38 units are 38 without a point"),
        (25, "target 25: found more units than there are, expected at most the 24 units of the network"),
        (-1, "target -1: expected a share of the units in [0.0, 1.0], or a whole number of units"),
        (-0.1, "target -0.1: expected a share"),
        (float("nan"), "target nan: expected a share"),
        (True, "target True: expected a share"),
        ("0.1", "target '0.1': expected a share"),
        (None, "target None: expected a share"),
        ((), "found no target, expected at least one"),
        ((0.2, 0.5), "target 0.5: asks for 12 units after a target of 5, expected fewer each time"),
        ((5, 5), "target 5: asks for 5 units after a target of 5"),
    ],
)
def test_targets(task: Any, tmp_path: Path, target: Any, message: str) -> None:
    assert message in refusal(task, tmp_path, target=target)


def test_a_target_above_what_is_left(task: Any, tmp_path: Path) -> None:
    model = nd.gate_network(task.network(), task.test[0][0])
    gates(model)["2"].freeze()
    for target, asked in ((0.8, 19), (13, 13)):
        message = refusal(task, tmp_path, model=model, target=target)
        assert f"asks for {asked} of 24 units, of which only 12 are not frozen yet" in message
        assert "give a number up to 12" in message
    layers = nd.gate_network(task.network(), task.test[0][0], granularity="layer")
    assert "nearest possible counts are 0 and 12" in refusal(task, tmp_path, model=layers, target=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a tenth", "target 'a tenth': expected a share of the units such as 0.1"), ("", "target '': expected"),
     ("10%", "target '10%': expected")],
)  # fmt: skip
def test_texts_that_are_no_target(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace("%", "%")):
        read_target(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ramp_epochs": 0}, "found ramp_epochs=0, expected a whole number from 1 on"),
        ({"recovery_epochs": -1}, "found recovery_epochs=-1, expected a whole number from 0 on"),
        ({"ramp_epochs": 1.5}, "found ramp_epochs=1.5, expected a whole number"),
        ({"points": 0}, "found points=0"),
        ({"seed": -1}, "found seed=-1"),
        ({"seed": 99999999999999999999}, "found seed=99999999999999999999, expected a whole number below 2^63"),
        ({"settle_epochs": 1}, "found settle_epochs=1 with survivors='keep'"),
        ({"settle_epochs": 0, "survivors": "relu"}, "found settle_epochs=0 with survivors='relu', expected at least 1"),
        ({"learning_rate": 0.0}, "found learning_rate=0.0, expected a positive number"),
        ({"learning_rate": float("nan")}, "found learning_rate=nan"),
        ({"momentum": 1.0}, "found momentum=1.0, expected a number in [0, 1)"),
        ({"weight_decay": -1e-4}, "found weight_decay=-0.0001"),
        ({"optimizer": "lbfgs"}, "found optimizer='lbfgs', expected one of adam, sgd"),
        ({"strength": -1.0}, "Linearizer: strength is -1.0"),
        ({"rule": "soft"}, "Linearizer: rule is 'soft'"),
        ({"survivors": "drop"}, "Linearizer: survivors is 'drop'"),
        ({"common_slope": 1.0, "survivors": "common"}, "Linearizer: common_slope is 1.0"),
    ],
)  # fmt: skip
def test_settings(task: Any, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    assert message in refusal(task, tmp_path, **settings)


def test_loaders(task: Any, tmp_path: Path) -> None:
    inputs, labels = task.train[0]
    assert "found a list_iterator without len(), expected a loader that knows" in refusal(
        task, tmp_path, train=iter(task.train)
    )
    assert "train_loader: found no batch, expected at least one" in refusal(task, tmp_path, train=[])
    assert "test_loader: found no batch in pass 1" in refusal(task, tmp_path, test=[])
    passes = endless(iter(task.test), "train_loader", torch.device("cpu"))
    assert [len(next(passes)[1]) for _ in range(2)] == [128, 128]
    with pytest.raises(ConfigurationError, match="train_loader: found no batch in pass 2, expected a loader for any"):
        next(passes)
    assert "found a batch that is a dict, expected (inputs, targets)" in refusal(task, tmp_path, train=[{"x": inputs}])
    assert "found a batch that is a tuple of 3, expected" in refusal(task, tmp_path, train=[(inputs, labels, labels)])
    assert "found targets of shape [], expected [N, ...]" in refusal(task, tmp_path, train=[(inputs, labels[0])])
    narrow = [(inputs[..., :5], labels)]
    message = refusal(task, tmp_path, train=narrow)
    assert "train_loader: the forward pass fails on inputs [32, 1, 8, 5] torch.float32" in message
    assert "test_loader: the forward pass fails on inputs [32, 1, 8, 5]" in refusal(task, tmp_path, test=narrow)


def test_labels_and_losses(task: Any, tmp_path: Path) -> None:
    inputs, labels = task.train[0]
    assert "labels: found label 3, expected 0 to 2, as the network has 3 outputs" in refusal(
        task, tmp_path, train=[(inputs, labels + 1)]
    )
    assert "labels: found label -1, expected 0 to 2" in refusal(task, tmp_path, test=[(inputs, labels - 1)])
    assert "loss: found targets [32] torch.float32 for outputs [32, 3], expected class numbers" in refusal(
        task, tmp_path, train=[(inputs, labels.float())]
    )

    def per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, reduction="none")

    assert "the loss returned [32] torch.float32, expected a tensor of one number; take the mean" in refusal(
        task, tmp_path, loss=per_sample
    )
    assert "the loss returned float, expected" in refusal(task, tmp_path, loss=lambda outputs, targets: 0.5)
    assert "train_loader: the loss fails on outputs [32, 3] torch.float32 and targets [32] torch.int64: " in refusal(
        task, tmp_path, loss=torch.matmul
    )


def test_a_label_that_only_a_later_batch_has(task: Any, tmp_path: Path) -> None:
    inputs, labels = task.train[0]
    batches = [(inputs, labels), (inputs, labels + 7)]
    with pytest.raises(ConfigurationError, match="labels: found label 9, expected 0 to 2"):
        nd.linearize(task.network(), batches, task.test, out=tmp_path / "out", **BRIEF)
    report = load_json((tmp_path / "out" / "report.json").read_bytes())
    assert report["status"] == "failed"
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert nd.Run.open(tmp_path / "out" / "run").manifest["status"] == "failed"


def test_networks(task: Any, tmp_path: Path) -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 3))
    assert "calls no ReLU, LeakyReLU or PReLU" in refusal(task, tmp_path, ConversionError, model=linear)
    assert "Flatten has no weights, expected a trained network" in refusal(task, tmp_path, model=nn.Flatten())
    fixed = task.network().requires_grad_(False)
    assert "found no weight with requires_grad" in refusal(task, tmp_path, model=fixed)
    spoilt = nd.gate_network(task.network(), task.test[0][0])
    with torch.no_grad():
        gates(spoilt)["4"].slope[0] = torch.nan
    assert "found slopes that are NaN in gate '4'" in refusal(task, tmp_path, model=spoilt)
    nowhere = task.network()
    with torch.no_grad():
        nowhere[5].bias.fill_(torch.nan)
    assert "the loss of the network on the test batches is not finite before any training" in refusal(
        task, tmp_path, model=nowhere
    )


def test_a_hook_that_changes_the_outputs_is_not_lost_silently(task: Any, tmp_path: Path) -> None:
    model = task.network()
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    message = refusal(task, tmp_path, model=model)
    assert "the outputs of the Sequential change when its hooks are taken off" in message


def test_a_folder_that_holds_something(task: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RecordingExists, match=r"holds 'notes.txt' already; nothing was touched; choose another folder"):
        nd.linearize(task.network(), task.train[:2], task.test, out=tmp_path, **BRIEF)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(RecordingExists, match="nothing was touched"):
        nd.linearize(task.network(), task.train[:2], task.test, out=tmp_path / "notes.txt", **BRIEF)


def test_no_recovery_is_warned_of_with_the_rule(task: Any) -> None:
    with pytest.warns(RuntimeWarning) as caught:
        done = nd.linearize(task.network(), task.train[:2], task.test, ramp_epochs=3, recovery_epochs=0)
    messages = [str(one.message) for one in caught if one.category is RuntimeWarning]
    assert messages == [
        "linearize: recovery_epochs=0 of 3 epochs leave the network no time to recover from the ramp; rule: ramp and "
        "settling end by 75% of the epochs, here with recovery_epochs=1 or more"
    ]
    assert done.report["warnings"] == messages
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        nd.linearize(task.network(), task.train[:2], task.test, ramp_epochs=3, recovery_epochs=1)


def test_a_share_that_is_no_unit_is_warned_of(task: Any) -> None:
    """A share of 0.01 of 24 units made the network linear without a word."""
    told = (
        "linearize: target 0.01 of the units is none of them after rounding, and the network becomes linear; give 0 if "
        "that is meant, or a larger share or number"
    )
    with pytest.warns(RuntimeWarning) as caught:
        done = nd.linearize(task.network(), task.train[:2], task.test, target=(0.5, 0.01), **BRIEF)
    assert [str(one.message) for one in caught if one.category is RuntimeWarning] == [told]
    assert done.report["warnings"] == [told]
    assert done.ends[1].active_units == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        nd.linearize(task.network(), task.train[:2], task.test, target=0, **BRIEF)


@pytest.mark.parametrize("record", [True, False])
def test_divergence_before_the_first_step_has_the_report_that_it_names(task: Any, tmp_path: Path, record: bool) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets) * (torch.nan if outputs.requires_grad else 1)

    out = tmp_path / "out"
    with pytest.raises(DivergedTraining, match="found loss nan at step 0") as caught:
        nd.linearize(task.network(), task.train[:2], task.test, loss=loss, out=out, record=record, **BRIEF)
    assert f"{out / 'report.json'} has the curve until then" in str(caught.value)
    report = load_json((out / "report.json").read_bytes())
    assert report["status"] == "diverged"
    assert [point["phase"] for point in report["curve"]] == ["dense"]
    assert not list(out.glob("*.safetensors"))


@pytest.mark.parametrize("place", ["loss", "slope", "evaluation"])
def test_divergence_is_said_and_leaves_no_network(
    task: Any, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += outputs.requires_grad
        value = functional.cross_entropy(outputs, targets)
        late = calls > 5
        if place == "evaluation":
            return value if outputs.requires_grad or not late else value * torch.inf
        if place == "slope" and outputs.requires_grad and late:
            # The loss is a number, its gradient is not: sqrt at 0.
            return value + (value * 0).sqrt()
        return value * torch.nan if late else value

    out = tmp_path / "out"
    expected = {"loss": "found loss nan at step 5", "slope": "slopes of gate '2', '4' became NaN in call 6 of the ramp",
                "evaluation": "found loss inf on the test batches after step 7"}[place]  # fmt: skip
    with pytest.raises(DivergedTraining, match=expected) as caught:
        nd.linearize(
            task.network(), task.train[:4], task.test, target=(0.5, 0.1), loss=loss, out=out, ramp_epochs=2,
            recovery_epochs=1,
        )  # fmt: skip
    assert f"{out / 'report.json'} has the curve until then" in str(caught.value)
    assert "\n" not in str(caught.value)
    report = load_json((out / "report.json").read_bytes())
    assert report["status"] == "diverged"
    assert report["diverged"] is True
    assert expected in report["divergence"]
    assert report["targets"] == []
    assert len(report["curve"]) >= 2
    assert sorted(file.name for file in out.iterdir()) == ["curve.csv", "curve.png", "curve.svg", "report.json", "run"]
    assert nd.Run.open(out / "run").manifest["results"]["diverged"] == 1


def test_divergence_after_a_target_keeps_the_network_of_that_target(task: Any, tmp_path: Path) -> None:
    calls = 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += outputs.requires_grad
        return functional.cross_entropy(outputs, targets) * (torch.nan if calls > 10 else 1)

    with pytest.raises(DivergedTraining):
        nd.linearize(
            task.network(), task.train[:4], task.test, target=(0.5, 0.1), loss=loss, out=tmp_path / "out", **BRIEF
        )
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model-12-units.safetensors"]
    report = load_json((tmp_path / "out" / "report.json").read_bytes())
    assert [entry["file"] for entry in report["targets"]] == ["model-12-units.safetensors"]


def test_interruption_leaves_whole_files_and_no_network(task: Any, tmp_path: Path) -> None:
    calls = 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += outputs.requires_grad
        if calls == 7 and outputs.requires_grad:
            raise KeyboardInterrupt
        return functional.cross_entropy(outputs, targets)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        nd.linearize(task.network(), task.train[:4], task.test, loss=loss, out=out, **BRIEF)
    assert sorted(file.name for file in out.iterdir()) == ["curve.csv", "report.json", "run"]
    assert load_json((out / "report.json").read_bytes())["status"] == "interrupted"
    assert nd.Run.open(out / "run").manifest["status"] == "interrupted"
