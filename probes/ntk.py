"""Probe ``ntk``: the empirical neural tangent kernel of a probe set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ..errors import ConfigurationError
from ..probe import Field, Snapshot

_DIMS = {
    "trace": ("sample", "sample_2"),
    "mean": ("sample", "sample_2"),
    "each": ("output", "sample", "sample_2"),
    "full": ("sample", "sample_2", "output", "output_2"),
}
_PER = (None, "layer", "parameter")
_MAX_MEMORY = 4 * 2**30


class EmpiricalNTK:
    """Empirical NTK of each probe set over the recorder's parameters, whole and per layer or parameter.

    Fields: ``kernel`` [N, N_2] for reduce "trace" or "mean", [C, N, N_2] for "each", [N, N_2, C, C_2] for "full";
    with ``per`` also ``layers`` [L, ...kernel], the contributions, which add up to the kernel.

    Args:
        reduce: "trace", "mean", "each" or "full", as in ``empirical_ntk``.
        per: None, "layer" or "parameter".
        max_memory: for a kernel "trace", "mean" or "full"; None: 4 GiB. The size of the recorded array decides: up to
            half of max_memory it is taken whole, and what computing it takes beside is not bounded. A larger one is
            computed and written in bands of samples, an eighth of max_memory each, and every band differentiates all
            samples again. Where max_memory is given it bounds that computation in bytes, and what is too little for
            one band is refused at the snapshot, with the least that works: tens of MB even for small networks.
            Contributions and "each" are always taken whole.

    Raises: ConfigurationError: another reduce or per, or max_memory with contributions or "each".
    Source: Jacot et al. 2018 (arXiv 1806.07572).
    """

    name = "ntk"

    def __init__(
        self,
        reduce: Literal["trace", "mean", "each", "full"] = "trace",
        per: Literal["layer", "parameter"] | None = None,
        max_memory: int | None = None,
    ) -> None:
        if reduce not in _DIMS:
            raise ConfigurationError(f"probe ntk: reduce is {reduce!r}; expected one of {', '.join(_DIMS)}")
        if per not in _PER:
            raise ConfigurationError(f"probe ntk: per is {per!r}; expected one of none, layer, parameter")
        if max_memory is not None and (max_memory < 1 or reduce == "each" or per is not None):
            raise ConfigurationError(
                f"probe ntk: max_memory is {max_memory}; expected at least 1 byte, and reduce trace, mean or full "
                "without per: the others are taken whole"
            )
        self.reduce = reduce
        self.per = per
        self.max_memory = max_memory

    def fields(self, snapshot: Snapshot, /) -> Sequence[Field]:
        """Declare the kernel, and its contributions where ``per`` is given."""
        kernel = self._kernel(snapshot)
        if self.per is None:
            return [kernel]
        names = list(snapshot.kernel(self.reduce, self.per))
        layers = Field(
            name="layers",
            dims=("layer", *kernel.dims),
            shape=(len(names), *kernel.shape),
            dtype=kernel.dtype,
            long_name=f"contribution of each {self.per} to the empirical NTK",
            coordinates={"layer": names},
            attributes={**kernel.attributes, "per": self.per},
        )
        return [kernel, layers]

    def measure(self, snapshot: Snapshot, /) -> Mapping[str, Any]:
        """Return the kernel at this step."""
        if self.per is not None:
            parts: list[Tensor] = list(snapshot.kernel(self.reduce, self.per).values())
            return {"kernel": sum(parts[1:], parts[0]), "layers": parts}
        kernel = self._kernel(snapshot)
        size, limit = math.prod(kernel.shape) * np.dtype(kernel.dtype).itemsize, self.max_memory or _MAX_MEMORY
        if self.reduce == "each" or size <= limit // 2:
            return {"kernel": snapshot.kernel(self.reduce)}
        samples = max(1, limit // 8 * kernel.shape[0] // size)
        return {"kernel": snapshot.kernel_bands(self.reduce, samples=samples, max_memory=self.max_memory)}

    def _kernel(self, snapshot: Snapshot) -> Field:
        samples, outputs = len(snapshot.outputs), snapshot.outputs[0].numel()
        size = {"sample": samples, "sample_2": samples, "output": outputs, "output_2": outputs}
        dims = _DIMS[self.reduce]
        return Field(
            name="kernel",
            dims=dims,
            shape=tuple(size[dim] for dim in dims),
            dtype="f8" if snapshot.outputs.element_size() == 8 else "f4",
            long_name="empirical NTK",
            attributes={"reduction": self.reduce},
        )
