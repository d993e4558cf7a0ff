"""neural_tangents.stax, imported without TensorFlow and used in float64; jax's own settings stay as they are."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ..errors import MissingPackage

# The extra, and what it cannot hold: pip would install TensorFlow with it, which none of these kernels needs.
INSTALL = "pip install -c constraints.txt '.[theory]' && pip install --no-deps neural-tangents==0.6.5"


@contextmanager
def stax_layers(where: str) -> Iterator[Any]:
    """Give neural_tangents.stax, computing in float64 on the CPU for as long as the block lasts."""
    stax = _import_stax(where)
    import jax
    from jax.experimental import enable_x64

    # On a GPU jax would take most of the memory that torch needs.
    with enable_x64(), jax.default_device(jax.devices("cpu")[0]):
        yield stax


def _import_stax(where: str) -> Any:
    # neural_tangents.experimental needs TensorFlow and nothing of the rest needs it: an empty module stands in for it
    # while neural_tangents is imported, and is gone afterwards.
    name = "neural_tangents.experimental"
    stand_in = ModuleType(name)
    before = sys.modules.setdefault(name, stand_in)
    try:
        with warnings.catch_warnings():
            # jax 0.4.38 deprecates names that neural-tangents 0.6.5 imports.
            warnings.simplefilter("ignore", DeprecationWarning)
            from neural_tangents import stax
    except (ImportError, AttributeError) as error:
        raise MissingPackage(
            f"{where}: found {type(error).__name__}: {' '.join(str(error).split())}; expected jax 0.4.38 and "
            f"neural-tangents 0.6.5; in a checkout: {INSTALL}"
        ) from error
    finally:
        if before is stand_in:
            del sys.modules[name]
            package = sys.modules.get("neural_tangents")
            if getattr(package, "experimental", None) is stand_in:
                del package.experimental  # type: ignore[union-attr]
    return stax
