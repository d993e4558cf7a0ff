"""Schedules: wrong arguments; what they do stands in their doctests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ntkdyn as nd
from ntkdyn.errors import ConfigurationError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nd.every(0), r"found n=0, expected a whole number from 1 on"),
        (lambda: nd.every("100"), r"found n='100', expected a whole number"),  # type: ignore[arg-type]
        (lambda: nd.every(2.5), r"found n=2\.5, expected a whole number"),  # type: ignore[arg-type]
        (lambda: nd.at_steps([1, -1]), r"found step -1, expected steps from 0 on"),
        (lambda: nd.at_steps([1.5]), r"found step 1\.5, expected whole numbers"),  # type: ignore[list-item]
        (lambda: nd.log_spaced(10, 1, 3), r"expected 1 <= first <= last"),
        (lambda: nd.at_epochs([1], 0), r"found steps_per_epoch=0"),
        (lambda: nd.paired(nd.every(4), 0), r"found dt=0"),
    ],
)
def test_wrong_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_numbers_of_numpy() -> None:
    assert nd.every(np.int64(3))(6)
    assert nd.at_steps(np.arange(0, 6, 2)).steps == {0, 2, 4}
