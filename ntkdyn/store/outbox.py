"""What a writer has not brought to the disk yet, in the order in which it must get there.

A disk that refuses is warned of once and tried again at the next snapshot; training is never stopped by it. Beyond
256 MiB in memory the newest snapshot is given up, and its step named at the end; one in bands, made while they are
written, is given up at once.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DamagedRecording, StorageError
from . import compact, files
from .block import Block, Facts, publish_segment
from .reader import Source
from .verify import remember

# What a full disk may pile up in memory before snapshots are given up.
PENDING_BYTES = 256 * 2**20
# Level from which a segment is large enough to stay as it is when its branch is left.
_SETTLED = 2


@dataclass(eq=False)
class _Waiting:
    name: str
    blocks: Sequence[Block]
    facts: Facts

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    @property
    def in_bands(self) -> bool:
        return any(block.in_bands for block in self.blocks)


class Outbox:
    """Publishes segments and run.json of one folder, and merges small segments.

    Attributes:
        lost: steps of snapshots that were given up.
        names: names of all segments, so that none is used twice.
    """

    def __init__(self, folder: Path, names: Iterable[str] = ()) -> None:
        self._folder = folder
        self.names = set(names)
        self.lost: list[int] = []
        self._waiting: deque[_Waiting] = deque()
        self._manifest: bytes | None = None
        self._levels: dict[int, list[Path]] = {}
        self._merge_at: dict[int, int] = {}
        self._warned = self._warned_of_merging = False

    @property
    def waiting(self) -> list[int]:
        """Steps that are in memory only."""
        return [step for one in self._waiting for step in _steps(one.blocks)]

    @property
    def is_empty(self) -> bool:
        """Whether everything is on the disk."""
        return not self._waiting and self._manifest is None

    def add(self, stem: str, blocks: Sequence[Block], facts: Facts, given_up: Callable[[], None]) -> bool:
        """Put a segment at the end and bring to the disk what it takes; whether everything is committed.

        ``given_up`` is called where the segment is: for want of memory, or because its bands, which can be made now
        only, from the network as it is, fail or cannot be written.

        Raises: what bands of the segment raise while they are made.
        """
        one = _Waiting(self._free_name(stem), blocks, facts)
        self._waiting.append(one)
        try:
            done = self.flush()
        except BaseException:
            self._keep_or_give_up(one, given_up, named=False)
            raise
        self._keep_or_give_up(one, given_up, named=True)
        return done

    def _keep_or_give_up(self, one: _Waiting, given_up: Callable[[], None], *, named: bool) -> None:
        """Of a segment that the disk has not taken, copy what belongs to the caller, or let it go."""
        if one not in self._waiting:
            return
        too_much = len(self._waiting) > 1 and sum(one.nbytes for one in self._waiting) > PENDING_BYTES
        steps = _steps(one.blocks)
        # What belongs to no step is needed to understand the run, and comes once.
        if one.in_bands or (too_much and steps):
            self._waiting.remove(one)
            self.lost += steps if named else []
            given_up()
            return
        for block in one.blocks:
            block.own()

    def set_manifest(self, content: bytes) -> bool:
        """Put run.json, in place of one that has not been written yet, and bring to the disk what it takes."""
        self._manifest = content
        return self.flush()

    def flush(self) -> bool:
        """Bring everything to the disk; False, with one warning for each time that the disk begins to refuse."""
        try:
            while self._waiting:
                one = self._waiting[0]
                target = self._folder / "segments" / one.name
                try:
                    publish_segment(target, one.blocks, one.facts)
                except BaseException as error:
                    # Behind the rename readers see it. It is written again only where a disk has failed, and it is
                    # still the same.
                    if target.exists() and (one.in_bands or not isinstance(error, StorageError)):
                        self._waiting.popleft()
                    raise
                self._waiting.popleft()
                remember(target)
                self._levels.setdefault(0, []).append(target)
            if self._manifest is not None:
                files.publish(self._folder / "run.json", self._manifest)
                self._manifest = None
        except StorageError as error:
            if not self._warned:
                lost = any(one.in_bands for one in self._waiting)
                new = "this snapshot, larger than memory, is given up" if lost else "what is new waits in memory and is"
                warnings.warn(
                    f"{error}; training goes on, {new}{'' if lost else ' tried again at the next commit'}",
                    RuntimeWarning,
                    stacklevel=5,
                )
            self._warned = True
            return False
        self._warned = False
        self._merge()
        return True

    def settle(self, sources: Sequence[Source]) -> None:
        """Make one file of the small segments of each earlier branch, to which nothing will be added.

        Raises: StorageError, DamagedRecording: all files stay.
        """
        by_branch: dict[tuple[int, ...], list[Source]] = {}
        for source in sources:
            if source.path.parent.name == "segments" and int(source.facts.get("level", 0)) < _SETTLED:
                by_branch.setdefault(source.branch, []).append(source)
        for together in by_branch.values():
            if len(together) > 1:
                target = self._folder / "segments" / self._free_name(merged_stem(together))
                compact.merge(together, target, level=_SETTLED)
                remember(target)
                for source in together:
                    files.unlink(source.path)

    def _free_name(self, stem: str) -> str:
        name, count = f"{stem}.h5", 1
        while name in self.names:
            name, count = f"{stem}-{count}.h5", count + 1
        self.names.add(name)
        return name

    def _merge(self) -> None:
        level = 0
        while len(self._levels.get(level, ())) >= self._merge_at.get(level, compact.FAN):
            here = self._levels[level]
            try:
                sources = [Source.open(path) for path in here]
                name = self._free_name(merged_stem(sources))
                target = self._folder / "segments" / name
                compact.merge(sources, target, level=level + 1)
                remember(target)
            except (StorageError, DamagedRecording) as error:
                # Again after as many more: an attempt at every snapshot would cost more than it saves.
                self._merge_at[level] = len(here) + compact.FAN
                if not self._warned_of_merging:
                    warnings.warn(
                        f"{error}; the segments stay as they are, training goes on", RuntimeWarning, stacklevel=6
                    )
                self._warned_of_merging = True
                return
            self._levels[level] = []
            self._merge_at.pop(level, None)
            self._levels.setdefault(level + 1, []).append(target)
            for path in here:
                try:
                    files.unlink(path)
                except StorageError:
                    # Twice on the disk is no loss; repair removes it.
                    continue
            level += 1


def merged_stem(sources: Sequence[Source]) -> str:
    """Name of the segment that several become, without its ending."""
    steps = [step for source in sources for axis, _ in source.axes.values() for step in axis.tolist()]
    return f"seg-0-{min(steps):012d}-{max(steps):012d}" if steps else "static-0"


def _steps(blocks: Sequence[Block]) -> list[int]:
    return sorted({step for block in blocks for step in block.steps})
