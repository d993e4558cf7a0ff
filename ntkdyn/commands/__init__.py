"""Commands of the command line, one file each; heavy imports stay inside the functions, so that --help is quick."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click


def called() -> str:
    """Return the command line as it was typed, for the recording."""
    return shlex.join(["ntkdyn", *sys.argv[1:]])


def printable(line: str) -> str:
    """A line without control sequences, which the recording of a stranger may hold for the terminal."""
    return "".join(character if character.isprintable() else "?" for character in line)


def runs_in(path: Path) -> list[Path]:
    """The folder of a run itself, or the folders of all runs of a sweep that exist."""
    if not (path / "sweep.json").is_file():
        return [path]
    return sorted(file.parent for kind in ("trunks", "arms") for file in path.glob(f"{kind}/*/*/run.json"))


def show_installed(group: str) -> None:
    """Print name and first docstring line of every entry point of a group."""
    from ..plugins import installed

    found = sorted(installed(group).items())
    width = max((len(name) for name, _ in found), default=0)
    for name, entry in found:
        summary = (entry.load().__doc__ or "").strip().splitlines()
        click.echo(f"{name:{width}}  {summary[0] if summary else ''}".rstrip())
