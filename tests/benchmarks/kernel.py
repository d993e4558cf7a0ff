"""The empirical NTK by ntkdyn and by its peers, on the same weights and inputs, interleaved in one run.

Every tool works in a process of its own, pinned to the same core(s), which lives through the case: it is loaded,
called twice to warm up, and then told to run once in each round, all tools in turn. Prints a Markdown table and writes
kernel.md and kernel.json. A peer that is not installed, fails, or passes the limits of time or memory gets a row that
says so. Peers: ``pip install "ntkdyn[bench]"``, then tests/benchmarks/install_peers.sh.

CPU seconds are user and system time of the process during one call, median over rounds. Peak memory is the highest
resident memory (VmHWM, set back before the call) of a call after the first one, less the resident memory after import,
building the network and compiling. The rate of matrix products is measured in every round as well, in a process of its
own for each library; the share of the peak is of the fastest of them in the same case, because the rate of a shared
machine moves by half within minutes. Errors are against the kernel in float64 by ntkdyn, which is itself compared with
rows of plain autograd.

Run: python tests/benchmarks/kernel.py [--case NAME ...] [--tool NAME ...] [--scaling]
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # python -P leaves it out

import kernel_networks  # noqa: E402
import kernel_report  # noqa: E402
from kernel_cases import CASES, GOALS, Case, mlp  # noqa: E402
from peers.matrix_products import FLOPS  # noqa: E402

# Tool -> (file in peers/, package that it needs)
TOOLS: dict[str, tuple[str, str]] = {
    "ntkdyn": ("ours", "ntkdyn"),
    "neural-tangents structured": ("neural_tangents_jax", "neural_tangents"),
    "neural-tangents Jacobian": ("neural_tangents_jax", "neural_tangents"),
    "neural-tangents products": ("neural_tangents_jax", "neural_tangents"),
    "torch.func Jacobian": ("torch_func", "torch"),
    "torch.func products": ("torch_func", "torch"),
    "nngeometry": ("nngeometry_gram", "nngeometry"),
    "BackPACK": ("backpack_gradients", "backpack"),
    "TorchJD autogram": ("torchjd_autogram", "torchjd"),
    "torchntk": ("torchntk_autograd", "torchntk"),
}
SCALED = ("ntkdyn", "neural-tangents structured", "torch.func Jacobian")
SCALING_BASE = {"samples": 64, "width": 512, "depth": 3}
SCALES = {"samples": [32, 64, 128, 256], "width": [128, 256, 512, 1024], "depth": [2, 4, 8, 16]}
RATES = ("torch mm", "torch mm, fast float32", "NumPy matmul")


@dataclass
class Limits:
    """What a tool may take."""

    seconds: float
    compile_seconds: float
    memory_mb: float


@dataclass
class Found:
    """What was measured of one tool on one case; ``failed`` says why there is nothing."""

    tool: str
    failed: str | None = None
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    first_peak_mb: float | None = None
    prepared_s: float | None = None
    error_frobenius: float | None = None
    error_maximum: float | None = None
    flops: float | None = None
    flops_by: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


class Failed(Exception):
    """A tool's own words, or the limit that it passed."""


