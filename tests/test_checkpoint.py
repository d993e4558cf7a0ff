"""Checkpoints: exact round trips of weights, buffers, optimizer and random state; damage is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkdyn.checkpoint import load, save
from ntkdyn.errors import ConfigurationError, DamagedRecording, StorageError
from ntkdyn.gates import Gate, gates


def network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), Gate(4), nn.Dropout(0.5), nn.Linear(4, 4), nn.Linear(4, 4)
    )
    model[5].weight = model[4].weight  # tied: safetensors refuses memory that is shared
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()


def same(first: Any, second: Any) -> bool:
    """Equal trees, tensors bit for bit and of the same type."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return type(first) is type(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 3)
    gates(model)["2"].freeze(torch.tensor([True, False, False, True]))
    path = save(tmp_path, 3, model, optimizer, {"note": "text", "path": [torch.ones(2), (1, None, True)], "rate": 0.1})
    train(model, optimizer, 3)

    torch.manual_seed(9)
    other = network()
    other_optimizer = OPTIMIZERS[name](other.parameters())
    checkpoint = load(path)
    checkpoint.restore(other, other_optimizer)
    train(other, other_optimizer, 3)
    assert checkpoint.step == 3
    assert path == tmp_path / "3"
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    assert same(optimizer.state_dict(), other_optimizer.state_dict())
    assert checkpoint.extra["note"] == "text"
    assert torch.equal(checkpoint.extra["path"][0], torch.ones(2))
    assert checkpoint.extra["path"][1] == (1, None, True)
    assert checkpoint.extra["rate"] == 0.1


def test_a_checkpoint_serves_many_branches(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 2)
    checkpoint = load(save(tmp_path, 2, model, optimizer))
    ends = []
    for _ in range(2):
        branch = nn.Linear(3, 2)
        branch_optimizer = torch.optim.Adam(branch.parameters())
        checkpoint.restore(branch, branch_optimizer)
        train(branch, branch_optimizer, 4)
        ends.append((dict(branch.state_dict()), branch_optimizer.state_dict()))
    assert same(ends[0], ends[1])


def test_number_types_survive(tmp_path: Path) -> None:
    extra = {
        "tensors": {
            str(dtype): torch.arange(3).to(dtype)
            for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool)
        },
        "view": torch.arange(6.0).reshape(2, 3).T,
        "scalar": torch.tensor(2.5),
    }
    loaded = load(save(tmp_path, 0, nn.Linear(1, 1), None, extra))
    assert same(loaded.extra, extra)
    assert loaded.optimizer is None


def test_saving_again_replaces(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    save(tmp_path, 5, model)
    with torch.no_grad():
        model.weight.fill_(7)
    assert load(save(tmp_path, 5, model)).model["weight"].item() == 7
    assert sorted(file.name for file in (tmp_path / "5").iterdir()) == ["checkpoint.json", "tensors.safetensors"]


def test_no_pickle_is_written_or_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"extra\.thing is a object; expected tensors, numbers"):
        save(tmp_path, 0, nn.Linear(1, 1), None, {"thing": object()})
    assert not (tmp_path / "0" / "checkpoint.json").exists()


def test_states_that_do_not_fit(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    path = save(tmp_path, 1, model)
    with pytest.raises(ConfigurationError, match="does not fit the Linear it is restored into") as caught:
        load(path).restore(nn.Linear(3, 2))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="holds no optimizer"):
        load(path).restore(model, torch.optim.Adam(model.parameters()))
    optimizer = torch.optim.Adam(model.parameters())
    path = save(tmp_path, 2, model, optimizer)
    with pytest.raises(ConfigurationError, match="does not fit"):
        load(path).restore(model, torch.optim.Adam([model.weight]))


def damage_tensors(folder: Path) -> None:
    data = bytearray((folder / "tensors.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "tensors.safetensors").write_bytes(data)


def forge_format(folder: Path) -> None:
    (folder / "checkpoint.json").write_text(json.dumps({"format": "other"}))


def rewrite(folder: Path, **changes: Any) -> None:
    """Change entries as a checkpoint of before may hold them, which had no checksum."""
    content = json.loads((folder / "checkpoint.json").read_text())
    del content["crc32"]
    (folder / "checkpoint.json").write_text(json.dumps({**content, **changes}))


def flip_a_digit(folder: Path) -> None:
    text = (folder / "checkpoint.json").read_text()
    (folder / "checkpoint.json").write_text(text.replace('"step": 4', '"step": 5'))


def nest(folder: Path) -> None:
    text = json.dumps({"format": "ntkdyn-checkpoint-1", "extra": None})
    (folder / "checkpoint.json").write_text(text.replace("null", '{"a":' * 50_000 + "1" + "}" * 50_000))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_tensors, DamagedRecording, "does not match its checksum"),
        (forge_format, DamagedRecording, "is not of format ntkdyn-checkpoint-1"),
        (flip_a_digit, DamagedRecording, "checkpoint.json does not match its checksum"),
        (lambda folder: rewrite(folder, model={}), DamagedRecording, "not a complete checkpoint"),
        (lambda folder: rewrite(folder, step=float("inf")), DamagedRecording, "not a complete checkpoint"),
        (lambda folder: rewrite(folder, extra={"tensor": []}), DamagedRecording, "not a complete checkpoint"),
        (nest, DamagedRecording, "not a complete checkpoint .RecursionError"),
        (lambda folder: (folder / "checkpoint.json").write_text("{"), DamagedRecording, "not a complete checkpoint"),
        (lambda folder: (folder / "checkpoint.json").write_text("[]"), DamagedRecording, "is not of format"),
        (lambda folder: (folder / "checkpoint.json").unlink(), StorageError, "no checkpoint here"),
    ],
)
def test_damage_is_named(damage: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    path = save(tmp_path, 4, nn.Linear(2, 2))
    damage(path)
    with pytest.raises(error, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checkpoints_of_before_have_no_checksum(tmp_path: Path) -> None:
    path = save(tmp_path, 4, nn.Linear(2, 2))
    rewrite(path, step=7)
    assert load(path).step == 7
