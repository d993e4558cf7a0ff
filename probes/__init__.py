"""The probes that come with ntkdyn, one file each; loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME_OF = {
    "EmpiricalNTK": "ntk",
    "GateTrajectory": "gates",
    "NonlinearUnits": "units",
    "PathLength": "path_length",
    "Outputs": "outputs",
}

if TYPE_CHECKING:
    from .gates import GateTrajectory as GateTrajectory
    from .ntk import EmpiricalNTK as EmpiricalNTK
    from .outputs import Outputs as Outputs
    from .path_length import PathLength as PathLength
    from .units import NonlinearUnits as NonlinearUnits

__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    raise AttributeError(f"module 'ntkdyn.probes' has no attribute {name!r}; probes: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)
