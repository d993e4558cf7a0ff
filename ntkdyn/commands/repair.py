"""``ntkdyn repair``: bring a recording into order that was cut off."""

from __future__ import annotations

from pathlib import Path

import click

from . import printable, runs_in


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--unlock", is_flag=True, help="Take the lock of a writer on another host that has certainly ended.")
def repair(path: Path, unlock: bool) -> None:
    """Remove leftovers of a killed writer of a run or sweep, and move damaged files into quarantine/.

    Nothing is deleted that is not in another file too. A run that is being written is refused.

    \b
    Example:
      ntkdyn repair runs/dense
    """
    from ..store.lock import NAME, Lock
    from ..store.repair import repair as done_to

    if unlock and (path / "sweep.json").is_file():
        # Its own, and those of runs that had not even begun.
        for lock in (path / NAME, *(file for kind in ("trunks", "arms") for file in path.glob(f"{kind}/*/*/{NAME}"))):
            if lock.exists():
                Lock(lock.parent, force=True).release()
                click.echo(printable(f"{lock.parent}: unlocked"))
    for run in runs_in(path):
        done = done_to(run, unlock=unlock)
        for line in done:
            click.echo(printable(line))
        click.echo(printable(f"{run}: {f'{len(done)} repairs' if done else 'nothing to repair'}"))
