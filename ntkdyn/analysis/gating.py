"""How gates move: patterns of open and closed units, when they settle, and the shape of what stays nonlinear.

A gate pattern is bool [S, N, U]: snapshot, sample, unit, True where the preactivation is positive. U counts channel
times position, channel-major (what `pattern.reshape(S, N, -1)` makes of [S, N, C, *space]). Recorded patterns are
bit-packed; `unpack_pattern` gives this form. The sign of a frozen unit means nothing: `frozen` masks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ShapeError, UndefinedMeasure
from .kernels import FloatArray


class EffectiveWidth(NamedTuple):
    """Active units per unit of path length, and mean active channels over the layers that have any."""

    per_path: Any
    per_layer: Any


def unpack_pattern(packed: ArrayLike, units: int) -> NDArray[np.bool_]:
    """Bit-packed patterns uint8 [..., ceil(U / 8)] as bool [..., U].

    The inverse of np.packbits along the last axis (first unit in the highest bit).

    Raises: ShapeError: not bytes, or their number does not fit the units.
    """
    array = np.asarray(packed)
    if array.dtype != np.uint8 or not array.ndim or array.shape[-1] != -(-units // 8):
        raise ShapeError(
            f"unpack_pattern: packed has shape {array.shape} and type {array.dtype}; expected uint8 "
            f"[..., {-(-units // 8)}] for {units} units"
        )
    return np.unpackbits(array, axis=-1, count=units).astype(bool)


def _as_patterns(
    patterns: ArrayLike, frozen: ArrayLike | None, *, where: str
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Patterns [S, N, U] and the live (not frozen) units [S, U]."""
    gates = np.asarray(patterns)
    if gates.ndim != 3 or gates.dtype != bool or 0 in gates.shape:
        raise ShapeError(
            f"{where}: patterns have shape {gates.shape} and type {gates.dtype}; expected bool [S, N, U]; use "
            f"unpack_pattern for recorded ones"
        )
    snapshots, _, units = gates.shape
    if frozen is None:
        return gates, np.ones((snapshots, units), dtype=bool)
    mask = np.asarray(frozen)
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.dtype != bool or mask.ndim != 2 or len(mask) not in (1, snapshots) or units % max(mask.shape[1], 1):
        raise ShapeError(
            f"{where}: frozen has shape {np.shape(frozen)} and type {mask.dtype}; expected bool [C] or "
            f"[{snapshots}, C] with C dividing the {units} units"
        )
    live = ~np.repeat(mask, units // mask.shape[1], axis=1)
    return gates, np.broadcast_to(live, (snapshots, units))


def gate_hamming(patterns: ArrayLike, frozen: ArrayLike | None = None) -> FloatArray:
    """Hamming distance between the gate patterns of all snapshots: mean over samples and units of 1[g != g'].

    Units frozen at either of the two snapshots are left out; NaN where none is left.

    Args: patterns: bool [S, N, U].  frozen: bool [S, C] or [C], C a divisor of U.
    Returns: float64 [S, S], symmetric, in [0, 1]; dimensionless.
    Raises: ShapeError: other shapes or types.
    """
    gates, live = _as_patterns(patterns, frozen, where="gate_hamming")
    # Signs +1, -1 and 0 for masked units: the Gram matrix counts agreements minus disagreements, exactly.
    signs = np.where(live[:, None, :], np.where(gates, 1.0, -1.0), 0.0).reshape(len(gates), -1)
    shared = live.astype(np.float64) @ live.T.astype(np.float64) * gates.shape[1]
    counted = np.where(shared > 0, shared, np.nan)
    return np.asarray((shared - signs @ signs.T) / (2 * counted))


def flips(patterns: ArrayLike, frozen: ArrayLike | None = None) -> NDArray[np.int64]:
    """Number of samples on which each unit's gate flipped between consecutive snapshots; frozen units count 0.

    Args: patterns: bool [S, N, U].  frozen: bool [S, C] or [C], C a divisor of U.
    Returns: int64 [S - 1, U], counts in 0 ... N.
    Raises: ShapeError: other shapes or types.
    """
    gates, live = _as_patterns(patterns, frozen, where="flips")
    changed = (gates[1:] != gates[:-1]).sum(axis=1, dtype=np.int64)
    return np.where(live[1:] & live[:-1], changed, 0)


def settle_step(
    steps: ArrayLike, patterns: ArrayLike, frozen: ArrayLike | None = None, *, tolerance: float
) -> FloatArray:
    """First recorded step from which on a unit's pattern stays within `tolerance` of its final pattern.

    Args:
        steps: recorded steps [S], increasing.
        patterns: bool [S, N, U].
        frozen: bool [S, C] or [C]; a unit frozen at the last snapshot has no pattern and gets NaN.
        tolerance: largest Hamming distance (share of samples, 0 ... 1) that counts as settled; state it.
    Returns: float64 [U], steps.
    Raises: ShapeError: other shapes or types.  UndefinedMeasure: tolerance outside of 0 ... 1.
    """
    where = "settle_step"
    gates, live = _as_patterns(patterns, frozen, where=where)
    times = np.asarray(steps)
    if times.shape != (len(gates),) or (np.diff(times) <= 0).any():
        raise ShapeError(f"{where}: steps are {times.tolist()}; expected {len(gates)} increasing ones")
    if not 0 <= tolerance <= 1:
        raise UndefinedMeasure(f"{where}: tolerance is {tolerance}; expected a share of samples, 0 ... 1")
    away = (gates != gates[-1]).mean(axis=1) > tolerance
    # Index after the last snapshot that is away from the end, 0 where none is.
    settled = np.where(away.any(axis=0), len(gates) - np.argmax(away[::-1], axis=0), 0)
    return np.where(live[-1], times[settled].astype(np.float64), np.nan)


def core_shape(frozen: Mapping[str, ArrayLike], *, channels: Mapping[str, int] | None = None) -> NDArray[np.int64]:
    """Active channels of each layer, in the order of `frozen`: the shape of the core that stays nonlinear.

    Args:
        frozen: gate name -> bool [C], or [S, C] over snapshots.
        channels: gate name -> number of units; needed where one slope serves a whole layer (frozen is [1]).
    Returns: int64 [L] or [S, L], counts.
    Raises: ShapeError: no gate, other shapes or types, unequal numbers of snapshots, or channels that do not fit.
    """
    where = "core_shape"
    if not frozen:
        raise ShapeError(f"{where}: no gates; expected at least one")
    columns = []
    for name, values in frozen.items():
        mask = np.asarray(values)
        if mask.dtype != bool or mask.ndim not in (1, 2) or 0 in mask.shape:
            raise ShapeError(f"{where}: gate '{name}' has {mask.dtype} {mask.shape}; expected bool [C] or [S, C]")
        units = mask.shape[-1] if channels is None else channels.get(name, mask.shape[-1])
        if units % mask.shape[-1]:
            raise ShapeError(
                f"{where}: gate '{name}' has {units} channels and {mask.shape[-1]} slopes; expected a multiple"
            )
        columns.append((~mask).sum(axis=-1, dtype=np.int64) * (units // mask.shape[-1]))
    if len({np.shape(column) for column in columns}) != 1:
        raise ShapeError(f"{where}: gates have {[np.shape(c) for c in columns]} snapshots; expected equal numbers")
    return np.stack(columns, axis=-1)


def effective_width(active: ArrayLike, normalized_path_length: ArrayLike) -> EffectiveWidth:
    """Both effective widths: active units / NAPL, and mean active channels over layers with at least one active unit.

    Args: active: active units per layer [..., L].  normalized_path_length: NAPL [...], active units per path.
    Returns: EffectiveWidth(per_path [...], per_layer [...]), units; NaN where nothing is active.
    Raises: ShapeError: shapes do not fit.
    """
    counts = np.asarray(active, dtype=np.float64)
    lengths = np.asarray(normalized_path_length, dtype=np.float64)
    if counts.ndim < 1 or counts.shape[:-1] != lengths.shape:
        raise ShapeError(
            f"effective_width: active has shape {counts.shape} and the path length {lengths.shape}; expected [..., L] "
            f"and [...]"
        )
    total = counts.sum(axis=-1)
    layers = (counts > 0).sum(axis=-1)
    alive = (total > 0) & (lengths > 0)
    per_path = np.where(alive, total / np.where(alive, lengths, 1.0), np.nan)
    per_layer = np.where(layers > 0, total / np.maximum(layers, 1), np.nan)
    return EffectiveWidth(per_path[()], per_layer[()])
