"""Commands of the command line, one file each; heavy imports stay inside the functions, so that --help is quick."""

from __future__ import annotations

import shlex
import sys

import click


def called() -> str:
    """Return the command line as it was typed, for the recording."""
    return shlex.join(["ntkdyn", *sys.argv[1:]])


def show_installed(group: str) -> None:
    """Print name and first docstring line of every entry point of a group."""
    from ..plugins import installed

    for name, entry in sorted(installed(group).items()):
        summary = (entry.load().__doc__ or "").strip().splitlines()
        click.echo(f"{name:20} {summary[0] if summary else ''}".rstrip())
