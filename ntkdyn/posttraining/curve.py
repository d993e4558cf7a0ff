"""The curve of a post-training: what the network can do against how nonlinear it still is."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..errors import DivergedTraining, TraceError
from ..gates import nonlinear_units
from ..paths import PathGraph, trace_paths
from ..training_loop import Loss, evaluate_batches
from .batches import passing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Phase = Literal["dense", "ramp", "settle", "recovery", "end"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """The network after one step of post-training.

    step, epoch: since post-training began.  target: units that remain at the end of this ramp.  phase: where the step
    lies; "dense" before the first, "end" after the last one of a target.  test_accuracy: share of right predictions,
    NaN where targets are no class numbers.  test_loss, train_loss: by the user's loss; train_loss is the mean over the
    batches since the point before, NaN at the first.  active_units, active_share: units that are not frozen.
    weighted_units: sum of |1 - slope| over them; survivor_nonlinearity: its mean.  napl, apl, weighted_napl: as in
    ``ntkdyn.path_lengths``, NaN where the graph cannot be traced.
    """

    step: int
    epoch: float
    target: int
    phase: Phase
    test_accuracy: float
    test_loss: float
    train_loss: float
    active_units: int
    active_share: float
    weighted_units: float
    survivor_nonlinearity: float
    napl: float
    apl: float
    weighted_napl: float


class Meter:
    """Measures a network; the graph for path lengths is traced once.

    Attributes: untraceable: why there are no path lengths, "" where there are.
    """

    def __init__(
        self, model: nn.Module, example: Any, loader: Iterable[Any], *, loss: Loss, device: torch.device
    ) -> None:
        self._loader = loader
        self._loss = loss
        self._device = device
        self._graph: PathGraph | None = None
        self.untraceable = ""
        try:
            self._graph = trace_paths(model, example)
        except TraceError as error:
            self.untraceable = str(error)

    def point(
        self,
        model: nn.Module,
        *,
        step: int,
        epoch: float,
        target: int,
        phase: Phase,
        train_loss: float = math.nan,
        calibration: Any = None,
    ) -> Point:
        """Evaluate the network and count its units; ``calibration`` re-estimates the statistics of BatchNorm first.

        Raises: DivergedTraining: the loss is not finite.
        """
        # A DataLoader draws from the global generator: training must not depend on how often it is looked at.
        with torch.random.fork_rng(devices=[]):
            batches = passing(self._loader, "test_loader", self._device)
            accuracy, loss = evaluate_batches(model, batches, loss=self._loss, calibration=calibration)
        if not math.isfinite(loss):
            raise DivergedTraining(
                f"evaluation: found loss {loss} on the test batches after step {step}, expected a finite number; lower "
                "the learning rate"
            )
        units = nonlinear_units(model)
        active = units.active_total
        lengths = None if self._graph is None else self._graph.lengths(model)
        return Point(
            step=step,
            epoch=epoch,
            target=target,
            phase=phase,
            test_accuracy=accuracy,
            test_loss=loss,
            train_loss=train_loss,
            active_units=active,
            active_share=units.active_share,
            weighted_units=units.weighted_total,
            survivor_nonlinearity=units.weighted_total / active if active else math.nan,
            napl=math.nan if lengths is None else lengths.normalized,
            apl=math.nan if lengths is None else lengths.mean,
            weighted_napl=math.nan if lengths is None else lengths.weighted,
        )


def as_csv(points: Sequence[Point]) -> bytes:
    """The points as a table with a column for each number."""
    text = io.StringIO()
    table = csv.DictWriter(text, [field.name for field in fields(Point)], lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(point) for point in points)
    return text.getvalue().encode()


def draw(points: Sequence[Point], figure: Figure) -> None:
    """Draw accuracy, or the loss where there is none, against the units left, and against NAPL where it is known."""
    from .. import plots

    by_accuracy = math.isfinite(points[0].test_accuracy)
    measured = [point.test_accuracy if by_accuracy else point.test_loss for point in points]
    ends = [index for index, point in enumerate(points) if point.phase in ("dense", "end")]
    columns = {"share of units active": [point.active_share for point in points]}
    if math.isfinite(points[0].napl):
        columns["NAPL (active units per path)"] = [point.napl for point in points]
    for ax, (name, abscissa) in zip(plots.panels(figure, len(columns)), columns.items(), strict=True):
        plots.draw_reference(measured[0], ax=ax, label="before")
        plots.draw_points(abscissa, measured, ax=ax, label="on the way", index=4)
        plots.draw_lines([abscissa[i] for i in ends], [measured[i] for i in ends], ax=ax, label="at a target")
        # Time goes from left to right, as the units get fewer.
        ax.invert_xaxis()
        ax.set_xlabel(name)
        ax.set_ylabel("test accuracy" if by_accuracy else "test loss")
    plots.finish(figure, columns=3)
