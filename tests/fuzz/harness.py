"""What the fuzzers share: corpora, what may come out of each file, mutations, and children that bear the consequences.

A target is a function of the bytes of one file. It writes them where such a file lies, reads them as ntkdyn does, and
returns what came out, as one text. NtkdynError in one line is a refusal; every other exception is a fault of ntkdyn.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import signal
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ntkdyn.errors import LockedRecording, NtkdynError
from ntkdyn.probe import Field
from ntkdyn.store import compact, lock, verify
from ntkdyn.store.manifest import encode_manifest, read_manifest, resumed_after
from ntkdyn.store.metadata import dump_json, load_json
from ntkdyn.store.reader import RunReader
from ntkdyn.store.repair import repair
from ntkdyn.store.writer import RunWriter

SEED = 20261125
BATCH = 40
SECONDS = 5.0
CPU_SECONDS = 2  # of a whole batch, which takes a tenth of it; what spins is ended sooner than what sleeps
MAX_BYTES = 2**26

Read = Callable[[Path, bytes], str]


def _never(data: bytes) -> bool:
    return False


def _as_it_is(data: bytes) -> bytes:
    return data


@dataclass
class Target:
    """One kind of file.

    Attributes:
        originals: sound files by name.
        read: (folder, bytes) -> what came out of such a file there.
        check: what a stranger's file has to pass before it is read, in a process that may end; raises to refuse it.
        seal: bytes -> the same with right checksums, where they can be had, as an attacker would give them.
        unsealed: whether a file has no checksum, so that nobody can tell its values from others.
        right: what comes out of the originals.
    """

    originals: Mapping[str, bytes]
    read: Read
    check: Read | None = None
    seal: Callable[[bytes], bytes] = _as_it_is
    unsealed: Callable[[bytes], bool] = _never
    right: set[str] = field(default_factory=set)

    def learn(self, folder: Path) -> None:
        """Note what comes out of the originals."""
        self.right = {self.read(folder, data) for data in self.originals.values()}


def judged(read: Read, folder: Path, data: bytes) -> str:
    """What came out, "refused", or "fault: ..." where something else was raised or a message has several lines."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read(folder, data)
    except NtkdynError as error:
        return "refused" if len(str(error).splitlines()) == 1 else f"fault: several lines: {str(error)!r:.300}"
    except MemoryError:
        return "refused"
    except Exception as error:
        return f"fault: {type(error).__name__} {str(error)!r:.300}"


def verdict(target: Target, folder: Path, data: bytes) -> str:
    """Read a file that has passed its check: "refused", "same", "unsealed", "different" or "fault: ..."."""
    found = judged(target.read, folder, data)
    if found == "refused" or found.startswith("fault"):
        return found
    return "same" if found in target.right else "unsealed" if target.unsealed(data) else "different"


def checked(target: Target, folder: Path, data: bytes) -> str:
    """Check a file as that of a stranger: "refused", "sound" or "fault: ..."."""
    return "sound" if target.check is None else judged(target.check, folder, data)


def recordings(folder: Path) -> Target:
    """Segments and run.h5: a segment of one step, merged ones, one without steps, and a packed run."""
    fan, compact.FAN = compact.FAN, 4
    try:
        writer = RunWriter(folder / "run", {"seed": 3, "config": {"width": 8}})
        writer.declare(
            "ntk/test", [Field(name="kernel", dims=("sample", "sample_2"), shape=(7, 7), attributes={"unit": 2})]
        )
        writer.declare("gates", [Field(name="a/slope", dims=("channel",), shape=(3,), dtype="f8"),
                                 Field(name="a/frozen", dims=("channel",), shape=(3,), dtype="?"),
                                 Field(name="note", dtype="str"),
                                 Field(name="n", dtype="i4", static=True)])  # fmt: skip
        writer.write_arrays({"probe_sets/test": {"x": np.eye(3), "label": np.array(["a", "é"])}},
                            dims={"probe_sets/test/x": ("n", "m"), "probe_sets/test/label": ("k",)})  # fmt: skip
        for step in range(6):
            kernel = np.add.outer(np.arange(7.0), np.arange(7.0)).astype("f4") + step
            writer.commit(step, step / 2, {
                "ntk/test": {"kernel": kernel},
                "gates": {"a/slope": [step, 0.5, 1], "a/frozen": [True, False, True], "note": f"é{step}", "n": 4},
            })  # fmt: skip
        found = {path.name: path.read_bytes() for path in sorted((folder / "run" / "segments").glob("*.h5"))}
        writer.close()
    finally:
        compact.FAN = fan
    found["run.h5"] = (folder / "run" / "run.h5").read_bytes()
    return Target(found, _read_recording, check=_check_recording)


