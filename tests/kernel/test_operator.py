"""The operator against dense kernels of the oracle, and its eigenpairs against numpy's."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import aslinearoperator, cg, eigsh
from torch import Tensor, nn

from ntkdyn import NTKOperator, empirical_ntk
from ntkdyn.errors import (
    ConfigurationError,
    NondeterministicForward,
    ShapeError,
    UndefinedMeasure,
    UnknownName,
    UnsupportedLayer,
)
from ntkdyn.kernel import differentials, eigenpairs
from ntkdyn.kernel.eigenpairs import largest_eigenpairs

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


def _zoo() -> ModuleType:
    # By path: the names are needed at collection, before there are fixtures.
    path = Path(__file__).parents[1] / "problems.py"
    spec = importlib.util.spec_from_file_location("ntkdyn_tests_problems_of_operator", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


ZOO = _zoo().ZOO
# torch has neither a second derivative nor a forward derivative of F.embedding_bag.
WITH_PRODUCTS = [name for name in ZOO if name != "embedding_bags"]


def matrix(full: Tensor) -> Any:
    """[N, N, C, C] -> [N·C, N·C], sample-major."""
    samples, _, outputs, _ = full.shape
    return full.permute(0, 2, 1, 3).reshape(samples * outputs, samples * outputs).numpy()


def dense(oracles: ModuleType, name: str) -> Any:
    """The zoo's kernel by the oracle's loop, and the problem."""
    problem = ZOO[name]()
    further = {"forward": problem.forward, "parameters": problem.parameters}
    return matrix(oracles.ntk_by_loop(problem.model, problem.x1, reduce="full", **further)), problem, further


def assert_eigenpairs(found: tuple[Tensor, Tensor], kernel: Any, k: int, tolerance: float = 1e-8) -> None:
    """Values as numpy's, relative to each and to rounding of the largest; vectors orthonormal, residuals small."""
    values, vectors = (part.double().numpy() for part in found)
    vectors = vectors.reshape(len(kernel), k)
    exact = np.linalg.eigvalsh(kernel)[::-1][:k]
    assert (np.abs(values - exact) <= tolerance * np.abs(exact) + 1e-13 * exact[0]).all()
    assert (np.diff(values) <= 0).all()
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-8)
    assert np.abs(kernel @ vectors - vectors * values).max() <= 1e-8 * max(exact[0], 1e-300)


