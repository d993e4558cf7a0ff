"""``ntkdyn record``: one recorded run of an experiment."""

from __future__ import annotations

import os
from pathlib import Path

import click

from . import called


@click.command()
@click.argument("experiment")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="One setting (lists in TOML syntax).")
@click.option(
    "--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Settings from a TOML file."
)
@click.option(
    "--probe", "probes", multiple=True, metavar="NAME[:k=v,...]", help="Probe; default: those the experiment chooses."
)
@click.option("--every", type=click.IntRange(min=1), metavar="N", help="Record every N steps.")
@click.option("--log-spaced", type=click.IntRange(min=1), metavar="COUNT", help="Record COUNT log-spaced steps.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder of the data sets; default: what NTKDYN_DATA names, else data.",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out from its last checkpoint, or begin it.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="New folder of the recording; with --resume its old one.",
)
def record(
    experiment: str,
    settings: tuple[str, ...],
    config: Path | None,
    probes: tuple[str, ...],
    every: int | None,
    log_spaced: int | None,
    seed: int,
    data_dir: Path | None,
    resume: bool,
    out: Path,
) -> None:
    """Train EXPERIMENT once and record it with probes into a new folder.

    EXPERIMENT is an installed name, file.py:object or package.module:object.

    A run that was killed goes on with the same command and --resume, from the last of the checkpoints that its setting
    checkpoint_epochs asked for; a finished one is left as it is.

    \b
    Example:
      ntkdyn record nonlinear-advantage --set task=sum10 --set intervention=none --out runs/dense
      ntkdyn record nonlinear-advantage --set start_epoch=8 --probe ntk --probe my.py:MyProbe --every 32 --out runs/late
    """
    if every is not None and log_spaced is not None:
        raise click.UsageError("--every and --log-spaced: found both, expected one schedule; drop one of them")
    if data_dir is not None:
        os.environ["NTKDYN_DATA"] = str(data_dir)
    from .. import schedule as schedules
    from ..configuration import parse_settings
    from ..experiment import run_experiment
    from ..plugins import load_experiment, load_probe

    chosen = load_experiment(experiment)
    results = run_experiment(
        chosen,
        parse_settings(chosen.Config, config, settings),
        seed=seed,
        path=out,
        probes=[load_probe(text) for text in probes] or None,
        schedule=None if every is None else schedules.every(every),
        log_spaced=log_spaced,
        command=called(),
        progress=True,
        resume=resume,
    )
    for name, value in results.items():
        click.echo(f"{name:24} {value:.6g}")
    click.echo(f"recorded in {out}; next: ntkdyn analyze {out}")
