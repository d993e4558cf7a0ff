"""``ntkdyn watch``: loss, accuracy, kernel drift and units of a run while it is being recorded."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from ..glance import Curve, Glance

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = "_.-=*#"
_WIDEST = 60


@click.command()
@click.argument("path", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--every",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two looks.",
)
@click.option("--once", is_flag=True, help="Look once, and end.")
@click.option("--trusted", is_flag=True, help="Skip the checks that files of strangers get.")
def watch(path: Path, every: float, once: bool, trusted: bool) -> None:
    """Show loss, accuracy, kernel drift and units of the run in folder DIR while it is being recorded.

    Reads only what is new and takes no lock; ends when the run ends, or with Ctrl-C. A live view on a terminal, a line
    for each look that finds something new elsewhere.

    \b
    Example:
      ntkdyn watch runs/dense
      ntkdyn watch runs/dense --every 30 >> dense.log
    """
    if (path / "sweep.json").is_file():
        raise click.UsageError(f"{path}: found a sweep, expected one run; ntkdyn info {path} shows how far it is")
    from rich.console import Console

    from ..glance import Glance
    from ..results import Run

    glance = Glance(Run.open(path, trusted=trusted), trusted=trusted)
    console = Console(highlight=False)
    pause = None if once else every
    try:
        if console.is_terminal:
            _watch_live(glance, console, pause)
        else:
            _watch_in_lines(glance, pause)
    except KeyboardInterrupt:
        # The way to leave, not a failure; the terminal is as it was.
        return
    if glance.status == "abandoned":
        click.echo(
            printable(
                f"the process that recorded {path} is gone without closing it; what it committed is there; "
                "ntkdyn record --resume goes on, ntkdyn repair clears up"
            )
        )


def _watch_in_lines(glance: Glance, pause: float | None) -> None:
    click.echo(line_of(glance))
    while pause is not None and glance.status == "running":
        time.sleep(pause)
        if glance.refresh():
            click.echo(line_of(glance))


def _watch_live(glance: Glance, console: Console, pause: float | None) -> None:
    from rich.live import Live

    with Live(view_of(glance, console), console=console, auto_refresh=False) as live:
        while pause is not None and glance.status == "running":
            time.sleep(pause)
            glance.refresh()
            live.update(view_of(glance, console), refresh=True)


def line_of(glance: Glance) -> str:
    """One look as a line of text."""
    parts = [f"{_title(curve)} {_last(curve)}" for curve in glance.curves if curve.values]
    return f"{_when(glance)}: {', '.join([*parts, _state(glance)])}"


def view_of(glance: Glance, console: Console) -> RenderableType:
    """One look as a table with a sparkline a curve."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = Text.assemble((printable(glance.run.name), "bold"), f"  {_when(glance)}  {_state(glance)}")
    if not glance.curves:
        return Group(head, Text("no snapshot of outputs, ntk or units yet", "dim"))
    ramp = _ASCII if console.options.ascii_only else _BLOCKS
    rows = [(_title(curve), _first(curve), _last(curve)) for curve in glance.curves]
    titles = ("curve", "first", "last")
    taken = sum(max(len(title), *(len(row[place]) for row in rows)) + 2 for place, title in enumerate(titles))
    width = min(_WIDEST, console.width - taken)
    # Text, not str: names of a stranger's recording may look like rich's markup.
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, pad_edge=False, header_style="dim")
    for title in titles:
        table.add_column(title, justify="left" if title == "curve" else "right", no_wrap=True)
    table.add_column("by snapshot", no_wrap=True)
    for curve, (name, first, last) in zip(glance.curves, rows, strict=True):
        drawn = curve.left_out or sparkline(curve.values, width, ramp)
        table.add_row(Text(name), Text(first), Text(last, "bold"), Text(drawn, "cyan"))
    return Group(head, table)


def sparkline(values: Sequence[float], width: int, ramp: str = _BLOCKS) -> str:
    """Values as characters of a ramp from their least to their greatest; a space where not finite.

    >>> sparkline([0, 1, 2, 3], 4)
    '▁▃▆█'
    """
    if not values or width < 1:
        return ""
    if len(values) > width:
        values = [values[round(place * (len(values) - 1) / max(width - 1, 1))] for place in range(width)]
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(ramp) - 1) / (high - low) if high > low else 0.0
    return "".join(ramp[round((value - low) * scale)] if math.isfinite(value) else " " for value in values)


def _title(curve: Curve) -> str:
    return printable(" ".join(part for part in (curve.name, curve.set) if part))


def _when(glance: Glance) -> str:
    if glance.step is None:
        return "no snapshot yet"
    epoch = glance.epoch
    return f"step {glance.step}" + (f", epoch {epoch:.4g}" if epoch == epoch else "")


def _state(glance: Glance) -> str:
    status, age = printable(glance.status), glance.age
    return f"{status}, last written {_span(age)} ago" if status == "running" and age == age else status


def _span(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _first(curve: Curve) -> str:
    return _number(curve, curve.values[0]) if curve.values else "-"


def _last(curve: Curve) -> str:
    if not curve.values:
        return "-"
    text = _number(curve, curve.values[-1])
    return f"{text} of {curve.of:.0f}" if curve.of is not None else text


def _number(curve: Curve, value: float) -> str:
    if curve.unit == "percent":
        return f"{value:.1f} %"
    return f"{value:.0f}" if curve.unit == "units" else f"{value:.4g}"
