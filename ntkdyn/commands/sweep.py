"""``ntkdyn sweep``: a grid of settings times seeds over local processes."""

from __future__ import annotations

import os
from pathlib import Path

import click

from . import called


@click.command()
@click.argument("experiment")
@click.option("--over", "grid", multiple=True, metavar="KEY=V1,V2,...", help="Axis of the grid; may be repeated.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="One setting of every run.")
@click.option(
    "--config",
    "plan_file",
    metavar="FILE|NAME",
    help="TOML file with [settings], [[grid]] and [plan] tables, or the name of a plan that comes with ntkdyn.",
)
@click.option("--seeds", type=click.IntRange(min=1), help="Number of seeds, from 0 on; default: the file's, else 1.")
@click.option("--jobs", type=click.IntRange(min=1), help="Worker processes; default: the cores of this process.")
@click.option("--plan", "show", is_flag=True, help="Show what would run, its cost and what it can find; run nothing.")
@click.option(
    "--confirm",
    is_flag=True,
    help="Repeat the plan of the sweep in --out once on 2 or more seeds that are fresh in that folder (what was run in "
    "other folders cannot be seen), into its folder confirmation.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder of the data sets; default: what NTKDYN_DATA names, else data.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the sweep; finished runs are kept."
)
def sweep(
    experiment: str,
    grid: tuple[str, ...],
    settings: tuple[str, ...],
    plan_file: str | None,
    seeds: int | None,
    jobs: int | None,
    show: bool,
    confirm: bool,
    data_dir: Path | None,
    out: Path,
) -> None:
    """Run EXPERIMENT for every setting of a grid and every seed; restartable.

    Runs that share their dense training share one trunk a seed and branch from its checkpoints.

    The file's [plan] names the one primary comparison, which is hashed with the plan before the first run; all others
    are exploratory. The same command with --confirm repeats the very plan on seeds that follow the used ones.

    \b
    Example:
      ntkdyn sweep nonlinear-advantage --over start_epoch=0,2,4,8,12 --seeds 5 --out runs/starts
      ntkdyn sweep nonlinear-advantage --config digits --plan --out runs/digits
      ntkdyn sweep nonlinear-advantage --config plan.toml --confirm --seeds 10 --out runs/planned
    """
    if data_dir is not None:
        # The worker processes inherit it.
        os.environ["NTKDYN_DATA"] = str(data_dir)
    from ..sweep import confirmation_of, cores, find_plan, foresight, make_plan, read_grid, run_sweep, standing

    with find_plan(plan_file) as file:
        plan = make_plan(experiment, file=file, settings=settings, grid=read_grid(grid), seeds=seeds)
    if confirm:
        plan, out = confirmation_of(out, plan, seeds=seeds)
    if show:
        for line in (*plan.lines(), *foresight(plan, jobs or cores()), *standing(plan, out)):
            click.echo(line)
        return
    summary = run_sweep(plan, out, jobs=jobs, command=called(), progress=True)
    click.echo(summary.line())
    if summary.failed:
        first = next(iter(summary.failed))
        raise click.ClickException(f"{len(summary.failed)} runs failed, the first {first}: {summary.failed[first]}")
    click.echo(f"next: ntkdyn analyze {out}")
