"""Gate patterns, flips, settling, and the shape of the core, against loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntkdyn import analysis
from ntkdyn.errors import ShapeError, UndefinedMeasure


def random_patterns(seed: int, snapshots: int = 4, samples: int = 5, units: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).random((snapshots, samples, units)) < 0.5


def hamming_by_loop(patterns: np.ndarray, frozen: np.ndarray) -> np.ndarray:
    snapshots = len(patterns)
    result = np.full((snapshots, snapshots), np.nan)
    for s in range(snapshots):
        for t in range(snapshots):
            live = [u for u in range(patterns.shape[2]) if not frozen[s, u] and not frozen[t, u]]
            if live:
                result[s, t] = np.mean([patterns[s, n, u] != patterns[t, n, u] for n in range(5) for u in live])
    return result


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_hamming_equals_the_loop(seed: int) -> None:
    patterns = random_patterns(seed)
    frozen = np.random.default_rng(seed + 1).random((4, 6)) < 0.4
    np.testing.assert_allclose(analysis.gate_hamming(patterns, frozen), hamming_by_loop(patterns, frozen))
    nothing = np.zeros((4, 6), dtype=bool)
    np.testing.assert_allclose(analysis.gate_hamming(patterns), hamming_by_loop(patterns, nothing))
    relabelled = patterns[:, :, ::-1]
    np.testing.assert_allclose(
        analysis.gate_hamming(relabelled, frozen[:, ::-1]), analysis.gate_hamming(patterns, frozen)
    )


def test_hamming_without_live_units_is_nan() -> None:
    result = analysis.gate_hamming(random_patterns(0), np.ones(6, dtype=bool))
    assert np.isnan(result).all()


def test_flips() -> None:
    patterns = random_patterns(0)
    frozen = np.zeros((4, 6), dtype=bool)
    frozen[2:, 1] = True
    expected = (patterns[1:] != patterns[:-1]).sum(axis=1)
    np.testing.assert_array_equal(analysis.flips(patterns), expected)
    expected[1:, 1] = 0
    result = analysis.flips(patterns, frozen)
    np.testing.assert_array_equal(result, expected)
    assert result.dtype == np.int64


def test_frozen_channels_cover_all_their_positions() -> None:
    # Two channels of three positions each, channel-major.
    patterns = random_patterns(1)
    by_channel = analysis.flips(patterns, np.array([True, False]))
    by_unit = analysis.flips(patterns, np.array([True] * 3 + [False] * 3))
    np.testing.assert_array_equal(by_channel, by_unit)
    assert (by_channel[:, :3] == 0).all()


def test_settle_step_by_hand() -> None:
    # Units: never moves; moves at the last step; returns to its end after step 10; settles within 1 of 4 samples.
    patterns = np.zeros((4, 4, 4), dtype=bool)
    patterns[:3, :, 1] = True
    patterns[1, :2, 2] = True
    patterns[0, :, 3] = True
    patterns[1:3, 0, 3] = True
    steps = [0, 10, 20, 30]
    np.testing.assert_array_equal(analysis.settle_step(steps, patterns, tolerance=0.0), [0, 30, 20, 30])
    np.testing.assert_array_equal(analysis.settle_step(steps, patterns, tolerance=0.25), [0, 30, 20, 10])
    frozen = np.array([False, False, True, False])
    np.testing.assert_array_equal(analysis.settle_step(steps, patterns, frozen, tolerance=0.25), [0, 30, np.nan, 10])


def test_unpack_pattern_is_the_inverse_of_packbits() -> None:
    for units in (1, 8, 13):
        patterns = random_patterns(2, units=units)
        np.testing.assert_array_equal(analysis.unpack_pattern(np.packbits(patterns, axis=-1), units), patterns)
    with pytest.raises(ShapeError, match=r"expected uint8 \[..., 2\] for 13 units"):
        analysis.unpack_pattern(np.zeros((3, 1), dtype=np.uint8), 13)
    with pytest.raises(ShapeError, match="type int64"):
        analysis.unpack_pattern(np.zeros((3, 2), dtype=np.int64), 13)


def test_core_shape_and_effective_width() -> None:
    frozen = {"a": np.array([True, False, False]), "b": np.ones(4, dtype=bool), "c": np.zeros(1, dtype=bool)}
    assert analysis.core_shape(frozen).tolist() == [2, 0, 1]
    assert analysis.core_shape(frozen, channels={"c": 64}).tolist() == [2, 0, 64]
    over_time = {name: np.stack([np.zeros_like(mask), mask]) for name, mask in frozen.items()}
    assert analysis.core_shape(over_time).tolist() == [[3, 4, 1], [2, 0, 1]]
    width = analysis.effective_width([2, 0, 1], 1.5)
    assert width.per_path == pytest.approx(2.0)
    assert width.per_layer == pytest.approx(1.5)
    series = analysis.effective_width([[3, 4, 1], [0, 0, 0]], [2.0, 0.0])
    np.testing.assert_allclose(series.per_path, [4.0, np.nan])
    np.testing.assert_allclose(series.per_layer, [8 / 3, np.nan])


def test_arguments_are_not_written_to() -> None:
    patterns = random_patterns(0)
    frozen = np.zeros((4, 6), dtype=bool)
    for array in (patterns, frozen):
        array.flags.writeable = False
    analysis.gate_hamming(patterns, frozen)
    analysis.flips(patterns, frozen)
    analysis.settle_step([0, 1, 2, 3], patterns, frozen, tolerance=0.1)
    analysis.core_shape({"a": frozen})


def test_errors() -> None:
    patterns = random_patterns(0)
    for function in (analysis.gate_hamming, analysis.flips):
        with pytest.raises(ShapeError, match="use unpack_pattern"):
            function(patterns.astype(np.uint8))
        with pytest.raises(ShapeError, match=r"expected bool \[C\] or \[4, C\]"):
            function(patterns, np.zeros(5, dtype=bool))
        with pytest.raises(ShapeError, match="frozen has shape"):
            function(patterns, np.zeros((3, 6), dtype=bool))
    with pytest.raises(ShapeError, match="4 increasing ones"):
        analysis.settle_step([0, 1, 2], patterns, tolerance=0.1)
    with pytest.raises(ShapeError, match="4 increasing ones"):
        analysis.settle_step([0, 1, 2, 2], patterns, tolerance=0.1)
    with pytest.raises(UndefinedMeasure, match="expected a share"):
        analysis.settle_step([0, 1, 2, 3], patterns, tolerance=2.0)
    with pytest.raises(ShapeError, match="no gates"):
        analysis.core_shape({})
    with pytest.raises(ShapeError, match="gate 'a' has float64"):
        analysis.core_shape({"a": np.zeros(3)})
    with pytest.raises(ShapeError, match="expected a multiple"):
        analysis.core_shape({"a": np.zeros(3, dtype=bool)}, channels={"a": 4})
    with pytest.raises(ShapeError, match="snapshots; expected equal"):
        analysis.core_shape({"a": np.zeros((2, 3), dtype=bool), "b": np.zeros((3, 3), dtype=bool)})
    with pytest.raises(ShapeError, match=r"expected \[..., L\]"):
        analysis.effective_width([1, 2], [1.0, 2.0, 3.0])
