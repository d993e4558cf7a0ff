"""``ntkdyn verify``: whether every byte of a recording is what was written."""

from __future__ import annotations

from pathlib import Path

import click

from . import printable, runs_in


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
def verify(path: Path) -> None:
    """Check structure and checksums of all files of a run, or of all runs of a sweep; nothing is changed.

    Exit code 1 says that something is damaged. Leftovers of an interruption are named, but no damage.

    \b
    Example:
      ntkdyn verify runs/dense
    """
    from ..errors import DamagedRecording
    from ..store.repair import recording_files
    from ..store.repair import verify as findings_of

    damaged = 0
    for run in runs_in(path):
        findings = findings_of(run)
        for finding in findings:
            click.echo(printable(("leftover: " if finding.harmless else "damaged: ") + finding.problem))
        worst = [finding for finding in findings if not finding.harmless]
        damaged += len(worst)
        state = f"{len(worst)} damaged" if worst else "sound"
        click.echo(printable(f"{run}: {len(recording_files(run))} files, {state}"))
    if damaged:
        raise DamagedRecording(f"{path}: found {damaged} damaged files, expected none; run ntkdyn repair {path}")
