"""Kernel distances, angle, velocity: vectors by hand, and properties on random kernels."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntkdyn import analysis
from ntkdyn.errors import ShapeError, UndefinedMeasure

DISTANCES = [analysis.kernel_distance, analysis.kernel_distance_centered]


def random_kernel(seed: int, samples: int = 6, features: int = 4) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(samples, features)) + 1.0
    return factor @ factor.T


def by_definition(K: np.ndarray, L: np.ndarray) -> float:
    return float(1 - np.trace(K @ L.T) / np.sqrt(np.trace(K @ K.T) * np.trace(L @ L.T)))


def explicitly_centered(K: np.ndarray) -> np.ndarray:
    n = len(K)
    H = np.eye(n) - np.ones((n, n)) / n
    return H @ K @ H


kernels = st.builds(random_kernel, st.integers(0, 10**6), st.integers(3, 8), st.integers(1, 9))
pairs = st.builds(
    lambda seed, samples: (random_kernel(seed, samples), random_kernel(seed + 1, samples, 5)),
    st.integers(0, 10**6),
    st.integers(3, 8),
)


def test_distance_by_hand() -> None:
    assert analysis.kernel_distance([[2, 1], [1, 2]], [[2, 0], [0, 2]]) == pytest.approx(1 - 2 / np.sqrt(5), abs=1e-15)
    assert analysis.kernel_distance(np.eye(3), np.ones((3, 3)) - np.eye(3)) == pytest.approx(1.0, abs=1e-15)
    assert analysis.kernel_distance(np.eye(3), -np.eye(3)) == 2.0


@settings(max_examples=50, deadline=None)
@given(pairs)
def test_distance_equals_the_definition(pair: tuple[np.ndarray, np.ndarray]) -> None:
    K, L = pair
    assert analysis.kernel_distance(K, L) == pytest.approx(by_definition(K, L), abs=1e-13)
    centered = by_definition(explicitly_centered(K), explicitly_centered(L))
    assert analysis.kernel_distance_centered(K, L) == pytest.approx(centered, abs=1e-12)
    explicit = analysis.kernel_distance(explicitly_centered(K), explicitly_centered(L))
    assert analysis.kernel_distance_centered(K, L) == pytest.approx(explicit, abs=1e-13)


@pytest.mark.parametrize("distance", DISTANCES)
@settings(max_examples=40, deadline=None)
@given(pair=pairs, scale=st.floats(1e-6, 1e6), seed=st.integers(0, 1000))
def test_distance_is_symmetric_and_blind_to_scale_and_order(distance, pair, scale: float, seed: int) -> None:  # type: ignore[no-untyped-def]
    K, L = pair
    value = distance(K, L)
    assert 0 <= value <= 1 + 1e-15
    assert distance(L, K) == value
    assert distance(scale * K, L) == pytest.approx(value, rel=1e-12, abs=1e-15)
    order = np.random.default_rng(seed).permutation(len(K))
    assert distance(K[order][:, order], L[order][:, order]) == pytest.approx(value, rel=1e-11, abs=1e-15)
    assert distance(K, scale * K) < 1e-29


@pytest.mark.parametrize("distance", DISTANCES)
def test_small_distances_keep_their_digits(distance) -> None:  # type: ignore[no-untyped-def]
    # 1 - cosine of these kernels is 0 or 1e-16 in float64; the true distance is half the squared angle.
    K, direction = random_kernel(0), random_kernel(1)
    K, direction = (explicitly_centered(M) for M in (K, direction))
    K /= np.linalg.norm(K)
    direction -= np.sum(direction * K) * K
    direction /= np.linalg.norm(direction)
    assert distance(K, K + 1e-9 * direction) == pytest.approx(0.5e-18, rel=1e-5)


@pytest.mark.parametrize("magnitude", [1e-320, 1e-300, 1e-170, 1e170, 1e300])
def test_extreme_magnitudes(magnitude: float) -> None:
    K, L = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[2.0, 0.0], [0.0, 2.0]])
    tolerance = 1e-3 if magnitude < 1e-308 else 1e-14
    assert analysis.kernel_distance(magnitude * K, L) == pytest.approx(1 - 2 / np.sqrt(5), abs=tolerance)
    assert analysis.kernel_distance_centered(magnitude * K, L) == pytest.approx(0.0, abs=tolerance)
    assert analysis.relative_change(magnitude * K, magnitude * L) == pytest.approx(1 / 2, abs=tolerance)
    assert analysis.constant_share(magnitude * K) == pytest.approx(0.9, abs=tolerance)


def test_arguments_are_not_written_to() -> None:
    K, L = random_kernel(0), random_kernel(1)
    stack = np.stack([K, L, K + L])
    for array in (K, L, stack):
        array.flags.writeable = False
    analysis.kernel_distance_centered(K, L)
    analysis.kernel_angle(K, L, centered=True)
    analysis.distance_matrix(stack)
    analysis.kernel_velocity([0, 1, 2], stack, dt=1, epochs_per_step=0.1)
    analysis.relative_change(stack, K)
    analysis.constant_share(stack)


def test_stacks_give_one_value_per_kernel() -> None:
    stack = np.stack([random_kernel(seed) for seed in range(4)])
    for distance in DISTANCES:
        expected = [distance(K, stack[-1]) for K in stack]
        np.testing.assert_allclose(distance(stack, stack[-1]), expected, rtol=1e-12)
        np.testing.assert_allclose(distance(stack[-1], stack), expected, rtol=1e-12)
        np.testing.assert_allclose(
            distance(stack, stack[::-1]), [distance(K, L) for K, L in zip(stack, stack[::-1], strict=True)]
        )
    assert isinstance(analysis.kernel_distance(stack[0], stack[1]), float)
    assert analysis.kernel_distance(stack[:1], stack[1]).shape == (1,)


def test_full_kernels() -> None:
    rng = np.random.default_rng(3)
    K, L = (np.einsum("ncp,mdp->nmcd", J, J) for J in rng.normal(size=(2, 5, 3, 7)))
    flat = [M.transpose(0, 2, 1, 3).reshape(15, 15) for M in (K, L)]
    assert analysis.kernel_distance(K, L) == pytest.approx(analysis.kernel_distance(*flat), abs=1e-14)
    H = np.kron(np.eye(5) - np.ones((5, 5)) / 5, np.eye(3))
    centered = [H @ M @ H for M in flat]
    assert analysis.kernel_distance_centered(K, L) == pytest.approx(by_definition(*centered), abs=1e-13)
    stack = np.stack([K, L])
    assert analysis.kernel_distance(stack, L).shape == (2,)
    np.testing.assert_allclose(analysis.distance_matrix(stack)[0, 1], analysis.kernel_distance_centered(K, L))
    # Samples on both sides may differ in number.
    assert analysis.kernel_distance(K[:, :4], L[:, :4]) > 0


@settings(max_examples=50, deadline=None)
@given(pairs, kernels)
def test_angle(pair: tuple[np.ndarray, np.ndarray], other: np.ndarray) -> None:
    K, L = pair
    for centered, distance in zip([False, True], DISTANCES, strict=True):
        angle = analysis.kernel_angle(K, L, centered=centered)
        assert np.cos(angle) == pytest.approx(1 - distance(K, L), abs=1e-12)
        assert 0 <= angle <= np.pi / 2 + 1e-12
    if other.shape == K.shape:
        assert analysis.kernel_angle(K, L) <= analysis.kernel_angle(K, other) + analysis.kernel_angle(other, L) + 1e-12


def test_angle_is_exact_near_its_ends() -> None:
    flat = np.array([[1.0, 0.0], [0.0, 0.0]])
    for angle in (1e-12, 1e-8, 0.5, np.pi / 2, np.pi - 1e-8):
        turned = np.array([[np.cos(angle), np.sin(angle)], [0.0, 0.0]])
        assert analysis.kernel_angle(flat, turned) == pytest.approx(angle, rel=1e-14)
    assert analysis.kernel_angle(flat, -flat) == pytest.approx(np.pi)
    assert analysis.kernel_angle(flat, 3 * flat) == 0.0


@pytest.mark.parametrize("centered", [False, True])
def test_distance_matrix_equals_pairwise_distances(centered: bool) -> None:
    stack = np.stack([random_kernel(seed) for seed in range(7)]).astype(np.float32)
    result = analysis.distance_matrix(stack, centered=centered)
    distance = DISTANCES[centered]
    np.testing.assert_allclose(result, [[distance(K, L) for L in stack] for K in stack], atol=1e-14)
    assert (result == result.T).all()
    assert (np.diagonal(result) == 0).all()


def test_distance_matrix_keeps_digits_of_nearby_kernels() -> None:
    K = random_kernel(0)
    stack = np.stack([K + 1e-7 * random_kernel(seed) for seed in range(1, 5)])
    expected = [[analysis.kernel_distance_centered(A, B) for B in stack] for A in stack]
    np.testing.assert_allclose(analysis.distance_matrix(stack), expected, rtol=1e-6, atol=1e-26)


def test_velocity_of_constant_and_of_moving_kernels() -> None:
    K, L = random_kernel(0), random_kernel(1)
    still = analysis.kernel_velocity([0, 10], np.stack([K, 2 * K]), dt=10, epochs_per_step=0.1)
    assert still.values == pytest.approx([0.0], abs=1e-28)
    steps = [0, 5, 100, 105, 300]
    stack = np.stack([K, L, K + L, K, L])
    velocity = analysis.kernel_velocity(steps, stack, dt=5, epochs_per_step=0.02)
    assert velocity.steps.tolist() == [0, 100]
    expected = [analysis.kernel_distance_centered(K, L) / 0.1, analysis.kernel_distance_centered(K + L, K) / 0.1]
    np.testing.assert_allclose(velocity.values, expected)
    uncentered = analysis.kernel_velocity(steps, stack, dt=5, epochs_per_step=0.02, centered=False)
    np.testing.assert_allclose(uncentered.values[0], analysis.kernel_distance(K, L) / 0.1)


def test_velocity_refuses_mixed_dt() -> None:
    stack = np.stack([random_kernel(seed) for seed in range(3)])
    with pytest.raises(UndefinedMeasure, match=r"dt holds 2 values \[1, 4\].*paired"):
        analysis.kernel_velocity([0, 1, 5], stack, dt=np.diff([0, 1, 5]), epochs_per_step=1.0)
    assert len(analysis.kernel_velocity([0, 4, 8], stack, dt=np.diff([0, 4, 8]), epochs_per_step=1.0).values) == 2
    with pytest.raises(UndefinedMeasure, match=r"no two of the steps .* are 2 apart"):
        analysis.kernel_velocity([0, 1, 5], stack, dt=2, epochs_per_step=1.0)
    for bad in ({"dt": 0, "epochs_per_step": 1.0}, {"dt": 1, "epochs_per_step": 0.0}):
        with pytest.raises(UndefinedMeasure, match="expected positive"):
            analysis.kernel_velocity([0, 1, 5], stack, **bad)
    with pytest.raises(ShapeError, match="do not increase"):
        analysis.kernel_velocity([0, 5, 1], stack, dt=1, epochs_per_step=1.0)
    with pytest.raises(ShapeError, match="steps have shape"):
        analysis.kernel_velocity([0, 5], stack, dt=1, epochs_per_step=1.0)


def test_relative_change() -> None:
    K = random_kernel(0)
    assert analysis.relative_change(3 * K, K) == pytest.approx(2.0)
    assert analysis.relative_change(K, K) == 0.0
    np.testing.assert_allclose(analysis.relative_change(np.stack([K, 2 * K]), K), [0.0, 1.0])
    with pytest.raises(UndefinedMeasure, match="reference kernel is zero"):
        analysis.relative_change(K, np.zeros_like(K))
    with pytest.raises(ShapeError, match="one reference"):
        analysis.relative_change(K, K[:3, :3])


def test_constant_share() -> None:
    assert analysis.constant_share(np.ones((4, 4))) == pytest.approx(1.0)
    assert analysis.constant_share(explicitly_centered(random_kernel(0))) == pytest.approx(0.0, abs=1e-25)
    assert analysis.constant_share(np.eye(5)) == pytest.approx(1 / 5)
    rng = np.random.default_rng(0)
    J = rng.normal(size=(5, 3, 7)) + 1
    full = np.einsum("ncp,mdp->nmcd", J, J)
    u = np.ones(5) / np.sqrt(5)
    expected = np.sum(np.einsum("n,nmcd,m->cd", u, full, u) ** 2) / np.sum(full**2)
    assert analysis.constant_share(full) == pytest.approx(expected)


@pytest.mark.parametrize("distance", [*DISTANCES, analysis.kernel_angle])
def test_errors(distance) -> None:  # type: ignore[no-untyped-def]
    K = random_kernel(0)
    with pytest.raises(UndefinedMeasure, match="kernel 0 of 1 is zero"):
        distance(K, np.zeros_like(K))
    with pytest.raises(UndefinedMeasure, match="NaN or infinity"):
        distance(K, np.where(np.eye(6), np.nan, K))
    with pytest.raises(ShapeError, match=r"\(6, 6\) and \(3, 3\)"):
        distance(K, K[:3, :3])
    with pytest.raises(ShapeError, match="shapes"):
        distance(np.stack([K, K]), np.stack([K, K, K]))
    with pytest.raises(ShapeError, match=r"expected \[N, N\]"):
        distance(K[0], K[0])
    with pytest.raises(ShapeError, match="output axes"):
        distance(np.ones((2, 2, 3, 4)), np.ones((2, 2, 3, 4)))


def test_centered_measures_refuse_constant_kernels() -> None:
    K = random_kernel(0)
    for constant in (np.ones((6, 6)), 0.1 * np.ones((6, 6)), np.full((6, 6), 1 / 3, dtype=np.float32)):
        with pytest.raises(UndefinedMeasure, match="constant over samples"):
            analysis.kernel_distance_centered(constant, K)
        with pytest.raises(UndefinedMeasure, match="kernel 1 of 2 is constant"):
            analysis.distance_matrix(np.stack([K, constant]))
    with pytest.raises(ShapeError, match="expected a stack"):
        analysis.distance_matrix(K)


def test_import_is_light() -> None:
    code = (
        "import sys, ntkdyn.analysis as a; a.kernel_distance, a.target_alignment, a.effective_rank, a.flips\n"
        "print([m for m in ('torch', 'h5py', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_names_are_listed_and_unknown_ones_refused() -> None:
    assert set(analysis.__all__) <= set(dir(analysis))
    for name in analysis.__all__:
        assert callable(getattr(analysis, name))
    with pytest.raises(AttributeError, match=r"no attribute 'kernel_distnace'; public names: .*kernel_distance"):
        _ = analysis.kernel_distnace
