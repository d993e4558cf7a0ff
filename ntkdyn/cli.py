"""The command line: collects the commands and turns errors into one line and an exit code."""

from __future__ import annotations

import pkgutil
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

import click

from . import __version__, commands
from .errors import NtkdynError


def _collect() -> dict[str, click.Command]:
    """One command a file of ``ntkdyn/commands``, under the file's name."""
    found = {}
    for module in pkgutil.iter_modules(commands.__path__):
        command = getattr(import_module(f"{commands.__name__}.{module.name}"), module.name)
        found[command.name] = command
    return found


@click.group(
    commands=_collect(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage.",
)
@click.version_option(__version__, prog_name="ntkdyn")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Neural tangent kernels and training dynamics of gated networks.

    \b
    Example:
      ntkdyn demo --out runs/demo
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        # As a program; a caller from Python keeps its own way with warnings.
        warnings.showwarning = _warn
    try:
        result = cli.main(given, prog_name="ntkdyn", standalone_mode=False)
        status = result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        status = _complain("interrupted; what was committed is kept", 130)
    except click.ClickException as error:
        status = _complain(error.format_message(), error.exit_code)
    except NtkdynError as error:
        if "--debug" in given:
            raise
        status = _complain(str(error), 2 if error.usage else 1)
    except OSError as error:
        if "--debug" in given:
            raise
        status = _complain(f"{type(error).__name__}: {error}", 1)
    sys.exit(status)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    # In one line, as errors are; where in the code it was raised says nothing to whoever runs a command.
    _complain(f"warning: {message}", 0)


def _complain(message: str, status: int) -> int:
    click.echo("ntkdyn: " + " ".join(message.split()), err=True)
    return status
