"""Segments: exact round trips, checksums that cover everything, JSON that is valid."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ntkdyn.errors import ConfigurationError
from ntkdyn.probe import Field
from ntkdyn.store import hdf5, segment
from ntkdyn.store.block import Block, fill
from ntkdyn.store.declare import declared

DTYPES = st.sampled_from(["?", "i1", "u1", "<i4", "<u8", "<f4", "<f8", ">f8", "f2"])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=DTYPES, shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
def test_image_round_trip_keeps_every_bit(data: st.DataObject, dtype: str, shape: tuple[int, ...]) -> None:
    given_array = data.draw(hnp.arrays(np.dtype(dtype), shape))
    array = given_array.astype(np.dtype(dtype).newbyteorder("<"))
    field = Field(name="a.b/x", dims=tuple(f"d{axis}" for axis in range(len(shape))), shape=shape, dtype=dtype)
    declaration = declared({}, "probe/set", [field], {}, stepped=True)
    stored = declaration.fields["a.b/x"]
    with hdf5.in_memory() as file:
        block = Block(declaration, [7], [0.5], {"a.b/x": array[None]}, {})
        fill(file, [block], lambda: {"level": 0}, lambda: None)
        image = hdf5.image(file)
    with h5py.File(io.BytesIO(image), "r") as file:
        found = segment.get_declarations(segment.get_recording(file, Path("x")))["probe/set"]
        steps, epochs = segment.get_axis(file, Path("x"), found)
        back = segment.get_array(file, Path("x"), found, found.fields["a.b/x"], steps.tolist())
    assert found == declaration
    assert steps.tolist() == [7]
    assert epochs.tolist() == [0.5]
    assert back.dtype == np.dtype(stored.dtype)
    assert back.shape == (1, *shape)
    assert back.tobytes() == array.tobytes()


def test_crc_covers_path_dims_shape_dtype_step_and_bytes() -> None:
    field = Field(name="x", dims=("a", "b"), shape=(2, 3), dtype="<f4")
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    reference = segment.row_crc("g/x", field, 5, array)
    changed = array.copy()
    changed[1, 2] = np.nextafter(changed[1, 2], np.float32(9))
    assert segment.row_crc("g/x", field, 5, np.asfortranarray(array)) == reference
    others = {
        segment.row_crc("g/y", field, 5, array),
        segment.row_crc("g/x", replace(field, dims=("b", "a")), 5, array),
        segment.row_crc("g/x", replace(field, shape=(3, 2)), 5, array),
        segment.row_crc("g/x", replace(field, dtype="<i4"), 5, array),
        segment.row_crc("g/x", field, 6, array),
        segment.row_crc("g/x", field, None, array),
        segment.row_crc("g/x", field, 5, changed),
    }
    assert len(others) == 7
    assert reference not in others


@pytest.mark.parametrize(
    "value",
    [{"a": [1, 2.5, None, True, "text"]}, "NaN", "\\NaN", "Infinity", float("inf"), -math.inf, {"ü": "\\\\Infinity"}],
)
def test_json_is_valid_and_reads_back(value: Any) -> None:
    text = segment.dump_json(value)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert segment.load_json(text) == value


def test_json_nan_reads_back_as_nan() -> None:
    assert json.loads(segment.dump_json({"gap": math.nan})) == {"gap": "NaN"}
    assert math.isnan(segment.load_json('{"gap": "NaN"}')["gap"])


def test_json_takes_arrays_and_names_other_types() -> None:
    assert segment.load_json(segment.dump_json({"a": np.arange(2), "b": np.float64(0.5), "c": {3, 1}})) == {
        "a": [0, 1],
        "b": 0.5,
        "c": [1, 3],
    }
    with pytest.raises(ConfigurationError, match="found a value of type object"):
        segment.dump_json({"a": object()})
    with pytest.raises(ValueError, match="nested too deeply"):
        segment.load_json("[" * 100_000)


def test_equal_segments_are_equal_bytes() -> None:
    declaration = declared({}, "probe", [Field(name="x", shape=(100,), dims=("a",))], {}, stepped=True)
    images = []
    for _ in range(2):
        with hdf5.in_memory() as first, hdf5.in_memory() as second:
            for file in (first, second):
                rows = np.arange(100, dtype="<f4")[None]
                fill(file, [Block(declaration, [3], [0.5], {"x": rows}, {})], dict, lambda: None)
                images.append(hdf5.image(file))
    assert len(set(images)) == 1


def test_json_at_its_limits() -> None:
    deep: object = 1
    for _ in range(100):
        deep = [deep]
    assert segment.load_json(segment.dump_json(deep)) == deep
    with pytest.raises(ConfigurationError, match="more than 100 levels"):
        segment.dump_json([deep])
    with pytest.raises(ValueError, match="nested too deeply"):
        segment.load_json(json.dumps([deep]))
    with pytest.raises(ConfigurationError, match="4300 digits"):
        segment.dump_json({"a": 10**5000})
    with pytest.raises(ValueError, match="4300 digits"):
        segment.load_json("1" * 5000)
    # What os.fsdecode makes of a file name in Latin 1.
    text = segment.dump_json("m\udcfcde/\ud800")
    assert text.isascii()
    assert segment.load_json(text) == "m\udcfcde/\ud800"
