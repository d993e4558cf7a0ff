"""Largest eigenpairs of a positive semi-definite matrix that is known by its products only."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from ..errors import ConfigurationError, UndefinedMeasure

Array = npt.NDArray[np.float64]
Product = Callable[[Array], Array]

# SciPy before 1.17 has no such argument: there ARPACK draws its restart vectors from a generator of its own.
_SEED: dict[str, Any] = {"rng": 0} if "rng" in inspect.signature(eigsh).parameters else {}


def largest_eigenpairs(product: Product, size: int, count: int, tolerance: float) -> tuple[Array, Array]:
    """Largest eigenvalues of K and their eigenvectors, by Lanczos from fixed start vectors.

    Lanczos from one vector sees one copy of a repeated eigenvalue, and the others only by rounding: of the five
    largest of K ⊗ 1₅ it missed four, without a word, at tolerance 1e-10 and above (SciPy 1.17). Hence what was found
    is projected out, and Lanczos started again, until nothing larger than the last value is left. Where about as many
    products would be needed as K has columns, these are computed and K is decomposed.

    Args:
        product: v [size] -> K v.
        count: how many, 1 ... size.
        tolerance: bound of |K v − λ v| in units of 2 λ_1; the error of λ is at most that, mostly its square.

    Returns: values [count], largest first; orthonormal vectors [size, count], their largest entry positive.
    Raises: UndefinedMeasure: K is not finite.  ConfigurationError: the tolerance was not reached.
    Source: Lehoucq, Sorensen and Yang 1998 (ARPACK); Parlett 1998, The Symmetric Eigenvalue Problem, section 13.
    """
    if size <= columns_instead(count):
        return _largest(*_dense(product, size), count)
    generator = np.random.default_rng(0)
    start = generator.standard_normal(size)
    image = product(start)
    scale = float(np.linalg.norm(image) / np.linalg.norm(start))
    if not np.isfinite(scale):
        raise UndefinedMeasure("a product with the kernel has NaN or Inf; the network's derivatives overflow")
    if scale == 0:  # of a random vector: the kernel is zero, and every vector an eigenvector
        return np.zeros(count), np.eye(size, count)
    values, vectors = _lanczos(product, image, np.zeros((size, 0)), count, scale, tolerance)
    wanted = 1
    while count > 1:
        # A new start: of the old one, what lies in the space of a repeated eigenvalue is among the vectors found.
        start = generator.standard_normal(size)
        further = _lanczos(product, start, vectors, wanted, scale, tolerance)
        missed = further[0][0] > values[-1] + 2 * tolerance * values[0]
        values, vectors = _largest(
            np.concatenate([values, further[0]]), np.concatenate([vectors, further[1]], axis=1), count
        )
        if not missed:
            break
        wanted = count
    return values, vectors


def columns_instead(count: int) -> int:
    """Size up to which K is formed column by column: Lanczos holds that many vectors, and makes more products."""
    return 2 * count + 20


def _lanczos(
    product: Product, start: Array, known: Array, count: int, scale: float, tolerance: float
) -> tuple[Array, Array]:
    """Largest eigenpairs of K on the complement of known eigenvectors."""

    def shifted(vector: Array) -> Array:
        # The shift makes ARPACK's tolerance, which is relative to each eigenvalue, relative to the largest one:
        # eigenvalues that are zero but for rounding would never converge. Known eigenvectors become its null space.
        inside = _without(known, vector.reshape(-1))
        return _without(known, product(inside) + scale * inside)

    operator = LinearOperator((len(start), len(start)), matvec=shifted, dtype=np.float64)
    try:
        values, vectors = eigsh(operator, count, which="LA", v0=_without(known, start), tol=tolerance, **_SEED)
    except ArpackNoConvergence as error:
        raise ConfigurationError(
            f"Lanczos found {len(error.eigenvalues)} of {count} eigenvalues to tolerance {tolerance:g}; "
            f"ask for fewer, or give a larger tolerance="
        ) from error
    return _largest(values - scale, _without(known, vectors), count)


def _without(known: Array, vectors: Array) -> Array:
    return vectors - known @ (known.T @ vectors) if known.shape[1] else vectors


def _dense(product: Product, size: int) -> tuple[Array, Array]:
    kernel = np.stack([product(column) for column in np.eye(size)])
    if not np.isfinite(kernel).all():
        raise UndefinedMeasure("a product with the kernel has NaN or Inf; the network's derivatives overflow")
    values, vectors = np.linalg.eigh(0.5 * (kernel + kernel.T))
    return values, vectors


def _largest(values: Array, vectors: Array, count: int) -> tuple[Array, Array]:
    """The largest, in falling order, with signs that do not depend on the way they were found."""
    order = np.argsort(-values, kind="stable")[:count]
    vectors = vectors[:, order]
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(len(order))])
    return values[order], vectors * signs
