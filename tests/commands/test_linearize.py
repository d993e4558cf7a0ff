"""``ntkdyn linearize``: what it prints and leaves, and what it refuses in one line before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import ntkdyn as nd
from ntkdyn import cli
from ntkdyn.datasets import load_npz, named_data
from ntkdyn.store.metadata import load_json

NETS = """
import torch
from torch import nn

def build(inputs, outputs):
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs[0].numel(), 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, outputs)
    )

def narrow(inputs, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, outputs))

def two_classes(inputs, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs[0].numel(), 16), nn.ReLU(), nn.Linear(16, 2))

def smooth(inputs, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs[0].numel(), 16), nn.GELU(), nn.Linear(16, outputs))

def broken(inputs, outputs):
    raise ValueError("no such width")

def without(outputs):
    return None
"""


def build(inputs: torch.Tensor, outputs: int) -> nn.Module:
    """As in NETS."""
    names: dict[str, Any] = {}
    exec(NETS, names)
    model: nn.Module = names["build"](inputs, outputs)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nets.py, digits.npz, and the checkpoint of a trained network, net.pt."""
    from ntkdyn.datasets import digits

    folder = tmp_path_factory.mktemp("files")
    (folder / "nets.py").write_text(NETS)
    split = digits()
    np.savez(
        folder / "digits.npz",
        **{f"{x}_{part}": getattr(getattr(split, part), name).numpy() for part in ("train", "test")
           for x, name in (("x", "inputs"), ("y", "targets"))},
    )  # fmt: skip
    model = build(split.train.inputs[:2], 10)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        functional.cross_entropy(model(split.train.inputs), split.train.targets).backward()
        optimizer.step()
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, folder / "net.pt")
    return folder


