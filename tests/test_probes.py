"""Every installed probe on a gated network: declared and measured agree, and agree with plain formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntkdyn as nd
from ntkdyn.errors import ProbeError
from ntkdyn.gates import Gate, gates
from ntkdyn.paths import trace_paths
from ntkdyn.plugins import installed, load_probe
from ntkdyn.probes import EmpiricalNTK, PathLength, path_length
from ntkdyn.store.reader import RunReader


def gated(*, granularity: Any = "channel") -> nn.Sequential:
    torch.manual_seed(0)
    slope = torch.tensor([0.0, 0.5, 0.9]) if granularity == "channel" else 0.0
    model = nn.Sequential(
        nn.Conv2d(1, 3, 2), Gate(3, slope=slope, granularity=granularity),
        nn.Flatten(), nn.Linear(12, 5), Gate(5), nn.Tanh(), nn.Linear(5, 4),
    )  # fmt: skip
    model[4].freeze(torch.tensor([True, False, False, True, False]))
    return model.double()


INPUTS = torch.randn(4, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
TARGETS = torch.tensor([0, 3, 1, 1])


def preactivations(model: nn.Sequential, name: str) -> Tensor:
    return model[: int(name)](INPUTS).detach()


@pytest.mark.parametrize("name", sorted(installed("ntkdyn.probes")))
def test_every_probe_records_what_it_declares(name: str, tmp_path: Path) -> None:
    model = gated()
    probe = load_probe(name)
    assert type(probe).__doc__
    recorder = nd.Recorder(model, [name], {"a": (INPUTS, TARGETS), "b": INPUTS[:2]}, path=tmp_path / "run")
    for _ in range(3):
        recorder.record()
    recorder.close()
    reader = RunReader.open(tmp_path / "run")
    for group in reader.groups():
        assert list(reader.steps(group)) == [0, 1, 2]
    for array in reader.names():
        declared = reader.field(array)
        values = reader.read(array)
        rows = () if declared.static else (3,)
        assert values.shape == rows + declared.shape, array
        assert declared.long_name or array.startswith("probe_sets"), array
        if not declared.static:
            assert np.array_equal(values[0], values[2])


@pytest.mark.parametrize("reduce", ["trace", "mean", "each", "full"])
@pytest.mark.parametrize("per", [None, "layer", "parameter"])
def test_ntk_equals_the_kernel_over_weights_and_biases(reduce: Any, per: Any) -> None:
    model = gated()
    found = nd.measure(model, [EmpiricalNTK(reduce, per)], INPUTS)
    names = [name for name, _ in model.named_parameters() if not name.endswith("slope")]
    expected = nd.empirical_ntk(model.eval(), INPUTS, reduce=reduce, parameters=names)
    np.testing.assert_allclose(found["ntk/kernel"], expected.numpy(), rtol=1e-10, atol=1e-12)
    assert found["ntk/kernel"].dtype == np.float64
    if per is not None:
        np.testing.assert_allclose(found["ntk/layers"].sum(0), found["ntk/kernel"], rtol=1e-10, atol=1e-12)
        assert len(found["ntk/layers"]) == (3 if per == "layer" else 6)


@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_gates(granularity: str) -> None:
    model = gated(granularity=granularity)
    found = nd.measure(model, ["gates"], {"test": INPUTS})
    for name, gate in gates(model).items():
        inputs = preactivations(model, name)
        group = f"gates/test/{name}"
        np.testing.assert_array_equal(found[f"{group}/slope"], gate.effective_slope.detach().float())
        np.testing.assert_array_equal(found[f"{group}/frozen"], gate.frozen)
        units = inputs[0].numel()
        bits = np.unpackbits(found[f"{group}/pattern"], axis=-1, count=units, bitorder="big")
        np.testing.assert_array_equal(bits, (inputs > 0).flatten(1))
        rates = [(inputs[:, channel] > 0).double().mean() for channel in range(inputs.shape[1])]
        np.testing.assert_allclose(found[f"{group}/on_rate"], rates, rtol=1e-6)


def test_units() -> None:
    found = nd.measure(gated(), ["units"], INPUTS)
    assert found["units/active"].tolist() == [3, 3]
    assert found["units/total"].tolist() == [3, 5]
    np.testing.assert_allclose(found["units/weighted"], [1 + 0.5 + 0.1, 3], rtol=1e-7)


def test_units_list_what_is_no_gate(tmp_path: Path) -> None:
    recorder = nd.Recorder(gated(), ["units"], INPUTS, path=tmp_path / "run")
    recorder.record()
    recorder.close()
    attributes = RunReader.open(tmp_path / "run").attributes("units")
    assert attributes["always_active"] == "5 (Tanh)"
    assert attributes["uncounted"] == ""


def test_path_length() -> None:
    model = gated()
    model[5] = nn.Identity()
    found = nd.measure(model, ["path-length"], INPUTS)
    expected = nd.path_lengths(model, INPUTS)
    for name in ("mean", "normalized", "weighted", "effective_width", "mean_active_width"):
        assert float(found[f"path_length/{name}"]) == getattr(expected, name)
    np.testing.assert_array_equal(found["path_length/distribution"], expected.distribution)


def test_path_length_lists_what_it_does_not_count(tmp_path: Path) -> None:
    recorder = nd.Recorder(gated(), ["path-length"], INPUTS, path=tmp_path / "run")
    recorder.record()
    recorder.close()
    attributes = RunReader.open(tmp_path / "run").attributes("path_length")
    assert attributes["always_active"] == "5 (Tanh)"
    assert attributes["uncounted"] == ""


def test_a_linear_network_has_lengths_but_no_width(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nd.Gate(4), nn.Linear(4, 2))
    model[1].freeze()
    recorder = nd.Recorder(model, ["path-length"], torch.zeros(2, 3), path=tmp_path / "run")
    recorder.record(0)
    recorder.close()
    run = nd.Run.open(tmp_path / "run")
    assert run["path_length/normalized"].tolist() == [0]
    assert np.isnan(run["path_length/effective_width"]).all()
    assert np.isnan(run["path_length/mean_active_width"]).all()


def test_path_length_traces_once_and_follows_the_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    monkeypatch.setattr(path_length, "trace_paths", lambda *given: traced.append(1) or trace_paths(*given))
    model = gated()
    recorder = nd.Recorder(model, ["path-length"], INPUTS, path=tmp_path / "run")
    expected = []
    for channel in range(3):
        model[1].freeze(torch.arange(3) <= channel)
        expected.append(nd.path_lengths(model, INPUTS).normalized)
        recorder.record()
    recorder.close()
    assert RunReader.open(tmp_path / "run").read("path_length/normalized").tolist() == expected
    assert len(set(expected)) == 3
    assert len(traced) == 1


def test_one_path_length_probe_serves_two_networks_in_turn(tmp_path: Path) -> None:
    probe = PathLength()
    models = [nn.Sequential(nn.Linear(2, 3), Gate(3), *middle, nn.Linear(3, 2)) for middle in ([], [nn.ReLU()])]
    recorders = [
        nd.Recorder(model, [probe], torch.zeros(4, 2), path=tmp_path / str(number))
        for number, model in enumerate(models)
    ]
    for recorder in [*recorders, *recorders]:
        recorder.record()
    for number, recorder in enumerate(recorders):
        recorder.close()
        assert RunReader.open(tmp_path / str(number)).read("path_length/mean").tolist() == [number + 1.0] * 2


def test_outputs() -> None:
    model = gated()
    found = nd.measure(model, ["outputs"], (INPUTS, TARGETS))
    outputs = model(INPUTS).detach()
    np.testing.assert_array_equal(found["outputs/logits"], outputs)
    expected = [-float(row.log_softmax(0)[target]) for row, target in zip(outputs, TARGETS, strict=True)]
    np.testing.assert_allclose(found["outputs/loss"], expected, rtol=1e-12)
    assert float(found["outputs/accuracy"]) == float((outputs.argmax(1) == TARGETS).double().mean())
    assert set(nd.measure(model, ["outputs"], INPUTS)) == {"outputs/logits"}


def test_outputs_of_other_ranks() -> None:
    scalar = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
    inputs, real = torch.randn(3, 2), torch.randn(3)
    found = nd.measure(scalar, ["outputs", "ntk"], (inputs, real))
    assert found["outputs/logits"].shape == (3, 1)
    np.testing.assert_allclose(found["outputs/loss"], (scalar(inputs) - real).square().detach(), rtol=1e-6)
    image = nn.Conv2d(1, 2, 1)
    pixels, classes = torch.randn(3, 1, 2, 2), torch.randint(2, (3, 2, 2))
    found = nd.measure(image, ["outputs"], (pixels, classes))
    assert found["outputs/logits"].shape == (3, 2, 2, 2)
    assert float(found["outputs/accuracy"]) == pytest.approx(
        float((image(pixels).argmax(1) == classes).double().mean())
    )
    assert found["outputs/loss"].shape == (3,)


def test_an_ungated_network_has_kernel_and_outputs() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    found = nd.measure(model, ["ntk", "outputs"], (torch.randn(4, 2), torch.tensor([0, 1, 0, 1])))
    assert found["ntk/kernel"].shape == (4, 4)


@pytest.mark.parametrize("name", ["gates", "units", "path-length"])
def test_an_ungated_network_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = nd.Recorder(model, [name], torch.randn(4, 2), path=tmp_path / "run")
    with (
        pytest.raises(ProbeError, match="the network has no Gate; expected at least one") as caught,
        recorder.attach(optimizer),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert not optimizer._optimizer_step_post_hooks


def test_channels_last_and_repeated_gates() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gate = nn.Linear(3, 3), Gate(3, dim=-1)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.gate(self.layer(self.gate(self.layer(inputs)))).mean(1)

    model, inputs = Twice(), torch.randn(4, 5, 3)
    first = model.layer(inputs)
    second = model.layer(model.gate(first))
    found = nd.measure(model, ["gates"], inputs)
    uses = torch.cat([first.transpose(1, 2), second.transpose(1, 2)], 2)
    bits = np.unpackbits(found["gates/gate/pattern"], axis=-1, count=30, bitorder="big")
    np.testing.assert_array_equal(bits, (uses > 0).flatten(1))
