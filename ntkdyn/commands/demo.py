"""``ntkdyn demo``: the main job, end to end, on real digits."""

from __future__ import annotations

from pathlib import Path

import click

from . import called


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Folder of the results.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Worker processes; default: the cores of this process.")
@click.option("--smoke", is_flag=True, help="A tiny version that only shows that everything works (20 s).")
def demo(out: Path, jobs: int | None, smoke: bool) -> None:
    """Record and analyze gated networks on pairs of real digits (3 minutes on 2 cores).

    Shows how the tangent kernel moved, how the gates went linear, and what early against late linearization cost.
    The plan, seeds included, is a file of the package; an interrupted demo goes on where it stopped.

    \b
    Example:
      ntkdyn demo --out runs/demo
    """
    from ..report import analyze
    from ..results import Sweep
    from ..sweep import make_plan, packaged_plan, run_sweep

    with packaged_plan("smoke.toml" if smoke else "demo.toml") as file:
        plan = make_plan("nonlinear-advantage", file=file)
    summary = run_sweep(plan, out, jobs=jobs, command=called(), progress=True)
    click.echo(summary.line())
    if summary.failed:
        first = next(iter(summary.failed))
        raise click.ClickException(f"{len(summary.failed)} runs failed, the first {first}: {summary.failed[first]}")
    report = analyze([Sweep.open(out)], out / "report", progress=True)
    for sentence in report.sentences:
        click.echo(sentence)
    click.echo(f"report: {out / 'report' / 'report.html'}")
