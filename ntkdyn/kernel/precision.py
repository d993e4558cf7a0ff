"""Matrix products in float32 at the full rate of the machine, and never in less than float32."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import ThreadpoolController

_LOCK = threading.RLock()


@contextmanager
def exact_products() -> Iterator[None]:
    """Switch rounded products (TF32, bfloat16) off on CPU and CUDA, and restore the caller's settings exactly.

    Only the per-backend ``fp32_precision`` is touched: the older ``set_float32_matmul_precision`` and it exclude each
    other. The settings belong to the whole process, so one thread at a time may be inside.
    """
    backends: Any = torch.backends  # annotated without the settings of its parts
    with _LOCK, ExitStack() as stack:
        for parent, children in (
            (backends.mkldnn, (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn)),
            (backends.cudnn, (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)),
        ):
            for backend in children:
                stack.enter_context(_set(backend, parent, "ieee"))
        yield


@contextmanager
def full_rate() -> Iterator[None]:
    """Run float32 products of the CPU on the fastest path that is exact; within ``exact_products``.

    OpenBLAS is kept to one thread where torch has one.
    """
    backends: Any = torch.backends  # annotated without the settings of its parts
    with _LOCK, _set(backends.mkldnn.matmul, backends.mkldnn, fast_path()), ExitStack() as stack:
        libraries = openblas() if torch.get_num_threads() == 1 else None
        if libraries is not None:
            stack.enter_context(libraries.limit(limits=1))
        yield


@contextmanager
def _set(backend: Any, parent: Any, precision: str) -> Iterator[None]:
    found = backend.fp32_precision
    # A backend without a value of its own shows that of its parent, and shall go on doing so.
    own = "none" if found == parent.fp32_precision else found
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = own


@cache
def fast_path() -> str:
    """The setting of oneDNN's float32 products with which this machine is fastest and still exact.

    MKL takes its AVX2 kernels on processors of other makers than its own; with any setting but "ieee" torch gives
    products to oneDNN, whose AVX512 kernels are 1.1 (Zen 4) to 2 times (Zen 5) as fast. Where the processor has no
    units for rounded products that is still float32; whether it is, is tried once: 1 + 2⁻¹² must survive, and random
    products must be as close to float64 as MKL's. The choice rests on nothing that is timed, so that all processes of a
    machine make it alike.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or _maker() == "GenuineIntel":
        return "ieee"
    backends: Any = torch.backends  # annotated without the settings of its parts
    with _LOCK, _set(backends.mkldnn.matmul, backends.mkldnn, "bf16"):
        return "bf16" if _is_exact() else "ieee"


@cache
def openblas() -> ThreadpoolController | None:
    """NumPy's and SciPy's OpenBLAS, where it multiplies faster than torch on one thread; else None.

    On processors with AVX2 from other makers than MKL's it is up to a fifth faster, and has the symmetric update that
    torch lacks (1.3 times as fast as panels). With more threads its own would compete with torch's. As above, nothing
    is timed.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX2" or _maker() == "GenuineIntel":
        return None
    found = ThreadpoolController().select(internal_api="openblas")
    return found if found.lib_controllers else None


def _is_exact() -> bool:
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((64, 64, 64), (33, 512, 130), (256, 1024, 256)):
        first = torch.randn(rows, inner, generator=generator)
        second = torch.randn(inner, columns, generator=generator)
        exact = first.double() @ second.double()
        for product in (first @ second, torch.bmm(first[None], second[None])[0]):
            if (product - exact).abs().max() > 1e-6 * inner**0.5 * 8:
                return False
        fine = torch.full((rows, inner), 1 + 2.0**-12)
        if not torch.equal(fine @ torch.eye(inner), fine):
            return False
    return True


def _maker() -> str:
    information = Path("/proc/cpuinfo")
    if not information.is_file():
        return ""
    with information.open() as lines:
        for line in lines:
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    return ""
