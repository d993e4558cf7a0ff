"""Tiles of a kernel that is larger than memory: computed by any number of processes, handed to a sink.

The kernel is cut into square tiles of samples, of which a symmetric one needs only those on and above the diagonal.
What is missing goes round-robin over the processes of torch.distributed. A tile is one call of ``empirical_ntk``, so
its bits do not depend on how many processes there are, nor on which of them computes it, nor on interruptions.
"""

from __future__ import annotations

import hashlib
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from .. import __version__
from ..clone import structural_clone, unwrapped
from ..errors import ConfigurationError, UndefinedMeasure
from ..progress import progress_bar
from . import Engine, Reduction, empirical_ntk, resolve_parameters
from .peers import Peers
from .preparation import Metric
from .problem import Forward, sample_count

# Of the default tile: large enough that computing its products dwarfs differentiating its samples.
TILE_BYTES = 128 * 2**20
TILE_SAMPLES = 1024
# Tiles of each process between two times that all wait for each other: few, so that a failure is soon known to all;
# more than one, so that tiles of unequal cost even out.
_ROUND = 8
_DIMS: Mapping[int, tuple[str, ...]] = {
    2: ("sample", "sample_2"),
    3: ("output", "sample", "sample_2"),
    4: ("sample", "sample_2", "output", "output_2"),
}

Array = np.ndarray[Any, Any]


class TileSink(Protocol):
    """Where finished tiles go: one place that all processes reach. ``ntkdyn.store.tiles.TileWriter`` is one.

    A tile is named by its (row, column) in the grid of tiles.
    """

    def begin(self, kernel: Mapping[str, Any]) -> Mapping[str, Any]:
        """Take up a new kernel, or go on with one; called before all else, first in the process of rank 0.

        Args: kernel: JSON values: dims, shape, dtype, tile, symmetric (only tiles with column >= row will come);
            network, inputs, inputs_2, settings: what the kernel is of; id, first, made_with: what an earlier start
            may have given differently.
        Returns: the kernel as it was given at the very first start.
        Raises: what is there already is another kernel.
        """
        ...

    def has(self, tile: tuple[int, int], /) -> bool:
        """Whether a tile was written before."""
        ...

    def write(self, tile: tuple[int, int], array: Array, /) -> None:
        """Take a tile; once this has returned, it must survive the end of the process."""
        ...


def sharded_ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    sink: TileSink,
    tile: int | None = None,
    reduce: Reduction = "trace",
    forward: Forward | None = None,
    parameters: Iterable[str] | None = None,
    metric: Metric | None = None,
    engine: Engine = "layerwise",
    dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    timeout: float = 1800.0,
    progress: bool = False,
) -> int:
    """Empirical NTK in tiles  Θ(x1[i·t : (i+1)·t], x2[j·t : (j+1)·t]), computed by all processes, handed to a sink.

    Call it once in every process of the default process group, with the same arguments; without a process group it
    computes everything here. Called again after an interruption it computes what is missing. Tiles are bitwise the same
    for any number of processes, given the same tile size, number of threads, device and version of torch.

    Each tile differentiates its own samples, so a sample is differentiated N / tile times instead of once. The
    products of a tile grow with tile², so what this adds depends on the tile and not on N. CPU time on one core, as a
    multiple of the kernel in one piece: MLP 784-512-512-512-10, 1000 samples, reduce="full", tiles of 500, 250, 125
    samples 0.9, 0.8, 1.1; "trace" 1.5, 2.8, 6.2; CNN of five convolutions, 256 images of 32×32, "full", tiles of 128
    and 64 samples 1.4, 2.1. So take tiles as large as memory allows.

    Args:
        model, x1, x2, reduce, forward, parameters, metric, engine, dtype, max_memory: as in ``empirical_ntk``.
            With a process group of backend nccl, a network elsewhere is copied to the device of this process's local
            rank, and so is each tile's part of the inputs; otherwise both stay where they are.
            max_memory bounds the computation of one tile. Layers in training mode are refused: a tile would have
            statistics of its own.
        sink: takes the tiles, e.g. ``TileWriter("kernel")``; in a folder that all processes see.
        tile: samples along each side of a tile, None for the most that fit into 128 MiB, at most 1024. One larger
            than the number of samples makes one tile.
        timeout: seconds that a process waits for the others after 8 tiles of its own.
        progress: show a bar in the process of rank 0.

    Returns: number of tiles that this process computed.
    Raises:
        ProcessFailure: another process failed (with its message), ended, or does not answer within timeout.
        ConfigurationError: a tile below 1; a kernel in half precision; processes that were given different networks,
            inputs or settings; torchrun without a process group.
        UndefinedMeasure: NaN or Inf in the inputs.
        Whatever ``empirical_ntk`` and the sink raise, in the process where it happens.
    """
    with Peers(timeout) as peers:
        with peers.together():
            task = _task(model, x1, x2, tile, reduce, forward, parameters, metric, engine, dtype, max_memory)
        peers.compare({key: task.kernel[key] for key in task.kernel if key not in ("id", "first", "made_with")})
        known: Mapping[str, Any] = {}
        for turn in (True, False):
            with peers.together():
                if (peers.rank == 0) == turn:
                    known = sink.begin(task.kernel)
                    _compare_first(known, task.kernel)
        peers.compare({"sink (each process sees another folder)": known["id"]})
        with peers.together():
            here = [peers.rank == 0 and not sink.has(place) for place in task.places]
            if peers.rank == 0 and not all(here):
                _warn_of_other_bits(known["made_with"], task.kernel["made_with"])
        missing = [place for place, wanted in zip(task.places, peers.of_first(here), strict=True) if wanted]

        done = 0
        shown = progress and peers.rank == 0
        with progress_bar(len(task.places), what="tiles", done=len(task.places) - len(missing), shown=shown) as bar:
            for start in range(0, len(missing), _ROUND * peers.size):
                batch = missing[start : start + _ROUND * peers.size]
                mine = batch[peers.rank :: peers.size]
                with peers.together():
                    for place in mine:
                        sink.write(place, task.compute(place))
                        done += 1
                        bar.update()
                bar.update(len(batch) - len(mine))
    return done


