"""Coverage-guided fuzzing of segments, run.h5 and run.json with atheris, which is no dependency of ntkdyn.

    pip install atheris                                     # CPython 3.11 to 3.13 on Linux
    python -P tests/fuzz/coverage.py recordings --runs 100000
    python -P tests/fuzz/coverage.py manifests --seconds 60

The corpus is made on the fly and grows in ``--corpus``. Coverage of ntkdyn guides it; HDF5 is not instrumented. What
ends the fuzzing process is tried again in a limited child, and the fuzzing goes on: a file at which the check of
strangers' files ends is refused in real life too, everything else is a finding, lies in ``findings`` of the corpus and
makes the exit code 1.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

KINDS = ("recordings", "manifests")
_SECONDS_A_FILE = 5


def harness() -> ModuleType:
    """The module harness.py beside this one."""
    # With -P the folder of a script is not where Python looks; last, as "coverage" is another package elsewhere.
    sys.path.append(str(Path(__file__).parent))
    return importlib.import_module("harness")


def target_of(tools: Any, kind: str, originals: Path, folder: Path) -> Any:
    """The target of a kind of file; what comes out of the files in ``originals`` is right."""
    target = tools.recordings(folder / "origin") if kind == "recordings" else tools.manifests()
    originals.mkdir(parents=True, exist_ok=True)
    # Those of the first process: each run that is recorded has a name and a time of its own.
    if not any(originals.iterdir()):
        for name, data in target.originals.items():
            (originals / name).write_bytes(data)
    target.originals = {file.name: file.read_bytes() for file in originals.iterdir()}
    target.learn(folder)
    return target


def one_input(tools: Any, target: Any, folder: Path) -> Callable[[bytes], None]:
    """What atheris calls with each file: raises AssertionError if it is neither refused nor read rightly."""

    def examine(data: bytes) -> None:
        found = tools.checked(target, folder, data)
        if found == "sound":
            found = tools.verdict(target, folder, data)
        assert found in ("refused", "same", "unsealed"), found
        # As somebody would give it who can compute checksums: other values are his right, faults are not.
        sealed = target.seal(data)
        if sealed != data:
            found = tools.verdict(target, folder, sealed)
            assert not found.startswith("fault"), found

    return examine


def fuzz(kind: str, originals: Path, folder: Path, arguments: list[str]) -> None:
    """Fuzz in this process until atheris ends it."""
    import atheris

    with atheris.instrument_imports(include=["ntkdyn"], enable_loader_override=False):
        tools = harness()
    examine = one_input(tools, target_of(tools, kind, originals, folder), folder)
    atheris.Setup([sys.argv[0], *arguments], examine)
    atheris.Fuzz()


def tried_again(kind: str, originals: Path, folder: Path, file: Path) -> str:
    """Why a file ended the fuzzing: "refused" where only its check ends, else what is wrong."""
    tools = harness()
    target = target_of(tools, kind, originals, folder)
    data = file.read_bytes()
    (found,) = tools.in_child(1, lambda _: tools.checked(target, folder, data))
    if found in ("crash", "hang"):
        return "refused"
    if found == "sound":
        (found,) = tools.in_child(1, lambda _: tools.verdict(target, folder, data))
    if found in ("refused", "same", "unsealed"):
        (found,) = tools.in_child(1, lambda _: tools.verdict(target, folder, target.seal(data)))
        found = found if found.startswith("fault") or found in ("crash", "hang") else "refused"
    return str(found)


def main() -> int:
    """Fuzz one kind of file, over all ends of the fuzzing process; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--runs", type=int, default=100_000, help="files that are tried")
    parser.add_argument("--seconds", type=int, default=24 * 3600, help="end after this time")
    parser.add_argument("--corpus", type=Path, help="folder that is kept; default one that goes")
    parser.add_argument("--inner", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        corpus = (options.corpus or Path(name) / "corpus") / options.kind
        if options.inner is not None:
            fuzz(options.kind, corpus / "originals", Path(name), options.inner)
            return 0
        return _fuzz_on(options, corpus)


def _fuzz_on(options: argparse.Namespace, corpus: Path) -> int:
    originals, files, ended, findings = (corpus / name for name in ("originals", "files", "ended", "findings"))
    for folder in (files, ended, findings):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        for original, data in target_of(harness(), options.kind, originals, Path(name)).originals.items():
            (files / original).write_bytes(data)
    begin, done, refused, wrong = time.monotonic(), 0, 0, 0
    while done < options.runs and (left := int(options.seconds - (time.monotonic() - begin))) > 0:
        limits = [f"-runs={options.runs - done}", f"-max_total_time={left}", f"-timeout={_SECONDS_A_FILE}"]
        command = [sys.executable, "-P", __file__, options.kind, "--corpus", corpus.parent, "--inner", *limits]
        command += [f"-artifact_prefix={ended}/", "-print_final_stats=1", str(files)]
        output = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        counted = re.findall(r"^#(\d+)|number_of_executed_units: (\d+)", output.stderr, re.MULTILINE)
        done += max((int(a or b) for a, b in counted), default=0)
        if output.returncode == 0:
            continue
        stopped = list(ended.iterdir())
        if not stopped:
            sys.exit(f"the fuzzing process ended without a file: {output.stderr[-2000:]}")
        for file in stopped:
            with tempfile.TemporaryDirectory() as name:
                reason = tried_again(options.kind, originals, Path(name), file)
            if reason == "refused":
                refused += 1
                file.unlink()
            else:
                wrong += 1
                print(f"{file.name}: {reason}")
                file.rename(findings / file.name)
    size = len(list(files.iterdir()))
    print(f"{options.kind}: {done} files in {time.monotonic() - begin:.0f} s, {size} in the corpus,", end=" ")
    print(f"{refused} ended their check and are refused by it, {wrong} findings")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