class Process:
    """A worker: one tool on one case."""

    def __init__(self, tool: str, module: str, case: Case, folder: Path, device: str, threads: int, limits: Limits,
                 cores: Sequence[int]) -> None:  # fmt: skip
        self.limits = limits
        order = {
            "tool": tool, "module": module, "case": case.as_json(), "folder": str(folder), "device": device,
            "threads": threads, "memory_mb": limits.memory_mb,
        }  # fmt: skip
        count = str(threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count,
            "XLA_FLAGS": "" if threads > 1 else "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
            "JAX_PLATFORMS": "cpu" if device == "cpu" else "",
        }  # fmt: skip
        self.log = (folder / f"{module}.log").open("a")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "kernel_worker.py"), json.dumps(order)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, bufsize=1, env=environment,
        )  # fmt: skip
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self.process.pid, cores)

    def ask(self, line: str, seconds: float | None = None) -> dict[str, Any]:
        """One answer. Raises: Failed: it reports an error, dies, or takes too long (and is ended)."""
        seconds = self.limits.seconds if seconds is None else seconds
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
        except BrokenPipeError:
            raise Failed("the process has ended") from None
        start, used = time.monotonic(), self.cpu_seconds()
        while not select.select([self.process.stdout], [], [], 0.2)[0]:
            # Its own seconds count, for the machine may have other work; five times as many on the clock end it too.
            if self.cpu_seconds() - used > seconds or time.monotonic() - start > 5 * seconds:
                self.end()
                raise Failed(f"> {seconds:.0f} s")
        text = self.process.stdout.readline()
        if not text:
            code = self.process.wait()
            name = signal.Signals(-code).name if code < 0 else f"exit {code}"
            raise Failed(f"the process ended ({name}), {self.limits.memory_mb / 1000:.0f} GB allowed")
        answer: dict[str, Any] = json.loads(text)
        if "error" in answer:
            raise Failed(kernel_report.reason(answer["error"], self.limits.memory_mb))
        return answer

    def cpu_seconds(self) -> float:
        """User and system time so far; the clock's where the system does not tell."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return time.monotonic()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.log.close()


class Run:
    """Settings of one run of the benchmark."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.limits = Limits(options.seconds, options.compile_seconds, 1000 * options.memory)
        available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
        self.cores = available[-options.threads :]

    def start(self, tool: str, module: str, case: Case, folder: Path) -> Process:
        """A worker."""
        options = self.options
        return Process(tool, module, case, folder, options.device, options.threads, self.limits, self.cores)

    def measure(self, case: Case, tools: Sequence[str], *, check: bool = True) -> dict[str, Any]:
        """All tools on one case, as the report holds it."""
        found = [Found(tool) for tool in tools]
        products = [Found(tool) for tool in RATES] if check and not self.options.no_rates else []
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            kernel_networks.write(case, folder)
            processes: dict[str, Process] = {}
            try:
                reference = self.reference(case, folder) if check else None
                for one in found:
                    self.warm_up(one, case, folder, processes, reference)
                for one in products:
                    self.warm_up_products(one, folder, processes)
                self.rounds([*found, *products], processes)
            finally:
                for process in processes.values():
                    process.end()
        held = {key: value for key, value in (reference or {}).items() if key != "file"}
        rates = {one.tool: FLOPS / statistics.median(one.cpu_s) / 1e9 for one in products if not one.failed}
        return {"case": case.as_json(), "reference": held, "rates": rates, "tools": [one.__dict__ for one in found]}

    def reference(self, case: Case, folder: Path) -> dict[str, Any] | None:
        """The kernel in float64: file, its difference from plain autograd, samples at a kink; None if it failed."""
        process = self.start("reference", "ours", case, folder)
        try:
            process.ask("load")
            process.ask("run", 300)
            process.ask(f"save {folder / 'reference.npy'}")
            checked = process.ask("verify")
            return {"file": folder / "reference.npy", "right": checked["difference"] < 1e-8, **checked}
        except Failed as failed:
            print(f"  no reference: {failed}", file=sys.stderr)
            return None
        finally:
            process.end()

    def warm_up(self, one: Found, case: Case, folder: Path, processes: dict[str, Process],
                reference: dict[str, Any] | None) -> None:  # fmt: skip
        """Load, call twice, compare; leaves the process running for the rounds."""
        module, package = TOOLS[one.tool]
        if importlib.util.find_spec(package) is None:
            one.failed = "not installed"
            return
        process = self.start(one.tool, module, case, folder)
        try:
            loaded = process.ask("load", self.limits.compile_seconds)
            one.versions, one.prepared_s = loaded["versions"], loaded["prepared_s"]
            first = process.ask("run")
            one.first_peak_mb = first["peak_mb"]
            if reference is not None and reference["right"]:
                process.ask(f"save {folder / 'kernel.npy'}")
                one.error_frobenius, one.error_maximum = kernel_report.errors(
                    folder / "kernel.npy", reference["file"], reference["kinks"]
                )
            slow = first["cpu_s"] > 0.25 * self.limits.seconds
            # What is too slow to be run again and again: this one call counts.
            second = first if slow else process.ask("run")
            one.peak_mb = second["peak_mb"]
            if one.tool == "ntkdyn":
                counted = process.ask("flops")
                one.flops, one.flops_by = counted["flops"], counted["by"]
            if slow:
                one.cpu_s, one.wall_s = [first["cpu_s"]], [first["wall_s"]]
                process.end()
            else:
                processes[one.tool] = process
        except Failed as failed:
            one.failed = str(failed)
            process.end()
        print(f"  {one.tool}: {one.failed or 'ready'}", file=sys.stderr)

    def warm_up_products(self, one: Found, folder: Path, processes: dict[str, Process]) -> None:
        """Load and multiply once."""
        process = self.start(one.tool, "matrix_products", CASES["tiny"], folder)
        try:
            process.ask("load")
            process.ask("run")
            processes[one.tool] = process
        except Failed as failed:
            one.failed = str(failed)
            process.end()

    def rounds(self, found: Sequence[Found], processes: dict[str, Process]) -> None:
        """Every tool once in each round; slow ones leave when they have had their share of time."""
        for number in range(self.options.rounds):
            for one in found:
                process = processes.get(one.tool)
                spent = sum(one.wall_s)
                if process is None or (number >= 3 and spent > self.options.share):
                    continue
                try:
                    answer = process.ask("run")
                except Failed as failed:
                    one.failed = str(failed)
                    process.end()
                    del processes[one.tool]
                    continue
                one.cpu_s.append(answer["cpu_s"])
                one.wall_s.append(answer["wall_s"])