@dataclass(frozen=True)
class _Task:
    """One kernel in tiles: what it is, which tiles it has, how one is computed."""

    kernel: Mapping[str, Any]
    places: Sequence[tuple[int, int]]
    block: Callable[[slice, slice | None], Tensor]

    def compute(self, place: tuple[int, int]) -> Array:
        row, column = place
        size = self.kernel["tile"]
        rows, columns = slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size)
        on_diagonal = self.kernel["symmetric"] and row == column
        array: Array = self.block(rows, None if on_diagonal else columns).cpu().numpy()
        return array


def _task(
    model: nn.Module,
    x1: Any,
    x2: Any,
    tile: int | None,
    reduce: Reduction,
    forward: Forward | None,
    parameters: Iterable[str] | None,
    metric: Metric | None,
    engine: Engine,
    dtype: torch.dtype | None,
    max_memory: int | None,
) -> _Task:
    if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
        raise ConfigurationError(f"sharded_ntk: tile is {tile!r}; expected a number of samples, at least 1")
    sizes = sample_count(x1, "x1"), sample_count(x1 if x2 is None else x2, "x2")
    for name, inputs in (("x1", x1), ("x2", x2)):
        # Here, because the tile that meets it may be hours away.
        if any(leaf.is_floating_point() and not leaf.isfinite().all() for leaf in _tensors(inputs)):
            raise UndefinedMeasure(f"{name} holds NaN or Inf; the kernel has no value there; leave these samples out")
    names = resolve_parameters(model, parameters)
    local, local_names, device = _on_own_device(model, names)

    def block(rows: slice, columns: slice | None) -> Tensor:
        with nullcontext() if device is None else torch.cuda.device(device):
            other = None if columns is None else _part(x1 if x2 is None else x2, columns, device)
            return empirical_ntk(
                local,
                _part(x1, rows, device),
                other,
                reduce=reduce,
                forward=forward,
                parameters=local_names,
                metric=metric,
                engine=engine,
                dtype=dtype,
                max_memory=max_memory,
            ).detach()

    first = block(slice(0, 1), None if x2 is None else slice(0, 1)).cpu()
    if first.dtype not in (torch.float32, torch.float64):
        raise ConfigurationError(
            f"sharded_ntk: the kernel would be {first.dtype}; expected float32 or float64, because in half precision "
            "it is not positive semi-definite any more; give dtype=torch.float32"
        )
    dims = _DIMS[first.dim()]
    samples = dict(zip(("sample", "sample_2"), sizes, strict=True))
    tile = min(tile or _default_tile(first.nbytes), max(sizes))
    counts = [-(-size // tile) for size in sizes]
    symmetric = x2 is None
    kernel = {
        "id": secrets.token_hex(8),
        "dims": list(dims),
        "shape": [samples.get(dim, first.shape[axis]) for axis, dim in enumerate(dims)],
        "dtype": first.numpy().dtype.newbyteorder("<").str,
        "tile": tile,
        "symmetric": symmetric,
        "network": _network_digest(model),
        "inputs": _digest(x1),
        "inputs_2": None if x2 is None else _digest(x2),
        "settings": {
            "reduce": repr(reduce),
            "parameters": list(names),
            "metric": None
            if metric is None
            else _digest({key: torch.as_tensor(metric[key]) for key in sorted(metric)}),
            "engine": engine,
        },
        "first": [float(first.norm()), *first.reshape(-1)[:15].tolist()],
        "made_with": {
            "ntkdyn": __version__,
            "torch": torch.__version__,
            "device": next(model.parameters()).device.type if device is None else device.type,
            "threads": torch.get_num_threads(),
            "max_memory": max_memory,
        },
    }
    places = [(row, column) for row in range(counts[0]) for column in range(row if symmetric else 0, counts[1])]
    return _Task(kernel, places, block)


def _number(value: float | Tensor) -> float | Tensor:
    return value if isinstance(value, Tensor) else float(value)


def _default_tile(entry_bytes: int) -> int:
    """Samples along the side of a tile of at most 128 MiB; ``entry_bytes`` belong to one pair of samples."""
    return max(1, min(TILE_SAMPLES, int((TILE_BYTES / entry_bytes) ** 0.5)))


def _tensors(inputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]


def _part(inputs: Any, rows: slice, device: torch.device | None) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor[rows] if device is None else tensor[rows].to(device), inputs)


def _on_own_device(model: nn.Module, names: tuple[str, ...]) -> tuple[nn.Module, tuple[str, ...], torch.device | None]:
    """The network and its parameters' names on the GPU of this process under nccl; None: where it is already."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl"):
        return model, names, None
    fallback = dist.get_rank() % max(torch.cuda.device_count(), 1)
    device = torch.device("cuda", dist.get_node_local_rank(fallback_rank=fallback))
    if all(tensor.device == device for tensor in [*model.parameters(), *model.buffers()]):
        return model, names, device
    clone = structural_clone(model, share_parameters=False).to(device)
    # By position, because the clone has lost the wrappers of inner modules (torch.compile), part of their names.
    before = [name for name, _ in unwrapped(model).named_parameters()]
    after = dict(zip(before, [name for name, _ in clone.named_parameters()], strict=True))
    return clone, tuple(after[name] for name in names), device


def _digest(inputs: Any) -> str:
    """SHA-256 over structure, dtypes, shapes and bytes of a pytree."""
    leaves, structure = tree_flatten(inputs)
    digest = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            _add(digest, "", leaf)
        elif isinstance(leaf, (bool, int, float, str, type(None))):
            digest.update(f"{leaf!r}\n".encode())
        else:  # its repr may name an address in memory
            digest.update(f"{type(leaf).__qualname__}\n".encode())
    return digest.hexdigest()


def _network_digest(model: nn.Module) -> str:
    """SHA-256 over classes, settings, training flags, parameters and buffers of all layers."""
    network = unwrapped(model)
    digest = hashlib.sha256()
    for name, module in network.named_modules():
        digest.update(f"{name} {type(module).__qualname__}({module.extra_repr()}) {module.training}\n".encode())
    # Not state_dict: it would run the user's hooks.
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        _add(digest, name, tensor)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    values = tensor.detach().cpu().contiguous()
    digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
    digest.update(values.reshape(-1).view(torch.uint8).numpy().data)


def _compare_first(known: Mapping[str, Any], kernel: Mapping[str, Any]) -> None:
    """Weights and layers may be equal and the forward pass not: compare the kernel of the first sample itself."""
    before, now = np.array(known["first"], dtype="f8"), np.array(kernel["first"], dtype="f8")
    if before.shape != now.shape or not np.abs(before - now).max() <= 1e-3 * before[0]:
        raise ConfigurationError(
            f"sharded_ntk: the kernel of the first sample has norm {now[0]:g}, in the sink {before[0]:g}; the weights "
            "are the same, so the forward pass is another one; choose another folder, or go on with the earlier code"
        )


def _warn_of_other_bits(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [f"{key} {before.get(key)!r} -> {now[key]!r}" for key in now if before.get(key) != now[key]]
    if changed:
        warnings.warn(
            f"sharded_ntk: tiles before were made with other {', '.join(changed)}; the rest equals them up to "
            "rounding, not bitwise",
            RuntimeWarning,
            stacklevel=3,
        )
