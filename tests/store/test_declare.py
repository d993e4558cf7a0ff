"""Declarations: what a recording refuses before the first byte."""

from __future__ import annotations

from typing import Any

import pytest

from ntkdyn.errors import NtkdynError
from ntkdyn.probe import Field
from ntkdyn.store.declare import declared


def field(name: str = "x", sizes: dict[str, int] | None = None, **settings: Any) -> Field:
    sizes = sizes or {}
    return Field(name=name, dims=tuple(sizes), shape=tuple(sizes.values()), **settings)


@pytest.mark.parametrize("name", ["", ".", "..", "a//b", "a/../b", "a/.", "/a", "a/", "a\0b", "a\nb", " a", "x" * 201])
def test_names_refused(name: str) -> None:
    with pytest.raises(NtkdynError, match="rename it"):
        declared({}, "probe", [field(name)], {}, stepped=True)
    with pytest.raises(NtkdynError, match="rename it"):
        declared({}, name, [field()], {}, stepped=True)


@pytest.mark.parametrize("name", ["kernel", "<root>", "trunk.0/slope", "Größe", "a b", "...", "x" * 200])
def test_names_accepted(name: str) -> None:
    assert name in declared({}, "probe", [field(name)], {}, stepped=True).fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([field("kernel", {"sample": 2, "sample_2": 2}, dtype="f2")], "half precision"),
        ([field("gram", {"sample": 2, "sample_2": 2}, dtype="f2")], "half precision"),
        ([field(dtype="c8")], "real and imaginary parts"),
        ([field(dtype="O")], "expected a truth value"),
        ([field(dtype="nonsense")], "expected a truth value"),
        ([field(dtype="M8[s]")], "expected a truth value"),
        ([field(), field()], "found twice"),
        ([field("a"), field("a/b")], "other fields below it"),
        ([field("a", {"a": 2})], "dimension of its name|dimension of the same name"),
        ([field("step")], "taken by the step axis"),
        ([field("epoch/x")], "taken by the step axis"),
        ([field("a", {"step": 2})], "neither a slash nor|neither 'step' nor"),
        ([field("a", {"b": 2}), field("c", {"b": 3})], "give the dimension another name"),
        ([field("a", {"b": 2}), field("c/d", {"b": 3})], "above it; give the dimension another name"),
        ([Field(name="a", dims=("b", "b"), shape=(2, 2))], "'sample_2'"),
        ([Field(name="a", dims=("b",), shape=(2, 2))], "one name per axis"),
        ([field("a", {"b": 2}, coordinates={"b": [1]})], "found 1 coordinates"),
        ([field("a", {"b": 2}, coordinates={"c": [1, 2]})], "found 2 coordinates"),
        ([field("a", {"b": 2}, coordinates={"b": [1, "x"]})], "expected numbers or text"),
        (
            [field("a", {"b": 1}, coordinates={"b": [1]}), field("c", {"b": 1}, coordinates={"b": [2]})],
            "other coordinates of 'b'",
        ),
    ],
)
def test_fields_refused(fields: list[Field], message: str) -> None:
    with pytest.raises(NtkdynError, match=message) as caught:
        declared({}, "probe/set", fields, {}, stepped=True)
    assert "\n" not in str(caught.value)


def test_groups_beside_each_other() -> None:
    known = {"ntk/test": declared({}, "ntk/test", [field()], {}, stepped=True)}
    for group in ("ntk/test", "ntk", "ntk/test/deeper"):
        with pytest.raises(NtkdynError, match="rename"):
            declared(known, group, [field()], {}, stepped=True)
    assert declared(known, "ntk/test2", [field()], {}, stepped=True).group == "ntk/test2"


def test_coordinates_with_nan_equal_themselves() -> None:
    nan = float("nan")
    fields = [field("a", {"b": 1}, coordinates={"b": [nan]}), field("c", {"b": 1}, coordinates={"b": [nan]})]
    assert len(declared({}, "g", fields, {}, stepped=True).fields) == 2
