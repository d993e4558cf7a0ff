"""One tool on one case in its own process: does one thing for each line on standard input, answers in JSON.

load   import, build the network, read the inputs, note the level of memory; compile where the tool compiles
run    one call: CPU seconds (user and system, all threads), wall seconds, peak memory above the level after load
flops  floating-point operations of one call of ntkdyn
verify the reference against plain autograd, and the samples at a kink
save   the last result to the .npy file that follows the word

Started by kernel.py, which puts the limits on threads into the environment.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from kernel_cases import Case

MB = 1e6


def status(field: str) -> float:
    """A field of this process's status in MB; 0 where the system has no such file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024 / MB
    return 0.0


def restart_peak() -> None:
    """Set the kernel's record of the highest resident memory (VmHWM) to the present level, where it lets us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Worker:
    """The tool, its network and its last result."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.case = Case(**order["case"])
        self.call: Callable[[], Any]
        self.to_array: Callable[[Any], Any]
        self.result: Any = None
        self.level = 0.0

    def load(self) -> dict[str, Any]:
        """Import and prepare; from here on no more than the allowed memory above the present level."""
        order = self.order
        module = importlib.import_module(f"peers.{order['module']}")
        if "torch" in sys.modules:
            import torch

            torch.set_num_threads(order["threads"])
        start = time.perf_counter()
        self.call, self.to_array = module.prepare(order["tool"], self.case, Path(order["folder"]), order["device"])
        gc.collect()
        self.level = status("VmRSS")
        limit = int((status("VmData") + order["memory_mb"]) * MB)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        return {"prepared_s": time.perf_counter() - start, "level_mb": self.level, "versions": module.versions()}

    def run(self) -> dict[str, Any]:
        """One call, the result of the one before freed."""
        self.result = None
        gc.collect()
        restart_peak()
        self._synchronize()
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        self.result = self.call()
        self._synchronize()
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"cpu_s": cpu, "wall_s": wall, "peak_mb": self._peak()}

    def flops(self) -> dict[str, Any]:
        """Of ntkdyn's own routes, by its own account."""
        from kernel_networks import read

        from ntkdyn import explain_ntk

        network, x = read(self.case, Path(self.order["folder"]), self.order["device"])
        explanation = explain_ntk(network, x, reduce=self.case.reduce)  # type: ignore[arg-type]
        return {"flops": float(sum(layer.flops for layer in explanation.layers)), "by": "ntkdyn.explain_ntk"}

    def save(self, path: str) -> dict[str, Any]:
        """Write the last result, in the case's shape."""
        array = self.to_array(self.result)
        np.save(path, array)
        return {"shape": list(array.shape)}

    def verify(self) -> dict[str, Any]:
        """Of the last result in float64: its error on two samples against plain autograd, and samples at a kink."""
        import torch
        from kernel_networks import autograd_block, kinks, read

        network, x = read(self.case, Path(self.order["folder"]), self.order["device"])
        network, x = network.double(), x.double() if x.is_floating_point() else x
        chosen = torch.tensor([0, len(x) // 2])
        block = autograd_block(network, x[chosen])
        if self.case.reduce == "trace":
            block = block.diagonal(dim1=2, dim2=3).sum(-1)
        found = self.result[chosen][:, chosen]
        at_kink = kinks(network, x).nonzero().flatten().tolist()
        return {"difference": float((found - block).norm() / block.norm()), "kinks": at_kink}

    def _synchronize(self) -> None:
        if self.order["device"].startswith("cuda"):
            import torch

            torch.cuda.synchronize()

    def _peak(self) -> float:
        if self.order["device"].startswith("cuda") and "torch" in sys.modules:
            import torch

            return torch.cuda.max_memory_allocated() / MB
        peak = status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB
        return peak - self.level


def main() -> None:
    # Tools print; their words must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.path.insert(0, str(Path(__file__).parent))
    worker = Worker(json.loads(sys.argv[1]))
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        try:
            answer = getattr(worker, word)(*[rest] * bool(rest))
        except BaseException as error:
            text = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {text}"[:600]}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
