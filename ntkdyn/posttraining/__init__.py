"""Post-training: a trained network loses all but a number of its nonlinear units, while its weights go on learning.

Source: the late linearization of Mehmeti-Göpel and Disselhoff 2023 (arXiv 2211.17180); the exact count, the survivors'
rules and the recovery are our own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..clone import unwrapped
from ..errors import DivergedTraining
from ..gates import Granularity
from ..linearization import Rule
from ..recorder import Recorder
from ..slope_owner import Survivors
from ..store.writer import refuse_occupied
from ..training_loop import Loss
from .curve import Point
from .preparation import prepare
from .recording import make_recorder
from .results import Results
from .settings import OptimizerName, Settings, Target, warn
from .training import PostTraining


@dataclass(frozen=True)
class Linearized:
    """What ``linearize`` returns.

    Attributes:
        model: the gated network at the last target, in evaluation mode.
        curve: the network on the way, from the dense one on.
        ends: the points at which the targets were reached, with recovery; the last one is ``model``.
        report: all of it and the settings, as in report.json.
    """

    model: nn.Module
    curve: tuple[Point, ...]
    ends: tuple[Point, ...]
    report: Mapping[str, Any]


def linearize(
    model: nn.Module,
    train_loader: Iterable[Any],
    test_loader: Iterable[Any],
    *,
    target: Target | Sequence[Target] = 0.1,
    loss: Loss | None = None,
    ramp_epochs: int = 4,
    settle_epochs: int | None = None,
    recovery_epochs: int = 4,
    optimizer: OptimizerName = "adam",
    learning_rate: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    strength: float = 1.0,
    rule: Rule = "clipped",
    survivors: Survivors = "keep",
    common_slope: float = 0.75,
    granularity: Granularity = "channel",
    points: int = 10,
    seed: int = 0,
    out: str | Path | None = None,
    record: bool = True,
    manifest: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Linearized:
    """Train a network on while its ReLUs become linear, until exactly ``target`` units are left; the network is copied.

    For each target the penalty of ``Linearizer`` ramps up for ``ramp_epochs``, the survivors move to their slope for
    ``settle_epochs``, and weights recover for ``recovery_epochs``, in which the learning rate falls linearly to 0. The
    next target goes on from there. BatchNorm stays in training mode; its statistics are re-estimated on 512 training
    samples, drawn by the seed from one pass of the loader, before each evaluation but the first, and those of the
    result are these.

    Args:
        model: a network with ReLUs, LeakyReLUs or PReLUs, which become gates (``gate_network``), or with gates, of
            which the frozen ones stay linear; stays on its device.
        train_loader, test_loader: anything with len() that can be gone through again and again and gives batches
            (inputs, targets), as a DataLoader; inputs are any pytree of tensors.
        target: share of all units that stay active (0.1), or their number (38); or several, from most to fewest.
        loss: loss(outputs, targets) -> scalar; None: cross-entropy of class numbers.
        settle_epochs: None: 1, or 0 where the survivors stay.
        momentum: of "sgd".  weight_decay: of the weights; slopes have none.
        strength, rule, survivors, common_slope: as in ``Linearizer``.
        granularity: of gates that are made here.
        points: points of the curve while the units of a ramp go, beside those at the end of each epoch.
        seed: torch's global generator is seeded by it within, and left as it was.
        out: new or empty folder for model.safetensors, report.json, curve.csv, curve.png, curve.svg and run/.
        record: also record units, path lengths, gates and outputs on 100 test samples into ``out``/run.
        manifest: further entries of report.json and run.json.
    Returns: network and curve.  Raises: ConfigurationError: a setting, target or batch that does not fit; nothing was
        written.  ConversionError: a ReLU that cannot be gated.  RecordingExists: ``out`` holds something.
        DivergedTraining: loss or slopes are not finite; report.json says how far it came, and no network is written.
    """
    folder = None if out is None else Path(out)
    if folder is not None:
        refuse_occupied(folder)
    targets = tuple(target) if isinstance(target, (list, tuple)) else (target,)
    settings = Settings(
        targets=targets,
        ramp_epochs=ramp_epochs,
        settle_epochs=settle_epochs,
        recovery_epochs=recovery_epochs,
        optimizer=optimizer,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        strength=strength,
        rule=rule,
        survivors=survivors,
        common_slope=common_slope,
        points=points,
        seed=seed,
    )
    devices = {parameter.device for parameter in unwrapped(model).parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        torch.manual_seed(seed)
        training = prepare(model, train_loader, test_loader, loss=loss, granularity=granularity, settings=settings)
        training.measure_dense()
        facts = dict(manifest or {})
        remarks = settings.doubts(training.counts)
        if training.meter.untraceable:
            remarks.append(f"{training.meter.untraceable}; the curve has no path lengths")
        warn(remarks)
        recorder = None
        if folder is not None and record:
            run = {"experiment": "linearize", "config": asdict(settings), "seed": seed} | facts
            recorder = make_recorder(training, folder / "run", test_loader, loss=loss, manifest=run)
        results = Results(folder, training, facts, remarks)
        try:
            _run(training, results, recorder, progress=progress)
        except DivergedTraining as error:
            where = "" if folder is None else f"; {folder / 'report.json'} has the curve until then"
            raise DivergedTraining(f"{error}{where}") from error
    return Linearized(training.model, tuple(training.curve), tuple(results.ends), results.report())


def _run(training: PostTraining, results: Results, recorder: Recorder | None, *, progress: bool) -> None:
    """Train, and say in report and recording how it ended."""
    try:
        training.train(recorder, reached=results.reached, progress=progress)
    except DivergedTraining as error:
        results.finish("diverged", str(error))
        raise
    except BaseException as error:
        results.finish("failed" if isinstance(error, Exception) else "interrupted")
        raise
    else:
        results.finish("finished")
    finally:
        if recorder is not None and not recorder.closed:
            # Divergence is a result.
            whole = results.status in ("finished", "diverged")
            if whole:
                recorder.finish(results.summary())
            recorder.close("finished" if whole else results.status)
