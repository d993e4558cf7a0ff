"""How long ``ntkdyn --help`` takes, beside an interpreter that does nothing: medians of interleaved runs.

Run: python -P tests/benchmarks/start_up.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-P", "-c", "pass"],
    "import click": [sys.executable, "-P", "-c", "import click"],
    "ntkdyn --help": [sys.executable, "-P", "-c", "from ntkdyn.cli import main; main(['--help'])"],
}


def main() -> None:
    """Print a Markdown table; the goal is at most 0.3 s."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(15):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    print("| command | median, s | minimum, s |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| `{name}` | {statistics.median(values):.3f} | {min(values):.3f} |")


if __name__ == "__main__":
    main()
