"""max_memory: the peak of a process stays under it, and the kernel stays the same."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ntkdyn import empirical_ntk
from ntkdyn.errors import ConfigurationError
from ntkdyn.kernel import planning, rows
from ntkdyn.kernel.accumulator import Accumulator

MIB = 2**20

# Run in a process of its own: memory that an earlier kernel has freed would hide what this one takes.
SCRIPT = """
import sys, torch
from torch import nn
from ntkdyn import empirical_ntk

torch.set_num_threads(1)
torch.manual_seed(0)
kind, reduce, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
if kind == "cnn":
    channels = [3, 16, 32, 32]
    layers = [m for c, d in zip(channels, channels[1:]) for m in (nn.Conv2d(c, d, 3, padding=1), nn.ReLU())]
    model, x = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)), torch.randn(96, 3, 24, 24)
elif kind == "deep":
    channels = [3] + [16] * 8
    layers = [m for c, d in zip(channels, channels[1:]) for m in (nn.Conv2d(c, d, 3, padding=1), nn.ReLU())]
    model, x = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)), torch.randn(16, 3, 64, 64)
else:
    model, x = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)), torch.randn(300, 300)
empirical_ntk(model, x[:4], reduce=reduce)  # what libraries load at their first use

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
kernel = empirical_ntk(model, x, reduce=reduce, max_memory=limit or None)
print(status("VmHWM") - before, kernel.double().norm().item(), kernel.flatten()[:: kernel.numel() // 97].double().sum().item())
"""  # noqa: E501


def _peak(kind: str, reduce: str, limit: int) -> tuple[int, float, float]:
    command = [sys.executable, "-P", "-c", SCRIPT, kind, reduce, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, norm, some = done.stdout.split()
    return int(peak), float(norm), float(some)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to read the peak memory")
@pytest.mark.parametrize(
    ("kind", "reduce", "limit"),
    [("cnn", "trace", 70), ("cnn", "full", 110), ("deep", "trace", 100), ("mlp", "full", 140)],
)
def test_peak_stays_under_the_limit(kind: str, reduce: str, limit: int) -> None:
    free, norm, some = _peak(kind, reduce, 0)
    peak, norm_2, some_2 = _peak(kind, reduce, limit * MIB)
    assert peak <= limit * MIB
    if kind != "mlp":
        assert free > limit * MIB, "the limit would be kept without trying"
    assert norm_2 == pytest.approx(norm, rel=1e-5)
    assert some_2 == pytest.approx(some, rel=1e-5)


@pytest.mark.parametrize(("tile", "chunk", "groups"), [(7, 5, 1), (12, 2, 3), (1, 1, 2), (6, 3, 9)])
@pytest.mark.parametrize("reduce", ["trace", "mean", "each", "full"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_tiles_groups_and_chunks_change_nothing(
    reduce: str, symmetric: bool, tile: int, chunk: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forced(problem: Any, plan: Any, *_: Any, **__: Any) -> Any:
        names = list(problem.parameters)
        some = plan.seeds.count if plan.combine == "full" else chunk
        return replace(plan, tile=tile, chunk=some, groups=[names[start::groups] for start in range(groups)], strip=5)

    monkeypatch.setattr(planning, "within_budget", forced)
    monkeypatch.setattr(rows, "_BLOCK", 2**8)
    monkeypatch.setattr(rows, "_PART", 2**10)
    monkeypatch.setattr(rows, "_KEPT", 2**10)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Tanh(),
        nn.Flatten(), nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, 5),
    ).double()  # fmt: skip
    # Tiles of one sample are many: fewer samples then.
    count, count_2 = (5, 3) if tile == 1 else (12, 7)
    x1, x2 = torch.randn(count, 2, 6, 6).double(), None if symmetric else torch.randn(count_2, 2, 6, 6).double()
    metric = {"3.weight": torch.rand(6, 6, 3, 3), "6.bias": 0.5}
    expected = empirical_ntk(model, x1, x2, reduce=reduce, per="parameter", metric=metric, engine="reference")
    found = empirical_ntk(model, x1, x2, reduce=reduce, per="parameter", metric=metric)
    for name, block in expected.items():
        torch.testing.assert_close(found[name], block, rtol=1e-9, atol=1e-12 * block.abs().max().item())


class Largest(TorchDispatchMode):
    """Keeps the number of entries of the largest tensor that was made."""

    entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        made = function(*arguments, **(keywords or {}))
        known = {each.untyped_storage().data_ptr() for each in arguments if isinstance(each, Tensor)}
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in known:
            self.entries = max(self.entries, made.numel())
        return made


def test_mirroring_takes_little_memory_for_few_samples_with_many_outputs() -> None:
    target = torch.randn(2, 800, 2, 800)
    matrix = target.view(1600, 1600)
    expected = matrix.triu() + matrix.triu(1).T
    with Largest() as largest:
        Accumulator("full", target, symmetric=True).finish()
    assert torch.equal(matrix, expected)
    assert 0 < largest.entries <= 512**2


def test_too_little_memory_says_how_much_works() -> None:
    model, x = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)), torch.randn(50, 100)
    with pytest.raises(ConfigurationError, match=r"max_memory is 1000 bytes; this kernel needs at least \d+") as caught:
        empirical_ntk(model, x, max_memory=1000)
    least = int(str(caught.value).split("at least ")[1].split(":")[0])
    torch.testing.assert_close(empirical_ntk(model, x, max_memory=least), empirical_ntk(model, x))
    for wrong in (0, -1, 1.5, True, "1 GiB"):
        with pytest.raises(ConfigurationError, match="expected a number of bytes"):
            empirical_ntk(model, x, max_memory=wrong)
