"""Every engine against the loop of the oracle, over the whole zoo."""

from __future__ import annotations

import copy
import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from ntkdyn import Gate, Projection, SummedOutputs, empirical_ntk
from ntkdyn.errors import (
    ConfigurationError,
    NondeterministicForward,
    NtkdynError,
    ShapeError,
    UnknownName,
    UnsupportedLayer,
)
from ntkdyn.kernel import ENGINES, resolve_parameters
from ntkdyn.kernel.reduction import NAMED
from ntkdyn.kernel.rules import layer_rule, rules

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def _zoo() -> ModuleType:
    # By path: the names are needed at collection, before there are fixtures.
    path = Path(__file__).parents[1] / "problems.py"
    spec = importlib.util.spec_from_file_location("ntkdyn_tests_problems_at_collection", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


ZOO = _zoo().ZOO


def error(found: Any, expected: Any) -> float:
    """The worse of the relative errors in the Frobenius norm and in the largest entry, over all blocks."""
    if not isinstance(expected, dict):
        found, expected = {"": found}, {"": expected}
    assert list(found) == list(expected)
    worst = 0.0
    for name, exact in expected.items():
        assert found[name].shape == exact.shape, name
        difference = found[name].double() - exact
        if exact.abs().max() == 0:
            assert difference.abs().max() == 0, name
            continue
        relative = max(difference.norm() / exact.norm(), difference.abs().max() / exact.abs().max())
        worst = max(worst, float(relative))
    return worst


@pytest.mark.parametrize("symmetric", [True, False], ids=["x1", "x1-x2"])
@pytest.mark.parametrize("name", ZOO)
def test_equals_loop(
    name: str,
    symmetric: bool,
    device: torch.device,
    oracles: ModuleType,
    pytestconfig: pytest.Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = ZOO[name]()
    further = {"forward": problem.forward, "parameters": problem.parameters}
    inputs = (problem.x1,) if symmetric else (problem.x1, problem.x2)
    model = problem.model.to(device)
    inputs = tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
    # The network is what it computes there: torch's weight_norm, for one, rounds its norms to single on CUDA. And what
    # it makes itself in its forward pass belongs on the device as well.
    with nullcontext() if device.type == "cpu" else device:
        full = {name: block.cpu() for name, block in oracles.full_by_loop(model, *inputs, **further).items()}
    kinds = (None, "layer", "parameter")
    cases = [(reduce, per, torch.float64) for reduce in NAMED for per in kinds]
    # Single precision, but by --long, once for each reduction, with the kinds of blocks in turn: it is the same code.
    singles = [(reduce, per, torch.float32) for per, reduce in zip((*kinds, None), NAMED, strict=True)]
    if pytestconfig.getoption("--long"):
        singles = [(reduce, per, torch.float32) for reduce in NAMED for per in kinds]
    cases += singles
    recurrent = device.type == "cuda" and any(isinstance(module, nn.RNNBase) for module in model.modules())
    cudnn = torch.backends.cudnn.enabled
    monkeypatch.setattr(torch.backends.cudnn, "enabled", cudnn)
    for engine in ENGINES:
        for reduce, per, dtype in cases:
            exact = oracles.combined(full, reduce, per)
            # In single precision cuDNN's recurrent layers are off by more than this themselves: torch's own gradients,
            # one by one, give kernels with the same 1.9e-5, and with 4e-7 where cuDNN is off.
            torch.backends.cudnn.enabled = cudnn and not (recurrent and dtype == torch.float32)
            with nullcontext() if device.type == "cpu" else device:
                found = empirical_ntk(model, *inputs, reduce=reduce, per=per, engine=engine, dtype=dtype, **further)
            blocks = found if isinstance(found, dict) else {"": found}
            assert all(block.dtype == dtype and block.device.type == device.type for block in blocks.values())
            on_cpu = {key: block.cpu() for key, block in blocks.items()}
            exact_blocks = exact if isinstance(exact, dict) else {"": exact}
            assert error(on_cpu, exact_blocks) <= TOLERANCE[dtype], (engine, reduce, per, dtype)


@pytest.fixture
def in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels, parts, blocks, strips and the trial run of the engine at the size of the zoo's kernels."""
    for name, value in {
        "accumulator._LEAST_ROWS": 1,
        "accumulator._PANELS": 3,
        "accumulator._SQUARE": 4,
        "accumulator._HEIGHT": 2,
        "accumulator._BLOCK": 2**3,
        "rows._BLOCK": 2**4,
        "rows._PART": 2**5,
        "rows._KEPT": 2**6,
        "contraction._BLOCK": 2**4,
        "contraction.NARROW": 2**3,
        "costs._LOOKS": 0.0,
        "costs._MANY": 2,
        "shared._BLOCK": 2**4,
        "shared._FEW": 1,
        "shared._LEAST_DIRECTIONS": 2,
        "sides._STRIP": 1,
        "sides._LEAST_STRIP": 2,
        "tracing._TRIAL": 2,
    }.items():
        monkeypatch.setattr(f"ntkdyn.kernel.{name}", value)


@pytest.mark.usefixtures("in_small_pieces")
@pytest.mark.parametrize("symmetric", [True, False], ids=["x1", "x1-x2"])
@pytest.mark.parametrize("name", ZOO)
def test_pieces_add_up_to_the_same(
    name: str, symmetric: bool, oracles: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = ZOO[name]()
    further = {"forward": problem.forward, "parameters": problem.parameters, "dtype": torch.float64}
    inputs = (problem.x1,) if symmetric else (problem.x1, problem.x2)
    full = empirical_ntk(problem.model, *inputs, reduce="full", per="parameter", engine="reference", **further)
    for reduce in (*NAMED, Projection(2, seed=1), SummedOutputs()):
        if reduce in NAMED:
            exact = oracles.combined(full, reduce, "parameter")
        else:
            exact = empirical_ntk(problem.model, *inputs, reduce=reduce, per="parameter", engine="reference", **further)
        whole = max(block.abs().max() for block in exact.values())
        # A symmetric kernel is multiplied in halves or in panels; which, the library of matrix products decides.
        for half in (True, False) if symmetric else (False,):
            monkeypatch.setattr("ntkdyn.kernel.accumulator.by_openblas", lambda _, half=half: half)
            found = empirical_ntk(problem.model, *inputs, reduce=reduce, per="parameter", **further)
            for key, block in exact.items():
                assert (found[key] - block).abs().max() <= 1e-10 * block.abs().max() + 1e-14 * whole + 1e-25, (
                    reduce, half, key,
                )  # fmt: skip
            together = empirical_ntk(problem.model, *inputs, reduce=reduce, **further)
            assert (together - sum(exact.values())).abs().max() <= 1e-10 * whole + 1e-25, (reduce, half)


def _networks(width: int, outputs: int) -> dict[str, tuple[nn.Module, Tensor]]:
    size = 70
    norm = nn.BatchNorm2d(4)
    norm.running_var.uniform_(0.5, 2.0)
    return {
        "mlp": (
            nn.Sequential(
                nn.Linear(9, width), Gate(width, 0.2), nn.Linear(width, 5), nn.PReLU(), nn.Linear(5, outputs),
            ),
            torch.randn(size, 9),
        ),
        "cnn": (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Flatten(),
                nn.Linear(4 * 9, outputs),
            ).eval(),
            torch.randn(size, 2, 5, 5),
        ),
        "positions": (
            nn.Sequential(
                nn.Embedding(11, width), nn.Linear(width, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 4),
                nn.Flatten(), nn.Linear(16, outputs),
            ),
            torch.randint(0, 11, (size, 4)),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("outputs", [1, 7, 70])
@pytest.mark.parametrize("name", ["mlp", "cnn", "positions"])
def test_many_samples(name: str, outputs: int) -> None:
    # Enough for several panels and strips; 70 outputs are as many as there are samples.
    torch.manual_seed(outputs)
    model, x = _networks(12, outputs)[name]
    model, x = model.double(), x.double() if x.is_floating_point() else x
    exact = {
        reduce: empirical_ntk(model, x, reduce=reduce, per="parameter", engine="reference")
        for reduce in (("each", "full") if outputs < 70 else ("each",))
    }
    exact["trace"] = {key: block.sum(0) for key, block in exact["each"].items()}
    for reduce, blocks in exact.items():
        second = 2 if reduce == "each" else 1
        part = {key: block.narrow(second, 0, 33).flip(second) for key, block in blocks.items()}
        for inputs, expected in (((x,), blocks), ((x, x[:33].flip(0)), part)):
            found = empirical_ntk(model, *inputs, reduce=reduce, per="parameter")
            for key, block in expected.items():
                assert (found[key] - block).abs().max() <= 1e-10 * block.abs().max(), (reduce, len(inputs), key)
            assert error(empirical_ntk(model, *inputs, reduce=reduce), sum(expected.values())) <= 1e-10


@pytest.mark.parametrize("name", ZOO)
def test_contributions_add_up(name: str) -> None:
    problem = ZOO[name]()
    further = {"forward": problem.forward, "parameters": problem.parameters, "dtype": torch.float64}
    whole = empirical_ntk(problem.model, problem.x1, **further)
    layers = empirical_ntk(problem.model, problem.x1, per="layer", **further)
    parameters = empirical_ntk(problem.model, problem.x1, per="parameter", **further)
    assert error(sum(layers.values()), whole) <= 1e-12
    assert error(sum(parameters.values()), whole) <= 1e-12
    assert tuple(parameters) == resolve_parameters(problem.model, problem.parameters)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    samples=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    positions=st.lists(st.integers(1, 4), max_size=2),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_mlp_of_any_shape(
    widths: list[int], samples: tuple[int, int], positions: list[int], bias: bool, seed: int, oracles: ModuleType
) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out, bias=bias), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    x1, x2 = (torch.randn(n, *positions, widths[0]) for n in samples)
    for reduce in ("trace", "full"):
        expected = oracles.ntk_by_loop(model, x1, x2, reduce=reduce)
        found = empirical_ntk(model, x1, x2, reduce=reduce, dtype=torch.float64)
        assert error(found, expected) <= 1e-10


class Counting(nn.Module):
    """Counts its calls in a list that a copy shares."""

    def __init__(self, calls: list[int]) -> None:
        super().__init__()
        self.note = calls.append

    def forward(self, x: Tensor) -> Tensor:
        self.note(len(x))
        return x


@pytest.mark.parametrize("engine", ENGINES)
def test_symmetric_kernel_runs_the_network_once(engine: str) -> None:
    calls: list[int] = []
    model = nn.Sequential(nn.Linear(3, 4), Counting(calls), nn.Linear(4, 2))
    # A few samples are run before, to see how the network is made.
    empirical_ntk(model, torch.randn(20, 3), engine=engine)
    assert calls.count(20) == 1
    assert sum(calls) <= 40
    calls.clear()
    empirical_ntk(model, torch.randn(20, 3), torch.randn(12, 3), engine=engine)
    assert (calls.count(20), calls.count(12)) == (1, 1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["batch_norm", "lstm", "weight_norm", "gates_at_exact_zeros", "in_place_on_the_input"])
def test_changes_nothing(name: str, engine: str) -> None:
    problem = ZOO[name]()
    model, fired = problem.model, []
    handles = [layer.register_forward_hook(lambda *_: fired.append(1)) for layer in model.modules()]
    handles += [layer.register_full_backward_hook(lambda *_: fired.append(1)) for layer in model.modules()]
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    first.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    attributes = [dict(vars(layer)) for layer in model.modules()]
    flags = [(p.requires_grad, p._version, p.data_ptr()) for p in model.parameters()]
    random, inputs, kept = torch.get_rng_state(), problem.x1.clone(), problem.x1.clone()
    with torch.no_grad():
        empirical_ntk(model, inputs, engine=engine, dtype=torch.float64)
    assert not fired
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(inputs, kept)
    assert inputs._version == 0
    assert flags == [(p.requires_grad, p._version, p.data_ptr()) for p in model.parameters()]
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [vars(layer).keys() for layer in model.modules()] == [one.keys() for one in attributes]
    assert all(len(layer._forward_hooks) == 1 for layer in model.modules())
    assert len(handles) == 2 * len(list(model.modules()))


@pytest.mark.parametrize("engine", ENGINES)
def test_weight_written_in_forward_stays_in_the_copy(engine: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Linear(3, 2))
    before = model[0].weight.detach().clone()
    empirical_ntk(model, torch.arange(4), engine=engine)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_context_of_the_caller_does_not_matter(context: Any, engine: str) -> None:
    problem = ZOO["gated_convolution_over_black_borders"]()
    expected = empirical_ntk(problem.model, problem.x1, engine=engine)
    with context():
        assert torch.equal(empirical_ntk(problem.model, problem.x1.clone(), engine=engine), expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(engine: str, dtype: torch.dtype, oracles: ModuleType) -> None:
    problem = ZOO["mlp"]()
    model = problem.model.to(dtype)
    found = empirical_ntk(model, problem.x1.to(dtype), engine=engine)
    assert found.dtype == dtype
    expected = oracles.ntk_by_loop(model, problem.x1.to(dtype))
    assert error(found, expected) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_that_depend_on_each_other(engine: str) -> None:
    class Centered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(x))
            return self.head(hidden - hidden.mean(0))

    torch.manual_seed(0)
    for size in (2, 5, 40):
        with pytest.raises(NondeterministicForward, match="depend on the other samples"):
            empirical_ntk(Centered(), torch.randn(size, 3), engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_random_forward_pass(engine: str) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.head(self.first(x) + self.calls)

    with pytest.raises(NondeterministicForward, match="when called again"):
        empirical_ntk(Noisy(), torch.randn(40, 3), engine=engine)


def _row(model: nn.Module, value: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)])


@pytest.mark.parametrize("engine", ENGINES)
def test_layers_allowed_in_training_mode(engine: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    state = torch.get_rng_state()
    outputs = copy.deepcopy(model)(x)
    torch.set_rng_state(state)
    live = copy.deepcopy(model)
    rows = [_row(live, value) for value in live(x).flatten()]
    torch.set_rng_state(state)
    jacobian = torch.stack(rows).view(*outputs.shape, -1)
    expected = torch.einsum("ncp,mcp->nm", jacobian, jacobian)
    found = empirical_ntk(model, x, engine=engine, train_mode=["1", "3"])
    assert error(found, expected) <= 1e-10
    assert int(model[1].num_batches_tracked) == 0


def test_network_that_does_not_run_with_one_sample(oracles: ModuleType) -> None:
    class Squeezing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(3, 4))
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh((x @ self.matrix).squeeze(0)))

    model, x = Squeezing(), torch.randn(4, 3)
    expected = oracles.ntk_by_loop(model, x, forward=lambda model, x: model(x.repeat(2, 1))[:1])
    assert error(empirical_ntk(model, x, dtype=torch.float64), expected) <= 1e-10


def test_every_reduction_is_what_it_says() -> None:
    problem = ZOO["mlp"]()
    full = empirical_ntk(problem.model, problem.x1, problem.x2, reduce="full", dtype=torch.float64)
    each = empirical_ntk(problem.model, problem.x1, problem.x2, reduce="each", dtype=torch.float64)
    trace = empirical_ntk(problem.model, problem.x1, problem.x2, dtype=torch.float64)
    mean = empirical_ntk(problem.model, problem.x1, problem.x2, reduce="mean", dtype=torch.float64)
    assert full.shape == (6, 4, 3, 3)
    assert each.shape == (3, 6, 4)
    torch.testing.assert_close(each, full.diagonal(dim1=2, dim2=3).permute(2, 0, 1))
    torch.testing.assert_close(trace, each.sum(0))
    torch.testing.assert_close(mean, trace / 3)


def test_names_of_blocks() -> None:
    tied, root = ZOO["tied_embedding"](), ZOO["root_owned_parameters"]()
    assert list(empirical_ntk(tied.model, tied.x1, per="layer")) == ["table", "middle"]
    blocks = empirical_ntk(root.model, root.x1, per="layer")
    assert list(blocks) == ["<root>", "head", "unused"]
    assert not blocks["unused"].any()
    assert resolve_parameters(tied.model, ["head.weight"]) == ("table.weight",)
    assert resolve_parameters(root.model, ["head.*", "scale"]) == ("scale", "head.weight", "head.bias")


def test_frozen_slopes_have_no_kernel() -> None:
    problem = ZOO["frozen_gates"]()
    blocks = empirical_ntk(problem.model, problem.x1, per="parameter")
    assert blocks["1.slope"].any()
    assert not blocks["3.slope"].any()


def test_every_rule_is_met_in_the_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    used = set()
    for target, rule in list(rules().items()):

        def counted(site: Any, target: Any = target, rule: Any = rule) -> Any:
            used.add(target)
            return rule.gradient(site)

        monkeypatch.setitem(rules(), target, replace(rule, gradient=counted))
    for build in ZOO.values():
        problem = build()
        empirical_ntk(problem.model, problem.x1, forward=problem.forward, parameters=problem.parameters)
    assert used == set(rules())


def test_a_second_rule_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"two layer rules: ntkdyn\.kernel\.rules\.linear\.linear and .*"):
        layer_rule(functional.linear, roles="weight")(lambda site: {})


