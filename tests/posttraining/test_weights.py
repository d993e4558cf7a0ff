"""Checkpoints of a user: every form that loads, and every one that is refused in a line."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import pickle
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ntkdyn as nd
from ntkdyn import checkpoint
from ntkdyn.errors import (
    ConfigurationError,
    DamagedRecording,
    MissingRecording,
    NtkdynError,
    StorageError,
    UntrustedFile,
)
from ntkdyn.gates import gates
from ntkdyn.posttraining.weights import encode_weights, load_weights, state_tensors

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))


def network(width: int = 6, seed: int = 0) -> nn.Module:
    """With a PReLU, whose weight becomes a slope, and a ReLU, which has no names."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, width),
        nn.BatchNorm1d(width),
        nn.PReLU(width, 0.2),
        nn.Linear(width, 4),
        nn.ReLU(),
        nn.Linear(4, 3),
    ).eval()


def gated(seed: int = 1) -> nn.Module:
    return nd.gate_network(network(seed=seed), X)


def wrapped(form: str, state: dict[str, Tensor]) -> Any:
    """What a training loop saves."""
    return {
        "plain": state,
        "state_dict": {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
        "model": {"model": state, "step": torch.tensor(4)},
        "model_state_dict": {"model_state_dict": state},
        "parallel": {f"module.{name}": value for name, value in state.items()},
        "compiled": {"state_dict": {f"_orig_mod.{name}": value for name, value in state.items()}},
        "both": {f"_orig_mod.module.{name}": value for name, value in state.items()},
        "half": {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
    }[form]


@pytest.mark.parametrize(
    "form", ["plain", "state_dict", "model", "model_state_dict", "parallel", "compiled", "both", "half"]
)
@pytest.mark.parametrize("before", ["before gating", "with gates"])
def test_forms_that_load(form: str, before: str, tmp_path: Path) -> None:
    original = network() if before == "before gating" else gated(seed=0)
    if before == "with gates":
        gates(original)["4"].freeze(torch.tensor([True, False, True, False]))
    file = tmp_path / "net.pt"
    torch.save(wrapped(form, original.state_dict()), file)
    model = gated()
    assert load_weights(model, file) == hashlib.sha256(file.read_bytes()).hexdigest()
    if form == "half":
        torch.testing.assert_close(model(X), original(X), rtol=1e-2, atol=1e-2)
    else:
        assert torch.equal(model(X), original(X))
    assert gates(model)["4"].frozen.tolist() == ([False] * 4 if before == "before gating" else [True, False] * 2)


def test_safetensors_whatever_its_name(tmp_path: Path) -> None:
    for name in ("net.safetensors", "net.bin"):
        save_file(network().state_dict(), tmp_path / name)
        model = gated()
        load_weights(model, tmp_path / name)
        assert torch.equal(model(X), network()(X))


def test_the_checkpoint_of_a_run(tmp_path: Path) -> None:
    original = gated(seed=0)
    checkpoint.save(tmp_path / "checkpoints", 12, original, torch.optim.Adam(original.parameters()))
    model = gated()
    load_weights(model, tmp_path / "checkpoints" / "12")
    assert torch.equal(model(X), original(X))
    with pytest.raises(StorageError, match="no checkpoint here; give a folder checkpoints/<step>"):
        load_weights(model, tmp_path)


def test_the_old_format_of_torch(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    model = gated()
    load_weights(model, tmp_path / "old.pt")
    assert torch.equal(model(X), network()(X))


def test_a_network_whose_own_names_begin_like_a_prefix(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = network()

    torch.save(Holder().state_dict(), tmp_path / "net.pt")
    load_weights(Holder(), tmp_path / "net.pt")


def test_tied_weights_are_written_and_load(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    (tmp_path / "tied.safetensors").write_bytes(encode_weights(model, {"ntkdyn": "0"}))
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    other.load_state_dict(load_file(tmp_path / "tied.safetensors"))
    assert torch.equal(model(torch.ones(1, 4)), other(torch.ones(1, 4)))


def test_state_that_is_no_tensor_is_refused_before_training() -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"epoch": 3}

    with pytest.raises(ConfigurationError, match="its state dict holds _extra_state, no tensor, which safetensors"):
        state_tensors(Stateful(2, 2))


def refusal(error: type[NtkdynError], file: Path) -> str:
    with pytest.raises(error) as caught:
        load_weights(gated(), file)
    text = str(caught.value)
    assert "\n" not in text
    assert str(file) in text
    return text


def test_what_cannot_be_read(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(MissingRecording, tmp_path / "absent.pt")
    torch.save(network().state_dict(), tmp_path / "whole.pt")
    save_file(network().state_dict(), tmp_path / "whole.safetensors")
    contents = {
        "torn.pt": (tmp_path / "whole.pt").read_bytes()[:-400],
        "torn.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:-8],
        "header.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:20],
        "empty.pt": b"",
        "text.pt": b"hello, world\n",
        "noise.pt": bytes(range(256)),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert "not readable as safetensors or as a file of torch.save" in refusal(DamagedRecording, tmp_path / name)


def test_objects_are_not_run(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "whole.pt")
    torch.save({"model": network().state_dict(), "arguments": Namespace(a=1)}, tmp_path / "arguments.pt")
    assert "holds an object of torch.nn.modules.container.Sequential, expected tensors alone" in refusal(
        UntrustedFile, tmp_path / "whole.pt"
    )
    text = refusal(UntrustedFile, tmp_path / "arguments.pt")
    assert "argparse.Namespace" in text
    assert "save the weights alone: torch.save(model.state_dict(), file)" in text


class Calling:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "posix.system"), (eval, "eval"), (getattr, "getattr"), (functools.partial, "functools.partial")],
)
@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_objects_of_blocked_modules_are_named_as_any_other(function: Any, name: str, form: str, tmp_path: Path) -> None:
    """torch words its refusal of os.system differently; the message was that of a damaged file, with its advice."""
    content = {"weight": torch.zeros(2), "more": Calling(function, "echo")}
    file = tmp_path / "net.pt"
    if form == "pickle":
        file.write_bytes(pickle.dumps(content["more"], protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    assert refusal(UntrustedFile, file) == (
        f"checkpoint {file}: holds an object of {name}, expected tensors alone, as loading it would run code out of "
        "the file; save the weights alone: torch.save(model.state_dict(), file)"
    )


def test_no_advice_of_torch_is_passed_on(tmp_path: Path) -> None:
    """It is to read the file with weights_only=False."""
    file = tmp_path / "net.pt"
    for content in (pickle.dumps({"a": Calling(eval, "1")}, protocol=4), b"\x80\x02}", b"noise", b"\x80\x02."):
        file.write_bytes(content)
        text = refusal(DamagedRecording, file)
        for advice in ("weights_only", "PyTorch", "Please", "documentation", "trust"):
            assert advice not in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file.write_bytes(pickle.dumps([1], protocol=4))
        assert "(UnpicklingError: Unsupported operand 149)" in refusal(DamagedRecording, file)


@pytest.fixture
def little_memory() -> Any:
    """An address space in which no more than 1 GiB can be taken."""
    resource = pytest.importorskip("resource")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_tensor_that_is_larger_than_what_the_file_holds(tmp_path: Path, little_memory: Any) -> None:
    """A file of 1 kB was a tensor of 3 * 10^10 numbers, and the search for NaN took 30 GB."""
    file = tmp_path / "net.pt"
    for value in (
        torch.zeros(1).expand(3 * 10**10),
        torch.zeros(4)[::2].expand(3, 2),
        torch.zeros(3, 3).to_sparse(),
        torch.zeros(3, device="meta"),
    ):
        torch.save({**network().state_dict(), "1.weight": value}, file)
        assert "found 1.weight with fewer numbers in the file than in its shape, or sparse, expected dense" in refusal(
            UntrustedFile, file
        )


def test_views_that_are_in_the_file_load(tmp_path: Path) -> None:
    state = network().state_dict()
    whole = torch.cat([state["0.weight"], state["0.weight"]])
    torch.save({**state, "0.weight": whole[6:], "3.weight": state["3.weight"].T.contiguous().T}, tmp_path / "net.pt")
    model = gated()
    load_weights(model, tmp_path / "net.pt")
    assert torch.equal(model(X), network()(X))


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """torch unpacks one: 200 kB of it are 200 MB of zeros."""
    stored = io.BytesIO()
    torch.save({**network().state_dict(), "1.weight": torch.zeros(10**6)}, stored)
    file = tmp_path / "net.pt"
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    text = refusal(UntrustedFile, file)
    assert f"bytes compressed into a file of {file.stat().st_size}, expected them as torch.save writes them" in text


def test_shapes_are_compared_before_numbers(tmp_path: Path) -> None:
    torch.save({**network().state_dict(), "0.weight": torch.full((9, 9), torch.nan)}, tmp_path / "net.pt")
    assert "found 0.weight [9, 9] instead of [6, 5]" in refusal(ConfigurationError, tmp_path / "net.pt")


def test_a_pipe_or_device_is_no_checkpoint(tmp_path: Path) -> None:
    """The remedy was to remove it."""
    os.mkfifo(tmp_path / "pipe.pt")
    for file in (tmp_path / "pipe.pt", Path("/dev/zero")):
        assert refusal(UntrustedFile, file).endswith(
            "found a FIFO or device, expected a file of weights or a folder checkpoints/<step>; copy what it gives "
            "into a file first"
        )


def test_what_holds_no_weights(tmp_path: Path) -> None:
    for number, (content, found) in enumerate(
        [
            ([1, 2], "found list, expected a state dict"),
            ({}, "found the keys , expected a state dict"),
            ({"epoch": 3, "loss": 0.5}, "found the keys epoch, loss, expected a state dict"),
            (torch.zeros(3), "found Tensor, expected a state dict"),
        ]
    ):
        torch.save(content, tmp_path / f"{number}.pt")
        assert found in refusal(ConfigurationError, tmp_path / f"{number}.pt")


def test_nan_in_slopes_and_weights_by_name(tmp_path: Path) -> None:
    model = gated(seed=0)
    with torch.no_grad():
        gates(model)["4"].slope[1] = torch.nan
    torch.save(model.state_dict(), tmp_path / "slope.pt")
    assert "found NaN in 4.slope, expected numbers" in refusal(ConfigurationError, tmp_path / "slope.pt")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    torch.save(model.state_dict(), tmp_path / "all.pt")
    assert "found NaN in 0.weight, 0.bias, 1.weight and 7 more" in refusal(ConfigurationError, tmp_path / "all.pt")


def test_another_architecture_names_the_first_differences(tmp_path: Path) -> None:
    file = tmp_path / "net.pt"
    torch.save(network(width=7).state_dict(), file)
    text = refusal(ConfigurationError, file)
    assert (
        "does not fit the Sequential that is built: found 0.bias [7] instead of [6], 0.weight [7, 5] instead of" in text
    )
    assert "build the network that it was saved from" in text
    deeper = nn.Sequential(*network(), nn.ReLU(), nn.Linear(3, 3))
    torch.save(deeper.state_dict(), file)
    assert "unexpected 7.weight, 7.bias;" in refusal(ConfigurationError, file)
    state = network().state_dict()
    torch.save({name: state[name] for name in ("5.weight", "5.bias")}, file)
    assert "missing 0.weight, 0.bias, 1.weight and" in refusal(ConfigurationError, file)
    # A PReLU's weight of another size goes by the Gate's own way of loading.
    torch.save({**state, "2.weight": torch.zeros(5)}, file)
    assert "2.slope" in refusal(ConfigurationError, file)
    layer_wise = nd.gate_network(network().train(), X, granularity="channel").state_dict()
    torch.save({**layer_wise, "4.slope": torch.zeros(1), "4.frozen": torch.zeros(1, dtype=torch.bool)}, file)
    assert "found 4.frozen [1] instead of [4], 4.slope [1] instead of [4]" in refusal(ConfigurationError, file)
