"""Progress of long work: a bar on a terminal and in a notebook, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")

# Of the plain lines: enough to see that it moves, few enough for a log.
_LINES = 10


class Progress(Protocol):
    """What a long piece of work reports to; a context manager."""

    n: float

    def update(self, count: float = 1) -> Any:
        """Count finished pieces."""
        ...

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> Any: ...


def progress_bar(total: int, *, what: str, done: int = 0, shown: bool = True) -> Progress:
    """Return a bar for ``total`` pieces of ``what`` (plural), ``done`` of them finished before."""
    if shown and not sys.stderr.isatty() and not _in_notebook():
        return _Lines(total, what, done)
    from tqdm.auto import tqdm

    bar: Progress = tqdm(total=total, initial=done, desc=what, disable=not shown, mininterval=0.5)
    return bar


def _in_notebook() -> bool:
    """Whether this code runs in a kernel; a process that merely starts kernels has imported ipykernel too."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def counted(work: Sequence[Item], *, what: str, shown: bool = True) -> Iterator[Item]:
    """Go through ``work`` and show how far it is."""
    with progress_bar(len(work), what=what, shown=shown) as bar:
        for item in work:
            yield item
            bar.update()


class _Lines:
    """A line on stderr after each tenth of the work."""

    def __init__(self, total: int, what: str, done: int) -> None:
        self.n: float = done
        self._total = total
        self._what = what
        self._next = self._tenth() + 1

    def _tenth(self) -> int:
        return int(_LINES * self.n // max(self._total, 1))

    def update(self, count: float = 1) -> None:
        self.n += count
        if self._tenth() >= self._next:
            self._next = self._tenth() + 1
            print(f"ntkdyn: {self.n:.0f} of {self._total} {self._what}", file=sys.stderr, flush=True)

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass
