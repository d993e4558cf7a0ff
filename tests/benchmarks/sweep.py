"""CPU seconds of a sweep on one core, and of the same runs in a process each that share nothing.

The sweep is tests/benchmarks/sweep.toml: 40 runs of which five are trunks, with kernels at ten steps of each trunk; a
second one records everything that the experiment records by itself. Alone, every run imports everything and trains its
own dense epochs; one run of each kind is measured and counted for all seeds, which differ in nothing that takes time.
CPU seconds are those of all processes, imports included, in which a busy machine shows less than in seconds on the
wall, but it shows: medians of interleaved rounds.

Run: python -P tests/benchmarks/sweep.py [ROUNDS]
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ntkdyn.sweep import make_plan
from ntkdyn.sweep.plan import PlannedConfiguration
from ntkdyn.sweep.plan_file import record_of

NTKDYN = [sys.executable, "-P", "-c", "from ntkdyn.cli import main; main()"]
EXPERIMENT, FILE = "nonlinear-advantage", Path(__file__).with_name("sweep.toml")


def cpu_seconds(*arguments: str | Path) -> float:
    """CPU seconds of one call of ntkdyn and of the processes that it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [*NTKDYN, *map(str, arguments)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def name_of(configuration: PlannedConfiguration) -> str:
    """A configuration in a few words."""
    config = configuration.config
    if config["intervention"] != "linearize":
        return "ReLU reference (trunk)" if config["intervention"] == "none" else "linear throughout"
    return f"{config['mask']} mask from epoch {config['start_epoch']}"


def call_of(configuration: PlannedConfiguration, record: Mapping[str, Any]) -> list[str]:
    """Arguments of ntkdyn record for the same run by itself."""
    given = {name: value for name, value in configuration.config.items() if value not in (None, [], {})}
    wanted = record_of(record, configuration.kind)
    flags = [part for name, value in given.items() for part in ("--set", f"{name}={value}")]
    flags += [part for probe in wanted.get("probes", ()) for part in ("--probe", probe)]
    return [*flags, *(["--log-spaced", str(wanted["log_spaced"])] if "log_spaced" in wanted else [])]


def main() -> None:
    """Print a Markdown table; the goals are 25 CPU seconds and a fifth of the other."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    plan = make_plan(EXPERIMENT, file=FILE)
    seeds = len(plan.seeds)
    sweeps: dict[str, list[float]] = {"as a sweep": [], "with the experiment's own recordings": []}
    alone: dict[str, list[float]] = {name_of(one): [] for one in plan.configurations}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before, _, after = FILE.read_text(encoding="utf-8").partition("[record.trunks]")
        (folder / "all.toml").write_text(f"{before}[settings]{after.partition('[settings]')[2]}", encoding="utf-8")
        for number in range(rounds):
            for times, file in zip(sweeps.values(), (FILE, folder / "all.toml"), strict=True):
                out = folder / f"{number}-{file.stem}"
                times.append(cpu_seconds("sweep", EXPERIMENT, "--config", file, "--jobs", "1", "--out", out))
            for one in plan.configurations:
                out = folder / f"{number}-alone" / one.runs.replace("/", "-")
                call = call_of(one, plan.record)
                alone[name_of(one)].append(cpu_seconds("record", EXPERIMENT, *call, "--seed", "0", "--out", out))
    print(f"| {len(plan.runs)} runs, one thread | CPU s, median of {rounds} | smallest |\n|---|---|---|")
    for title, times in sweeps.items():
        print(f"| {title} | {statistics.median(times):.1f} | {min(times):.1f} |")
    whole = sweeps["as a sweep"]
    medians, least = ([pick(times) for times in alone.values()] for pick in (statistics.median, min))
    print(f"| a process each, from one of each kind | {seeds * sum(medians):.0f} | {seeds * sum(least):.0f} |")
    ratio = seeds * sum(medians) / statistics.median(whole)
    print(f"| so many times cheaper | {ratio:.1f} | {seeds * sum(least) / min(whole):.1f} |")
    print("\nA run by itself: " + ", ".join(f"{name} {statistics.median(v):.1f} s" for name, v in alone.items()))


if __name__ == "__main__":
    main()