def scaling(run: Run, tools: Sequence[str]) -> dict[str, Any]:
    """CPU seconds of the full kernel of an MLP against samples, width and depth, the other two held."""
    found: dict[str, Any] = {}
    for axis, values in SCALES.items():
        found[axis] = {"values": values, "cpu_s": {tool: [] for tool in tools}}
        for value in values:
            settings = {**SCALING_BASE, axis: value}
            case = mlp(settings["samples"], "full", width=settings["width"], depth=settings["depth"])
            print(f"{axis} {value}", file=sys.stderr)
            for tool in run.measure(case, tools, check=False)["tools"]:
                seconds = None if tool["failed"] else statistics.median(tool["cpu_s"])
                found[axis]["cpu_s"][tool["tool"]].append(seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES), help="default: all with a goal")
    parser.add_argument("--tool", action="append", choices=list(TOOLS), help="default: all that are installed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--activation", choices=["relu", "gate", "prelu"], default="relu", help="gated variants")
    parser.add_argument("--seconds", type=float, default=60, help="limit of one call")
    parser.add_argument("--compile-seconds", type=float, default=240, help="limit of loading and compiling")
    parser.add_argument("--memory", type=float, default=8, help="GB above the level after loading")
    parser.add_argument("--share", type=float, default=20, help="seconds in a case after which a tool rests")
    parser.add_argument("--scaling", action="store_true", help="cost against samples, width and depth instead")
    parser.add_argument("--no-rates", action="store_true", help="do not measure matrix products")
    parser.add_argument("--out", type=Path, default=Path("kernel_benchmark"), help="folder")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended
    run = Run(options)
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": kernel_report.processor(), "python": platform.python_version(), "threads": options.threads,
        "device": options.device, "rounds": options.rounds, "activation": options.activation,
        "command": " ".join(["kernel.py", *sys.argv[1:]]),
        "limits": run.limits.__dict__, "cases": [],
    }  # fmt: skip
    if options.scaling:
        report["scaling"] = scaling(run, options.tool or list(SCALED))
        (options.out / "scaling.json").write_text(json.dumps(report, indent=1))
        kernel_report.draw_scaling(report, options.out / "scaling.png")
        print(kernel_report.scaling_table(report))
        return
    tools = options.tool or list(TOOLS)
    for name in options.case or GOALS:
        case = replace(CASES[name], activation=options.activation)
        print(f"{case.title}, {options.activation}", file=sys.stderr)
        report["cases"].append(run.measure(case, tools))
        (options.out / "kernel.json").write_text(json.dumps(report, indent=1))
        (options.out / "kernel.md").write_text(kernel_report.markdown(report))
    print(kernel_report.markdown(report))


if __name__ == "__main__":
    main()
