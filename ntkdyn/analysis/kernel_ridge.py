"""How well a kernel by itself predicts targets: ridge regression with the kernel of one network, nothing trained."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ShapeError, UndefinedMeasure
from .kernels import as_kernels, centered, scaled

RIDGE = 0.01
"""Ridge as a share of the mean eigenvalue of the centered kernel."""


def kernel_ridge_error(kernel: ArrayLike, targets: ArrayLike, *, ridge: float = RIDGE) -> float:
    """Leave-one-out error of ridge regression with a kernel, relative to predicting the mean.

    error = Σ_i |y_i - f_-i(x_i)|² / Σ_i |y_i - ȳ_-i|²,   f = g + b minimizes  Σ |y - g - b|² + λ |g|²_K,
    λ = ridge · tr(HKH) / N,  H = I - 1 1^T / N

    f_-i is fitted without sample i and with the same λ; all N of them come from one fit:
    y_i - f_-i(x_i) = (y - S y)_i / (1 - S_ii),  S = 1 1^T / N + HKH (HKH + λ I)^-1.  The intercept b is not
    penalized, so that the constant direction, most of a tangent kernel, does not count.

    Args:
        kernel: trace kernel [N, N], symmetric positive semi-definite, N >= 3; its scale does not matter.
        targets: one-hot or real [N, C], same order; [N] is one real output, class labels go through `one_hot` first.
        ridge: share of the mean eigenvalue, > 0.
    Returns: float >= 0, dimensionless; 1 is as good as the mean.
    Raises: ShapeError: sizes differ.  UndefinedMeasure: ridge not positive, kernel constant over samples, targets
        constant or not finite.
    Source: Wahba 1990, Spline Models for Observational Data, 4.2 (leave-one-out lemma).
    """
    where = "kernel_ridge_error"
    if np.ndim(kernel) != 2:
        raise ShapeError(f"{where}: kernel has shape {np.shape(kernel)}; expected one trace kernel [N, N]")
    matrix = scaled(as_kernels(kernel, where=where))[0]
    n = matrix.shape[1]
    outputs = np.asarray(targets, dtype=np.float64)
    outputs = outputs[:, None] if outputs.ndim == 1 else outputs
    if outputs.ndim != 2 or len(outputs) != n or n < 3:
        raise ShapeError(
            f"{where}: kernel has {n} samples and targets have shape {np.shape(targets)}; expected at least 3 samples "
            f"and targets [N, C] or [N]"
        )
    if not 0 < ridge < math.inf:
        raise UndefinedMeasure(f"{where}: ridge is {ridge}; expected a positive number")
    spread = outputs - outputs.mean(axis=0)
    if not np.isfinite(spread).all() or np.abs(spread).max() <= np.finfo(np.float64).eps * n * np.abs(outputs).max():
        raise UndefinedMeasure(f"{where}: targets are constant over samples or not finite; there is nothing to predict")
    middle = centered(matrix)[0, :, :, 0, 0]
    values, vectors = np.linalg.eigh((middle + middle.T) / 2)
    values = np.maximum(values, 0.0)
    if values.sum() <= np.finfo(np.float64).eps * n * np.abs(matrix).max():
        raise UndefinedMeasure(f"{where}: kernel is constant over samples; ridge regression with it is the mean")
    shares = values / (values + ridge * values.mean())
    smoother = (vectors * shares) @ vectors.T
    left = (spread - smoother @ spread) / (1 - 1 / n - np.diag(smoother))[:, None]
    return float((left**2).sum() / ((spread * n / (n - 1)) ** 2).sum())
