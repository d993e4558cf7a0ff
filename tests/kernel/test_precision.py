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


OPENBLAS = ThreadpoolController().select(internal_api="openblas")
with_openblas = pytest.mark.skipif(not OPENBLAS.lib_controllers, reason="NumPy is without OpenBLAS")


@pytest.mark.parametrize(
    ("capability", "maker", "used"),
    [
        ("AVX2", "AuthenticAMD", bool(OPENBLAS.lib_controllers)),
        ("AVX512", "AuthenticAMD", False),
        ("DEFAULT", "", False),
        ("AVX2", "GenuineIntel", False),
    ],
)
def test_openblas_is_used_where_it_is_faster(
    capability: str, maker: str, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(precision, "_maker", lambda: maker)
    assert (precision.openblas.__wrapped__() is not None) == used


def test_openblas_multiplies_on_one_thread_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(2)
    for found in (None, OPENBLAS):
        monkeypatch.setattr(products, "openblas", lambda found=found: found)
        for threads in (1, 2):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            assert products.by_openblas(tensor) == (found is not None and threads == 1)
            assert not products.by_openblas(tensor.to("meta"))


@with_openblas
@pytest.mark.parametrize(("torch_threads", "within"), [(1, 1), (2, 2)])
def test_openblas_has_the_thread_of_torch_and_its_own_again(
    torch_threads: int, within: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "openblas", lambda: OPENBLAS)
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)

    def threads() -> set[int]:
        return {one.num_threads for one in OPENBLAS.lib_controllers}

    with OPENBLAS.limit(limits=2):
        with full_rate():
            assert threads() == {within}
        assert threads() == {2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numpy", [True, False])
def test_products_by_either_library(numpy: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "by_openblas", lambda _: numpy)
    torch.manual_seed(0)
    first = torch.randn(7, 33, dtype=dtype)
    layouts = {
        "as it is": torch.randn(5, 33, dtype=dtype),
        "transposed": torch.randn(40, 5, dtype=dtype).T[:, :33],
        "expanded": torch.randn(1, 33, dtype=dtype).expand(5, 33),
        "windows": torch.randn(80, dtype=dtype).unfold(0, 33, 8)[:5],
        "every third": torch.randn(5, 99, dtype=dtype)[:, ::3],
        "one row": torch.randn(1, 33, dtype=dtype),
    }
    for layout, second in layouts.items():
        found = products.times_transposed(first, second, torch.full((7, len(second)), torch.nan, dtype=dtype))
        assert (found - first @ second.T).abs().max() < 40 * torch.finfo(dtype).eps, layout
    nothing = first[:, :0]
    assert not products.times_transposed(nothing, nothing, torch.full((7, 7), torch.nan, dtype=dtype)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 7, 130])
@pytest.mark.parametrize("columns", [0, 1, 33])
def test_half_a_symmetric_product(columns: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows in (torch.randn(size, columns, dtype=dtype), torch.randn(columns, size, dtype=dtype).T,
                 torch.randn(size, 2 * columns, dtype=dtype)[:, ::2]):  # fmt: skip
        exact, before = (rows @ rows.T).triu(), torch.randn(size, size, dtype=dtype)
        # What summation in any order may differ by.
        bound = 2 * (columns + 2) * torch.finfo(dtype).eps * (rows.abs() @ rows.abs().T + before.abs())
        added = before.clone()
        assert products.symmetric_product(rows, added, add=True) is added
        assert ((added.triu() - (before.triu() + exact)).abs() <= bound).all()
        written = torch.full_like(before, torch.nan)
        assert products.symmetric_product(rows, written) is written
        assert ((written.triu() - exact).abs() <= bound).all()


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