LINEAR, X = nn.Linear(3, 2), torch.ones(4, 3)


class Outputs(nn.Module):
    """Returns what it is told to."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.made = made

    def forward(self, x: Tensor) -> Any:
        return self.made(x * self.weight)


@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [
        (ConfigurationError, "reduce is 'sum'; expected one of 'trace'",
         lambda: empirical_ntk(LINEAR, X, reduce="sum")),
        (ConfigurationError, "engine is 'fast'", lambda: empirical_ntk(LINEAR, X, engine="fast")),
        (ConfigurationError, "per is 'block'", lambda: empirical_ntk(LINEAR, X, per="block")),
        (ConfigurationError, "dtype is torch.int64", lambda: empirical_ntk(LINEAR, X, dtype=torch.int64)),
        (ConfigurationError, "parameters is the string", lambda: empirical_ntk(LINEAR, X, parameters="weight")),
        (ConfigurationError, "parameters= is empty", lambda: empirical_ntk(LINEAR, X, parameters=[])),
        (ConfigurationError, "ReLU has no parameter", lambda: empirical_ntk(nn.ReLU(), X)),
        (UnknownName, "no parameter fits 'wieght'; did you mean 'weight'",
         lambda: empirical_ntk(LINEAR, X, parameters=["wieght"])),
        (UnknownName, "train_mode: no layer fits 'norm'", lambda: empirical_ntk(LINEAR, X, train_mode=["norm"])),
        (ShapeError, "x1 holds no tensor", lambda: empirical_ntk(LINEAR, [])),
        (ShapeError, "x1 has tensors of shape", lambda: empirical_ntk(LINEAR, (X, X[:2]))),
        (ShapeError, "x2 has tensors of shape", lambda: empirical_ntk(LINEAR, X, X[:0])),
        (ShapeError, "x1 has tensors of shape", lambda: empirical_ntk(LINEAR, torch.tensor(1.0))),
        (ShapeError, "returned tuple", lambda: empirical_ntk(Outputs(lambda y: (y, y)), X)),
        (ShapeError, "dtype torch.int64", lambda: empirical_ntk(Outputs(lambda y: y.long()), X)),
        (ShapeError, "4 samples on axis 0", lambda: empirical_ntk(Outputs(lambda y: y.sum()), X)),
        (ShapeError, "x1 gives 4 outputs a sample, x2 gives 3",
         lambda: empirical_ntk(Outputs(lambda y: y @ y.T), X, X[:3])),
        (ConfigurationError, "do not depend on the model", lambda: empirical_ntk(Outputs(lambda y: y.detach()), X)),
        (ConfigurationError, "do not depend on the model",
         lambda: empirical_ntk(nn.Linear(3, 2), X, forward=lambda _, x: LINEAR(x))),
        (UnsupportedLayer, r"layer '1' \(BatchNorm1d\) normalizes.*train_mode=\['1'\]",
         lambda: empirical_ntk(nn.Sequential(LINEAR, nn.BatchNorm1d(2)), X)),
        (UnsupportedLayer, r"layer '1' \(BatchNorm1d\)",
         lambda: empirical_ntk(nn.Sequential(LINEAR, nn.BatchNorm1d(2, track_running_stats=False)).eval(), X)),
        (UnsupportedLayer, r"layer '1' \(Dropout\) is random",
         lambda: empirical_ntk(nn.Sequential(LINEAR, nn.Dropout()), X)),
        (UnsupportedLayer, r"layer '0' \(LSTM\) drops units",
         lambda: empirical_ntk(nn.Sequential(nn.LSTM(3, 2, 2, dropout=0.1)), X)),
        (UnsupportedLayer, r"layer '1' \(dropout\) is random",
         lambda: empirical_ntk(nn.Sequential(nn.ReLU(), Outputs(functional.dropout)), X)),
        (UnsupportedLayer, r"\(rrelu\) is random",
         lambda: empirical_ntk(Outputs(lambda y: functional.rrelu(y, 0.0, 1.0, True)), X)),
        (UnsupportedLayer, r"\(scaled_dot_product_attention\) is random",
         lambda: empirical_ntk(Outputs(lambda y: functional.scaled_dot_product_attention(y, y, y, dropout_p=0.1)), X)),
        (UnsupportedLayer, r"layer '<root>' \(batch_norm\) normalizes",
         lambda: empirical_ntk(Outputs(lambda y: functional.batch_norm(y, None, None, training=True)), X)),
        (UnsupportedLayer, "'weight' has dtype torch.complex64",
         lambda: empirical_ntk(nn.Linear(3, 2, dtype=torch.complex64), X)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("engine", ENGINES)
def test_errors(engine: str, kind: type[NtkdynError], message: str, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(empirical_ntk.__kwdefaults__, "engine", engine)
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "made", [lambda y: functional.dropout(y, 0.0), lambda y: functional.dropout(y, training=False)]
)
def test_dropout_that_drops_nothing(made: Any) -> None:
    assert empirical_ntk(Outputs(made), X).shape == (4, 4)


@pytest.mark.parametrize("engine", ENGINES)
def test_input_changed_after_the_layer(engine: str) -> None:
    class Spoiling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            outputs = self.second(hidden)
            hidden.relu_()
            return outputs + hidden

    with pytest.raises(UnsupportedLayer, match=r"in.place"):
        empirical_ntk(Spoiling(), X, engine=engine)
