"""``ntkdyn info``: what a recording or a sweep holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import printable

if TYPE_CHECKING:
    from ..results import Run

_SHOWN = ("status", "experiment", "seed", "created", "ntkdyn", "torch", "git", "command", "parent", "config", "results")


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--trusted", is_flag=True, help="Skip the checks that files of strangers get.")
def info(path: Path, trusted: bool) -> None:
    """Show what PATH holds: a run's manifest and arrays, or the state of a sweep.

    PATH is the folder of a run, live or packed, a run.h5, or the folder of a sweep.

    \b
    Example:
      ntkdyn info runs/dense
      ntkdyn info runs/dense/run.h5
    """
    if (path / "sweep.json").is_file():
        lines = _sweep_lines(path)
    else:
        from ..results import Run

        lines = _run_lines(Run.open(path, trusted=trusted))
    for line in lines:
        click.echo(printable(line))


def _run_lines(run: Run) -> list[str]:
    lines = [f"run {run.name}"]
    for key in _SHOWN:
        value = run.manifest.get(key)
        if isinstance(value, dict):
            if value:
                lines.append(f"  {key}:")
                lines += [f"    {name} = {_short(entry)}" for name, entry in value.items()]
        elif value not in (None, ""):
            lines.append(f"  {key}: {_short(value)}")
    lines.append("groups")
    lines += [f"  {group}: {_span(run, group)}" for group in run.groups()] or ["  none"]
    lines += _cost_lines(run)
    lines.append("arrays")
    for name in run.names():
        field = run.field(name)
        dims = ", ".join(f"{dim}={size}" for dim, size in zip(field.dims, field.shape, strict=True))
        group = next((group for group in run.groups() if name.startswith(f"{group}/")), None)
        stepped = group is not None and not field.static
        axes = ", ".join(part for part in (f"step={len(run.steps(group))}" if group and stepped else "", dims) if part)
        lines.append(f"  {name} [{axes}] {field.dtype} unit {field.unit}" + ("" if stepped else ", static"))
    if not run.names():
        lines.append("  none")
    return lines


def _cost_lines(run: Run) -> list[str]:
    costs = run.costs()
    if not costs:
        return []
    skipped = run.manifest.get("skipped") or {}
    lines = ["costs"]
    for group, cost in costs.items():
        size = cost["bytes"] / 2**20
        line = f"  {group}: {cost['snapshots']:.0f} snapshots, {cost['seconds']:.2f} s, {size:.2f} MiB"
        lines.append(f"{line}, {cost['share']:.1%} of the time" if cost["share"] == cost["share"] else line)
    total = sum(cost["share"] for cost in costs.values())
    if total == total:
        lines.append(f"  all: {sum(cost['seconds'] for cost in costs.values()):.2f} s, {total:.1%} of the time")
    if isinstance(skipped, dict):
        limit = run.manifest.get("max_overhead")
        lines += [
            f"  {name}: {count} scheduled snapshots skipped, max_overhead={limit}" for name, count in skipped.items()
        ]
    return lines


def _span(run: Run, group: str) -> str:
    steps = run.steps(group)
    if len(steps) == 0:
        return "no steps"
    epochs = run.epochs(group)
    text = f"{len(steps)} steps, {steps[0]} to {steps[-1]}"
    return text if epochs[0] != epochs[0] else f"{text} (epochs {epochs[0]:g} to {epochs[-1]:g})"


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _sweep_lines(path: Path) -> list[str]:
    from ..errors import DamagedRecording
    from ..store.files import read
    from ..store.manifest import read_manifest
    from ..store.metadata import load_json

    try:
        sweep = load_json(read(path / "sweep.json"))
        planned = [str(entry["run"]) for entry in sweep["plan"]]
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedRecording(
            f"{path / 'sweep.json'} is damaged: found {type(error).__name__} {error}, expected the plan of a sweep; "
            "restore it from a copy"
        ) from error
    lines = [f"sweep {path.absolute().name}", f"  experiment: {sweep.get('experiment', 'unknown')}"]
    for kind in ("trunks", "arms"):
        states: dict[str, int] = {}
        wanted = [name for name in planned if name.startswith(f"{kind}/")]
        for name in wanted:
            # A run that failed is set aside under another name, so only planned folders count.
            if (path / name / "run.json").is_file():
                state = str(read_manifest(path / name).get("status", "unknown"))
                states[state] = states.get(state, 0) + 1
        finished = states.pop("finished", 0)
        rest = "".join(f", {count} {state}" for state, count in sorted(states.items()))
        lines.append(f"  {kind}: {finished} of {len(wanted)} finished, {len(wanted) - finished} unfinished{rest}")
    return lines
