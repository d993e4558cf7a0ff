"""``ntkdyn studies``: what can be analyzed."""

from __future__ import annotations

import click

from . import show_installed


@click.command()
def studies() -> None:
    """List the installed studies.

    \b
    Example:
      ntkdyn studies
      ntkdyn analyze runs/a --only kernel-distance
    """
    show_installed("ntkdyn.studies")
