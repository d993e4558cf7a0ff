"""``ntkdyn prune``: fewer snapshots of a run."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--keep", required=True, metavar="every=N", help="Keep every N-th snapshot, the first and the last.")
def prune(path: Path, keep: str) -> None:
    """Keep every N-th recorded snapshot of each group of the run in folder PATH; the others are deleted for good.

    The first and the last snapshot of each group stay. The run is packed into one run.h5.

    \b
    Example:
      ntkdyn prune runs/dense --keep every=10
    """
    rule, _, number = keep.partition("=")
    if rule != "every" or not number.isdigit() or int(number) < 1:
        raise click.UsageError(f"--keep: found {keep!r}, expected every=N with N from 1 on, e.g. every=10")
    from ..store.prune import prune as pruned

    report = pruned(path, every=int(number))
    for group, (kept, before) in report.snapshots.items():
        click.echo(f"{group}: {kept} of {before} snapshots kept")
    click.echo(f"{path}: {report.bytes_before / 2**20:.1f} MiB before, {report.bytes_after / 2**20:.1f} MiB now")