def _check_recording(folder: Path, data: bytes) -> str:
    (folder / "file.h5").write_bytes(data)
    verify.check_file(folder / "file.h5", max_bytes=MAX_BYTES, max_ratio=200.0)
    return "sound"


def _read_recording(folder: Path, data: bytes) -> str:
    """Everything that a reader gets out of a file."""
    (folder / "file.h5").write_bytes(data)
    reader = RunReader.open(folder / "file.h5", trusted=True)
    arrays = {name: (str(array.dtype), array.shape, array.tolist()) for name in reader.names()
              if (array := reader.read(name)) is not None}  # fmt: skip
    declared = {group: dump_json(entry.to_json()) for group, entry in reader.declarations.items()}
    axes = {group: (reader.steps(group).tolist(), reader.epochs(group).tolist()) for group in reader.groups()}
    return repr((arrays, declared, axes, dump_json(reader.manifest)))


def manifests() -> Target:
    """run.json, of a run that was resumed, with all kinds of values."""
    entries = {
        "format": "ntkdyn recording 1", "run": "0123456789abcdef", "status": "finished", "seed": 3,
        "config": {"rate": 0.1, "tiny": 5e-324, "widths": [8, 16], "note": "é\n\"", "text": "NaN", "on": True},
        "results": {"gap": float("nan"), "best": float("-inf"), "accuracy": 0.5, "none": None},
        "branches": [{"after": 4, "created": "2026-11-25T10:00:00+00:00"}, {"after": 6}],
    }  # fmt: skip
    return Target({"run.json": encode_manifest(entries)}, _read_manifest, seal=_seal_manifest, unsealed=_unsealed)


def _read_manifest(folder: Path, data: bytes) -> str:
    (folder / "run.json").write_bytes(data)
    reader = RunReader.open(folder)
    resumed_after(read_manifest(folder))
    return dump_json(reader.manifest)


def _unsealed(data: bytes) -> bool:
    return "crc32" not in json.loads(data)


def _seal_manifest(data: bytes) -> bytes:
    try:
        entries = load_json(data)
        entries.pop("crc32", None)
        return encode_manifest(entries)
    except (ValueError, AttributeError, TypeError):
        return data


def locks(folder: Path) -> Target:
    """LOCK; a run beside it must stay readable, and is repaired, or its owner named."""
    folder.mkdir()
    held = lock.Lock(folder)
    content = (folder / lock.NAME).read_bytes()
    held.release()
    elsewhere = json.dumps({**json.loads(content), "host": "elsewhere"}).encode()
    # No numbers come out of a LOCK; whom it makes wait is all that it decides.
    return Target({"mine": content, "elsewhere": elsewhere}, _read_lock, unsealed=lambda data: True)


def _read_lock(folder: Path, data: bytes) -> str:
    if not (folder / "run.json").exists():
        (folder / "run.json").write_bytes(encode_manifest({"format": "ntkdyn recording 1", "status": "finished"}))
    (folder / lock.NAME).write_bytes(data)
    refused = []
    for action in (lock.refuse_locked, repair):
        try:
            action(folder)
        except LockedRecording as error:
            if not str(error).isprintable():
                raise ValueError("a message of several lines") from error
            refused.append(action.__name__)
    assert read_manifest(folder)["status"] == "finished"
    return f"refused by {len(refused)}"


