"""``ntkdyn pack``: one run.h5 out of the segments of a run."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
def pack(path: Path) -> None:
    """Merge the segments of the run in folder PATH into one run.h5, which netCDF4 readers open, and remove them.

    Runs of up to 1 GiB are packed when they end; larger ones by this command, if the disk has room for both.

    \b
    Example:
      ntkdyn pack runs/dense
    """
    from ..store.pack import pack as packed

    target = packed(path)
    click.echo(f"{target}: {target.stat().st_size / 2**20:.1f} MiB")
