"""Alignment with targets, HSIC and CKA: vectors by hand, brute-force U-statistics, properties."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntkdyn import analysis
from ntkdyn.errors import ConfigurationError, ShapeError, UndefinedMeasure

X, Y = np.array([0.0, 1, 2, 3]), np.array([0.0, 1, 0, 1])


def gram(seed: int, samples: int, features: int = 3) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(samples, features)) + 0.5
    return factor @ factor.T


def hsic_as_u_statistic(K: np.ndarray, L: np.ndarray) -> float:
    """Mean over all ordered quadruples of distinct samples of K_tu (L_tu + L_vw - 2 L_tv)."""
    terms = [K[t, u] * (L[t, u] + L[v, w] - 2 * L[t, v]) for t, u, v, w in permutations(range(len(K)), 4)]
    return float(np.mean(terms))


def test_target_alignment_by_hand() -> None:
    K = np.diag([3.0, 1.0])
    assert analysis.target_alignment(K, [1, -1]) == pytest.approx(0.6324555, abs=1e-7)
    assert analysis.target_alignment_full(K[..., None, None], [1, -1]) == pytest.approx(0.6324555, abs=1e-7)
    y = np.array([1.0, -2.0, 0.5])
    assert analysis.target_alignment(np.outer(y, y), y) == pytest.approx(1.0)
    assert analysis.target_alignment(-np.outer(y, y), y) == pytest.approx(-1.0)


def test_target_alignment_of_several_outputs() -> None:
    rng = np.random.default_rng(0)
    K, targets = gram(1, 7), rng.normal(size=(7, 3))
    G = targets @ targets.T
    expected = np.sum(K * G) / (np.linalg.norm(K) * np.linalg.norm(G))
    assert analysis.target_alignment(K, targets) == pytest.approx(expected)
    # The trap of the definition: |Y|^2 in place of |Y Y^T| is too small by about sqrt(C).
    orthogonal = np.linalg.qr(rng.normal(size=(9, 3)))[0]
    assert analysis.target_alignment(orthogonal @ orthogonal.T, orthogonal) == pytest.approx(1.0)
    assert analysis.target_alignment(K, targets, centered=True) == pytest.approx(analysis.cka(K, G), abs=1e-13)
    stack = np.stack([K, 2 * K, gram(2, 7)])
    np.testing.assert_allclose(
        analysis.target_alignment(stack, targets), [analysis.target_alignment(k, targets) for k in stack]
    )


def test_target_alignment_of_full_kernels() -> None:
    rng = np.random.default_rng(0)
    J, targets = rng.normal(size=(5, 3, 8)), rng.normal(size=(5, 3))
    K = np.einsum("ncp,mdp->nmcd", J, J)
    matrix, y = J.reshape(15, 8) @ J.reshape(15, 8).T, targets.reshape(15)
    expected = y @ matrix @ y / (np.linalg.norm(matrix) * (y @ y))
    assert analysis.target_alignment_full(K, targets) == pytest.approx(expected)
    np.testing.assert_allclose(analysis.target_alignment_full(np.stack([K, 3 * K]), targets), [expected] * 2)
    # A kernel that is the same for every output and couples none of them.
    k = gram(3, 5)
    same = k[:, :, None, None] * np.eye(3)
    ratio = analysis.target_alignment_full(same, targets) / (
        np.sum(k * (targets @ targets.T)) / (np.linalg.norm(k) * np.sqrt(3) * np.sum(targets**2))
    )
    assert ratio == pytest.approx(1.0)


def test_one_hot() -> None:
    np.testing.assert_array_equal(analysis.one_hot([0, 2]), [[1, 0, 0], [0, 0, 1]])
    assert analysis.one_hot([0, 1], 5).shape == (2, 5)
    with pytest.raises(ShapeError, match=r"expected 0 \.\.\. 1"):
        analysis.one_hot([0, 2], 2)
    with pytest.raises(ShapeError, match="expected integers"):
        analysis.one_hot([0.5, 1.0])


def test_cka_and_hsic_by_hand() -> None:
    K, L = np.outer(X, X), np.outer(Y, Y)
    assert analysis.cka(K, L) == pytest.approx(0.2, abs=1e-14)
    assert analysis.cka(K, L) == pytest.approx(np.corrcoef(X, Y)[0, 1] ** 2)
    assert analysis.hsic(K, L) == pytest.approx(-1 / 6, abs=1e-14)
    biased = np.sum(np.outer(X - X.mean(), X - X.mean()) * L) / 9
    assert analysis.hsic(K, L, estimator="biased") == pytest.approx(biased)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 6))
def test_hsic_1_equals_the_u_statistic(seed: int, samples: int) -> None:
    K, L = gram(seed, samples), gram(seed + 1, samples, 2)
    assert analysis.hsic(K, L) == pytest.approx(hsic_as_u_statistic(K, L), rel=1e-10, abs=1e-12)
    variance = hsic_as_u_statistic(K, K) * hsic_as_u_statistic(L, L)
    both = min(hsic_as_u_statistic(K, K), hsic_as_u_statistic(L, L))
    if both > 1e-9:
        expected = hsic_as_u_statistic(K, L) / np.sqrt(variance)
        assert analysis.cka(K, L, estimator="unbiased") == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_hsic_1_does_not_see_diagonal_nor_constant() -> None:
    K, L = gram(0, 6), gram(1, 6)
    value = analysis.hsic(K, L)
    assert analysis.hsic(K + np.diag(np.arange(6.0)), L) == pytest.approx(value)
    assert analysis.hsic(K + 1e6, L) == pytest.approx(value, rel=1e-8)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), samples=st.integers(5, 9), scale=st.floats(1e-5, 1e5))
def test_cka_properties(estimator, seed: int, samples: int, scale: float) -> None:  # type: ignore[no-untyped-def]
    K, L = gram(seed, samples, 12), gram(seed + 1, samples, 12)
    value = analysis.cka(K, L, estimator=estimator)
    order = np.random.default_rng(seed).permutation(samples)
    again = analysis.cka(scale * L[order][:, order], K[order][:, order], estimator=estimator)
    np.testing.assert_allclose(again, value, rtol=1e-9, atol=1e-12)
    if estimator == "biased":
        assert value == pytest.approx(1 - analysis.kernel_distance_centered(K, L), abs=1e-13)
        assert analysis.cka(K, K) == pytest.approx(1.0)


def test_unbiased_cka_of_independent_data_is_about_zero() -> None:
    rng = np.random.default_rng(0)
    values = {"biased": [], "unbiased": []}
    for _ in range(200):
        a, b = rng.normal(size=(2, 10, 50))
        for estimator, found in values.items():
            found.append(analysis.cka(a @ a.T, b @ b.T, estimator=estimator))
    assert np.mean(values["biased"]) == pytest.approx(0.838, abs=0.02)
    assert abs(np.mean(values["unbiased"])) < 0.03


def test_unbiased_cka_without_variance_is_nan() -> None:
    K = gram(0, 5)
    off_diagonal_constant = np.full((5, 5), 0.3) + np.diag(np.arange(5.0))
    assert np.isnan(analysis.cka(off_diagonal_constant, K, estimator="unbiased"))
    stacked = analysis.cka(np.stack([K, off_diagonal_constant]), K, estimator="unbiased")
    assert stacked[0] == pytest.approx(1.0)
    assert np.isnan(stacked[1])


def test_stacks_and_read_only_arguments() -> None:
    stack = np.stack([gram(seed, 6) for seed in range(3)])
    stack.flags.writeable = False
    for estimator in ("biased", "unbiased"):
        for function in (analysis.cka, analysis.hsic):
            expected = [function(K, stack[2], estimator=estimator) for K in stack]
            np.testing.assert_allclose(function(stack, stack[2], estimator=estimator), expected, rtol=1e-12)
            assert isinstance(expected[0], float)


def test_errors() -> None:
    K = gram(0, 5)
    with pytest.raises(ShapeError, match=r"targets have shape \(4,\); expected \[5, C\]"):
        analysis.target_alignment(K, np.ones(4))
    with pytest.raises(UndefinedMeasure, match="targets are zero"):
        analysis.target_alignment(K, np.zeros(5))
    with pytest.raises(UndefinedMeasure, match="constant over samples; use centered=False"):
        analysis.target_alignment(K, np.full(5, 0.1), centered=True)
    with pytest.raises(UndefinedMeasure, match="is zero"):
        analysis.target_alignment(0 * K, np.arange(5))
    with pytest.raises(ShapeError, match="expected a trace kernel"):
        analysis.target_alignment(K[..., None, None], np.arange(5))
    with pytest.raises(ShapeError, match="square kernel"):
        analysis.target_alignment(K[:3], np.arange(3))
    with pytest.raises(ShapeError, match="use target_alignment"):
        analysis.target_alignment_full(K, np.arange(5))
    with pytest.raises(ShapeError, match="2 columns and the kernel 1 outputs"):
        analysis.target_alignment_full(K[..., None, None], np.ones((5, 2)))
    for function in (analysis.cka, analysis.hsic):
        with pytest.raises(ConfigurationError, match="expected 'biased' or 'unbiased'"):
            function(K, K, estimator="debiased")
        with pytest.raises(ShapeError, match="at least 4"):
            function(K[:3, :3], K[:3, :3], estimator="unbiased")
        with pytest.raises(ShapeError, match="expected equal ones"):
            function(K, K[:4, :4])
    with pytest.raises(ShapeError, match="at least 2"):
        analysis.hsic([[1.0]], [[1.0]], estimator="biased")
    with pytest.raises(UndefinedMeasure, match="constant over samples"):
        analysis.cka(np.ones((5, 5)), K)
    with pytest.raises(UndefinedMeasure, match="zero"):
        analysis.cka(0 * K, K, estimator="unbiased")
