"""Symmetric kernels at half their size: the very bytes come back, whatever they are."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntkdyn.probe import Field
from ntkdyn.store import triangle
from ntkdyn.store.reader import RunReader
from ntkdyn.store.writer import RunWriter


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 140),
    lead=st.lists(st.integers(0, 3), max_size=2),
    dtype=st.sampled_from(["<f4", "<f8"]),
    seed=st.integers(0, 99),
)
def test_unpacking_gives_back_every_bit(size: int, lead: list[int], dtype: str, seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 256, (*lead, size, size, np.dtype(dtype).itemsize), dtype=np.uint8)
    rows = bits.view(dtype)[..., 0]
    rows = np.where(np.triu(np.ones((size, size), bool)), rows, rows.swapaxes(-1, -2))
    assert triangle.is_symmetric(rows)
    packed = triangle.pack(rows)
    assert packed.shape == triangle.packed_shape(rows.shape)
    assert triangle.unpack(packed, size).tobytes() == rows.tobytes()


def test_signs_of_zero_and_payloads_of_nan_are_bits() -> None:
    kernel = np.zeros((2, 2), "<f4")
    assert triangle.is_symmetric(kernel)
    kernel[0, 1] = -0.0
    assert not triangle.is_symmetric(kernel)
    kernel[:] = np.nan
    assert triangle.is_symmetric(kernel)


@pytest.mark.parametrize("symmetric", [True, False])
def test_segments_store_triangles_and_run_h5_the_whole(tmp_path: Path, symmetric: bool) -> None:
    writer = RunWriter(tmp_path / "run", {})
    writer.declare(
        "ntk",
        [
            Field(name="kernel", dims=("sample", "sample_2"), shape=(40, 40)),
            Field(name="layers", dims=("layer", "sample", "sample_2"), shape=(2, 40, 40), dtype="f8"),
            Field(name="cross", dims=("sample", "probe"), shape=(40, 40)),
        ],
    )
    kernels = np.random.default_rng(0).standard_normal((3, 40, 40)).astype("f4")
    kernels += kernels.swapaxes(1, 2)
    if not symmetric:
        kernels[1, 0, 5] += 1
    for step, kernel in enumerate(kernels):
        writer.commit(step, None, {"ntk": {"kernel": kernel, "layers": np.stack([kernel, kernel]), "cross": kernel}})
    with h5py.File(tmp_path / "run" / "segments" / "seg-0-000000000001-000000000001.h5") as file:
        assert file["ntk/kernel"].shape == ((1, 820) if symmetric else (1, 40, 40))
        assert file["ntk/layers"].shape == ((1, 2, 820) if symmetric else (1, 2, 40, 40))
        assert file["ntk/cross"].shape == (1, 40, 40)
    live = RunReader.open(tmp_path / "run").read("ntk/kernel")
    assert live.tobytes() == kernels.tobytes()
    writer.close()
    with h5py.File(tmp_path / "run" / "run.h5") as file:
        assert file["ntk/kernel"].shape == (3, 40, 40)
        assert file["ntk/kernel"][...].tobytes() == kernels.tobytes()
