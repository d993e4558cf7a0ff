"""``ntkdyn compare``: one measure of several runs on one figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import printable

if TYPE_CHECKING:
    from ..comparison import Comparison


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--by", multiple=True, metavar="SETTING", help="Setting that makes a group, or seed; may be repeated.")
@click.option(
    "--measure",
    default="kernel-distance",
    show_default=True,
    metavar="NAME",
    help="A study of single runs, a variable of it (kernel-distance:to_end), or a recorded array.",
)
@click.option(
    "--against",
    type=click.Choice(["step", "epoch", "lr_time", "train_loss"]),
    default="step",
    show_default=True,
    help="What the figure goes along.",
)
@click.option("--out", type=click.Path(path_type=Path), help="New folder for the figure (PNG, SVG) and tables.")
@click.option("--trusted", is_flag=True, help="Skip the checks that files of strangers get.")
def compare(
    paths: tuple[Path, ...], by: tuple[str, ...], measure: str, against: str, out: Path | None, trusted: bool
) -> None:
    """Show one measure of several runs, and of the runs of sweeps, on one figure and in one table.

    Runs that differ by their seed only are averaged, with the standard deviation over them; --by pools all runs of
    one value of a setting. Without --out only the table at the last common step is printed.

    \b
    Example:
      ntkdyn compare runs/a runs/b
      ntkdyn compare runs/starts --by start_epoch --measure learning-curve --against epoch --out figures/starts
      ntkdyn compare runs/a runs/b --measure outputs/test/loss --against train_loss --out figures/loss
    """
    from ..comparison import compare as compared
    from ..comparison import write
    from ..results import open_recording
    from ..store.files import refuse_existing

    if out is not None:
        refuse_existing(out)
    comparison = compared([open_recording(path, trusted=trusted) for path in paths], measure, against=against, by=by)  # type: ignore[arg-type]
    for line in _lines(comparison):
        click.echo(printable(line))
    for name, reason in comparison.left_out.items():
        click.echo(printable(f"ntkdyn: left out {name}: {reason}"), err=True)
    for group, settings in comparison.pooled.items():
        click.echo(
            printable(f"ntkdyn: {group or 'all runs'} pools runs that differ in {', '.join(settings)}"), err=True
        )
    if out is not None:
        for file in write(comparison, out):
            click.echo(file)


def _lines(comparison: Comparison) -> list[str]:
    from ..comparison import SPREAD

    unit = "" if comparison.unit == "1" else f" {comparison.unit}"
    lines = [f"{comparison.measure}, at the last step that all runs of a group have; ± {SPREAD}"]
    for row in comparison.last.to_dict("records"):
        spread = "" if math.isnan(row["standard_deviation"]) else f" ± {row['standard_deviation']:.2g}"
        where = ", ".join(part for part in (row["group"] or "all runs", row["set"]) if part)
        runs = f"{row['runs']} run{'s' if row['runs'] > 1 else ''}"
        lines.append(f"  {where}: {row['mean']:.4g}{spread}{unit} (step {row['step']}, {runs})")
    return lines
