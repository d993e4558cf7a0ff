"""Runs and sweeps as a notebook shows them: HTML with everything escaped, and nothing from the network."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from . import plots
from .errors import NtkdynError
from .glance import Curve, Glance

if TYPE_CHECKING:
    from .results import Run, Sweep

MOST_ROWS = 20
"""Most groups of a run, or runs of a sweep, that are listed."""

_MOST_ARRAYS = 6
# What a picture reads of each curve, so that it is there within a second whatever the size of the run.
_POINTS, _BYTES = 40, 2**25
_LABELS = {
    "kernel drift": "kernel distance\nto the start (1)",
    "loss": "mean loss (nat)",
    "accuracy": "accuracy (percent)",
    "active units": "active units (count)",
}


def run_html(run: Run) -> str:
    """Return name, status and groups of a run, beside kernel drift, else loss, accuracy or units."""
    manifest = run.manifest
    facts = [f"status {manifest.get('status', 'unknown')}"]
    facts += [f"{key} {manifest[key]}" for key in ("experiment", "seed", "created") if manifest.get(key) is not None]
    rows = []
    for group in run.groups()[:MOST_ROWS]:
        steps = run.steps(group)
        span = f"{steps[0]} to {steps[-1]}" if len(steps) else "none"
        rows.append((group, str(len(steps)), span, _arrays(run, group)))
    left = len(run.groups()) - len(rows)
    try:
        picture = _picture(run)
    except (NtkdynError, OSError) as error:
        # A damaged array: the table is still of use.
        picture = _paragraph(f"no picture: {error}")
    table = _table(("group", "snapshots", "steps", "arrays"), rows)
    more = _paragraph(f"and {left} more groups") if left else ""
    return f"<div>{_heading('Run', run.name, facts)}{picture}{table}{more}</div>"


def sweep_html(sweep: Sweep) -> str:
    """Return what the finished runs of a sweep share, and a table of what differs between the first of them."""
    table = sweep.table
    facts = [f"{len(table)} of {len(sweep.manifest['plan'])} runs finished"]
    if sweep.manifest.get("experiment"):
        facts.append(f"experiment {sweep.manifest['experiment']}")
    texts = {str(column): [_text(value) for value in table[column]] for column in table.columns}
    shared = {name: cells[0] for name, cells in texts.items() if len(set(cells)) == 1 and len(cells) > 1}
    columns = [name for name in texts if name not in shared]
    rows = list(zip(*(texts[name][:MOST_ROWS] for name in columns), strict=True))
    same = _paragraph("in all: " + ", ".join(f"{name} = {value}" for name, value in shared.items())) if shared else ""
    left = len(table) - len(rows)
    more = _paragraph(f"and {left} more runs; all are in .table") if left > 0 else ""
    return f"<div>{_heading('Sweep', sweep.name, facts)}{same}{_table(columns, rows)}{more}</div>"


def _picture(run: Run) -> str:
    for name, label in _LABELS.items():
        curves = [
            curve
            for curve in Glance(run, points=_POINTS, most_bytes=_BYTES, names={name}).curves
            if any(map(math.isfinite, curve.values))
        ]
        if curves:
            image = base64.b64encode(_png(curves[: len(plots.COLORS)], label)).decode()
            return f'<img alt="{escape(name)}" width="330" src="data:image/png;base64,{image}">'
    return ""


def _png(curves: Sequence[Curve], label: str) -> bytes:
    with plots.style():
        figure = plots.new_figure()
        (ax,) = plots.panels(figure, 1, height=1.3)
        for index, curve in enumerate(curves):
            # Dollar signs would make a formula of a name that a stranger chose.
            title = curve.set.replace("$", r"\$")
            plots.draw_lines(curve.steps, curve.values, ax=ax, label=title, index=index)
        ax.set_ylabel(label)
        ax.set_xlabel("optimizer steps")
        plots.finish(figure)
        return plots.png(figure)


def _arrays(run: Run, group: str) -> str:
    names = [name for name in run.names() if run.group_of(name) == group]
    texts = []
    for name in names[:_MOST_ARRAYS]:
        shape = " × ".join(map(str, run.field(name).shape))
        texts.append(name.removeprefix(f"{group}/") + (f" [{shape}]" if shape else ""))
    more = [f"and {len(names) - _MOST_ARRAYS} more"] if len(names) > _MOST_ARRAYS else []
    return ", ".join(texts + more)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return "" if value is None else str(value)


def _heading(kind: str, name: str, facts: Iterable[str]) -> str:
    return f"<p>{kind} <b>{escape(name)}</b>: {escape(', '.join(facts))}</p>"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
