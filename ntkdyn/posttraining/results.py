"""What a post-training leaves: its report, and the files of its folder, each of which appears whole."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import torch

from .. import __version__
from ..gates import gates, nonlinear_units
from ..store.files import make_folder, publish
from ..store.manifest import without_secrets
from ..store.metadata import dump_json
from .curve import Point, as_csv, draw
from .training import PostTraining
from .weights import encode_weights

FORMAT = "ntkdyn-posttraining-1"
NETWORK = "model.safetensors"

Status = Literal["running", "finished", "diverged", "interrupted", "failed"]


class Results:
    """Report of a post-training, and its folder ``out``; with None nothing is written.

    ``model.safetensors`` is the network at the last target, ``model-<units>-units.safetensors`` those at targets before
    it, written when a target is reached. ``report.json`` is replaced then, and says how far the whole came; of each
    target it has ``target_asked``, the share or number that was asked for, and ``target``, the number of units it is.
    """

    def __init__(
        self, out: Path | None, training: PostTraining, facts: Mapping[str, Any], remarks: Sequence[str]
    ) -> None:
        self._out = out
        self._training = training
        self._facts = without_secrets(facts)
        self._remarks = list(remarks)
        self._targets: list[dict[str, Any]] = []
        self.ends: list[Point] = []
        self.status: Status = "running"
        self.divergence = ""

    def reached(self) -> None:
        """Write the network at a target."""
        training = self._training
        point = training.curve[-1]
        self.ends.append(point)
        asked = training.settings.targets[len(self.ends) - 1]
        entry: dict[str, Any] = {"target_asked": asked} | asdict(point)
        entry["active_units_of_gates"] = dict(nonlinear_units(training.model).active)
        if self._out is not None:
            make_folder(self._out)
            last = len(self.ends) == len(training.counts)
            name = NETWORK if last else f"model-{point.active_units}-units.safetensors"
            facts = {"ntkdyn": __version__, "active_units": str(point.active_units)}
            data = encode_weights(training.model, facts)
            publish(self._out / name, data)
            entry |= {"file": name, "sha256": hashlib.sha256(data).hexdigest()}
        self._targets.append(entry)
        self._write_report()

    def finish(self, status: Status, divergence: str = "") -> None:
        """Write curve and report; nothing where training failed before its first step."""
        self.status, self.divergence = status, divergence
        if self._out is None or not (self._training.step or status == "diverged"):
            return
        make_folder(self._out)
        curve = self._training.curve
        publish(self._out / "curve.csv", as_csv(curve))
        if status in ("finished", "diverged"):
            from .. import plots

            with plots.style():
                figure = plots.new_figure()
                draw(curve, figure)
                for name, data in (("curve.png", plots.png(figure)), ("curve.svg", plots.svg(figure))):
                    publish(self._out / name, data)
        self._write_report()

    def report(self) -> dict[str, Any]:
        """Everything that is known, as values of JSON."""
        training = self._training
        units = nonlinear_units(training.model, training.example)
        return {
            "format": FORMAT,
            "ntkdyn": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "status": self.status,
            "diverged": self.status == "diverged",
            "divergence": self.divergence,
            **self._facts,
            "settings": asdict(training.settings),
            "network": {
                "weights": sum(parameter.numel() for parameter in training.model.parameters())
                - sum(gate.slope.numel() for gate in gates(training.model).values()),
                "units": units.total_total,
                "units_of_gates": dict(units.total),
                "always_active": dict(units.always_active),
                "uncounted": dict(units.uncounted),
            },
            "steps_per_epoch": training.steps_per_epoch,
            "warnings": self._remarks,
            "targets": self._targets,
            "curve": [asdict(point) for point in training.curve],
        }

    def summary(self) -> dict[str, float]:
        """Results for run.json: the last target's point, NaN where none was reached, and the dense network."""
        names = [field.name for field in fields(Point) if field.name not in ("step", "epoch", "target", "phase")]
        last = asdict(self.ends[-1]) if self.ends else {}
        dense = self._training.curve[0]
        return {name: float(last.get(name, math.nan)) for name in names} | {
            "dense_accuracy": dense.test_accuracy,
            "dense_loss": dense.test_loss,
            "diverged": float(self.status == "diverged"),
        }

    def _write_report(self) -> None:
        if self._out is not None:
            publish(self._out / "report.json", dump_json(self.report(), indent=1).encode())
