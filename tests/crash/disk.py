"""A disk that remembers every operation of ``ntkdyn.store.files``, so that each point of time can be looked at again.

The operations are done for real and written into a journal. ``states(point)`` gives what the disk may hold if the
process, or the machine, stops before operation number ``point``: everything done; everything that was not synced
dropped; names without their bytes; torn and scrambled bytes; and a random part of the names, as a journaling file
system may leave them. File bytes are sure after fsync of the file, names after fsync of their folder.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ntkdyn.store import files

_FUNCTIONS = ("create", "write", "truncate", "fsync", "replace", "link", "unlink", "sync_folder", "make_folder")


@dataclass
class Inode:
    """Bytes of one file: now, and after the last fsync."""

    now: bytearray = field(default_factory=bytearray)
    sure: bytes = b""


@dataclass
class Disk:
    """Names and bytes below one folder."""

    root: Path
    journal: list[tuple[Any, ...]] = field(default_factory=list)
    _open: dict[int, int] = field(default_factory=dict)
    _inodes: int = 0
    _in_folder: bool = False

    def record(self, patch: pytest.MonkeyPatch) -> None:
        """Put the journal in place of the functions of ``files``."""
        real = {name: getattr(files, name) for name in _FUNCTIONS}

        def create(path: Path) -> int:
            descriptor: int = real["create"](path)
            self._inodes += 1
            self._open[descriptor] = self._inodes
            self.journal.append(("create", self._name(path), self._inodes))
            return descriptor

        def write(descriptor: int, data: Any, offset: int) -> int:
            done: int = real["write"](descriptor, data, offset)
            self.journal.append(("write", self._open[descriptor], offset, bytes(memoryview(data).cast("B")[:done])))
            return done

        def truncate(descriptor: int, size: int) -> None:
            real["truncate"](descriptor, size)
            self.journal.append(("truncate", self._open[descriptor], size))

        def fsync(descriptor: int) -> None:
            real["fsync"](descriptor)
            if not self._in_folder:
                self.journal.append(("fsync", self._open[descriptor]))

        def sync_folder(path: Path) -> None:
            self._in_folder = True
            try:
                real["sync_folder"](path)
            finally:
                self._in_folder = False
            if path == self.root or self.root in path.parents:
                self.journal.append(("sync_folder", self._name(path)))

        def two(kind: str) -> Callable[[Path, Path], None]:
            def act(source: Path, target: Path) -> None:
                real[kind](source, target)
                self.journal.append((kind, self._name(source), self._name(target)))

            return act

        def unlink(path: Path) -> None:
            there = path.exists()
            real["unlink"](path)
            if there:
                self.journal.append(("unlink", self._name(path)))

        def make_folder(path: Path) -> None:
            missing = [folder for folder in (path, *path.parents) if not folder.exists()]
            for folder in reversed(missing):
                self.journal.append(("mkdir", self._name(folder)))
            real["make_folder"](path)

        acts = (create, write, truncate, fsync, two("replace"), two("link"), unlink, sync_folder, make_folder)
        for name, act in zip(_FUNCTIONS, acts, strict=True):
            patch.setattr(files, name, act)

    def _name(self, path: Path) -> str:
        return str(Path(path).absolute().relative_to(self.root))

    def states(self, point: int, seed: int, *, random_ones: int = 2) -> Iterator[tuple[str, dict[str, bytes | None]]]:
        """What may be on the disk when everything stops before operation ``point``: name -> bytes, None for folders."""
        replay = _Replay()
        for operation in self.journal[:point]:
            replay.apply(operation)
        yield "killed", replay.tree(replay.pending, lambda inode: bytes(inode.now))
        yield "dropped", replay.tree([], lambda inode: inode.sure)
        yield "names without bytes", replay.tree(replay.pending, lambda inode: inode.sure)
        chance = random.Random(seed * 1_000_003 + point)
        yield "torn", replay.tree(replay.pending, lambda inode: _torn(inode, chance))
        for number in range(random_ones):
            part = [change for change in replay.pending if chance.random() < 0.5]
            yield f"part {number}", replay.tree(part, lambda inode: _torn(inode, chance))


class _Replay:
    def __init__(self) -> None:
        self.inodes: dict[int, Inode] = {}
        self.names: dict[str, int | None] = {}
        self.sure_names: dict[str, int | None] = {}
        self.pending: list[tuple[str, str, int | None]] = []  # folder, name, inode or -1 for "gone"

    def apply(self, operation: tuple[Any, ...]) -> None:
        kind, *given = operation
        if kind == "create":
            name, number = given
            self.inodes[number] = Inode()
            self._name(name, number)
        elif kind == "mkdir":
            self._name(given[0], None)
        elif kind == "write":
            number, offset, data = given
            now = self.inodes[number].now
            now.extend(b"\0" * (offset + len(data) - len(now)))
            now[offset : offset + len(data)] = data
        elif kind == "truncate":
            number, size = given
            now = self.inodes[number].now
            del now[size:]
            now.extend(b"\0" * (size - len(now)))
        elif kind == "fsync":
            self.inodes[given[0]].sure = bytes(self.inodes[given[0]].now)
        elif kind == "replace":
            source, target = given
            number = self.names[source]
            # One change of the folder's content: the new name does not appear without the old one going, or the
            # other way round; across folders either may come first.
            self._name(target, number, renamed=source)
        elif kind == "link":
            self._name(given[1], self.names[given[0]])
        elif kind == "unlink":
            self.pending.append((str(Path(given[0]).parent), given[0], -1))
            del self.names[given[0]]
        elif kind == "sync_folder":
            mine = [change for change in self.pending if change[0] == given[0]]
            self.pending = [change for change in self.pending if change[0] != given[0]]
            _change(self.sure_names, mine)

    def _name(self, name: str, number: int | None, renamed: str | None = None) -> None:
        self.names[name] = number
        self.pending.append((str(Path(name).parent), name, number))
        if renamed is not None:
            del self.names[renamed]
            self.pending.append((str(Path(renamed).parent), renamed, -1))

    def tree(
        self, changes: list[tuple[str, str, int | None]], content: Callable[[Inode], bytes]
    ) -> dict[str, bytes | None]:
        names = dict(self.sure_names)
        _change(names, changes)
        contents: dict[int, bytes] = {}
        found: dict[str, bytes | None] = {}
        for name, number in names.items():
            # A file in a folder that did not reach the disk is gone with it.
            folders = [str(parent) for parent in Path(name).parents if str(parent) != "."]
            if any(folder not in names for folder in folders):
                continue
            if number is None:
                found[name] = None
            else:
                if number not in contents:
                    contents[number] = content(self.inodes[number])
                found[name] = contents[number]
        return found


def _change(names: dict[str, int | None], changes: list[tuple[str, str, int | None]]) -> None:
    for _, name, number in changes:
        if number == -1:
            names.pop(name, None)
        else:
            names[name] = number


def _torn(inode: Inode, chance: random.Random) -> bytes:
    """What was synced, or else a part of the bytes, in sectors that may be missing or scrambled."""
    if bytes(inode.now) == inode.sure:
        return inode.sure
    data = bytearray(inode.now[: chance.randrange(len(inode.now) + 1)])
    for start in range(0, len(data), 512):
        fate = chance.random()
        if fate < 0.2:
            data[start : start + 512] = b"\0" * len(data[start : start + 512])
        elif fate < 0.3:
            data[start : start + 512] = chance.randbytes(len(data[start : start + 512]))
    return bytes(data)


def lay_out(state: dict[str, bytes | None], folder: Path) -> None:
    """Write a state into a real folder."""
    for name, data in sorted(state.items()):
        target = folder / name
        if data is None:
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(descriptor, data)
            os.close(descriptor)
