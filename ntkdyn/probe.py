"""What the author of a probe needs: Field, Snapshot, Probe, and Bands for what is larger than memory. Nothing else.

A probe is any object with a ``name``, a method ``fields`` that declares the arrays before the first snapshot, and a
method ``measure`` that returns them at one step. It records what happens at a step; whatever needs two distant steps
is an analysis of recorded arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Field:
    """What one recorded array will be.

    Args:
        name: name inside the probe's group; ``"<gate>/slope"`` makes a group of its own for each gate.
        dims: one name per axis, without the step axis; the two sample axes of a kernel need two names.
        shape: one size per axis.
        dtype: NumPy type string; ``"f2"`` is refused for kernels, which lose positive semi-definiteness in it.
        unit: physical or counting unit; ``"1"`` is dimensionless.
        long_name: label for axes of figures.
        coordinates: labels along an axis, ``{dim: values}``.
        attributes: further facts that belong to the numbers (reduction, convention).
        static: recorded once per run instead of once per step.
    """

    name: str
    dims: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    dtype: str = "f4"
    unit: str = "1"
    long_name: str = ""
    coordinates: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    static: bool = False


class Bands:
    """An array too large for memory, in bands of its first axis, top to bottom, each made when it is written.

    ``measure`` may return it in place of an array of a field with steps. Bands are taken at once, before training goes
    on, and again from the start where something else of the same step has failed. Random states run on from one band to
    the next; modes and switches are put back after each band, so that ``no_grad``, ``autocast`` and their like are
    entered inside the loop, for each band, and left before it is given.

    Args: make: gives the bands, arrays [k, ...] whose first axes add up to that of the field.
    """

    def __init__(self, make: Callable[[], Iterable[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return iter(self._make())


class Snapshot:
    """Read-only view of the network at one step, shared by all probes of that step.

    Everything dear is computed once, when the first probe asks for it. The model is a structural clone of the live
    one in evaluation mode: a probe may call it, but has nothing to restore.

    Attributes:
        step: applied optimizer steps so far.
        epoch: step / steps_per_epoch, or None where the recorder was not told.
        model: a clone of its own for each probe, made when it is first asked for.
        inputs, targets: the probe set; targets is None where none were given.
        set: name of the probe set, "" for the only unnamed one.
        parameters: names of the parameters whose kernel is recorded, fixed at attach.
    """

    def __init__(
        self,
        *,
        step: int,
        epoch: float | None,
        model: Callable[[], nn.Module],
        inputs: Any,
        targets: Any,
        set: str,
        parameters: tuple[str, ...],
        forward: Callable[[], Tensor],
        loss: Callable[[Tensor], Tensor | None],
        preactivations: Callable[[], Mapping[str, Tensor]],
        kernel: Callable[[Any, str | None], Any],
        kernel_bands: Callable[[Any, int, int | None], Callable[[], Iterable[Tensor]]],
        previous: Callable[[str], np.ndarray[Any, Any] | None],
    ) -> None:
        self.step = step
        self.epoch = epoch
        self.inputs = inputs
        self.targets = targets
        self.set = set
        self.parameters = parameters
        self._model = model
        self._forward = forward
        self._loss = loss
        self._preactivations = preactivations
        self._kernel = kernel
        self._kernel_bands = kernel_bands
        self._previous = previous
        self._cache: dict[Any, Any] = {}

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    @property
    def model(self) -> nn.Module:
        """The network at this step, in evaluation mode; what a probe does to it, nobody else sees."""
        result: nn.Module = self._once("model", self._model)
        return result

    @property
    def outputs(self) -> Tensor:
        """Outputs of the network on the probe set, [N, ...], without gradient."""
        result: Tensor = self._once("outputs", self._forward)
        return result

    @property
    def loss(self) -> Tensor | None:
        """Loss per sample [N] by the recorder's loss, None without targets."""
        result: Tensor | None = self._once("loss", lambda: self._loss(self.outputs))
        return result

    @property
    def preactivations(self) -> Mapping[str, Tensor]:
        """Input of every Gate by its dotted name, [N, channels, *space]."""
        result: Mapping[str, Tensor] = self._once("preactivations", self._preactivations)
        return result

    def kernel(self, reduce: Any = "trace", per: str | None = None) -> Any:
        """Empirical NTK of the probe set over ``parameters``; arguments as in ``empirical_ntk``."""
        return self._once(("kernel", reduce, per), lambda: self._kernel(reduce, per))

    def kernel_bands(self, reduce: Any = "trace", *, samples: int, max_memory: int | None = None) -> Bands:
        """The kernel in bands of so many samples, [samples, N, ...], for one that is larger than memory.

        Every band differentiates all samples again, so take as many as memory allows.

        Args: reduce: "trace", "mean" or "full".  max_memory: bytes that computing a band may take.
        """
        return Bands(self._kernel_bands(reduce, samples, max_memory))

    def previous(self, field: str) -> np.ndarray[Any, Any] | None:
        """The probe's own last recorded array of that field, None at its first step, for Bands and beyond 1 GiB."""
        return self._previous(field)


@runtime_checkable
class Probe(Protocol):
    """Two methods and a name; no base class.

    ``uses_inputs = False`` (optional) marks a probe that looks at the model only: it is recorded once a step, not
    once a probe set.
    """

    name: str

    def fields(self, snapshot: Snapshot, /) -> Sequence[Field]:
        """Declare what will be recorded; called once per probe set, before the first snapshot."""
        ...

    def measure(self, snapshot: Snapshot, /) -> Mapping[str, Any]:
        """Return one array per declared field, by name; for one that is larger than memory Bands."""
        ...
