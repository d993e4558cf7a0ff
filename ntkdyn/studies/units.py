"""How many units are nonlinear, and how nonlinear they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .curves import Panel, draw_curves
from .recorded import Datasets, by_series, spread, time_axis, variable

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from ..results import Run

NEED = "no unit counts are recorded; gate the network and record with the probe units"


class Units:
    """Nonlinear units over training, counted and weighted by |1 - slope|."""

    name = "units"
    title = "Nonlinear units"
    reading = (
        "The active count takes every unit that is not frozen as one; the weighted count takes it as |1 - slope|: "
        "equal counts are not equal nonlinearity."
    )
    scope = "run"
    with_arms = True

    def unavailable(self, source: Run, /) -> str | None:
        """Need recorded unit counts."""
        return None if "units/active" in source and "units/weighted" in source else NEED

    def measure(self, source: Run, /) -> xr.Dataset:
        """Return active and weighted units [step], and by gate [step, gate]."""
        import xarray as xr

        active = np.asarray(source["units/active"], dtype=np.float64)
        weighted = np.asarray(source["units/weighted"], dtype=np.float64)
        total = np.asarray(source["units/total"], dtype=np.float64).reshape(-1)
        field = source.field("units/active")
        names = field.coordinates.get(field.dims[-1], np.arange(active.shape[1]))
        attributes = source.attributes("units")
        return xr.Dataset(
            {
                "active": variable("step", active.sum(1), "units", "active units"),
                "weighted": variable("step", weighted.sum(1), "units", "units weighted by |1 - slope|"),
                "active_of_gate": variable(("step", "gate"), active, "units", "active units"),
                "weighted_of_gate": variable(("step", "gate"), weighted, "units", "units weighted by |1 - slope|"),
                "total_of_gate": variable("gate", total, "units", "units"),
            },
            coords=time_axis(source, "units") | {"gate": ("gate", [str(name) for name in names])},
            attrs={name: str(attributes.get(name, "")) for name in ("always_active", "uncounted")},
        )

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say the counts at start and end, and what is not a gate."""
        lines = []
        for series, members in by_series(datasets).items():
            total = members[0]["total_of_gate"].values.sum()
            lines.append(
                f"{series + ': ' if series else ''}of {total:.0f} units "
                f"{spread([one['active'].values[0] for one in members], 4)} are active at the start and "
                f"{spread([one['active'].values[-1] for one in members], 4)} at the end; weighted by |1 - slope| "
                f"{spread([one['weighted'].values[0] for one in members], 4)} and "
                f"{spread([one['weighted'].values[-1] for one in members], 4)}."
            )
            lines.append(
                f"Always active and in no count: {members[0].attrs['always_active'] or 'nothing'}; "
                f"nonlinear but uncounted: {members[0].attrs['uncounted'] or 'nothing'}."
            )
        return lines

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw both counts."""
        draw_curves(
            figure,
            datasets,
            [Panel({"active": "active", "weighted": "weighted by |1 - slope|"}, "units (count)", from_zero=True)],
        )
