"""What the engine does: a plan as a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .accumulator import Combine
from .costs import Extent
from .factors import Form
from .problem import Problem
from .ranges import ranges
from .sides import Seeds
from .tracing import Trace


@dataclass(frozen=True)
class Head:
    """A linear last layer, whose own kernel needs no backward pass.

    Attributes:
        index: among the calls that reach the outputs.
        weight: [channels, width], detached.
        names: role -> name of its wanted parameters.
        from_features: other layers are differentiated from its input, because that has fewer entries than the outputs.
    """

    index: int
    weight: Tensor
    names: Mapping[str, str]
    from_features: bool


@dataclass(frozen=True)
class Plan:
    """What the engine does.

    Attributes:
        combine: of the accumulated kernel; with a head from features all pairs of features may be needed.
        groups: names of parameters whose gradients are held at the same time.
        chunk: directions at a time; tile: samples at a time; strip: samples that run through the network together.
        forms: of each use of a parameter; absent for plain autograd.
        attends: the network has fused attention, whose blocks oneDNN's products make 60 times slower.
        outputs: of the few samples on which the trace was made, for comparison with all samples.
    """

    trace: Trace
    head: Head | None
    seeds: Seeds
    combine: Combine
    groups: Sequence[Sequence[str]]
    chunk: int
    tile: int
    strip: int
    forms: Mapping[str, Sequence[Form]]
    attends: bool
    outputs: Tensor

    @property
    def by_direction(self) -> bool:
        """Pairs of directions lie outside in memory: best for Hadamard products, where most of the work is these."""
        if self.combine != "full" or len(self.groups) > 1 or self.chunk < self.seeds.count:
            return False
        layers = [forms for forms in self.forms.values() if not forms[0].bias]
        return all(len(forms) == 1 and (forms[0].positions == 1 or forms[0].positions == 0) for forms in layers)

    def tiles(self, size: int) -> list[slice]:
        """Ranges of samples."""
        return list(ranges(slice(0, size), self.tile))

    def extent(self, problem: Problem) -> Extent:
        """Sizes of a product of two whole tiles."""
        sizes = min(self.tile, problem.sizes[0]), min(self.tile, problem.sizes[1])
        symmetric = problem.inputs_2 is None and self.tile >= problem.sizes[0]
        by_direction = self.by_direction and self.tile >= max(problem.sizes)
        on_cpu = self.outputs.device.type == "cpu"
        return Extent(sizes, self.chunk, self.combine, symmetric, problem.dtype.itemsize, by_direction, on_cpu)
