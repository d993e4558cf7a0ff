"""The empirical NTK as a linear operator, for sizes whose dense kernel does not fit: products, largest eigenvalues."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import ConfigurationError, ShapeError, UndefinedMeasure
from .differentials import Part, chosen_way, parts_of, refuse_coupled_samples, saved_bytes
from .eigenpairs import largest_eigenpairs
from .precision import full_rate
from .preparation import Metric, prepared
from .problem import Forward, Problem, gradients, plain_autograd

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}
# Peak in units of the bytes that the graph of plain autograd saves: the double backward's graph, what a pass holds for
# a moment, and what the allocator does not give back; measured 2.3 (ResNet20) to 6.0 (MLP), and up to a tenth more from
# one run to the next.
_GRAPHS = 7
# Copies of the parameters that an operator makes: two clones, a gradient, a tangent, and one for a moment.
_COPIES = 5


class Eigenpairs(NamedTuple):
    """Largest eigenvalues [k], falling, and their orthonormal eigenvectors [N, C, k]; in the unit of the kernel."""

    values: Tensor
    vectors: Tensor


class NTKOperator(LinearOperator):
    """Empirical NTK  K = J diag(s) Jᵀ  as a symmetric scipy LinearOperator [N·C, N·C], without the dense kernel.

    A product takes one vector-Jacobian product Jᵀ v and one Jacobian-vector product J w; memory grows like N + P.
    Entry n·C + c of a vector belongs to output c of sample n, so that ``vec = outputs.flatten()``. The operator holds
    copies of the parameters, buffers and inputs: training afterwards does not move it. J w is taken by forward-mode or
    by double backward differentiation, whichever suits the network, after it has agreed with plain autograd on
    <u, J w> = <Jᵀ u, w>.

    Args:
        model, x: as ``empirical_ntk``.
        forward, parameters, metric, dtype, train_mode: as ``empirical_ntk``; below 32 bits everything is float32.
        chunk: samples that go through the network at a time. None means all, with their graph kept from product to
            product: the fastest while it fits. Otherwise each product runs the network anew, about twice the time.
        max_memory: bytes that the operator may take at its peak, besides the network, its inputs and the vectors;
            chooses the chunk. The smaller of the two counts.

    Raises: as ``empirical_ntk``.  ConfigurationError: a chunk below 1; chunks of a network in whose train_mode
        samples depend on each other; a max_memory too small for one sample, with the least that works.
        UnsupportedLayer: an operation with neither forward-mode nor double backward differentiation.
    Source: Jacot et al. 2018 (arXiv 1806.07572); Pearlmutter 1994 (10.1162/neco.1994.6.1.147) for J w.

    >>> operator = NTKOperator(torch.nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    >>> operator @ [1.0, 0.0]
    array([6., 7.], dtype=float32)
    """

    def __init__(
        self,
        model: nn.Module,
        x: Any,
        *,
        forward: Forward | None = None,
        parameters: Iterable[str] | None = None,
        metric: Metric | None = None,
        dtype: torch.dtype | None = None,
        chunk: int | None = None,
        max_memory: int | None = None,
        train_mode: Iterable[str] = (),
    ) -> None:
        if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
            raise ConfigurationError(f"chunk is {chunk!r}; expected a number of samples, at least 1, or None")
        with prepared(
            model,
            x,
            forward=forward,
            parameters=parameters,
            metric=metric,
            dtype=dtype,
            max_memory=max_memory,
            train_mode=train_mode,
        ) as problem:
            problem.inputs = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), problem.inputs)
            samples = problem.sizes[0]
            at_a_time = min(samples, chunk or samples, _samples_that_fit(problem))
            self._parts: list[Part] = parts_of(problem, at_a_time)
            if at_a_time < samples:
                refuse_coupled_samples(problem, at_a_time)
            self._way = chosen_way(problem, self._parts[0])
            self._outputs = self._parts[0].outputs().shape[1]
        self._problem = problem
        size = samples * self._outputs
        super().__init__(  # type: ignore[call-arg]  # unknown to scipy-stubs
            np.dtype(str(problem.dtype).removeprefix("torch.")), (size, size)
        )

    def top(self, k: int, *, tolerance: float | None = None) -> Eigenpairs:
        """Largest k eigenvalues and their eigenvectors, by Lanczos; repeated eigenvalues count as often as they are.

        Takes some 2 k + 40 products or more, each as dear as three to five forward passes, and 8·N·C·(3 k + 20) bytes.
        The same call gives the same numbers.

        Args:
            k: 1 ... N·C; above a third of N·C the kernel is formed column by column.
            tolerance: bound of |K v − λ v| in units of 2 λ_1; the error of λ is at most that, mostly its square.
                None means 1e-10 in float64 and 1e-6 in float32.

        Returns: Eigenpairs(values [k] falling, vectors [N, C, k]) on the device of the parameters.
        Raises: ConfigurationError: k or tolerance out of range, or a tolerance that is not reached.
            UndefinedMeasure: a product has NaN or Inf.

        >>> NTKOperator(torch.nn.Linear(1, 1, bias=False), torch.tensor([[3.0], [4.0]])).top(1).values
        tensor([25.])
        """
        size = self.shape[0]
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= size:
            raise ConfigurationError(f"k is {k!r}; expected a whole number from 1 to N·C = {size}")
        if tolerance is None:
            tolerance = _TOLERANCE[self._problem.dtype]
        if not 0 <= tolerance < 1:
            raise ConfigurationError(f"tolerance is {tolerance!r}; expected a number from 0 to below 1, or None")

        def product(vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            return self._matvec(vector).astype(np.float64)

        values, vectors = largest_eigenpairs(product, size, k, tolerance)
        like = torch.empty(0, dtype=self._problem.dtype, device=next(iter(self._problem.parameters.values())).device)
        return Eigenpairs(
            torch.from_numpy(values).to(like), torch.from_numpy(vectors).to(like).reshape(-1, self._outputs, k)
        )

    def matvec(self, x: npt.ArrayLike) -> npt.NDArray[Any]:  # type: ignore[override]
        """K x for a real vector [N·C] or [N·C, 1]; raises ShapeError, and UndefinedMeasure for NaN or Inf."""
        return cast(npt.NDArray[Any], super().matvec(self._checked(x)))

    def matmat(self, X: npt.ArrayLike) -> npt.NDArray[Any]:  # type: ignore[override]
        """K X for a real matrix [N·C, columns]; raises as matvec."""
        return cast(npt.NDArray[Any], super().matmat(self._checked(X)))

    def _checked(self, vectors: npt.ArrayLike) -> npt.NDArray[Any]:
        array = np.asarray(vectors)
        if array.ndim not in (1, 2) or array.shape[0] != self.shape[0]:
            raise ShapeError(
                f"vector of shape {array.shape}; expected [N·C] or [N·C, columns] with N·C = {self.shape[0]}"
            )
        if array.dtype.kind not in "buif":
            raise ShapeError(
                f"vector of dtype {array.dtype}; expected real numbers; give real and imaginary parts apart"
            )
        if not np.isfinite(array).all():
            raise UndefinedMeasure(f"vector has NaN or Inf at entry {int(np.argwhere(~np.isfinite(array))[0, 0])}")
        return array

    def _matvec(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        vector = torch.from_numpy(np.array(x, dtype=self.dtype)).reshape(-1, self._outputs)
        return self._product(vector).flatten().cpu().numpy()

    def _matmat(self, X: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.stack([self._matvec(column) for column in X.T], axis=1) if X.shape[1] else X.astype(self.dtype)

    def _adjoint(self) -> NTKOperator:
        return self

    def _transpose(self) -> NTKOperator:
        return self

    def _product(self, vector: Tensor) -> Tensor:
        """K v for v [N, C]."""
        problem = self._problem
        leaves = list(problem.parameters.values())
        tangents: list[Tensor | None] = [None] * len(leaves)
        starts = np.cumsum([0, *(part.problem.sizes[0] for part in self._parts)])
        with plain_autograd(problem.model), full_rate():
            for part, start in zip(self._parts, starts, strict=False):
                outputs = part.outputs()
                cotangent = vector[start : start + len(outputs)].to(outputs)
                for position, gradient in enumerate(gradients(outputs, leaves, cotangent)):
                    if gradient is not None:
                        sum_so_far = tangents[position]
                        tangents[position] = gradient if sum_so_far is None else sum_so_far.add_(gradient)
                del outputs
            scaled = [
                tangent if tangent is None or name not in problem.scales else tangent * problem.scales[name]
                for name, tangent in zip(problem.parameters, tangents, strict=True)
            ]
            return torch.cat([self._way(part, scaled).to(problem.dtype) for part in self._parts])


def _samples_that_fit(problem: Problem) -> int:
    if problem.max_memory is None:
        return problem.sizes[0]
    fixed = _COPIES * sum(parameter.nbytes for parameter in problem.model.parameters())
    each = _GRAPHS * saved_bytes(problem)
    if fixed + each > problem.max_memory:
        raise ConfigurationError(
            f"max_memory is {problem.max_memory} bytes; one sample at a time takes {fixed + each}; give at least that"
        )
    return (problem.max_memory - fixed) // each
