"""What probes return: arrays, compared with what was declared."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ProbeError
from ..probe import Bands, Field
from ..store.segment import TEXT, Array


def checked_arrays(
    measured: Any, fields: Mapping[str, Field], recorded: Container[str], where: str
) -> dict[str, Array | Bands]:
    """Return arrays in their declared dtypes.

    Args: recorded: fields that are recorded already; static ones among them need not come again.
    Raises: ProbeError: names the field, what was found, what was declared.
    """
    if not isinstance(measured, Mapping):
        raise ProbeError(f"{where}: measure() gave {type(measured).__name__}, expected a mapping of field to array")
    unknown = sorted(set(map(str, measured)) - set(fields))
    if unknown:
        raise ProbeError(
            f"{where}, field {unknown[0]!r}: found no declaration, expected one of {', '.join(fields) or 'no field'}; "
            "return it from fields()"
        )
    arrays: dict[str, Array | Bands] = {}
    for name, one in fields.items():
        if isinstance(measured.get(name), Bands):
            if one.static or not one.shape or one.dtype == TEXT:
                raise ProbeError(
                    f"{where}, field {name!r}: found Bands, expected an array; they are for numbers [size, ...] of "
                    "each step"
                )
            arrays[name] = measured[name]
        elif name in measured:
            arrays[name] = checked_array(measured[name], one, f"{where}, field {name!r}")
        elif not (one.static and name in recorded):
            raise ProbeError(
                f"{where}, field {name!r}: found nothing, expected shape {list(one.shape)}; measure() must return it"
            )
    return arrays


def checked_array(value: Any, declaration: Field, where: str) -> Array:
    """One array in its declared dtype.  Raises: ProbeError."""
    array = as_array(value)
    if array.shape != tuple(declaration.shape):
        raise ProbeError(
            f"{where}: found shape {list(array.shape)}, expected {list(declaration.shape)} as declared; declare what "
            "is measured"
        )
    if declaration.dtype == TEXT:
        return array
    target = np.dtype(declaration.dtype)
    fits = np.can_cast(array.dtype, target, "same_kind") or (array.dtype.kind in "biu" and target.kind in "biu")
    if not fits:
        raise ProbeError(f"{where}: found dtype {array.dtype}, expected {target} as declared; declare what is measured")
    if array.dtype.kind == "f" and not declaration.attributes.get("allow_nan", False) and np.isnan(array).any():
        raise ProbeError(
            f"{where}: found NaN in {int(np.isnan(array).sum())} of {array.size} numbers, expected none; are "
            "weights and inputs finite? Declare attributes={'allow_nan': True} where NaN has a meaning"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(target)
    same = converted == array if target.kind in "biu" else np.isfinite(converted) | ~np.isfinite(array)
    if not np.all(same):
        raise ProbeError(
            f"{where}: found numbers beyond the range of {target}, expected them to fit; declare a larger dtype"
        )
    return converted


def as_array(value: Any) -> Array:
    """A copy of numbers, of a tensor or of a list of tensors, as an array of NumPy."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
        value = torch.stack(list(value))
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().resolve_conj().resolve_neg()
        # A copy: the tensor may be a part of the clone, or be shared with the next probe.
        return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy().copy()
    return np.array(value)


def shared_attributes(fields: Iterable[Field]) -> dict[str, Any]:
    """Attributes that all fields of a group have in common; they stand at the group too."""
    all_attributes = [one.attributes for one in fields]
    first = all_attributes[0] if all_attributes else {}
    return {
        key: value for key, value in first.items() if all(key in one and one[key] == value for one in all_attributes)
    }
