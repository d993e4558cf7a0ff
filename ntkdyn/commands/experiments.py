"""``ntkdyn experiments``: what can be run."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

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
        kind = _kind(field.annotation)
        default = "required" if field.is_required() else repr(field.default)
        click.echo(f"{key:18} {default:14} {kind:34} {field.description or ''}".rstrip())


def _kind(annotation: Any) -> str:
    """What a setting may be, in words: "int", "keep | common | relu", "str | none"."""
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _kind(parts[0])
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, parts))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(map(_kind, parts))
    if annotation is NoneType:
        return "none"
    return str(annotation).replace("typing.", "") if parts else getattr(annotation, "__name__", str(annotation))
