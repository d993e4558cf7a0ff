"""Commands of the command line, one file each; heavy imports stay inside the functions, so that --help is quick."""

from __future__ import annotations

import click


def show_installed(group: str) -> None:
    """Print name and first docstring line of every entry point of a group."""
    from ..plugins import installed

    for name, entry in sorted(installed(group).items()):
        summary = (entry.load().__doc__ or "").strip().splitlines()
        click.echo(f"{name:20} {summary[0] if summary else ''}".rstrip())
