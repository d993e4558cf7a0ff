"""Numbers of a study as CSV and JSON: the same bytes for the same recording, no dates, no paths.

CSV, one value a line: run, variable, unit, one column a coordinate (empty where a variable has it not), value.
JSON: the same by run and variable, values as nested lists in the order of their dims. NaN is empty in CSV and
null in JSON.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import xarray as xr


def as_csv(datasets: Mapping[str, xr.Dataset]) -> bytes:
    """Return the datasets in tidy long form, sorted by run and variable."""
    coordinates = sorted({str(name) for dataset in datasets.values() for name in dataset.coords})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["run", "variable", "unit", *coordinates, "value"])
    for label in sorted(datasets):
        dataset = datasets[label]
        for name in sorted(str(variable) for variable in dataset.data_vars):
            array = dataset[name]
            columns = [_column(array, coordinate) for coordinate in coordinates]
            unit = array.attrs.get("units", "1")
            values = _texts(np.asarray(array.values).reshape(-1))
            writer.writerows([label, name, unit, *row] for row in zip(*columns, values, strict=True))
    return buffer.getvalue().encode()


def as_json(study: str, datasets: Mapping[str, xr.Dataset], sentences: Sequence[str]) -> bytes:
    """Return the datasets with dims, units, long names and the sentences made of them."""
    content = {
        "study": study,
        "sentences": list(sentences),
        "runs": {
            label: {
                "attributes": {str(key): _plain(value) for key, value in dataset.attrs.items()},
                "coordinates": {str(name): _described(dataset[name]) for name in dataset.coords},
                "variables": {str(name): _described(dataset[name]) for name in dataset.data_vars},
            }
            for label, dataset in datasets.items()
        },
    }
    return (json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n").encode()


def _column(array: xr.DataArray, coordinate: str) -> list[str]:
    """The coordinate at every element of the array in C order; empty where the array does not have it."""
    size = int(array.size)
    if coordinate not in array.coords or not set(array.coords[coordinate].dims) <= set(array.dims):
        return [""] * size
    along = array.coords[coordinate]
    shape = [array.sizes[dim] if dim in along.dims else 1 for dim in array.dims]
    values = np.asarray(along.transpose(*[dim for dim in array.dims if dim in along.dims]).values).reshape(shape)
    texts = np.asarray(_texts(values.reshape(-1)), dtype=object).reshape(shape)
    return list(np.broadcast_to(texts, array.shape).reshape(-1))


def _texts(values: NDArray[Any]) -> list[str]:
    if np.issubdtype(values.dtype, np.floating):
        # item() of float32 would print digits that were never recorded.
        shortest = str if values.dtype == np.float32 else lambda value: repr(float(value))
        return ["" if np.isnan(value) else shortest(value) for value in values]
    return [str(value) for value in values.tolist()]


def _described(array: xr.DataArray) -> dict[str, Any]:
    return {
        "dims": [str(dim) for dim in array.dims],
        "unit": str(array.attrs.get("units", "1")),
        "long_name": str(array.attrs.get("long_name", "")),
        "values": _plain(array.values),
    }


def _plain(value: Any) -> Any:
    """Lists, numbers, texts and null for json.dumps; float32 in its own shortest digits."""
    if isinstance(value, np.ndarray):
        if value.ndim:
            return [_plain(part) for part in value]
        return _plain(value[()])
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, np.float32):
        value = float(str(value))
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, (int, np.integer)):
        return int(value)
    return str(value)