@pytest.mark.parametrize("chunk", [None, 2], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_products_equal_dense_kernel(name: str, chunk: int | None, oracles: ModuleType) -> None:
    kernel, problem, further = dense(oracles, name)
    for dtype, tolerance in TOLERANCE.items():
        operator = NTKOperator(problem.model, problem.x1, dtype=dtype, chunk=chunk, **further)
        assert operator.shape == kernel.shape
        assert operator.dtype == {torch.float64: np.float64, torch.float32: np.float32}[dtype]
        found = operator @ np.eye(len(kernel))
        assert found.dtype == operator.dtype
        for norm in (np.linalg.norm, lambda array: np.abs(array).max()):
            assert norm(found - kernel) <= tolerance * norm(kernel)


@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_largest_eigenpairs_equal_dense_ones(name: str, oracles: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, problem, further = dense(oracles, name)
    size = len(kernel)
    operator = NTKOperator(problem.model, problem.x1, dtype=torch.float64, **further)
    samples = len(problem.x1 if isinstance(problem.x1, Tensor) else next(iter(_leaves(problem.x1))))
    for k in {1, size - 1, size} - {0}:
        found = operator.top(k)
        assert found.vectors.shape == (samples, size // samples, k)
        assert_eigenpairs(found, kernel, k)
    monkeypatch.setattr(eigenpairs, "columns_instead", lambda count: count + 2)
    k = max(1, min(3, size - 4))
    assert_eigenpairs(operator.top(k), kernel, k)


def _leaves(tree: Any) -> list[Tensor]:
    return list(tree.values()) if isinstance(tree, dict) else list(tree)


@pytest.mark.parametrize("way", [differentials.ForwardMode, differentials.DoubleBackward])
@pytest.mark.parametrize("name", ["gates_at_exact_zeros", "batch_norm", "lstm", "attention"])
def test_both_ways_to_the_jacobian(name: str, way: Any, oracles: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, problem, further = dense(oracles, name)
    other = {differentials.ForwardMode, differentials.DoubleBackward} - {way}
    monkeypatch.setattr(differentials, other.pop().__name__, _Impossible)
    for chunk in (None, 2):
        operator = NTKOperator(problem.model, problem.x1, dtype=torch.float64, chunk=chunk, **further)
        assert np.abs(operator @ np.eye(len(kernel)) - kernel).max() <= 1e-10 * np.abs(kernel).max()


class _Impossible(differentials.DoubleBackward):
    title = "impossible"

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> Tensor:
        raise RuntimeError("no derivative\nand a second line")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    samples=st.integers(1, 6),
    chunk=st.none() | st.integers(1, 7),
    positions=st.lists(st.integers(1, 3), max_size=1),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    widths: list[int], samples: int, chunk: int | None, positions: list[int], seed: int, oracles: ModuleType
) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double()
    x = torch.randn(samples, *positions, widths[0], dtype=torch.float64)
    kernel = matrix(oracles.ntk_by_loop(model, x, reduce="full"))
    operator = NTKOperator(model, x, chunk=chunk)
    vectors = np.random.default_rng(seed).standard_normal((len(kernel), 2))
    expected = kernel @ vectors
    scale = np.linalg.norm(kernel, 2) * np.linalg.norm(vectors)
    assert np.abs(operator.matvec(vectors[:, 0]) - expected[:, 0]).max() <= 1e-10 * scale
    assert np.abs(operator.matmat(vectors) - expected).max() <= 1e-10 * scale


@pytest.mark.parametrize("device", DEVICES)
def test_operator_of_scipy(device: str) -> None:
    problem = ZOO["mlp"]()
    model, x = problem.model.double().to(device), problem.x1.double().to(device)
    operator = NTKOperator(model, x)
    kernel = operator @ np.eye(18)
    assert operator.H is operator
    assert operator.T is operator
    vector = np.random.default_rng(0).standard_normal(18)
    for found in (operator.rmatvec(vector), operator @ torch.from_numpy(vector), operator @ vector[:, None]):
        np.testing.assert_allclose(found.reshape(18), kernel @ vector, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose((2 * operator + aslinearoperator(np.eye(18))) @ vector, 2 * kernel @ vector + vector)
    assert operator.matmat(np.zeros((18, 0))).shape == (18, 0)
    values = eigsh(operator, 3, return_eigenvectors=False, v0=np.ones(18))
    np.testing.assert_allclose(values[::-1], operator.top(3).values.cpu(), rtol=1e-10)
    regular = operator + aslinearoperator(np.eye(18))
    solution, failed = cg(regular, vector, rtol=1e-10)
    assert failed == 0
    np.testing.assert_allclose(kernel @ solution + solution, vector, atol=1e-8)
    assert operator.top(2).values.device == operator.top(2).vectors.device == x.device


def test_metric_scales_parameters() -> None:
    problem = ZOO["mlp"]()
    scale = torch.rand(7, 5) + 0.5
    metric = {"0.weight": scale, "4.*": 3.0}
    full = empirical_ntk(
        problem.model, problem.x1, reduce="full", metric=metric, engine="reference", dtype=torch.float64
    )
    operator = NTKOperator(problem.model, problem.x1, metric=metric, dtype=torch.float64)
    np.testing.assert_allclose(operator @ np.eye(18), matrix(full), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tolerance", [1e-10, 1e-4])
def test_repeated_eigenvalues_are_found_as_often_as_they_are(tolerance: float) -> None:
    # A linear model's kernel is (X Xᵀ + 1) ⊗ 1_C: scipy's eigsh alone finds one copy of each, without a word.
    torch.manual_seed(0)
    model, x = nn.Linear(8, 5).double(), torch.randn(40, 8, dtype=torch.float64)
    kernel = np.kron((x @ x.T + 1).numpy(), np.eye(5))
    operator = NTKOperator(model, x)
    exact = np.linalg.eigvalsh(kernel)[::-1]
    for k in (1, 4, 12):
        values, vectors = operator.top(k, tolerance=tolerance)
        assert np.abs(values.numpy() - exact[:k]).max() <= 2 * tolerance * exact[0]
        rows = vectors.numpy().reshape(200, k)
        np.testing.assert_allclose(rows.T @ rows, np.eye(k), atol=1e-8)
        assert np.abs(kernel @ rows - rows * values.numpy()).max() <= 4 * tolerance * exact[0]


@pytest.mark.parametrize("k", [1, 3, 30, 89, 90])
def test_zero_and_deficient_kernels(k: int) -> None:
    none, _ = largest_eigenpairs(lambda v: 0 * v, 90, k, 1e-10)
    assert (none == 0).all()
    values, vectors = largest_eigenpairs(lambda v: np.full(90, v.sum()), 90, k, 1e-10)
    np.testing.assert_allclose(values, np.eye(k)[0] * 90, atol=1e-12)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-8)


def test_zero_kernel_of_a_network() -> None:
    problem = ZOO["root_owned_parameters"]()
    operator = NTKOperator(problem.model, problem.x1, parameters=["unused.*"])
    assert not (operator @ np.ones(8)).any()
    assert not operator.top(2).values.any()
    assert operator.top(2).vectors.shape == (4, 2, 2)


def test_same_call_same_numbers_and_signs() -> None:
    problem = ZOO["positions_as_outputs"]()
    first, second = (NTKOperator(problem.model, problem.x1).top(4) for _ in range(2))
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.vectors, second.vectors)
    flat = first.vectors.flatten(0, 1)
    assert (flat.gather(0, flat.abs().argmax(0, keepdim=True)) > 0).all()


def test_holds_copies_and_touches_nothing() -> None:
    problem = ZOO["batch_norm"]()
    model, x = problem.model, problem.x1.clone()
    state, random = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    operator = NTKOperator(model, x)
    vector = np.ones(operator.shape[0])
    before = operator @ vector
    operator.top(1)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
        x += 1.0
    assert (operator @ vector == before).all()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_context_of_the_caller_does_not_matter(context: Any) -> None:
    problem = ZOO["gated_convolution_over_black_borders"]()
    vector = np.ones(16)
    expected = NTKOperator(problem.model, problem.x1) @ vector
    with context():
        assert (NTKOperator(problem.model, problem.x1.clone(), chunk=2) @ vector).dtype == np.float32
        assert (NTKOperator(problem.model, problem.x1.clone()) @ vector == expected).all()


def test_half_precision_is_computed_in_single() -> None:
    problem = ZOO["mlp"]()
    operator = NTKOperator(problem.model.to(torch.bfloat16), problem.x1.to(torch.bfloat16))
    assert operator.dtype == np.float32
    assert operator.top(2).values.dtype == torch.float32


class Centered(nn.Module):
    """Outputs that depend on the other samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.head(hidden - hidden.mean(0))


def test_train_mode_is_one_draw_and_refuses_chunks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    full = empirical_ntk(model, x, reduce="full", train_mode=["1", "3"], engine="reference")
    operator = NTKOperator(model, x, train_mode=["1", "3"])
    torch.rand(3)  # another random state at the time of the products
    np.testing.assert_allclose(operator @ np.eye(10), matrix(full), rtol=1e-10, atol=1e-12)
    with pytest.raises(ConfigurationError, match="samples depend on each other or are drawn anew"):
        NTKOperator(model, x, train_mode=["1", "3"], chunk=2)
    with pytest.raises(UnsupportedLayer, match="'1'"):
        NTKOperator(model, x)


def test_coupled_samples_are_refused_in_chunks() -> None:
    torch.manual_seed(0)
    with pytest.raises(NondeterministicForward, match="differ between one pass and two"):
        NTKOperator(Centered(), torch.randn(5, 3), chunk=2)


def test_max_memory_chooses_the_chunk() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 2)), torch.randn(30, 6)
    expected = NTKOperator(model, x) @ np.ones(60)
    with pytest.raises(ConfigurationError, match=r"max_memory is 100 bytes; one sample at a time takes (\d+)") as error:
        NTKOperator(model, x, max_memory=100)
    least = int(str(error.value).split("takes ")[1].split(";")[0])
    parts = []
    for budget in (least, 2 * least, 100 * least):
        operator = NTKOperator(model, x, max_memory=budget)
        parts.append(len(operator._parts))
        np.testing.assert_allclose(operator @ np.ones(60), expected, rtol=1e-4)
    assert parts[0] == 30
    assert parts[0] > parts[1] > parts[2] == 1


MEASURED = """
import sys, numpy, torch
from torch import nn
from ntkdyn import NTKOperator

def held(entry):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(entry))

torch.set_num_threads(1)
layers = [layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.ReLU())]
model, x = nn.Sequential(*layers, nn.Linear(256, 2)), torch.randn(4096, 256)
NTKOperator(model, x[:4], chunk=2) @ numpy.ones(8)  # what torch loads on its first call is no memory of ours
vector, before = numpy.ones(2 * len(x)), held("VmRSS")
operator = NTKOperator(model, x, max_memory=int(sys.argv[1]))
for _ in range(2):
    operator @ vector
print(held("VmHWM") - before - x.nbytes, len(operator._parts))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
def test_peak_stays_below_max_memory() -> None:
    budget = 2**25
    command = [sys.executable, "-P", "-W", "ignore", "-c", MEASURED, str(budget)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    peak, parts = (int(number) for number in output.split())
    assert parts > 1
    assert budget / 8 < peak <= budget


class WithoutSecondDerivative(torch.autograd.Function):
    """x -> 2 x, whose derivative cannot be taken again, and not forward either."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class WrongForwardMode(torch.autograd.Function):
    """x -> 2 x with a forward-mode derivative that is wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2.01 * tangent


class Applying(nn.Module):
    """A linear layer, then a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(3, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(self.layer(x))  # type: ignore[no-any-return]


def test_networks_without_exact_products_are_refused() -> None:
    with pytest.raises(UnsupportedLayer, match=r"double backward: <u, J w> = 0, .*; forward mode: .*jvp.*; use emp"):
        NTKOperator(Applying(WithoutSecondDerivative), torch.randn(4, 3))


def test_a_wrong_derivative_is_not_used() -> None:
    torch.manual_seed(0)
    model, x = Applying(WrongForwardMode), torch.randn(4, 3)
    operator = NTKOperator(model, x, chunk=2)  # where forward mode is tried first
    full = empirical_ntk(model, x, reduce="full", engine="reference")
    np.testing.assert_allclose(operator @ np.eye(8), matrix(full), rtol=1e-5, atol=1e-5)


BAD_VECTORS: list[tuple[Any, type[Exception], str]] = [
    (np.ones(17), ShapeError, r"shape \(17,\); expected \[N·C\] or \[N·C, columns\] with N·C = 18"),
    (np.ones((17, 2)), ShapeError, r"shape \(17, 2\)"),
    (np.ones((2, 18)), ShapeError, r"shape \(2, 18\)"),
    (np.ones(18) * 1j, ShapeError, "complex128; expected real numbers"),
    (np.full(18, np.nan), UndefinedMeasure, "NaN or Inf at entry 0"),
    (np.array([[0.0, 0.0]] * 17 + [[0.0, np.inf]]), UndefinedMeasure, "NaN or Inf at entry 17"),
]


@pytest.mark.parametrize(("vector", "kind", "message"), BAD_VECTORS)
def test_bad_vectors(vector: Any, kind: type[Exception], message: str) -> None:
    problem = ZOO["mlp"]()
    operator = NTKOperator(problem.model, problem.x1)
    with pytest.raises(kind, match=message):
        operator @ vector
    with pytest.raises(kind, match=message):
        operator.matvec(vector) if vector.ndim == 1 else operator.matmat(vector)


@pytest.mark.parametrize("k", [0, -1, 19, 2.0, True, None])
def test_bad_count(k: Any) -> None:
    problem = ZOO["mlp"]()
    with pytest.raises(ConfigurationError, match="expected a whole number from 1 to N·C = 18"):
        NTKOperator(problem.model, problem.x1).top(k)


@pytest.mark.parametrize("tolerance", [-1e-3, 1.0, float("nan")])
def test_bad_tolerance(tolerance: float) -> None:
    problem = ZOO["mlp"]()
    with pytest.raises(ConfigurationError, match="expected a number from 0 to below 1"):
        NTKOperator(problem.model, problem.x1).top(1, tolerance=tolerance)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"chunk": 0}, ConfigurationError, "chunk is 0; expected a number of samples"),
        ({"chunk": True}, ConfigurationError, "chunk is True"),
        ({"max_memory": 0}, ConfigurationError, "max_memory is 0"),
        ({"parameters": ["9.weight"]}, UnknownName, "no parameter fits '9.weight'"),
        ({"forward": lambda model, x: nn.Linear(5, 2)(x)}, ConfigurationError, "do not depend on the model's"),
    ],
)
def test_bad_arguments(arguments: Any, kind: type[Exception], message: str) -> None:
    problem = ZOO["mlp"]()
    with pytest.raises(kind, match=message):
        NTKOperator(problem.model, problem.x1, **arguments)


def test_overflowing_products_are_named() -> None:
    model = nn.Linear(2, 1).requires_grad_()
    operator = NTKOperator(model, torch.full((40, 2), 1e25))
    for k in (1, 30):
        with pytest.raises(UndefinedMeasure, match="NaN or Inf; the network's derivatives overflow"):
            operator.top(k)


def test_a_layer_without_second_derivative_is_refused() -> None:
    problem = ZOO["embedding_bags"]()
    with pytest.raises(UnsupportedLayer, match="no product with the Jacobian of Composite is exact"):
        NTKOperator(problem.model, problem.x1, forward=problem.forward)
