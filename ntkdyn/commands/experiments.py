"""``ntkdyn experiments``: what can be run."""

from __future__ import annotations

import click

from . import show_installed


@click.command()
@click.argument("name", required=False)
def experiments(name: str | None) -> None:
    """List the installed experiments, or the settings of one.

    \b
    Example:
      ntkdyn experiments
      ntkdyn experiments nonlinear-advantage
    """
    if name is None:
        show_installed("ntkdyn.experiments")
        return
    from ..plugins import load_experiment

    for key, field in load_experiment(name).Config.model_fields.items():
        kind = getattr(field.annotation, "__name__", None) or str(field.annotation).replace("typing.", "")
        default = "required" if field.is_required() else repr(field.default)
        click.echo(f"{key:18} {default:14} {kind:34} {field.description or ''}".rstrip())
