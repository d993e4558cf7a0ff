"""``ntkdyn probes``: what can be recorded."""

from __future__ import annotations

import click

from . import show_installed


@click.command()
def probes() -> None:
    """List the installed probes.

    \b
    Example:
      ntkdyn probes
      ntkdyn record nonlinear-advantage --probe ntk:per=layer --probe my.py:MyProbe --out runs/a
    """
    show_installed("ntkdyn.probes")
