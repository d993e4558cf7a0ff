"""Eigenvalues and ranks: vectors by hand and properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntkdyn import analysis
from ntkdyn.errors import ShapeError, UndefinedMeasure

MEASURES = [
    analysis.participation_ratio,
    analysis.effective_rank,
    analysis.intrinsic_rank,
    analysis.condition_number,
]


def gram(seed: int, samples: int = 5, features: int = 9) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(samples, features))
    return factor @ factor.T


def test_vectors_by_hand() -> None:
    assert analysis.participation_ratio([4, 2, 1, 1]) == pytest.approx(64 / 22)
    assert analysis.intrinsic_rank([4, 2, 1, 1]) == 2.0
    assert analysis.condition_number([[2, 1], [1, 2]]) == pytest.approx(3.0)
    assert analysis.condition_number([1, 4]) == 4.0
    for rank in (analysis.effective_rank, analysis.participation_ratio, analysis.intrinsic_rank):
        assert rank(np.eye(6)) == pytest.approx(6.0)
        assert rank(np.outer(np.arange(1.0, 5), np.arange(1.0, 5))) == pytest.approx(1.0, abs=1e-6)
    p = np.array([0.5, 0.25, 0.25])
    assert analysis.effective_rank(8 * p) == pytest.approx(np.exp(-np.sum(p * np.log(p))))


def test_eigenvalues() -> None:
    K = gram(0)
    np.testing.assert_allclose(analysis.eigenvalues(K), np.sort(np.linalg.eigvals(K).real)[::-1])
    stack = np.stack([K, gram(1)])
    np.testing.assert_allclose(analysis.eigenvalues(stack)[0], analysis.eigenvalues(K))
    J = np.random.default_rng(0).normal(size=(4, 3, 20))
    full = np.einsum("ncp,mdp->nmcd", J, J)
    matrix = J.reshape(12, 20) @ J.reshape(12, 20).T
    np.testing.assert_allclose(analysis.eigenvalues(full), np.linalg.eigvalsh(matrix)[::-1])
    assert analysis.eigenvalues(np.stack([full, full])).shape == (2, 12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-200, 1e200), st.integers(2, 7))
def test_measures_are_blind_to_scale_and_order(seed: int, scale: float, samples: int) -> None:
    K = gram(seed, samples)
    order = np.random.default_rng(seed).permutation(samples)
    for measure in MEASURES:
        value = measure(K)
        assert measure(scale * K[order][:, order]) == pytest.approx(value, rel=1e-7)
        assert measure(analysis.eigenvalues(K)) == pytest.approx(value)
    ranks = analysis.intrinsic_rank(K), analysis.participation_ratio(K), analysis.effective_rank(K)
    assert 1 <= ranks[0] <= ranks[1] * (1 + 1e-12)
    assert ranks[1] <= ranks[2] * (1 + 1e-12)
    assert ranks[2] <= samples * (1 + 1e-12)


def test_stacks_give_one_value_per_kernel() -> None:
    stack = np.stack([gram(seed) for seed in range(3)])
    stack.flags.writeable = False
    for measure in MEASURES:
        np.testing.assert_allclose(measure(stack), [measure(K) for K in stack])
        assert isinstance(measure(stack[0]), float)


def test_singular_kernels_have_infinite_condition() -> None:
    assert analysis.condition_number(np.outer([1.0, 2, 3], [1.0, 2, 3])) == np.inf
    assert analysis.condition_number([1.0, 0.0]) == np.inf
    # Rounding of a float32 kernel makes eigenvalues slightly negative.
    assert analysis.condition_number([1.0, -1e-8]) == np.inf
    assert analysis.effective_rank([1.0, -1e-8]) == 1.0


def test_power_law() -> None:
    index = np.arange(1, 51)
    exact = analysis.power_law(3.0 * index**-1.5)
    assert exact.slope == pytest.approx(-1.5)
    assert exact.r_squared == pytest.approx(1.0)
    assert (exact.first, exact.last) == (1, 50)
    bent = np.where(index <= 10, index**-2.0, 10**-2.0 * (index / 10) ** -0.5)
    assert analysis.power_law(bent, last=10).slope == pytest.approx(-2.0)
    assert analysis.power_law(bent, first=10).slope == pytest.approx(-0.5)
    whole = analysis.power_law(bent)
    fit = np.polyfit(np.log(index), np.log(bent), 1)
    assert whole.slope == pytest.approx(fit[0])
    assert whole.r_squared == pytest.approx(np.corrcoef(np.log(index), np.log(bent))[0, 1] ** 2)
    flat = analysis.power_law(np.full(5, 2.0))
    assert flat.slope == 0.0
    assert np.isnan(flat.r_squared)
    assert analysis.power_law(np.diag([4.0, 1.0])).slope == pytest.approx(-2.0)


def test_errors() -> None:
    with pytest.raises(UndefinedMeasure, match="not symmetric"):
        analysis.eigenvalues([[1.0, 0.0], [0.5, 1.0]])
    with pytest.raises(ShapeError, match="square"):
        analysis.eigenvalues(np.ones((2, 3)))
    with pytest.raises(UndefinedMeasure, match="NaN or infinity"):
        analysis.eigenvalues([[np.inf, 0.0], [0.0, 1.0]])
    for measure in MEASURES:
        with pytest.raises(UndefinedMeasure, match="expected a positive one"):
            measure([0.0, 0.0])
        with pytest.raises(UndefinedMeasure, match="positive semi-definite"):
            measure([1.0, -0.5])
        with pytest.raises(UndefinedMeasure, match="NaN"):
            measure([1.0, np.nan])
        with pytest.raises(ShapeError, match="no eigenvalues"):
            measure([])
    with pytest.raises(ShapeError, match=r"window 3 \.\.\. 3 of 4"):
        analysis.power_law([4, 3, 2, 1], first=3, last=3)
    with pytest.raises(ShapeError, match=r"window 0 \.\.\. 2"):
        analysis.power_law([4, 3, 2, 1], first=0, last=2)
    with pytest.raises(UndefinedMeasure, match="eigenvalue 3 is not positive"):
        analysis.power_law([4, 3, 0, 0])
    with pytest.raises(ShapeError, match="stack"):
        analysis.power_law(np.stack([np.eye(2)] * 3))
