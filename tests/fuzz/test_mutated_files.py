"""Mutated segments and packed runs: refused, or read with the very numbers; never wrong ones, never a crash.

A server forks a limited child for each batch of files, so that a file that crashes or hangs HDF5 costs one child. The
check that strangers' files get runs in such a child in real life too: there an end of the child is a refusal. After a
file has passed it, a crash, a hang or another number is a failure.
"""

from __future__ import annotations

import os
import random
import resource
import select
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntkdyn.errors import NtkdynError
from ntkdyn.probe import Field
from ntkdyn.store import compact, verify
from ntkdyn.store.metadata import dump_json
from ntkdyn.store.reader import RunReader
from ntkdyn.store.writer import RunWriter

SEED = 20261125
BATCH = 40
SECONDS = 5.0


def originals(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A segment of one step, a merged one, one without steps, and a packed run."""
    patch.setattr(compact, "FAN", 4)
    writer = RunWriter(folder / "run", {"seed": 3, "config": {"width": 8}})
    writer.declare(
        "ntk/test", [Field(name="kernel", dims=("sample", "sample_2"), shape=(7, 7), attributes={"unit": 2})]
    )
    writer.declare("gates", [Field(name="a/slope", dims=("channel",), shape=(3,), dtype="f8"),
                             Field(name="a/frozen", dims=("channel",), shape=(3,), dtype="?"),
                             Field(name="note", dtype="str"), Field(name="n", dtype="i4", static=True)])  # fmt: skip
    writer.write_arrays("probe_sets/test", {"x": np.eye(3), "label": np.array(["a", "é"])},
                        dims={"x": ("n", "m"), "label": ("k",)})  # fmt: skip
    for step in range(6):
        kernel = np.add.outer(np.arange(7.0), np.arange(7.0)).astype("f4") + step
        writer.commit(step, step / 2, {
            "ntk/test": {"kernel": kernel},
            "gates": {"a/slope": [step, 0.5, 1], "a/frozen": [True, False, True], "note": f"é{step}", "n": 4},
        })  # fmt: skip
    found = {path.name: path.read_bytes() for path in (folder / "run" / "segments").glob("*.h5")}
    writer.close()
    found["run.h5"] = (folder / "run" / "run.h5").read_bytes()
    return found


def content(path: Path) -> dict[str, Any]:
    """Everything that a reader gets out of a file."""
    reader = RunReader.open(path, trusted=True)
    arrays = {name: (str(array.dtype), array.shape, array.tolist()) for name in reader.names()
              if (array := reader.read(name)) is not None}  # fmt: skip
    declared = {group: dump_json(entry.to_json()) for group, entry in reader.declarations.items()}
    axes = {group: (reader.steps(group).tolist(), reader.epochs(group).tolist()) for group in reader.groups()}
    return {"arrays": arrays, "declared": declared, "axes": axes, "manifest": dump_json(reader.manifest)}


def mutated(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """One to four changes: bits, bytes, numbers, blocks, cuts, pieces of other files, near the beginning more often."""
    result = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        size = len(result)
        if size < 8:
            break
        place = chance.randrange(min(size, 4096) if chance.random() < 0.4 else size)
        length = chance.choice((1, 2, 4, 8, 64, 512))
        match chance.randrange(8):
            case 0 | 1:
                result[place] ^= 1 << chance.randrange(8)
            case 2:
                result[place : place + length] = chance.randbytes(min(length, size - place))
            case 3:
                filler = chance.choice((b"\0", b"\xff", b"\x7f", b"\x01"))
                result[place : place + length] = filler * min(length, size - place)
            case 4:
                del result[place:]
            case 5:
                del result[place : place + length]
            case 6:
                other = chance.choice(others)
                start = chance.randrange(len(other))
                piece = other[start : start + length]
                result[place : place + len(piece)] = piece
            case 7:
                result[place:place] = result[place : place + length]
    return bytes(result)


def in_child(count: int, work: Callable[[int], str]) -> list[str]:
    """Verdicts of a forked child on a batch of files; the file at which it ended gets the reason as its verdict."""
    verdicts: list[str] = []
    while len(verdicts) < count:
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reading)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            for index in range(len(verdicts), count):
                os.write(writing, f"{work(index)}\n".encode())
            os._exit(0)
        os.close(writing)
        heard, begun = b"", time.monotonic()
        reason = "crash"
        while True:
            ready, _, _ = select.select([reading], [], [], SECONDS)
            if not ready:
                reason = "hang"
                os.kill(process, signal.SIGKILL)
                break
            part = os.read(reading, 65536)
            if not part:
                break
            heard += part
        os.close(reading)
        os.waitpid(process, 0)
        verdicts += heard.decode().split()
        if len(verdicts) < count:
            verdicts.append(reason)
        assert time.monotonic() - begun < BATCH * SECONDS
    return verdicts


def test_mutated_files_are_refused_or_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    files = 100_000 if request.config.getoption("--long") else 2000
    sources = originals(tmp_path, monkeypatch)
    names = sorted(sources)
    expected = {}
    for name in names:
        (tmp_path / name).write_bytes(sources[name])
        expected[name] = content(tmp_path / name)
    chance = random.Random(SEED)
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    target = memory / f"ntkdyn-fuzz-{os.getpid()}.h5"
    checked: Counter[str] = Counter()
    read: Counter[str] = Counter()
    begin = time.perf_counter()
    try:
        for first in range(0, files, BATCH):
            batch = []
            for _ in range(min(BATCH, files - first)):
                name = chance.choice(names)
                batch.append((name, mutated(sources[name], list(sources.values()), chance)))

            def check(index: int, batch: list[tuple[str, bytes]] = batch) -> str:
                target.write_bytes(batch[index][1])
                try:
                    verify.check_file(target, max_bytes=2**26, max_ratio=200.0)
                except (NtkdynError, MemoryError):
                    return "refused"
                return "sound"

            verdicts = in_child(len(batch), check)
            checked.update(verdicts)
            sound = [entry for entry, verdict in zip(batch, verdicts, strict=True) if verdict == "sound"]

            def compare(index: int, sound: list[tuple[str, bytes]] = sound) -> str:
                name, data = sound[index]
                target.write_bytes(data)
                try:
                    found = content(target)
                except NtkdynError:
                    return "refused"
                return "same" if found == expected[name] else "different"

            verdicts = in_child(len(sound), compare)
            read.update(verdicts)
            for (name, data), verdict in zip(sound, verdicts, strict=True):
                if verdict not in ("same", "refused"):
                    kept = tmp_path / f"{verdict}-{name}"
                    kept.write_bytes(data)
    finally:
        target.unlink(missing_ok=True)
    seconds = time.perf_counter() - begin
    ended = checked["crash"] + checked["hang"]
    with capsys.disabled():
        print(f"\n{files} mutated files in {seconds:.0f} s, seed {SEED}:", end=" ")
        print(f"{checked['refused']} refused, {ended} ended or held up the checking process;", end=" ")
        print(f"of {checked['sound']} that passed {read['same']} gave the same numbers,", end=" ")
        print(f"{read['refused']} were refused while they were read, {read['different']} gave wrong ones,", end=" ")
        print(f"{read['crash']} crashed and {read['hang']} hung the reader")
    assert sum(checked.values()) == files
    assert read["different"] == read["crash"] == read["hang"] == 0
    assert checked["refused"] > files / 4
    assert read["same"] > 0
