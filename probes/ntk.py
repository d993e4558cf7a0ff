"""Probe ``ntk``: the empirical neural tangent kernel of a probe set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

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


class EmpiricalNTK:
    """Empirical NTK of each probe set over the recorder's parameters, whole and per layer or parameter.

    Fields: ``kernel`` [N, N_2] for reduce "trace" or "mean", [C, N, N_2] for "each", [N, N_2, C, C_2] for "full";
    with ``per`` also ``layers`` [L, ...kernel], the contributions, which add up to the kernel.

    Args:
        reduce: "trace", "mean", "each" or "full", as in ``empirical_ntk``.
        per: None, "layer" or "parameter".

    Raises: ConfigurationError: another reduce or per.
    Source: Jacot et al. 2018 (arXiv 1806.07572).
    """

    name = "ntk"

    def __init__(
        self,
        reduce: Literal["trace", "mean", "each", "full"] = "trace",
        per: Literal["layer", "parameter"] | None = None,
    ) -> None:
        if reduce not in _DIMS:
            raise ConfigurationError(f"probe ntk: reduce is {reduce!r}; expected one of {', '.join(_DIMS)}")
        if per not in _PER:
            raise ConfigurationError(f"probe ntk: per is {per!r}; expected one of none, layer, parameter")
        self.reduce = reduce
        self.per = per

    def fields(self, snapshot: Snapshot, /) -> Sequence[Field]:
        """Declare the kernel, and its contributions where ``per`` is given."""
        samples, outputs = len(snapshot.outputs), snapshot.outputs[0].numel()
        size = {"sample": samples, "sample_2": samples, "output": outputs, "output_2": outputs}
        dims = _DIMS[self.reduce]
        shape = tuple(size[dim] for dim in dims)
        dtype = "f8" if snapshot.outputs.element_size() == 8 else "f4"
        facts = {"reduction": self.reduce}
        kernel = Field(name="kernel", dims=dims, shape=shape, dtype=dtype, long_name="empirical NTK", attributes=facts)
        if self.per is None:
            return [kernel]
        names = list(snapshot.kernel(self.reduce, self.per))
        layers = Field(
            name="layers",
            dims=("layer", *dims),
            shape=(len(names), *shape),
            dtype=dtype,
            long_name=f"contribution of each {self.per} to the empirical NTK",
            coordinates={"layer": names},
            attributes=facts | {"per": self.per},
        )
        return [kernel, layers]

    def measure(self, snapshot: Snapshot, /) -> Mapping[str, Any]:
        """Return the kernel at this step."""
        if self.per is None:
            return {"kernel": snapshot.kernel(self.reduce)}
        parts: list[Tensor] = list(snapshot.kernel(self.reduce, self.per).values())
        return {"kernel": sum(parts[1:], parts[0]), "layers": parts}
