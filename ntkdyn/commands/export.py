"""``ntkdyn export``: a recording or a sweep for other tools."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(["csv", "parquet", "netcdf", "tensorboard"]), help="Format.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to; by default beside PATH, named after both.")
@click.option("--trusted", is_flag=True, help="Skip the checks that files of strangers get.")
def export(path: Path, to: str, out: Path | None, trusted: bool) -> None:
    """Write all arrays of the run or sweep in PATH in another format.

    csv and parquet make a folder of tidy tables, netcdf one file for any netCDF-4 reader, tensorboard a folder of event
    files with every scalar. What is already there is never overwritten.

    Of a sweep they make a folder with all its finished runs, each in its place (arms/<settings>/<seed>), and beside
    them runs.csv, or with parquet runs.parquet: one row a run, with kind, seed, settings and results.

    \b
    Example:
      ntkdyn export runs/a --to csv --out tables
      ntkdyn export runs/starts --to tensorboard
    """
    from ..export import export as exported
    from ..results import Run, open_recording
    from . import printable

    source = open_recording(path, trusted=trusted)
    is_file = to == "netcdf" and isinstance(source, Run)
    target = out or path.absolute().with_name(f"{source.name}.nc" if is_file else f"{source.name}-{to}")
    result = exported(source, to, target)
    for name, reason in result.left_out.items():
        click.echo(printable(f"ntkdyn: left out {name}: {reason}"), err=True)
    click.echo(str(result.path))
