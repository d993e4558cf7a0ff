"""Spread of kernels at initialization, and their deviation from the analytic kernel, against width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import plots
from .recorded import Datasets, variable

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from ..results import Run

MEASURES = {
    "spread": "relative spread over initializations",
    "deviation": "relative deviation from the analytic kernel",
}


class WidthScaling:
    """How kernels of freshly drawn networks settle as the width grows, with the exponent and its interval."""

    name = "width-scaling"
    title = "Kernels at initialization against width"
    reading = (
        "Both axes are logarithmic: a straight line is a power of the width, the thin line the power -1/2; a deviation "
        "that levels off while the spread falls would be a wrong limit."
    )
    scope = "run"

    def unavailable(self, source: Run, /) -> str | None:
        """Need kernels of several widths."""
        if "widths/kernel" not in source or "widths/hidden_units" not in source:
            return "no kernels of several widths are recorded; record the experiment width-scaling"
        return None

    def measure(self, source: Run, /) -> xr.Dataset:
        """Return spread [width], exponent and interval, also of the deviation where there is an analytic kernel."""
        import xarray as xr

        from ..analysis import kernel_deviation, kernel_spread, width_exponent

        widths = np.asarray(source["widths/hidden_units"][-1])
        fitted = widths >= source.config.get("fit_from", 0)
        kernels = source["widths/kernel"][-1]
        references: dict[str, NDArray[Any] | None] = {"spread": None}
        if "widths/analytic" in source:
            references["deviation"] = source["widths/analytic"][-1]
        measures = {}
        for name, reference in references.items():
            found = width_exponent(widths[fitted], kernels[fitted], None if reference is None else reference[fitted])
            values = kernel_spread(kernels) if reference is None else kernel_deviation(kernels, reference)
            measures[name] = variable("width", values, "1", MEASURES[name])
            for part in ("slope", "low", "high"):
                text = "exponent" if part == "slope" else f"{part} end of its 95 % interval"
                measures[f"{name}_{part}"] = variable((), getattr(found, part), "1", f"{text}, {MEASURES[name]}")
        measures["fit_from"] = variable((), widths[fitted][0], "unit", "least width of the fit")
        return xr.Dataset(measures, coords={"width": ("width", widths, {"units": "unit", "long_name": "width"})})

    def sentences(self, datasets: Datasets, /) -> list[str]:
        """Say exponents and the value of the widest network."""
        lines = []
        for label, dataset in datasets.items():
            prefix = f"{label}: " if len(datasets) > 1 else ""
            words = [
                f"the {text} falls as width to the power {float(dataset[f'{name}_slope']):.2f} "
                f"({float(dataset[f'{name}_low']):.2f} to {float(dataset[f'{name}_high']):.2f}) and is "
                f"{float(dataset[name][-1]):.3g} at width {int(dataset['width'][-1])}"
                for name, text in MEASURES.items()
                if name in dataset
            ]
            if "deviation" not in dataset:
                words.append("there is no analytic kernel in this recording (extra theory)")
            lines.append(f"{prefix}{'; '.join(words)}; -1/2 is expected (fit from width {int(dataset['fit_from'])}).")
        return lines

    def draw(self, figure: Figure, datasets: Datasets, /) -> None:
        """Draw both measures against width, with the power -1/2 through the spread of the widest network."""
        (ax,) = plots.panels(figure, 1, height=2.2)
        index = 0
        for label, dataset in datasets.items():
            for name, text in MEASURES.items():
                if name in dataset:
                    shown = f"{label}, {text}" if len(datasets) > 1 else text
                    plots.draw_lines(dataset["width"].values, dataset[name].values, ax=ax, label=shown, index=index)
                    index += 1
        first = next(iter(datasets.values()))
        widths = first["width"].values
        ax.plot(widths, first["spread"].values[-1] * (widths / widths[-1]) ** -0.5, color="0.5", linewidth=0.6)
        ax.set_xscale("log", base=2)
        ax.set_xticks(widths, [f"{width:g}" for width in widths])
        plots.logarithmic(ax)
        ax.set_xlabel("width (units per hidden layer)")
        ax.set_ylabel("relative to the kernel (1)")
        plots.finish(figure, columns=1)