@pytest.fixture
def command(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in the folder of the files; options by name, the output goes to tmp_path/out."""
    monkeypatch.chdir(files)

    def run(checkpoint: str = "net.pt", *more: str, **options: Any) -> tuple[int, str, str]:
        given = {"model": "nets.py:build", "data": "digits.npz", "out": tmp_path / "out"} | options
        words = [str(word) for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
        with pytest.raises(SystemExit) as end:
            cli.main(["linearize", checkpoint, *words, *more])
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def test_from_checkpoint_to_files(command: Any, files: Path, tmp_path: Path) -> None:
    code, printed, told = command(target="0.5,4", ramp_epochs=2, recovery_epochs=2, samples=1000, learning_rate=0.003)
    assert code == 0, told
    lines = printed.splitlines()
    assert lines[0] == "32 units in 2 gates, 1482 weights"
    assert lines[1].startswith("before: test accuracy 0.9")
    assert lines[2].startswith("16 units (0.5): test accuracy 0.")
    assert lines[3].startswith("4 units (0.125): test accuracy 0.")
    assert lines[3].endswith(" points)")
    assert "NAPL 0.25 (weighted " in lines[3]
    assert lines[-1].startswith(f"recorded in {tmp_path / 'out' / 'run'}; next: ntkdyn analyze ")
    report = load_json((tmp_path / "out" / "report.json").read_bytes())
    assert report["checkpoint"]["path"] == "net.pt"
    told_of = report["data"]
    assert [told_of[name] for name in ("name", "train", "test", "classes")] == ["digits.npz", 1000, 450, 10]
    assert told_of["provenance"]["subset"]["samples"] == 1000
    assert report["command"].startswith("ntkdyn")
    # The network before is that of the checkpoint, to the last prediction.
    split = load_npz(files / "digits.npz")
    dense = build(split.train.inputs[:2], 10)
    dense.load_state_dict(torch.load(files / "net.pt")["state_dict"])
    share = (dense(split.test.inputs).argmax(1) == split.test.targets).double().mean().item()
    assert report["curve"][0]["test_accuracy"] == share
    # And that after is in the file, by the way that the README shows.
    model = nd.gate_network(build(split.train.inputs[:2], 10), split.train.inputs[:2])
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    model.eval()
    share = (model(split.test.inputs).argmax(1) == split.test.targets).double().mean().item()
    assert report["targets"][1]["test_accuracy"] == share
    assert share > 0.8  # chance is 0.1
    assert nd.nonlinear_units(model).active_total == 4
    # What it wrote is a checkpoint like any other.
    code, printed, told = command(
        str(tmp_path / "out" / "model.safetensors"), "--no-record", target=2, ramp_epochs=1, out=tmp_path / "further"
    )
    assert code == 0, told
    assert printed.splitlines()[1].startswith(f"before: test accuracy {share:.4f}")
    assert not (tmp_path / "further" / "run").exists()


def test_digits_need_no_files(command: Any, tmp_path: Path) -> None:
    code, printed, told = command("net.pt", "--no-record", data="digits", target=8, ramp_epochs=1, recovery_epochs=1)
    assert code == 0, told
    assert printed.splitlines()[2].startswith("8 units (0.25): test accuracy 0.")
    report = load_json((tmp_path / "out" / "report.json").read_bytes())
    assert report["data"]["provenance"]["name"] == "digits"
    assert report["curve"][0]["test_accuracy"] > 0.9


def test_targets_may_be_repeated_and_no_recovery_is_warned_of(command: Any) -> None:
    code, printed, told = command(
        "net.pt", "--target", "8", "--target", "0.125", "--no-record", ramp_epochs=1, recovery_epochs=0, samples=500
    )
    assert code == 0
    assert [line.split()[0] for line in printed.splitlines()[2:4]] == ["8", "4"]
    warned = [line for line in told.splitlines() if "recover" in line]
    assert len(warned) == 1
    assert warned[0].startswith("ntkdyn: linearize: recovery_epochs=0 of 1 epochs leave the network no time")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"target": "1.5"}, 2, "target 1.5: found more units than there are, expected a share of at most 1.0"),
        ({"target": "33"}, 2, "target 33: found more units than there are, expected at most the 32 units"),
        ({"target": "some"}, 2, "target 'some': expected a share of the units such as 0.1"),
        ({"target": "0.1,0.5"}, 2, "target 0.5: asks for 16 units after a target of 3"),
        ({"model": "nets.py"}, 2, "'nets.py': expected file.py:object"),
        ({"model": "absent.py:build"}, 2, "there is no file absent.py"),
        ({"model": "nets.py:bild"}, 2, "nets.py has no 'bild'; did you mean 'build'"),
        ({"model": "nets.py:broken"}, 2, "failed: ValueError: no such width; expected def function(inputs, outputs)"),
        (
            {"model": "nets.py:without"},
            2,
            "unexpected keyword argument 'inputs'; expected def function(inputs, outputs)",
        ),
        ({"model": "nets.py:narrow"}, 2, "its forward pass fails on a batch [32, 64] torch.float32"),
        ({"model": "nets.py:two_classes"}, 2, "found outputs [32, 2], expected [32, 10]: an output for each of the 10"),
        ({"model": "nets.py:smooth"}, 1, "calls no ReLU, LeakyReLU or PReLU; found GELU"),
        ({"data": "digit.npz"}, 2, "digit.npz"),
        ({"data": "fashion-mist"}, 2, "fashion-mist"),
        ({"samples": 9000}, 2, "samples: found 9000, expected 1 to 1347, the size of digits.npz train"),
        ({"test_samples": 9000}, 2, "test_samples: found 9000, expected 1 to 450"),
        ({"device": "quantum"}, 2, "device 'quantum': cannot be used"),
        ({"learning_rate": -1}, 2, "found learning_rate=-1.0, expected a positive number"),
        ({"common_slope": 1, "survivors": "common"}, 2, "common_slope is 1.0"),
        ({"seed": 99999999999999999999}, 2, "99999999999999999999 is not in the range 0<=x<=9223372036854775807"),
        ({"survivors": "all"}, 2, "'all' is not one of 'keep', 'common', 'relu'"),
    ],
)
def test_bad_input(command: Any, tmp_path: Path, options: dict[str, Any], code: int, message: str) -> None:
    found, _, told = command(**options)
    assert message in told
    assert len(told.splitlines()) == 1
    assert told.startswith("ntkdyn: ")
    assert found == code
    assert not list(tmp_path.iterdir())


def test_bad_checkpoints(command: Any, files: Path, tmp_path: Path) -> None:
    (files / "torn.pt").write_bytes((files / "net.pt").read_bytes()[:-500])
    torch.save(nn.Linear(3, 3), files / "module.pt")
    torch.save(nn.Linear(64, 16).state_dict(), files / "other.pt")
    state = torch.load(files / "net.pt")["state_dict"]
    torch.save({**state, "1.bias": torch.full((16,), torch.nan)}, files / "nan.pt")
    for name, code, message in (
        ("absent.pt", 2, "checkpoint absent.pt: there is no such file"),
        ("torn.pt", 1, "checkpoint torn.pt: not readable as safetensors or as a file of torch.save"),
        ("module.pt", 1, "holds an object of torch.nn.modules.linear.Linear, expected tensors alone"),
        ("other.pt", 2, "missing 1.weight, 1.bias, 3.weight and 3 more; unexpected weight, bias; build the network"),
        ("nan.pt", 2, "checkpoint nan.pt: found NaN in 1.bias, expected numbers"),
    ):
        found, _, told = command(name)
        assert message in told
        assert len(told.splitlines()) == 1
        assert found == code
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_not_touched(command: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    code, _, told = command()
    assert code == 2
    assert told == f"ntkdyn: {tmp_path / 'out'} holds 'notes.txt' already; nothing was touched; choose another folder\n"
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_divergence_is_a_failure(command: Any, tmp_path: Path) -> None:
    code, printed, told = command("net.pt", "--no-record", optimizer="sgd", learning_rate=1e6, samples=1000)
    assert code == 1
    assert not printed
    assert "found loss" in told.splitlines()[-1]
    assert "has the curve until then" in told.splitlines()[-1]
    assert load_json((tmp_path / "out" / "report.json").read_bytes())["status"] == "diverged"
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_real_images_by_name(command: Any, data_folder: Path, files: Path, tmp_path: Path) -> None:
    split = named_data("mnist", data_dir=data_folder)
    inputs, targets = split.train[:4000]
    model = build(inputs[:2], 10)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(150):
        optimizer.zero_grad()
        rows = slice(step % 15 * 256, step % 15 * 256 + 256)
        functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    torch.save(model.state_dict(), files / "mnist.pt")
    code, _, told = command(
        "mnist.pt", "--no-record", data="mnist", data_dir=data_folder, samples=4000, test_samples=1000, target=0.1,
        ramp_epochs=2, recovery_epochs=2,
    )  # fmt: skip
    assert code == 0, told
    report = load_json((tmp_path / "out" / "report.json").read_bytes())
    assert report["targets"][0]["active_units"] == 3
    assert report["targets"][0]["test_accuracy"] > 0.75  # chance is 0.1; a linear network gets about 0.88
    assert report["data"]["provenance"]["name"] == "mnist"
