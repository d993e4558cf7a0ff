"""Leave-one-out error of kernel ridge regression against fits that really leave a sample out."""

from __future__ import annotations

import numpy as np
import pytest

from ntkdyn.analysis import kernel_ridge_error
from ntkdyn.errors import ShapeError, UndefinedMeasure


def _by_leaving_out(kernel: np.ndarray, targets: np.ndarray, ridge: float) -> float:
    n = len(kernel)
    centering = np.eye(n) - np.ones((n, n)) / n
    penalty = ridge * np.trace(centering @ kernel @ centering) / n
    errors = baseline = 0.0
    for left in range(n):
        rest = np.arange(n) != left
        # Stationarity of  |y - K a - b|^2 + penalty a^T K a  in a and b.
        system = np.zeros((n, n))
        system[:-1, :-1] = kernel[np.ix_(rest, rest)] + penalty * np.eye(n - 1)
        system[:-1, -1] = system[-1, :-1] = 1.0
        solution = np.linalg.solve(system, np.vstack([targets[rest], np.zeros((1, targets.shape[1]))]))
        predicted = kernel[left, rest] @ solution[:-1] + solution[-1]
        errors += ((targets[left] - predicted) ** 2).sum()
        baseline += ((targets[left] - targets[rest].mean(0)) ** 2).sum()
    return float(errors / baseline)


@pytest.mark.parametrize(("n", "features", "outputs"), [(3, 2, 1), (8, 20, 3), (15, 4, 2), (12, 12, 12)])
@pytest.mark.parametrize("ridge", [1e-4, 0.01, 3.0])
def test_equals_fits_that_leave_a_sample_out(n: int, features: int, outputs: int, ridge: float) -> None:
    generator = np.random.default_rng([n, features])
    x = generator.normal(size=(n, features)) + 5.0
    kernel, targets = x @ x.T, generator.normal(size=(n, outputs))
    expected = _by_leaving_out(kernel, targets, ridge)
    assert kernel_ridge_error(kernel, targets, ridge=ridge) == pytest.approx(expected, rel=1e-7)
    assert kernel_ridge_error(1e-30 * kernel, targets, ridge=ridge) == pytest.approx(expected, rel=1e-7)
    assert kernel_ridge_error(kernel + 100.0, 7 * targets + 3, ridge=ridge) == pytest.approx(expected, rel=1e-6)


def test_a_kernel_of_the_targets_predicts_them_and_one_of_noise_does_not() -> None:
    generator = np.random.default_rng(0)
    labels = np.eye(4)[np.arange(40) % 4]
    assert kernel_ridge_error(labels @ labels.T, labels) < 0.01
    noise = generator.normal(size=(40, 200))
    assert 0.8 < kernel_ridge_error(noise @ noise.T, labels) < 1.5
    assert kernel_ridge_error(labels @ labels.T, labels, ridge=1e9) == pytest.approx(1.0)


def test_what_has_no_value_is_refused() -> None:
    kernel, targets = np.eye(4), np.array([0.0, 1.0, 0.0, 1.0])
    with pytest.raises(ShapeError, match=r"kernel has 4 samples and targets have shape \(3,\)"):
        kernel_ridge_error(kernel, targets[:3])
    with pytest.raises(ShapeError, match=r"expected one trace kernel \[N, N\]"):
        kernel_ridge_error(np.stack([kernel, kernel]), targets)
    with pytest.raises(UndefinedMeasure, match="ridge is 0; expected a positive number"):
        kernel_ridge_error(kernel, targets, ridge=0)
    with pytest.raises(UndefinedMeasure, match="targets are constant over samples"):
        kernel_ridge_error(kernel, np.ones(4))
    with pytest.raises(UndefinedMeasure, match="kernel is constant over samples"):
        kernel_ridge_error(np.ones((4, 4)), targets)
