"""Checks of files that this process has not written, made in a limited process of their own.

HDF5 follows external links and storage without asking, and crashes or hangs on some broken files. So the structure is
checked before any array is read, then every CRC, in a child with limits of memory, processor and wall time.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py

from ..errors import (
    DamagedRecording,
    MissingRecording,
    NewerRecording,
    NtkdynError,
    ReplacedFile,
    StorageError,
    UntrustedFile,
)
from .bands import in_pieces
from .segment import (
    EPOCH,
    STEP,
    Declaration,
    Identity,
    get_array,
    get_axis,
    get_declarations,
    get_recording,
    identity_of,
    opened,
    refuse_newer,
)

MAX_BYTES = 2 * 2**30
# For who keeps a recording in order: nothing is read whole, and memory is bounded by the size of the files.
ANY_SIZE = 2**62
MAX_RATIO = 200.0
_FILTERS = {
    h5py.h5z.FILTER_DEFLATE: "gzip",
    h5py.h5z.FILTER_SHUFFLE: "shuffle",
    h5py.h5z.FILTER_FLETCHER32: "fletcher32",
    h5py.h5z.FILTER_LZF: "lzf",
}
# Below this an array without storage (an empty one, a short axis) is no attack.
_SMALL = 64 * 2**10
_SECONDS = 30.0
_BYTES_PER_SECOND = 20e6
_MEMORY = 2**30
_BOOT = "import sys; sys.path.append(sys.argv[1]); from ntkdyn.store.verify import main; main()"
_KINDS: Mapping[str, type[NtkdynError]] = {
    "damaged": DamagedRecording,
    "newer": NewerRecording,
    "untrusted": UntrustedFile,
    "missing": MissingRecording,
    "storage": StorageError,
}

# Files known to be sound, by identity: written by this process, or validated under these limits.
_sound: dict[Identity, tuple[float, float]] = {}


def remember(path: Path) -> None:
    """Note that this process wrote a file."""
    _sound[identity_of(path.stat())] = (0.0, 0.0)


def is_own(identity: Identity) -> bool:
    """Whether this process wrote a file."""
    return _sound.get(identity) == (0.0, 0.0)


def _is_sound(identity: Identity, max_bytes: float, max_ratio: float) -> bool:
    bytes_before, ratio_before = _sound.get(identity, (math.inf, math.inf))
    return bytes_before <= max_bytes and ratio_before <= max_ratio


def refuse_replaced(path: Path, identity: Identity, *, max_bytes: int, max_ratio: float) -> None:
    """Refuse what has been opened if it is not what was validated; between the two anybody may have put another file.

    Raises: ReplacedFile.
    """
    if not _is_sound(identity, max_bytes, max_ratio):
        raise ReplacedFile(
            f"{path} was replaced or changed between its check and its opening; open it again; on a file system that "
            "gives files new numbers each time, copy it to another or open with trusted=True if you made the file"
        )


def validate(paths: Sequence[Path], *, max_bytes: int = MAX_BYTES, max_ratio: float = MAX_RATIO) -> None:
    """Check files once per process: structure, declared sizes, filters, then every CRC.

    Raises: UntrustedFile, DamagedRecording: the first file that is not sound.  FileNotFoundError: it is gone.
    """
    for problem in examine(paths, max_bytes=max_bytes, max_ratio=max_ratio).values():
        if problem is not None:
            raise problem


def examine(
    paths: Sequence[Path], *, max_bytes: int = MAX_BYTES, max_ratio: float = MAX_RATIO
) -> dict[Path, NtkdynError | None]:
    """The problem of each file, None for sound ones; sound files are remembered."""
    found: dict[Path, NtkdynError | None] = dict.fromkeys(paths)
    waiting = []
    for path in found:
        try:
            identity = identity_of(path.stat())
        except OSError as error:
            found[path] = MissingRecording(f"{path}: {error.strerror}; expected a file of a recording; check the path")
            continue
        if not _is_sound(identity, max_bytes, max_ratio):
            waiting.append(path)
    while waiting:
        for path, verdict in _in_child(waiting, max_bytes, max_ratio).items():
            waiting.remove(path)
            if isinstance(verdict, NtkdynError):
                found[path] = verdict
            else:
                _sound[verdict] = (max_bytes, max_ratio)
    return found


def _in_child(paths: Sequence[Path], max_bytes: int, max_ratio: float) -> dict[Path, NtkdynError | Identity]:
    """Verdicts of one child, of sound files the identity of what it has read.

    At least one: a file that ends the child is blamed for it if it was its first; after others it gets one of its own,
    as time and memory may have gone to them.
    """
    seconds = _SECONDS + sum(path.stat().st_size for path in paths if path.exists()) / _BYTES_PER_SECOND
    request = {
        "paths": [str(path) for path in paths],
        "max_bytes": max_bytes,
        "max_ratio": max_ratio,
        "seconds": math.ceil(seconds),
    }
    # One thread: the pools of numerical libraries would count against the limit of memory. "::" loads no filter plugin.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HDF5_PLUGIN_PRELOAD": "::",
    }
    command = [sys.executable, "-P", "-c", _BOOT, str(Path(__file__).parents[2])]
    try:
        child = subprocess.run(
            command,
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=seconds,
            env=environment,
            check=False,
        )
        output, complaint, status = child.stdout, child.stderr, child.returncode
        end = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
    except subprocess.TimeoutExpired as error:
        output, complaint, end = error.stdout or b"", b"", f"no answer within {seconds:.0f} s"
    verdicts: dict[Path, NtkdynError | Identity] = {}
    begun: Path | None = None
    first: Path | None = None
    for line in output.decode(errors="replace").splitlines():
        try:
            answer = json.loads(line)
        except ValueError:
            continue
        begun = paths[answer["file"]]
        first = first or begun
        if "identity" in answer:
            device, inode, size, modified, changed = answer["identity"]
            verdicts[begun] = device, inode, size, modified, changed
        elif "kind" in answer:
            verdicts[begun] = _KINDS[answer["kind"]](answer["message"])
    if begun is None:
        reason = complaint.decode(errors="replace").strip().splitlines()[-1:] or [end]
        raise StorageError(
            f"the process that checks files of others did not start: {reason[0]}; use trusted=True for own files"
        )
    if begun not in verdicts and begun is first:
        verdicts[begun] = DamagedRecording(
            f"{begun} is damaged: reading it ended the checking process ({end}); restore it from a copy"
        )
    return verdicts


def _untrusted(path: Path, what: str, found: str, expected: str, option: str = "") -> UntrustedFile:
    remedy = f"open with {option} if you know the file" if option else "open with trusted=True if you made the file"
    return UntrustedFile(f"{path} at {what!r}: found {found}, expected {expected}; {remedy}")


def _links(group: h5py.Group, path: Path) -> Iterator[tuple[str, h5py.Group | h5py.Dataset]]:
    """All objects below the root; each has one name, reached by hard links only."""
    seen = {h5py.h5o.get_info(group.id).addr}
    stack = [group]
    while stack:
        parent = stack.pop()
        for name in parent:
            where = f"{parent.name}/{name}".strip("/")
            link = parent.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise _untrusted(path, where, f"a link of type {type(link).__name__}", "hard links only")
            child = parent[name]
            address = h5py.h5o.get_info(child.id).addr
            if address in seen:
                raise _untrusted(path, where, "a second name of another object", "one name for each object")
            seen.add(address)
            if isinstance(child, h5py.Group):
                stack.append(child)
            elif not isinstance(child, h5py.Dataset):
                raise _untrusted(path, where, f"a {type(child).__name__}", "groups and arrays only")
            yield where, child


def _check_dataset(dataset: h5py.Dataset, name: str, path: Path, max_bytes: int, max_ratio: float) -> int:
    properties = dataset.id.get_create_plist()
    if properties.get_layout() == h5py.h5d.VIRTUAL:
        raise _untrusted(path, name, "a virtual dataset", "arrays stored in this file")
    if properties.get_external_count():
        raise _untrusted(path, name, "storage in another file", "arrays stored in this file")
    for index in range(properties.get_nfilters()):
        code = properties.get_filter(index)[0]
        if code not in _FILTERS:
            raise _untrusted(path, name, f"the filter number {code}", f"only {', '.join(sorted(_FILTERS.values()))}")
    is_text = h5py.check_string_dtype(dataset.dtype) is not None
    if not is_text and dataset.dtype.kind not in "biuf":
        raise _untrusted(path, name, f"elements of type {dataset.dtype}", "numbers or text")
    chunk = math.prod(dataset.chunks or (0,)) * dataset.dtype.itemsize
    size: int = math.prod(dataset.shape or (0,)) * dataset.dtype.itemsize
    for what, count in (("declared size", size), ("chunk size", chunk)):
        if count > max_bytes:
            option = f"max_bytes={count} or trusted=True (--trusted)"
            raise _untrusted(path, name, f"a {what} of {count} bytes", f"at most {max_bytes}", option)
    _check_ratio(size, dataset.id.get_storage_size(), name, path, max_ratio)
    return size


def _check_ratio(size: int, stored: int, name: str, path: Path, max_ratio: float) -> None:
    ratio = size / max(stored, 1)
    if size > _SMALL and ratio > max_ratio:
        found, expected = f"{ratio:.0f} declared bytes for each stored one", f"at most {max_ratio:g}"
        raise _untrusted(path, name, found, expected, f"max_ratio={math.ceil(ratio)}")


def _known_names(declarations: Mapping[str, Declaration]) -> set[str]:
    known: set[str] = set()
    for declaration in declarations.values():
        paths = [declaration.path(field) for field in declaration.fields.values()]
        for path, field in zip(paths, declaration.fields.values(), strict=True):
            known |= {f"{path.rpartition('/')[0]}/{dim}" for dim in field.dims}
        if declaration.stepped:
            paths += [declaration.path(STEP), declaration.path(EPOCH)]
        for path in paths:
            parts = path.split("/")
            known |= {"/".join(parts[:depth]) for depth in range(1, len(parts) + 1)}
    return known


def check_file(path: Path, *, max_bytes: int, max_ratio: float) -> Identity:
    """Check one file in this process: structure first, then every CRC; return the identity that it had before.

    Raises: UntrustedFile, DamagedRecording.
    """
    found: list[Identity] = []
    with opened(path, found.append) as file:
        # A later format may hold what this one refuses.
        refuse_newer(path, file.attrs.get("format"))
        total, names = 0, []
        for name, item in _links(file, path):
            names.append(name)
            if isinstance(item, h5py.Dataset):
                total += _check_dataset(item, name, path, max_bytes, max_ratio)
        _check_ratio(total, found[0][2], "/", path, max_ratio)
        declarations = get_declarations(get_recording(file, path))
        known = _known_names(declarations)
        for name in names:
            if name not in known:
                raise _untrusted(path, name, "an object that the recording does not declare", "declared ones only")
        check_sums(file, path, declarations)
    return found[0]


def check_sums(file: h5py.File, path: Path, declarations: Mapping[str, Declaration]) -> None:
    """Read every array in bounded pieces and compare its CRCs.

    Raises: DamagedRecording: names the file, array and step.
    """
    for declaration in declarations.values():
        steps = get_axis(file, path, declaration)[0].tolist() if declaration.stepped else []
        for field in declaration.fields.values():
            if declaration.is_static(field):
                if declaration.path(field) in file:
                    get_array(file, path, declaration, field, None)
                continue
            every = [(row, row) for row in range(len(steps))]
            for _ in in_pieces(file, path, declaration, field, steps, every):
                pass


def _limit(seconds: int, max_bytes: int, largest_file: int) -> None:
    try:
        import resource
    except ImportError:  # no such limits on Windows; the wall time holds there
        return
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    )
    # A row that is stored as its triangle takes three times its bytes in the file while it is unpacked.
    ceiling = used + min(2 * max_bytes, max(2 * MAX_BYTES, 3 * largest_file)) + _MEMORY
    for limit, wanted in ((resource.RLIMIT_AS, ceiling), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(limit)
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(limit, (allowed, hard))


def main() -> None:
    """The child: reads a request from stdin, answers one line at the begin and one at the end of each file."""
    request: dict[str, Any] = json.load(sys.stdin)
    largest = max((Path(name).stat().st_size for name in request["paths"] if Path(name).exists()), default=0)
    _limit(request["seconds"], request["max_bytes"], largest)

    def answer(entry: Mapping[str, Any]) -> None:
        sys.stdout.write(json.dumps(entry) + "\n")
        sys.stdout.flush()

    for number, name in enumerate(request["paths"]):
        answer({"file": number})
        try:
            identity = check_file(Path(name), max_bytes=request["max_bytes"], max_ratio=request["max_ratio"])
            answer({"file": number, "identity": identity})
            continue
        except UntrustedFile as error:
            kind, message = "untrusted", str(error)
        except NewerRecording as error:
            kind, message = "newer", str(error)
        except FileNotFoundError as error:
            kind, message = "missing", f"{name}: {error.strerror}; expected a file of a recording; check the path"
        except MemoryError:
            kind, message = "storage", f"{name}: checking it needs more memory than max_bytes allows; raise it"
        except (NtkdynError, OSError) as error:
            kind, message = "damaged", str(error)
        answer({"file": number, "kind": kind, "message": message})


if __name__ == "__main__":
    main()
