"""Spread, deviation and width exponents: known answers, invariances, coverage of the interval."""

from __future__ import annotations

import numpy as np
import pytest

from ntkdyn.analysis import kernel_deviation, kernel_spread, width_exponent
from ntkdyn.errors import ShapeError, UndefinedMeasure

WIDTHS = np.array([16, 64, 256])


def draws(seed: int, count: int = 8, power: float = -0.5) -> np.ndarray:
    """Kernels 2 + width^power z, one normal z per entry: relative spread width^power / 2 on average."""
    noise = np.random.default_rng(seed).standard_normal((3, count, 4, 4))
    return 2 + WIDTHS[:, None, None, None] ** power * noise


def test_known_answers() -> None:
    kernels = np.array([[[1.0, 0], [0, 3]], [[3.0, 0], [0, 3]]])
    # Variances 2, 0, 0, 0; mean diag(2, 3).
    assert kernel_spread(kernels) == pytest.approx(np.sqrt(2) / np.sqrt(13))
    # Squared distances to diag(1, 3): 0 and 4.
    assert kernel_deviation(kernels, kernels[0]) == pytest.approx(np.sqrt(2) / np.sqrt(10))
    assert kernel_spread(np.stack([kernels, 5 * kernels])).shape == (2,)
    assert kernel_spread(5 * kernels) == pytest.approx(kernel_spread(kernels))


def test_an_exact_power_is_found() -> None:
    offsets = np.array([-1.0, 1, -2, 2])[:, None, None] * np.eye(2)
    kernels = np.eye(2) + WIDTHS[:, None, None, None] ** -0.5 * offsets
    found = width_exponent(WIDTHS, kernels)
    assert found.slope == pytest.approx(-0.5, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((-0.5, -0.5), abs=0.2)
    assert found.values == pytest.approx(kernel_spread(kernels))
    reference = np.broadcast_to(np.eye(2), (3, 2, 2))
    assert width_exponent(WIDTHS, kernels, reference).slope == pytest.approx(-0.5, abs=1e-12)
    # A wrong limit shows: the deviation levels off, the spread does not.
    assert width_exponent(WIDTHS, kernels, 2 * reference).slope > -0.3


@pytest.mark.parametrize("with_reference", [False, True])
def test_the_interval_covers(with_reference: bool) -> None:
    reference = np.full((3, 4, 4), 2.0) if with_reference else None
    found = [width_exponent(WIDTHS, draws(seed), reference) for seed in range(100)]
    covered = np.mean([one.low <= -0.5 <= one.high for one in found])
    assert 0.88 <= covered <= 1
    assert np.mean([one.slope for one in found]) == pytest.approx(-0.5, abs=0.02)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ShapeError, match=r"kernel_spread: found kernels \(1, 4, 4\), expected .* with D >= 2"):
        kernel_spread(np.ones((1, 4, 4)))
    with pytest.raises(ShapeError, match=r"found kernels \(3, 8, 4, 4\) and reference \(4, 4\), expected \(3, 4, 4\)"):
        kernel_deviation(draws(0), np.ones((4, 4)))
    with pytest.raises(ShapeError, match="two or more different positive widths"):
        width_exponent([16, 16, 16], draws(0))
    with pytest.raises(ShapeError, match="D >= 3"):
        width_exponent(WIDTHS, draws(0, count=2))
    with pytest.raises(UndefinedMeasure, match="all kernels of a width agree"):
        width_exponent(WIDTHS, np.ones((3, 5, 2, 2)))
    with pytest.raises(UndefinedMeasure, match="mean kernel is zero"):
        kernel_spread(np.zeros((3, 2, 2)))
    with pytest.raises(UndefinedMeasure, match="reference is zero"):
        kernel_deviation(np.ones((3, 2, 2)), np.zeros((2, 2)))
