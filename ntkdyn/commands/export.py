"""``ntkdyn export``: a recording for other tools."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(["csv", "parquet", "netcdf", "tensorboard"]), help="Format.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to; by default beside PATH, named after both.")
def export(path: Path, to: str, out: Path | None) -> None:
    """Write all arrays of the run in PATH in another format.

    csv and parquet make a folder of tidy tables, netcdf one file for any netCDF-4 reader, tensorboard a folder of event
    files with every scalar. What is already there is never overwritten.

    \b
    Example:
      ntkdyn export runs/a --to csv --out tables
    """
    from ..export import export as exported
    from ..results import Run
    from . import printable

    run = Run.open(path)
    target = out or path.absolute().with_name(f"{run.name}.nc" if to == "netcdf" else f"{run.name}-{to}")
    result = exported(run, to, target)
    for name, reason in result.left_out.items():
        click.echo(printable(f"ntkdyn: left out {name}: {reason}"), err=True)
    click.echo(str(result.path))
