"""``ntkdyn linearize``: a trained network of the user's own loses all but a number of its nonlinear units."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from . import called, printable

if TYPE_CHECKING:
    from ..posttraining.curve import Point


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--model", required=True, metavar="FILE.py:FUNCTION", help="function(inputs, outputs) -> the network.")
@click.option("--data", required=True, metavar="NAME|FILE.npz|FOLDER", help="Images; see ntkdyn datasets.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("0.1",),
    show_default=True,
    metavar="SHARE|COUNT",
    help="Units left active: 0.1 is a share, 38 a number. Several (0.5,0.2,0.1) are reached one after the other.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New or empty folder of the results.")
@click.option("--ramp-epochs", type=click.IntRange(min=1), default=4, show_default=True, help="In which units go.")
@click.option(
    "--settle-epochs",
    type=click.IntRange(min=1),
    help="In which survivors move to their slope; default: 1, none with --survivors keep.",
)
@click.option("--recovery-epochs", type=click.IntRange(min=0), default=4, show_default=True, help="After that.")
@click.option("--batch-size", type=click.IntRange(min=2), default=128, show_default=True)
@click.option("--optimizer", type=click.Choice(["adam", "sgd"]), default="adam", show_default=True)
@click.option("--learning-rate", type=float, default=1e-3, show_default=True, help="Falls to 0 in the recovery.")
@click.option("--momentum", type=float, default=0.9, show_default=True, help="Of sgd.")
@click.option("--weight-decay", type=float, default=0.0, show_default=True)
@click.option("--strength", type=float, default=1.0, show_default=True, help="Factor on the penalty.")
@click.option("--rule", type=click.Choice(["clipped", "half-threshold"]), default="clipped", show_default=True)
@click.option("--survivors", type=click.Choice(["keep", "common", "relu"]), default="keep", show_default=True)
@click.option("--common-slope", type=float, default=0.75, show_default=True, help="Of the survivors with common.")
@click.option("--granularity", type=click.Choice(["channel", "layer"]), default="channel", show_default=True)
@click.option("--samples", type=click.IntRange(min=1), help="Class-balanced part of the training samples.")
@click.option("--test-samples", type=click.IntRange(min=1), help="Class-balanced part of the test samples.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder of data sets; default: NTKDYN_DATA, ./data.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, mps.")
@click.option("--record/--no-record", default=True, show_default=True, help="Also record cheap probes into OUT/run.")
def linearize(
    checkpoint: Path,
    model: str,
    data: str,
    targets: tuple[str, ...],
    out: Path,
    ramp_epochs: int,
    settle_epochs: int | None,
    recovery_epochs: int,
    batch_size: int,
    optimizer: Literal["adam", "sgd"],
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    strength: float,
    rule: Literal["clipped", "half-threshold"],
    survivors: Literal["keep", "common", "relu"],
    common_slope: float,
    granularity: Literal["channel", "layer"],
    samples: int | None,
    test_samples: int | None,
    data_dir: Path | None,
    seed: int,
    device: str,
    record: bool,
) -> None:
    """Train the network in CHECKPOINT on while its ReLUs become linear, down to an exact number of them.

    CHECKPOINT is a safetensors file, a file of torch.save with a state dict, or a folder checkpoints/<step> of a run.
    Nothing in it is executed.

    Inputs are given as the data set has them, images in [0, 1]: a network that was trained on normalized ones
    normalizes them in its forward.

    \b
    Example:
      ntkdyn linearize net.pt --model nets.py:build --data fashion-mnist --target 0.1 --out runs/tenth
      ntkdyn linearize net.safetensors --model nets.py:build --data my.npz --target 0.5,0.2,0.1 --out runs/walk
    """
    from ..posttraining import linearize as linearized
    from ..posttraining.settings import read_target
    from ..posttraining.sources import open_sources
    from ..store.writer import refuse_occupied

    refuse_occupied(out)
    target = [read_target(part.strip()) for text in targets for part in text.split(",")]
    with _warnings_in_one_line():
        sources = open_sources(
            checkpoint,
            model=model,
            data=data,
            data_dir=data_dir,
            samples=samples,
            test_samples=test_samples,
            batch_size=batch_size,
            granularity=granularity,
            seed=seed,
            device=device,
        )
        done = linearized(
            sources.model,
            sources.train,
            sources.test,
            target=target,
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
            granularity=granularity,
            seed=seed,
            out=out,
            record=record,
            manifest={"command": called(), **sources.facts},
            progress=True,
        )
    network = done.report["network"]
    click.echo(f"{network['units']} units in {len(network['units_of_gates'])} gates, {network['weights']} weights")
    for kind in ("always_active", "uncounted"):
        if network[kind]:
            listed = ", ".join(f"{name} ({label})" for name, label in network[kind].items())
            click.echo(printable(f"{kind.replace('_', ' ')}: {listed}"))
    dense = done.curve[0]
    click.echo(f"before: {_described(dense)}")
    for end in done.ends:
        gained = 100 * (end.test_accuracy - dense.test_accuracy)
        change = "" if math.isnan(gained) else f" ({gained:+.2f} points)"
        click.echo(f"{end.active_units} units ({end.active_share:.3g}): {_described(end)}{change}")
    click.echo(f"written: {out / 'model.safetensors'}, report.json, curve.csv, curve.png, curve.svg")
    if record:
        click.echo(f"recorded in {out / 'run'}; next: ntkdyn analyze {out / 'run'}")


def _described(point: Point) -> str:
    lengths = "" if math.isnan(point.napl) else f", NAPL {point.napl:.3g} (weighted {point.weighted_napl:.3g})"
    return f"test accuracy {point.test_accuracy:.4f}, loss {point.test_loss:.4g}{lengths}"


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Show warnings as the errors of the command line are shown, without the place in the code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: click.echo(
            printable(f"ntkdyn: {' '.join(str(message).split())}"), err=True
        )
        yield
