"""Bands of a probe while they are written: made under guard, checked, charged to their probe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import ProbeError
from ..probe import Bands
from ..store.segment import Array
from .arrays import as_array, checked_array
from .guard import random_states, undisturbed
from .watches import Watched


class FailedBands(Exception):
    """Bands of a probe failed while they were written; what was written of that step is gone."""

    def __init__(self, watched: Watched, group: str, error: Exception, where: str) -> None:
        super().__init__(str(error))
        self.watched, self.group, self.error, self.where = watched, group, error, where


def guarded(bands: Bands, watched: Watched, group: str, name: str, where: str, model: nn.Module) -> Bands:
    """Bands that leave the training of ``model`` alone; whatever fails in them is FailedBands.

    Random states run on from band to band, as in one snapshot. All else that is guarded is put back after each band.
    """
    declaration = watched.fields[group][name]
    charged = 0.0

    def make() -> Iterator[Array]:
        nonlocal charged
        # What another group has made it begin again is not what the next snapshot will cost.
        watched.seconds -= charged
        charged = 0.0
        begun: Any = None
        states: Sequence[Callable[[], object]] = ()
        done = 0
        try:
            while True:
                started = time.perf_counter()
                # Not around the yield: what is done with a band is no part of the snapshot.
                with undisturbed(model):
                    for put_back in states:
                        put_back()
                    begun = iter(bands) if begun is None else begun
                    band = next(begun, None)
                    if band is None:
                        break
                    array = as_array(band)
                    if done + len(array) > declaration.shape[0]:
                        raise ProbeError(
                            f"{where}, field {name!r}: found bands of at least {done + len(array)} rows in all, "
                            f"expected {declaration.shape[0]}"
                        )
                    part = replace(declaration, shape=(len(array), *declaration.shape[1:]))
                    array = checked_array(array, part, f"{where}, field {name!r}, rows from {done}")
                    states = random_states()
                taken = time.perf_counter() - started
                watched.seconds += taken
                charged += taken
                done += len(array)
                yield array
            if done != declaration.shape[0]:
                raise ProbeError(
                    f"{where}, field {name!r}: found bands of {done} rows in all, expected {declaration.shape[0]}"
                )
        except Exception as error:
            raise FailedBands(watched, group, error, where) from error
        finally:
            # Bands that were left before their end: what their author does last belongs to the snapshot too. Whatever
            # has no close ends with its last reference, which is ours.
            try:
                with undisturbed(model):
                    if hasattr(begun, "close"):
                        begun.close()
                    begun = None
            except Exception as error:
                raise FailedBands(watched, group, error, where) from error

    return Bands(make)
