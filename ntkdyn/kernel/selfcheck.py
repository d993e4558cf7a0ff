"""Self-check: the kernel of a batch, block by block, against plain autograd on a few of its samples."""

from __future__ import annotations

import fnmatch
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..clone import unwrapped
from ..errors import ConfigurationError, UnsupportedLayer
from . import empirical_ntk
from .preparation import Metric, Per, resolve_parameters
from .problem import ROOT, Forward, default_forward, sample_count
from .reduction import Reduction, directions

WHOLE = "<all>"
# Bytes of the Jacobian of the chosen samples, and of the blocks of one call; beyond them, several calls.
_JACOBIAN = 2**28
_BLOCKS = 2**30
# Roundings of the whole that a gradient which cancels leaves in its block.
_ROUNDINGS = 20
# Share of the tolerance beyond which a sample's entry with itself has moved: the change of its gradient may be all but
# perpendicular to the gradient, and then moves the entries with others more. Roundings are at a hundredth.
_MOVED = 0.1


@dataclass(frozen=True)
class KernelCheck:
    """What a self-check has compared; it has passed, because a failure raises.

    Attributes:
        rows, columns: positions of the compared samples in x1 and x2.
        errors: relative error by parameter, and by layer or of the whole ("<all>") for the kernel itself; the worse of
            those in the Frobenius norm and in the largest entry.
        tolerance: largest error allowed.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    errors: Mapping[str, float]
    tolerance: float


def check_ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    reduce: Reduction = "trace",
    per: Per | None = None,
    forward: Forward | None = None,
    parameters: Iterable[str] | None = None,
    metric: Metric | None = None,
    dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    samples: int = 4,
    kernel: Tensor | Mapping[str, Tensor] | None = None,
) -> KernelCheck:
    """Compare the kernel of these very inputs with plain autograd on a few of the samples, parameter by parameter.

    What is found is taken from the kernel of the whole batch, with the routes that its sizes lead to; what is expected
    from engine "reference" on the chosen samples alone. So a wrong layer rule, a wrong tile and an output that depends
    on other samples all show. Chosen are the first sample, the last, and others that the inputs' bytes decide; no
    random state is touched. The cost is one more kernel, by parameter, and ``samples`` rows of the Jacobian per output.

    A block B of the kernel Θ is held to |Δ| ≤ τ |B| + e √(|B| |Θ|) + e² |Θ| in both norms, τ = 1e-10 in float64 and
    1e-5 in float32: where a gradient cancels, the rounding e = 20 ε of what cancelled stays. Where the batch rounds the
    input of a ReLU to the other side of 0 than a few samples do, float64 decides.

    Args:
        samples: number of samples to compare, at least 1.
        kernel: what ``empirical_ntk`` gave for the same arguments; None computes it. The others are as there.
    Raises:
        UnsupportedLayer: names the layer with the largest error, what was found and what was expected.
        NtkdynError: whatever ``empirical_ntk`` raises.

    >>> check = check_ntk(nn.Linear(3, 2), torch.eye(5, 3), samples=3)
    >>> list(check.errors), max(check.errors.values()) < check.tolerance
    (['weight', 'bias', '<all>'], True)
    """
    if samples < 1:
        raise ConfigurationError(f"check_ntk: samples is {samples}; expected at least 1")
    model = unwrapped(model)
    seed = zlib.crc32(b"".join(_bytes(leaf) for leaf in tree_leaves((x1, x2)) if isinstance(leaf, Tensor)))
    rows = _chosen(sample_count(x1, "x1"), samples, seed)
    batch = _Batch(
        model=model,
        x1=x1,
        x2=x2,
        rows=rows,
        columns=rows if x2 is None else _chosen(sample_count(x2, "x2"), samples, seed),
        names=resolve_parameters(model, parameters),
        reduce=reduce,
        per=per,
        forward=forward or default_forward,
        metric=metric or {},
        max_memory=max_memory,
    )
    if kernel is None:
        kernel = batch.kernel(batch.names, per, dtype)
    one = kernel if isinstance(kernel, Tensor) else next(iter(kernel.values()))
    if torch.finfo(one.dtype).bits < 32:
        # Rounded from float32 at the end; that is compared.
        kernel, dtype = batch.kernel(batch.names, per, torch.float32), torch.float32
    outputs = batch.outputs(one.shape[-1], seed) if reduce == "full" else None
    found = batch.found(kernel, outputs, dtype)
    comparison = _Comparison(found, batch.expected(outputs, dtype))
    wrong = comparison.wrong()
    if wrong and not _rounds_differently(batch, comparison, outputs):
        raise UnsupportedLayer(_message(batch, comparison, wrong))
    return KernelCheck(batch.rows, batch.columns, comparison.errors, comparison.tolerance)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """The arguments of a kernel; its chosen rows and columns as computed for the batch, and by plain autograd."""

    model: nn.Module
    x1: Any
    x2: Any
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    names: tuple[str, ...]
    reduce: Reduction
    per: Per | None
    forward: Forward
    metric: Metric
    max_memory: int | None

    def kernel(self, names: Sequence[str], per: Per | None, dtype: torch.dtype | None) -> Tensor | dict[str, Tensor]:
        """The kernel of all samples over some parameters."""
        result: Tensor | dict[str, Tensor] = empirical_ntk(
            self.model,
            self.x1,
            self.x2,
            reduce=self.reduce,
            per=cast(Any, per),
            forward=self.forward,
            parameters=names,
            metric=self._metric(names),
            dtype=dtype,
            max_memory=self.max_memory,
        )
        return result

    def found(
        self, kernel: Tensor | Mapping[str, Tensor], outputs: Sequence[int] | None, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        """Chosen entries of the kernel of all samples, by parameter and as it is given."""
        given = {WHOLE: kernel} if isinstance(kernel, Tensor) else kernel
        one = next(iter(given.values()))
        together = max(1, _BLOCKS // (one.numel() * one.element_size()))
        result: dict[str, Tensor] = {}
        for start in range(0, 0 if self.per == "parameter" else len(self.names), together):
            blocks = cast(dict[str, Tensor], self.kernel(self.names[start : start + together], "parameter", dtype))
            result |= {name: self._selected(block, outputs) for name, block in blocks.items()}
        return result | {name: self._selected(block, outputs) for name, block in given.items()}

    def _selected(self, block: Tensor, outputs: Sequence[int] | None) -> Tensor:
        """Chosen entries of a block of the kernel of all samples."""
        rows, columns = list(self.rows), list(self.columns)
        if self.reduce == "each":
            return block[:, rows][:, :, columns]
        chosen = block[rows][:, columns]
        return chosen if outputs is None else chosen[..., list(outputs), :][..., list(outputs)]

    def by_pair(self, entries: Tensor) -> Tensor:
        """The largest of the entries of each pair of samples."""
        if self.reduce == "each":
            return entries.amax(0)
        return entries.flatten(2).amax(2) if self.reduce == "full" else entries

    def outputs(self, count: int, seed: int) -> tuple[int, ...]:
        """Of a full kernel, as many outputs as fit into memory."""
        return _chosen(count, self._outputs_at_a_time(), seed)

    def expected(self, outputs: Sequence[int] | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The same entries by plain autograd on the chosen samples alone, by parameter."""
        if outputs is not None:
            return self._by_autograd(list(outputs), dtype)[0]
        step = self._outputs_at_a_time()
        parts, count = self._by_autograd(range(0, step), dtype)
        for start in range(step, count, step):
            further, _ = self._by_autograd(range(start, min(start + step, count)), dtype)
            for name, block in further.items():
                parts[name] = torch.cat([parts[name], block]) if self.reduce == "each" else parts[name] + block
        return {name: block / count for name, block in parts.items()} if self.reduce == "mean" else parts

    def _by_autograd(self, chosen: Sequence[int], dtype: torch.dtype | None) -> tuple[dict[str, Tensor], int]:
        counts: list[int] = []

        def forward(model: nn.Module, inputs: Any) -> Tensor:
            results = self.forward(model, inputs)
            flat = results.reshape(len(results), -1)
            along = directions(self.reduce, flat.shape[1], flat)
            counts.append(flat.shape[1] if along is None else len(along))
            part = [number for number in chosen if number < counts[0]]
            return flat[:, part] if along is None else flat @ along[part].T

        blocks = empirical_ntk(
            self.model,
            _part(self.x1, self.rows),
            None if self.x2 is None else _part(self.x2, self.columns),
            reduce=cast(Any, self.reduce if self.reduce in ("each", "full") else "trace"),
            per="parameter",
            forward=forward,
            parameters=self.names,
            metric=self._metric(self.names),
            engine="reference",
            dtype=dtype,
        )
        return blocks, counts[0]

    def _outputs_at_a_time(self) -> int:
        owned = dict(self.model.named_parameters())
        row = sum(owned[name].numel() * owned[name].element_size() for name in self.names)
        return max(1, _JACOBIAN // (row * len(self.rows)))

    def _metric(self, names: Sequence[str]) -> Metric:
        return {pattern: scale for pattern, scale in self.metric.items() if fnmatch.filter(names, pattern)}


class _Comparison:
    """Relative errors of blocks of parameters, layers or the whole, against expected blocks of parameters."""

    def __init__(self, found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
        self.found = found
        self.expected = {name: _sum_over(name, exact) for name in found}
        precision = torch.finfo(next(iter(exact.values())).dtype)
        self.tolerance = 1e-10 if precision.bits == 64 else 1e-5
        rounding = _ROUNDINGS * precision.eps
        wholes = [sum(sizes) for sizes in zip(*map(_sizes, exact.values()), strict=True)]
        self.errors: dict[str, float] = {}
        for name, block in found.items():
            # Products of float32 may be as large as float64 only can square.
            difference = _sizes(block.double() - self.expected[name].double())
            worst = 0.0
            for off, size, whole in zip(difference, _sizes(self.expected[name]), wholes, strict=True):
                allowed = self.tolerance * size + rounding * (size * whole) ** 0.5 + rounding**2 * whole
                # NaN counts as infinitely wrong.
                worst = max(worst, 0.0 if off == 0 else off / allowed if allowed > 0 and off < inf else inf)
            self.errors[name] = self.tolerance * worst

    def wrong(self) -> list[str]:
        """Names of blocks beyond the tolerance, the worst first."""
        beyond = [name for name, error in self.errors.items() if not error <= self.tolerance]
        return sorted(beyond, key=lambda name: -self.errors[name])


def _rounds_differently(batch: _Batch, comparison: _Comparison, outputs: Sequence[int] | None) -> bool:
    """Whether all is right in float64, and what is wrong in the present precision are a few samples in all their pairs.

    A ReLU whose input is all but 0 can be open in the batch and closed in a few samples alone: matrix products of
    another size add in another order. That moves a sample's gradient by up to percents in float32 (once in about 10
    checks of a convolutional network with 200,000 units), and none in float64. Imprecise products move all samples, an
    entry that was lost moves no sample's entry with itself. Where the batch has what float64 has, nothing of it is
    wrong, and it is the few samples that were rounded.
    """
    if comparison.tolerance < 1e-6:
        return False
    exact = batch.expected(outputs, torch.float64)
    kernel = batch.kernel(batch.names, batch.per, torch.float64)
    if _Comparison(batch.found(kernel, outputs, torch.float64), exact).wrong():
        return False
    for name in comparison.wrong():
        truth, expected = _sum_over(name, exact), comparison.expected[name].double()
        found = comparison.found[name].double()
        off = batch.by_pair((found - expected).abs().minimum((found - truth).abs()))
        limit = comparison.tolerance * truth.abs().max()
        if batch.x2 is None:
            rows = columns = off.diagonal() > _MOVED * limit
        else:
            rows, columns = ((off > limit).double().mean(axis) >= 0.5 for axis in (1, 0))
        unexplained = (off > limit) & ~rows[:, None] & ~columns
        if unexplained.any() or off.median() > limit + 10 * batch.by_pair((expected - truth).abs()).median():
            return False
    return True


def _sum_over(name: str, exact: Mapping[str, Tensor]) -> Tensor:
    """The block of a parameter, or the sum over a layer's own parameters, or over all."""
    if name in exact:
        return exact[name]
    parts = [block for key, block in exact.items() if name in (WHOLE, _layer(key))]
    return torch.stack(parts).sum(0)


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0] or ROOT


def _sizes(block: Tensor) -> tuple[float, float]:
    exact = block.double()
    return float(exact.norm()), float(exact.abs().max())


def _message(batch: _Batch, comparison: _Comparison, wrong: Sequence[str]) -> str:
    name = wrong[0]
    found, expected = comparison.found[name], comparison.expected[name]
    place = np.unravel_index(int((found - expected).abs().nan_to_num(torch.inf).argmax()), found.shape)
    first = 1 if batch.reduce == "each" else 0
    pair = (batch.rows[place[first]], batch.columns[place[first + 1]])
    if name == WHOLE:
        where = "the sum over all layers"
    else:
        layer = _layer(name) if name in batch.names else name
        kind = type(batch.model.get_submodule("" if layer == ROOT else layer)).__name__
        where = f"layer {layer!r} ({kind})" + (f", parameter {name!r}" if name in batch.names else "")
    further = f", as {len(wrong) - 1} further blocks are" if len(wrong) > 1 else ""
    return (
        f"{where}: the kernel of samples {pair[0]} and {pair[1]} is {float(found[place]):.8g} in the batch and "
        f"{float(expected[place]):.8g} by plain autograd on {len(batch.rows)} samples alone, off by "
        f"{comparison.errors[name]:.1e}{further}; expected at most {comparison.tolerance:.0e}; take engine='reference' "
        "or leave the layer out by parameters=, and see that no output depends on other samples"
    )


def _chosen(count: int, wanted: int, seed: int) -> tuple[int, ...]:
    """The first, the last, and others of ``count`` numbers, ascending."""
    if wanted >= count:
        return tuple(range(count))
    ends = [0, count - 1][:wanted]
    others = np.random.default_rng(seed).choice(np.arange(1, count - 1), wanted - len(ends), replace=False)
    return tuple(sorted([*ends, *others.tolist()]))


def _part(inputs: Any, samples: Sequence[int]) -> Any:
    return tree_map_only(Tensor, lambda leaf: leaf[list(samples)], inputs)


def _bytes(leaf: Tensor) -> bytes:
    return leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
