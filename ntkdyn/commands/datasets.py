"""``ntkdyn datasets``: which data sets are there, and where to put those that are not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import printable

if TYPE_CHECKING:
    from ..datasets.status import Status


@click.command()
@click.argument("name", required=False)
@click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Folder of data sets; default: that of NTKDYN_DATA, else data."
)
def datasets(name: str | None, data_dir: Path | None) -> None:
    """List the known data sets, or all about one: built in, there, partial, missing or damaged.

    Every file that is there is compared with its checksum. Nothing is downloaded: for what is missing, the list says
    which files belong where, and where they come from. Exit code 1 says that something is damaged.

    \b
    Example:
      ntkdyn datasets
      ntkdyn datasets cifar-10 --data-dir ~/data
    """
    from ..datasets.location import data_directory
    from ..datasets.manifest import known_dataset, known_datasets
    from ..datasets.status import status_of
    from ..errors import DamagedData

    chosen = list(known_datasets().values()) if name is None else [known_dataset(name)]
    directory = data_directory(data_dir)
    statuses = [status_of(known, data_dir) for known in chosen]
    click.echo(printable(f"data directory {directory}{'' if directory.is_dir() else ' (does not exist)'}"))
    for status in statuses:
        for line in _lines(status) if name is None else _details(status):
            click.echo(printable(line))
    damaged = [status.known.name for status in statuses if status.state == "damaged"]
    if damaged:
        raise DamagedData(
            f"{directory}: found {', '.join(damaged)} damaged, expected the originals; replace the files named above"
        )


def _lines(status: Status) -> list[str]:
    place = f"in {status.folder}/, " if status.folder else ""
    size = f"{_size(status.bytes)}, " if status.records else ""
    line = f"{status.known.name:14} {status.state:8} {place}{size}license: {status.known.license}"
    return [line, *(f"{'':14} {remark}" for remark in status.remarks)]


def _details(status: Status) -> list[str]:
    known = status.known
    files = [
        f"  folder    {status.folder or 'none of it is there'}",
        f"  size      {_size(status.bytes)} in {len(status.records)} sound files",
    ]
    lines = [
        f"{known.name}: {known.title}",
        f"  state     {status.state}",
        *(f"            {remark}" for remark in status.remarks),
        *([] if known.built_in else files),
        f"  kind      {known.kind}" + (f", {len(known.classes)} classes" if known.classes else ""),
        f"  origin    {known.origin}",
        f"  license   {known.license}",
        f"  citation  {known.citation}",
    ]
    for record in status.records:
        lines.append(f"  {record.file}  {record.bytes} bytes  sha256 {record.sha256}  checked by {record.verified}")
    return lines


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
