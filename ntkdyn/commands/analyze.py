"""``ntkdyn analyze``: figures, numbers and a report from recordings."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--only", multiple=True, metavar="NAME", help="Only this study (see ntkdyn studies); may be repeated.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the results; default: report/ in the first PATH."
)
@click.option("--trusted", is_flag=True, help="Skip the checks that files of strangers get.")
def analyze(paths: tuple[Path, ...], only: tuple[str, ...], out: Path | None, trusted: bool) -> None:
    """Write figures (PNG, SVG), numbers (CSV, JSON) and report.html from runs or a sweep.

    PATH is the folder of a run or sweep, or a packed run.h5. Several runs are drawn together.

    \b
    Example:
      ntkdyn analyze runs/dense
      ntkdyn analyze runs/seed0 runs/seed1 --only kernel-distance --out figures
    """
    from ..report import analyze as write_report
    from ..results import open_recording

    sources = [open_recording(path, trusted=trusted) for path in paths]
    folder = out or (paths[0] if paths[0].is_dir() else paths[0].parent) / "report"
    report = write_report(sources, folder, only=only, progress=True)
    for sentence in report.sentences:
        click.echo(sentence)
    click.echo(f"report: {folder / 'report.html'}")
