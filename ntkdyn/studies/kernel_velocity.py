"""How fast the tangent kernel moves, at one fixed dt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import UndefinedMeasure
from .curves import Panel, draw_curves, time_of
from .recorded import KERNEL_NEED, Datasets, by_set, each_set, kernel_sets, path_of, spread, trace_kernels, variable

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from ..results import Run


class KernelVelocity:
    """Kernel velocity S(K_t, K_t+dt)/dt from paired snapshots."""

    name = "kernel-velocity"
    title = "Kernel velocity"
    reading = (
        "Each point is the centered kernel distance between two snapshots that lie one fixed dt apart, per epoch; "
        "the number depends on dt (S grows like dt² for smooth motion, like dt for the noise of the gradients), so "
        "only velocities at the same dt may be compared."
    )
    scope = "run"

    def unavailable(self, source: Run, /) -> str | None:
        """Need kernels, steps per epoch, and pairs of snapshots at one recorded dt."""
        sets = kernel_sets(source)
        if not sets:
            return KERNEL_NEED
        dt = _dt(source)
        if dt is None:
            return "the run has no paired snapshots at one fixed dt; record with schedule=paired(..., dt=...)"
        if _epochs_per_step(source, sets[0]) is None:
            return "the length of an epoch is not known; record with steps_per_epoch="
        steps = set(source.steps(path_of("ntk", sets[0], "")).tolist())
        if not any(step + dt in steps for step in steps):
            return f"no two snapshots lie dt = {dt} steps apart"
        return None

    def measure(self, source: Run, /) -> xr.Dataset:
        """Return the velocity [set, step] at the first step of each pair, centered and not, in 1/epoch."""
        import xarray as xr

        from ..analysis import kernel_velocity

        parts = kernel_sets(source)
        dt, per_step = _dt(source), _epochs_per_step(source, parts[0])
        if dt is None or per_step is None:
            raise UndefinedMeasure(f"kernel-velocity: {self.unavailable(source)}")

        def one(probe_set: str) -> xr.Dataset:
            group = path_of("ntk", probe_set, "")
            steps, kernels = np.asarray(source.steps(group)), trace_kernels(source, probe_set)
            centered, plain = (
                kernel_velocity(steps, kernels, dt=dt, epochs_per_step=per_step, centered=way) for way in (True, False)
            )
            return xr.Dataset(
                {
                    "velocity": variable("step", centered.values, "1/epoch", "centered kernel velocity"),
                    "velocity_uncentered": variable("step", plain.values, "1/epoch", "uncentered kernel velocity"),
                },
                coords={"step": ("step", centered.steps), "epoch": ("step", centered.steps * per_step)},
                attrs={"dt_steps": dt, "dt_epochs": dt * per_step},
            )

        return by_set(parts, one)

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say the velocity at the start, its peak and its end."""
        lines = []
        for prefix, members in each_set(datasets):
            peaks = [int(np.nanargmax(one["velocity"].values)) for one in members]
            when = spread([time_of(one)[peak] for one, peak in zip(members, peaks, strict=True)])
            greatest = spread([one["velocity"].values[peak] for one, peak in zip(members, peaks, strict=True)])
            lines.append(
                f"{prefix}at dt = {members[0].attrs['dt_epochs']:.3g} epochs the kernel moves fastest at epoch {when}, "
                f"with {greatest} per epoch, and at {spread([one['velocity'].values[-1] for one in members])} "
                f"per epoch in the last pair."
            )
        return lines

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw both velocities a probe set on a logarithmic scale."""
        dt = next(iter(datasets.values())).attrs["dt_epochs"]
        panel = Panel(
            {"velocity": f"centered, dt = {dt:.3g} epochs", "velocity_uncentered": "uncentered"},
            "kernel velocity (1/epoch)",
            logarithmic=True,
        )
        draw_curves(figure, datasets, [panel])


def _dt(run: Run) -> int | None:
    """The fixed dt of the recording in steps, as declared with the kernels; None where there is none or several."""
    found = {run.attributes(path_of("ntk", probe_set, "")).get("dt_steps") for probe_set in kernel_sets(run)}
    dt = found.pop() if len(found) == 1 else None
    return None if dt is None else int(dt)


def _epochs_per_step(run: Run, probe_set: str) -> float | None:
    group = path_of("ntk", probe_set, "")
    steps, epochs = np.asarray(run.steps(group)), np.asarray(run.epochs(group), dtype=np.float64)
    known = (steps > 0) & np.isfinite(epochs)
    return float(epochs[known][-1] / steps[known][-1]) if known.any() else None
