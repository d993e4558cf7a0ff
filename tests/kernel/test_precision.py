"""Matrix products at the full rate: exact, only inside the engine, and the caller's settings as they were."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from threadpoolctl import ThreadpoolController
from torch import nn

from ntkdyn import empirical_ntk
from ntkdyn.kernel import precision, products
from ntkdyn.kernel.precision import exact_products, fast_path, full_rate

BACKENDS: Any = torch.backends


def _settings() -> tuple[str, ...]:
    parts = (BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn, BACKENDS.cuda.matmul,
             BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn)  # fmt: skip
    return (BACKENDS.fp32_precision, BACKENDS.mkldnn.fp32_precision, *(part.fp32_precision for part in parts))


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.fp32_precision = "none"
    BACKENDS.mkldnn.matmul.fp32_precision = "none"
    BACKENDS.cuda.matmul.fp32_precision = "none"
    BACKENDS.cudnn.conv.fp32_precision = "tf32"
    BACKENDS.cudnn.rnn.fp32_precision = "tf32"


def _set(backend: str, value: str) -> Callable[[], None]:
    def change() -> None:
        part = BACKENDS
        for name in backend.split("."):
            part = getattr(part, name) if name else part
        part.fp32_precision = value

    return change


CALLERS = {
    "untouched": lambda: None,
    "older function": lambda: torch.set_float32_matmul_precision("medium"),
    "older function, highest": lambda: torch.set_float32_matmul_precision("highest"),
    "all backends": _set("", "tf32"),
    "all backends exact": _set("", "ieee"),
    "products": _set("mkldnn.matmul", "bf16"),
    "CUDA": _set("cuda.matmul", "tf32"),
}


@pytest.mark.parametrize("caller", CALLERS)
def test_settings_are_restored_exactly(caller: str) -> None:
    CALLERS[caller]()
    before = _settings()
    with exact_products():
        assert set(_settings()[2:]) == {"ieee"}
        with full_rate():
            assert _settings()[2] == fast_path()
        assert set(_settings()[2:]) == {"ieee"}
    assert _settings() == before
    with pytest.raises(ZeroDivisionError), exact_products(), full_rate():
        raise ZeroDivisionError
    assert _settings() == before
    empirical_ntk(nn.Linear(3, 2), torch.randn(4, 3))
    assert _settings() == before


def test_the_path_taken_is_exact() -> None:
    with exact_products(), full_rate():
        for rows, inner in ((16, 16), (64, 64), (130, 512)):
            fine = torch.full((rows, inner), 1 + 2.0**-12)
            assert torch.equal(fine @ torch.eye(inner), fine)
            assert torch.equal(torch.bmm(fine[None], torch.eye(inner)[None])[0], fine)


def test_a_path_that_rounds_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_maker", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(precision, "_is_exact", lambda: False)
    assert precision.fast_path.__wrapped__() == "ieee"
    monkeypatch.setattr(precision, "_is_exact", lambda: True)
    assert precision.fast_path.__wrapped__() == "bf16"
    monkeypatch.setattr(precision, "_maker", lambda: "GenuineIntel")
    assert precision.fast_path.__wrapped__() == "ieee"


def test_rounding_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision._is_exact()
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: product(a.bfloat16(), b.bfloat16()).float())
    assert not precision._is_exact()


def test_openblas_is_used_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_maker", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert precision.openblas.__wrapped__() is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    found = precision.openblas.__wrapped__()
    assert found is None or all(one.internal_api == "openblas" for one in found.lib_controllers)
    monkeypatch.setattr(precision, "_maker", lambda: "GenuineIntel")
    assert precision.openblas.__wrapped__() is None


@pytest.mark.skipif(
    not ThreadpoolController().select(internal_api="openblas").lib_controllers, reason="NumPy is without OpenBLAS"
)
def test_openblas_has_the_thread_of_torch_and_its_own_again(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = ThreadpoolController().select(internal_api="openblas")
    monkeypatch.setattr(precision, "openblas", lambda: libraries)

    def threads() -> set[int]:
        return {one.num_threads for one in libraries.lib_controllers}

    with libraries.limit(limits=2):
        with full_rate():
            assert threads() == {1}
        assert threads() == {2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("half", [True, False])
def test_products_by_either_library(half: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "halves", lambda _: half)
    torch.manual_seed(0)
    first, second = torch.randn(7, 33, dtype=dtype), torch.randn(40, 5, dtype=dtype).T[:, :33]
    found = products.times_transposed(first, second, torch.empty(7, 5, dtype=dtype))
    tolerance = 40 * torch.finfo(dtype).eps
    assert (found - first @ second.T).abs().max() < tolerance
    target = torch.randn(7, 7, dtype=dtype)
    expected = (target + first @ first.T).triu()
    assert (products.symmetric_product(first, target, add=True).triu() - expected).abs().max() < tolerance
    assert (products.symmetric_product(first, target).triu() - (first @ first.T).triu()).abs().max() < tolerance


def test_kernel_is_exact_whatever_the_caller_allows(oracles: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)), torch.randn(6, 64)
    expected = oracles.ntk_by_loop(model, x, reduce="full")
    for change in CALLERS.values():
        change()
        found = empirical_ntk(model, x, reduce="full").double()
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_threads_do_not_mix_settings() -> None:
    before = _settings()
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)), torch.randn(40, 20)
    expected = empirical_ntk(model, x)
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(empirical_ntk(model, x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(kernel, expected) for kernel in found)
    assert len(found) == 4
    assert _settings() == before
