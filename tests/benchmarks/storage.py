"""What a recording costs: a commit beside other ways to keep a snapshot, opening and reading a long run, its files.

The commit is of a symmetric 512 x 512 float32 kernel and ends with an fsync, interleaved with plain h5py (append and
flush, single-writer-multiple-reader) and SQLite (synchronous=FULL). Run: python -P tests/benchmarks/storage.py
"""

from __future__ import annotations

import argparse
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ntkdyn.probe import Field
from ntkdyn.processor import processor_name
from ntkdyn.results import Run
from ntkdyn.store import verify
from ntkdyn.store.writer import RunWriter

SIZE = 512
Commit = Callable[[int, "np.ndarray[Any, Any]"], None]


def ours(folder: Path) -> Commit:
    """A snapshot of ntkdyn: durable when it returns, compaction included."""
    writer = RunWriter(folder / "run", {})
    writer.declare("ntk", [Field(name="kernel", dims=("sample", "sample_2"), shape=(SIZE, SIZE))])

    def commit(step: int, kernel: np.ndarray[Any, Any]) -> None:
        assert writer.commit(step, None, {"ntk": {"kernel": kernel}})

    return commit


def h5py_append(folder: Path, *, swmr: bool) -> Commit:
    """Append to an extensible dataset and flush; a crash may lose what came before."""
    file = h5py.File(folder / "append.h5", "w", libver="latest" if swmr else None)
    dataset = file.create_dataset("kernel", (0, SIZE, SIZE), "f4", maxshape=(None, SIZE, SIZE), chunks=(1, SIZE, SIZE))
    if swmr:
        file.swmr_mode = True

    def commit(step: int, kernel: np.ndarray[Any, Any]) -> None:
        dataset.resize(step + 1, axis=0)
        dataset[step] = kernel
        dataset.flush()

    return commit


def sqlite(folder: Path) -> Commit:
    """One row of bytes in a transaction of its own."""
    database = sqlite3.connect(folder / "kernels.sqlite", isolation_level=None)
    database.execute("pragma journal_mode=wal")
    database.execute("pragma synchronous=full")
    database.execute("create table kernels (step integer primary key, kernel blob)")

    def commit(step: int, kernel: np.ndarray[Any, Any]) -> None:
        database.execute("insert into kernels values (?, ?)", (step, kernel.tobytes()))

    return commit


def commits(rounds: int) -> None:
    """Print medians of interleaved commits."""
    kernels = np.random.default_rng(0).standard_normal((8, SIZE, SIZE)).astype("f4")
    kernels += kernels.swapaxes(1, 2)
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(index) for index in range(4)]
        for folder in folders:
            folder.mkdir()
        ways = {
            "ntkdyn, committed": ours(folders[0]),
            "h5py append + flush": h5py_append(folders[1], swmr=False),
            "h5py SWMR + flush": h5py_append(folders[2], swmr=True),
            "SQLite, synchronous=FULL": sqlite(folders[3]),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for step in range(rounds):
            for way, commit in ways.items():
                begin = time.perf_counter()
                commit(step, kernels[step % 8])
                times[way].append(time.perf_counter() - begin)
        sizes = {
            way: sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file()) / rounds / 2**20
            for way, folder in zip(ways, folders, strict=True)
        }
    print(f"| commit of a {SIZE} x {SIZE} float32 kernel | median, ms | worst, ms | MiB | goal, ms |")
    print("|---|---|---|---|---|")
    for way, taken in times.items():
        goal = "5" if way.startswith("ntkdyn") else ""
        print(f"| {way} | {statistics.median(taken) * 1e3:.2f} | {max(taken) * 1e3:.0f} | {sizes[way]:.2f} | {goal} |")


def long_run(snapshots: int) -> None:
    """Print what it costs to open a live run of many snapshots and to read one kernel of it."""
    size = 64
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run"
        writer = RunWriter(path, {})
        writer.declare("ntk", [Field(name="kernel", dims=("sample", "sample_2"), shape=(size, size))])
        writer.declare("large", [Field(name="kernel", dims=("sample", "sample_2"), shape=(SIZE, SIZE))])
        kernel = np.add.outer(np.arange(size, dtype="f4"), np.arange(size, dtype="f4"))
        large = np.add.outer(np.arange(SIZE, dtype="f4"), np.arange(SIZE, dtype="f4"))
        most = 0
        begin = time.perf_counter()
        for step in range(snapshots):
            records = {"ntk": {"kernel": kernel + step}}
            if step % 100 == 99:
                records["large"] = {"kernel": large + step}
            writer.commit(step, None, records)
            if step % 50 == 0:
                most = max(most, sum(1 for _ in path.rglob("*")) + 1)
        recorded = time.perf_counter() - begin
        most = max(most, sum(1 for _ in path.rglob("*")) + 1)
        verify._sound.clear()
        begin = time.perf_counter()
        Run.open(path)
        first = time.perf_counter() - begin
        opening, reading = [], []
        for index in range(9):
            begin = time.perf_counter()
            run = Run.open(path)
            opening.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            found = run.lazy("large/kernel")[index]
            reading.append(time.perf_counter() - begin)
            assert found[0, 0] == 100 * index + 99
        tail = len(list((path / "segments").glob("*.h5")))
    print(f"\n| live run of {snapshots} snapshots, {tail} segments | | goal |\n|---|---|---|")
    print(f"| validation of all files, once, in a process of its own, and opening | {first:.2f} s | |")
    print(f"| opening, after validation | {statistics.median(opening):.2f} s | 1 s |")
    print(f"| reading one {SIZE} x {SIZE} kernel out of it | {statistics.median(reading) * 1e3:.1f} ms | 5 ms |")
    print(f"| files and folders, most at a time | {most} | 200 |")
    print(f"| recording them, each a commit, compaction included | {recorded / snapshots * 1e3:.2f} ms | |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=200, help="commits of each kind")
    parser.add_argument("--snapshots", type=int, default=10_000, help="snapshots of the long run")
    options = parser.parse_args()
    commits(options.rounds)
    long_run(options.snapshots)
    print(f"\n{processor_name()}, Python {sys.version.split()[0]}, h5py {h5py.__version__}")


if __name__ == "__main__":
    main()
