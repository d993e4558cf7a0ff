"""Neural tangent kernels and training dynamics of gated networks.

Public names load on first use: ``import ntkdyn`` imports neither torch nor h5py nor matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "kernel": ("NTKOperator", "Projection", "SummedOutputs", "empirical_ntk", "explain_ntk", "ntk_diagonal"),
    "kernel.selfcheck": ("check_ntk",),
    "kernel.sharded": ("sharded_ntk",),
    "store.tiles": ("TileWriter",),
    "store.tile_reader": ("TiledKernel",),
    "conversion": ("gate_network",),
    "gates": ("Gate", "slopes", "nonlinear_units", "slope_penalty", "freeze_linear"),
    "linearization": ("Linearizer",),
    "paths": ("PathLengths", "path_lengths", "average_path_length"),
    "posttraining": ("Linearized", "linearize"),
    "probe": ("Bands", "Field", "Probe", "Snapshot"),
    "recorder": ("Recorder", "Watch", "measure"),
    "datasets": ("probe_batch",),
    "results": ("Run", "Sweep"),
    "schedule": ("Schedule", "at_epochs", "at_steps", "every", "log_spaced", "paired"),
    "theory": ("infinite_width_nngp", "infinite_width_ntk"),
    "errors": ("NtkdynError",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from .conversion import gate_network as gate_network
    from .datasets import probe_batch as probe_batch
    from .errors import NtkdynError as NtkdynError
    from .gates import Gate as Gate
    from .gates import freeze_linear as freeze_linear
    from .gates import nonlinear_units as nonlinear_units
    from .gates import slope_penalty as slope_penalty
    from .gates import slopes as slopes
    from .kernel import NTKOperator as NTKOperator
    from .kernel import Projection as Projection
    from .kernel import SummedOutputs as SummedOutputs
    from .kernel import empirical_ntk as empirical_ntk
    from .kernel import explain_ntk as explain_ntk
    from .kernel import ntk_diagonal as ntk_diagonal
    from .kernel.selfcheck import check_ntk as check_ntk
    from .kernel.sharded import sharded_ntk as sharded_ntk
    from .linearization import Linearizer as Linearizer
    from .paths import PathLengths as PathLengths
    from .paths import average_path_length as average_path_length
    from .paths import path_lengths as path_lengths
    from .posttraining import Linearized as Linearized
    from .posttraining import linearize as linearize
    from .probe import Bands as Bands
    from .probe import Field as Field
    from .probe import Probe as Probe
    from .probe import Snapshot as Snapshot
    from .recorder import Recorder as Recorder
    from .recorder import Watch as Watch
    from .recorder import measure as measure
    from .results import Run as Run
    from .results import Sweep as Sweep
    from .schedule import Schedule as Schedule
    from .schedule import at_epochs as at_epochs
    from .schedule import at_steps as at_steps
    from .schedule import every as every
    from .schedule import log_spaced as log_spaced
    from .schedule import paired as paired
    from .store.tile_reader import TiledKernel as TiledKernel
    from .store.tiles import TileWriter as TileWriter
    from .theory import infinite_width_nngp as infinite_width_nngp
    from .theory import infinite_width_ntk as infinite_width_ntk

__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    raise AttributeError(f"module 'ntkdyn' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