def checkpoints(folder: Path) -> tuple[Target, Target]:
    """checkpoint.json and tensors.safetensors of a training."""
    # Here, because torch takes seconds to import and the coverage-guided fuzzer starts often.
    import torch
    from torch import nn

    from ntkdyn import checkpoint

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.125)
    model(torch.randn(4, 2)).square().sum().backward()
    optimizer.step()
    extra = {"recorder": {"step": 3, "names": ["a", "é"], "nan": float("nan")}, "mask": (torch.arange(3), None, True)}
    saved = checkpoint.save(folder, 3, model, optimizer, extra)
    structure, tensors = ((saved / name).read_bytes() for name in ("checkpoint.json", "tensors.safetensors"))

    def read_structure(place: Path, data: bytes) -> str:
        (place / "checkpoint.json").write_bytes(data)
        (place / "tensors.safetensors").write_bytes(tensors)
        return _loaded(place)

    def read_tensors(place: Path, data: bytes) -> str:
        (place / "checkpoint.json").write_bytes(structure)
        (place / "tensors.safetensors").write_bytes(data)
        return _loaded(place)

    return (
        Target({"checkpoint.json": structure}, read_structure, seal=_seal_checkpoint, unsealed=_unsealed),
        Target({"tensors.safetensors": tensors}, read_tensors),
    )


def _loaded(place: Path) -> str:
    from ntkdyn import checkpoint

    found = checkpoint.load(place)
    parts = (found.step, found.model, found.optimizer, found.extra, found.random_state)
    return repr(_plain(parts))


def _plain(value: Any) -> Any:
    if hasattr(value, "detach"):
        return str(value.dtype), tuple(value.shape), value.tolist()
    if isinstance(value, dict):
        return [(_plain(key), _plain(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [_plain(item) for item in value]
    return value


def _seal_checkpoint(data: bytes) -> bytes:
    try:
        content = json.loads(data)
        content.pop("crc32", None)
        return json.dumps({**content, "crc32": zlib.crc32(json.dumps(content).encode())}).encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        return data


_TOKENS = (
    b"NaN", b"Infinity", b"1e400", b"-1e400", b"1e-400", b"-0.0", b"9" * 100_000, b"1" * 4300, b"18446744073709551616",
    b"[" * 100_000, b'{"a":' * 100_000, b"[" * 90 + b"]" * 90, b'"' + b"x" * 1_000_000 + b'"', b'"\\ud800"',
    b"\xff\xfe", b"\xc3\x28", b"\0", b'"\\u0000"', b"null", b"true", b"{}", b"[]", b'""', b'{"a": 1, "a": 2}', b"\n",
    b'"\\n\\u001b[31m"',
)  # fmt: skip


def mutated(data: bytes, others: list[bytes], chance: random.Random, *, text: bool = False) -> bytes:
    """One to four changes: bits, bytes, numbers, blocks, cuts, pieces of other files, near the beginning more often.

    Args: text: of JSON also values, in place of one that stands there.
    """
    result = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        size = len(result)
        if size < 8:
            break
        place = chance.randrange(min(size, 4096) if chance.random() < 0.4 else size)
        length = chance.choice((1, 2, 4, 8, 64, 512))
        match chance.randrange(10 if text else 8):
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
            case _:
                first = max(result.rfind(mark, 0, place) for mark in (b":", b"[", b",", b"{")) + 1
                last = min((end for mark in (b",", b"]", b"}") if (end := result.find(mark, first)) >= 0), default=size)
                result[first:last] = chance.choice(_TOKENS)
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
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                for index in range(len(verdicts), count):
                    os.write(writing, json.dumps(work(index)).encode() + b"\n")
            finally:
                # Not back into the test, of which this is a copy.
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
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
            reason = "hang"
        verdicts += [json.loads(line) for line in heard.decode().splitlines()]
        if len(verdicts) < count:
            verdicts.append(reason)
        assert time.monotonic() - begun < BATCH * SECONDS
    return verdicts
