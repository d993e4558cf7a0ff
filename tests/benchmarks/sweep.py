"""CPU seconds of a sweep on one core, and of the same runs in a process each that share nothing.

The sweep is tests/benchmarks/sweep.toml: 40 runs of which five are trunks. Alone, every run imports everything and
trains its own dense epochs; one run of each kind is measured and counted for all seeds, as seeds differ in nothing
that takes time. CPU seconds are those of all processes, imports included, in which a busy machine shows far less than
in seconds on the wall, but it shows: medians of interleaved rounds.

Run: python -P tests/benchmarks/sweep.py [ROUNDS]
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ntkdyn.sweep import make_plan
from ntkdyn.sweep.plan import PlannedConfiguration

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


def main() -> None:
    """Print a Markdown table; the goals are 25 CPU seconds and a fifth of the other."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    plan = make_plan(EXPERIMENT, file=FILE)
    seeds = len(plan.seeds)
    whole: list[float] = []
    alone: dict[str, list[float]] = {name_of(one): [] for one in plan.configurations}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            whole.append(
                cpu_seconds("sweep", EXPERIMENT, "--config", FILE, "--jobs", "1", "--out", Path(folder) / f"{number}")
            )
            for one in plan.configurations:
                settings = [
                    f"{name}={value}"
                    for name, value in one.config.items()
                    if value is not None and value not in ([], {})
                ]
                flags = [part for setting in settings for part in ("--set", setting)]
                out = Path(folder) / f"{number}-alone" / one.runs.replace("/", "-")
                alone[name_of(one)].append(cpu_seconds("record", EXPERIMENT, *flags, "--seed", "0", "--out", out))
    print(f"| {len(plan.runs)} runs, one thread | CPU s, median of {rounds} | smallest |\n|---|---|---|")
    print(f"| as a sweep | {statistics.median(whole):.1f} | {min(whole):.1f} |")
    medians, least = ([pick(times) for times in alone.values()] for pick in (statistics.median, min))
    print(f"| a process each, from one of each kind | {seeds * sum(medians):.0f} | {seeds * sum(least):.0f} |")
    ratio = seeds * sum(medians) / statistics.median(whole)
    print(f"| so many times cheaper | {ratio:.1f} | {seeds * sum(least) / min(whole):.1f} |")
    print("\nA run by itself: " + ", ".join(f"{name} {statistics.median(v):.1f} s" for name, v in alone.items()))


if __name__ == "__main__":
    main()
