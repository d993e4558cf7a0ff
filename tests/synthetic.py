"""Made-up runs and sweeps with the reading interface of the real ones, and known answers in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ntkdyn.probe import Field

GATES = {"trunk.1": 6, "trunk.3": 4}


@dataclass
class Run:
    """A run whose arrays stand in a dictionary; the step axis of a group is ``group/step``."""

    name: str
    arrays: dict[str, np.ndarray]
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    results: dict[str, float] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    steps_per_epoch: int | None = 4
    dt_steps: int | None = 1

    def groups(self) -> list[str]:
        return sorted({name.removesuffix("/step") for name in self.arrays if name.endswith("/step")})

    def names(self) -> list[str]:
        return [name for name in self.arrays if not name.endswith("/step")]

    def sets(self, probe: str) -> list[str]:
        return [
            group.split("/", 1)[1] if "/" in group else "" for group in self.groups() if group.split("/")[0] == probe
        ]

    def steps(self, group: str) -> np.ndarray:
        return self.arrays[f"{group}/step" if f"{group}/step" in self.arrays else f"{group}/{self.sets(group)[0]}/step"]

    def epochs(self, group: str) -> np.ndarray:
        steps = self.steps(group).astype(float)
        return steps / self.steps_per_epoch if self.steps_per_epoch else np.full(len(steps), np.nan)

    def __contains__(self, name: object) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def targets(self, probe_set: str) -> np.ndarray:
        return self.arrays["/".join(part for part in ("probe_sets", probe_set, "targets") if part)]

    def lazy(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def field(self, name: str) -> Field:
        shape = self.arrays[name].shape[1:]
        gate = name.split("/")[-2] if name.endswith("/pattern") else ""
        facts = {"units": GATES[gate]} if gate else {}
        return Field(name=name, dims=("gate",), shape=shape, coordinates={"gate": list(GATES)}, attributes=facts)

    def attributes(self, group: str) -> Mapping[str, Any]:
        if group == "units":
            return {"always_active": "head.gelu (GELU)", "uncounted": "pool (MaxPool2d)"}
        return {"dt_steps": self.dt_steps} if self.dt_steps and group.startswith("ntk") else {}


def kernels(generator: np.random.Generator, snapshots: int, samples: int, *, rate: float = 0.4) -> np.ndarray:
    """Positive kernels [S, N, N] that move smoothly from one random features to another."""
    first, second = generator.standard_normal((2, samples, 3 * samples))
    times = 1 - np.exp(-rate * np.arange(snapshots))
    features = [(1 - time) * first + time * second + 1.0 for time in times]
    return np.stack([matrix @ matrix.T / samples for matrix in features]).astype("f4")


def run(
    name: str = "run",
    *,
    seed: int = 0,
    snapshots: int = 7,
    samples: int = 10,
    sets: tuple[str, ...] = ("train", "test"),
    moving: bool = False,
    steps_per_epoch: int | None = 4,
    config: Mapping[str, Any] | None = None,
    first: int = 0,
    rate: float = 0.4,
) -> Run:
    """A recorded run with all five probes; kernels are paired at dt = 1 step and move at a rate."""
    generator = np.random.default_rng([seed, snapshots])
    starts = first + 4 * np.arange(snapshots)
    steps = np.sort(np.concatenate([starts, starts + 1]))
    count = len(steps)
    arrays: dict[str, np.ndarray] = {}
    slopes = np.linspace(0, 1, count)[:, None] if moving else np.zeros((count, 1))
    for probe_set in sets:

        def path(probe: str, field: str, probe_set: str = probe_set) -> str:
            return "/".join(part for part in (probe, probe_set, field) if part)

        arrays[path("probe_sets", "targets")] = np.arange(samples) % 2
        arrays[path("ntk", "step")] = arrays[path("outputs", "step")] = arrays[path("gates", "step")] = steps
        arrays[path("ntk", "kernel")] = kernels(generator, count, samples, rate=rate)
        arrays[path("outputs", "accuracy")] = np.linspace(0.1, 0.9, count)
        arrays[path("outputs", "loss")] = np.linspace(2, 0.2, count)[:, None] * np.ones(samples)
        for gate, channels in GATES.items():
            spread = np.linspace(0.5, 1, channels)
            arrays[path("gates", f"{gate}/slope")] = slopes * spread
            arrays[path("gates", f"{gate}/frozen")] = slopes * spread >= 1
            arrays[path("gates", f"{gate}/on_rate")] = generator.uniform(size=(count, channels))
            ends = generator.standard_normal((2, samples, channels))
            times = (1 - np.exp(-rate * np.arange(count)))[:, None, None]
            arrays[path("gates", f"{gate}/pattern")] = np.packbits((1 - times) * ends[0] + times * ends[1] > 0, axis=-1)
    arrays["learning_rate/step"] = steps
    arrays["learning_rate/sum"] = 1e-3 * steps
    arrays["units/step"] = arrays["path_length/step"] = steps
    channels = np.array(list(GATES.values()))
    arrays["units/active"] = np.tile(channels, (count, 1))
    arrays["units/weighted"] = channels * (1 - 0.75 * slopes)
    arrays["units/total"] = channels
    for place, field_name in enumerate(("mean", "normalized", "weighted")):
        arrays[f"path_length/{field_name}"] = np.linspace(2, 1, count) - 0.1 * place
    for width in ("effective_width", "mean_active_width"):
        arrays[f"path_length/{width}"] = np.linspace(8, 2, count)
    shares = np.linspace(0, 1, count)
    arrays["path_length/distribution"] = np.stack([0 * shares, shares, 1 - shares], axis=1)
    manifest = {
        "experiment": "nonlinear-advantage", "ntkdyn": "0.1.0", "torch": "2.13.0", "command": f"ntkdyn record {name}",
        "status": "finished", "schedules": {"ntk": "paired"},
    }  # fmt: skip
    return Run(name, arrays, dict(config or {}), seed, {}, manifest, steps_per_epoch)


def widths_run(name: str = "widths", *, seed: int = 0, samples: int = 10) -> Run:
    """Kernels of three widths, five initializations each, around an analytic one; relative spread 2 width^-1/2."""
    generator = np.random.default_rng(seed)
    widths, analytic = np.array([16, 64, 256]), kernels(generator, 1, samples)[0]
    noise = generator.standard_normal((3, 5, 1, 1)) * 2 / np.sqrt(widths)[:, None, None, None]
    arrays = {
        "widths/step": np.array([0]),
        "widths/hidden_units": widths[None],
        "widths/kernel": (analytic * (1 + noise))[None],
        "widths/analytic": np.stack([analytic] * 3)[None],
    }
    return Run(name, arrays, seed=seed, manifest={"experiment": "width-scaling", "status": "finished"})


@dataclass
class Sweep:
    """A sweep in memory."""

    name: str
    runs: dict[str, Run]
    kinds: dict[str, str]
    parents: dict[str, str]
    primary: Any = None
    confirms: str | None = None

    @property
    def table(self) -> pd.DataFrame:
        rows = [
            {"kind": self.kinds[name], "run": name, "seed": one.seed}
            | {f"setting_{key}" if key == "kind" else key: value for key, value in one.config.items()}
            | one.results
            for name, one in self.runs.items()
        ]
        return pd.DataFrame(rows)

    def trunk_of(self, run: str) -> str:
        return self.parents[run]


def centered_distance(first: np.ndarray, second: np.ndarray) -> float:
    """1 - cosine of two kernels less their row and column means."""
    flat = [
        (kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean()).ravel().astype(float)
        for kernel in (first, second)
    ]
    return float(1 - flat[0] @ flat[1] / np.sqrt((flat[0] @ flat[0]) * (flat[1] @ flat[1])))


CHANGES = {
    ("rate_before", 0.1): 0.02, ("rate_before", 3.0): 0.2, ("scale_before", 0.5): 0.15, ("scale_before", 4.0): 0.03,
    ("labels_before", "parity"): 0.25, ("train_before", "readout"): 0.01, ("anchor_before", 1.0): 0.04,
}  # fmt: skip
"""Interventions before the switch, and the rate at which the kernel then moves; without one it is .08."""

DEFAULTS = {
    "task": "sum10", "intervention": "linearize", "start_epoch": 0, "survivors": "common", "mask": "learned",
    "budget": "total", "data_order": 0, "ramp_epochs": 1, "latest_start": 4, "strength": 4.0,
}  # fmt: skip


def sweep(
    *,
    seeds: int = 3,
    starts: tuple[int, ...] = (0, 1, 2, 3, 4),
    gaps: Mapping[str, float] = {"sum10": 15.0, "first": 0.0},
    controls: bool = True,
    samples: int = 10,
    snapshots: int = 7,
    data: bool = False,
    diverged: frozenset[tuple[str, int, int]] = frozenset(),
    changes: Mapping[tuple[str, Any], float] = {},
    ratio: float = 40.0,
    direct: Mapping[str, float] = {},
    mask: str = "learned",
) -> Sweep:
    """Trunks, arms and controls of two tasks: accuracy rises by ``gaps`` percentage points from first to last start.

    ``changes`` are interventions before the switch at start epoch 2 (as CHANGES), with the given mask: accuracy follows
    what they move in the trunk's kernel up to there by ``ratio`` points a unit, and ``direct`` points for a family.
    ``data``: the tasks are names of data sets, as of a setting that replaces ``task``.
    """
    runs: dict[str, Run] = {}
    kinds: dict[str, str] = {}
    parents: dict[str, str] = {}

    def add(kind: str, task: str, seed: int, accuracy: float, trunk: str | None, **settings: Any) -> str:
        config = DEFAULTS | {"task": None if data else task, "data": task if data else None} | settings
        name = f"{kind}s/{len(runs):012x}/{seed}"
        failed = (task, int(config["start_epoch"]), seed) in diverged and kind == "arm"
        linear = config["intervention"] == "linearize"
        one = run(
            name.replace("/", "-"), seed=seed + 100 * (task == "first"), samples=samples, config=config,
            snapshots=snapshots if kind == "trunk" or not linear else 2, moving=linear,
            first=0 if kind == "trunk" or not linear else 4 * int(config["start_epoch"]),
            rate=next((changes[change] for change in changes if settings.get(change[0]) == change[1]), 0.08)
            if changes else 0.4,
        )  # fmt: skip
        one.seed = seed
        late = config["start_epoch"] / max(starts)
        one.results = {
            "test_accuracy": float("nan") if failed else accuracy / 100,
            "dense_accuracy": 0.5 + 0.3 * late + noises.normal(0, 0.01),
            "dense_weight_norm": 20.0 + 5.0 * late + noises.normal(0, 0.1),
            "diverged": float(failed),
            "active_units": 4.0,
            "survivor_nonlinearity": 0.25,
            "weighted_units": 1.0,
            "napl": 0.6,
            "weighted_napl": 0.15,
        }
        runs[name], kinds[name] = one, kind
        if trunk is not None:
            parents[name] = trunk
        return name

    def drift_before(trunk: str, start: int = 2) -> float:
        """Distance of the trunk's kernel at an epoch from its first one."""
        recorded = runs[trunk].arrays["ntk/test/kernel"]
        return centered_distance(recorded[0], recorded[runs[trunk].steps("ntk/test").tolist().index(4 * start)])

    generator = np.random.default_rng(5)
    noises = np.random.default_rng(6)
    for task, gap in gaps.items():
        for seed in range(seeds):
            base = 30.0 + 60.0 * (task == "first") + generator.normal(0, 1)
            noise = lambda: generator.normal(0, 0.2)  # noqa: E731
            trunk = add("trunk", task, seed, base + 56 - 50 * (task == "first"), None, intervention="none")
            for start in starts:
                moved = ratio * drift_before(trunk, start) if changes else 0.0
                add("arm", task, seed, base + gap * start / max(starts) + moved + noise(), trunk, start_epoch=start)
            middle = base + gap * 2 / max(starts) if mask == "learned" else base
            if mask != "learned" and changes:
                accuracy = middle + ratio * drift_before(trunk) + noise()
                add("arm", task, seed, accuracy, trunk, start_epoch=2, mask=mask)
            for name, value in changes:
                other = add("trunk", task, seed, base + 40, None, intervention="none", **{name: value})
                accuracy = middle + ratio * drift_before(other) + direct.get(name, 0.0) + noise()
                add("arm", task, seed, accuracy, other, start_epoch=2, mask=mask, **{name: value})
            if not controls:
                continue
            late = max(starts)
            for start in (0, late):
                add("arm", task, seed, base - start / late + noise(), trunk, start_epoch=start, mask="random")
                add("arm", task, seed, base + 2 * start / late + noise(), trunk, start_epoch=start, survivors="keep")
            add("arm", task, seed, base + noise(), trunk, mask="late")
            add("arm", task, seed, base + noise(), trunk, mask="late-path")
            add("arm", task, seed, base - 4 + noise(), trunk, budget="after-switch")
            add("arm", task, seed, base - 20, None, intervention="linear")
            if seed == 0:
                add("arm", task, seed, base + 50, trunk, intervention="none", start_epoch=late, data_order=1)
    return Sweep("sweep", runs, kinds, parents)


@dataclass
class Protocol:
    """A sweep that is put together run by run; accuracies are given in percent and stored as shares."""

    defaults: dict[str, Any]
    runs: dict[str, Run] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)

    def add(
        self,
        kind: str,
        seed: int,
        settings: Mapping[str, Any],
        accuracy: float,
        trunk: str | None = None,
        **results: Any,
    ) -> str:
        """A run with these results; ``arrays`` among them are recorded."""
        config = self.defaults | dict(settings)
        name = f"{kind}s/{len(self.runs):012x}/{seed}"
        arrays = results.pop("arrays", {})
        values = {"test_accuracy": accuracy / 100, "diverged": float(not np.isfinite(accuracy))} | results
        manifest = {"experiment": "protocol", "status": "finished"}
        self.runs[name] = Run(name.replace("/", "-"), arrays, config, seed, values, manifest)
        self.kinds[name] = kind
        if trunk is not None:
            self.parents[name] = trunk
        return name

    def sweep(self) -> Sweep:
        return Sweep("sweep", self.runs, self.kinds, self.parents)


def collapse_sweep(
    *, seeds: int = 4, noise: float = 0.1, scratch: bool = True, settings: Mapping[str, Any] | None = None
) -> Sweep:
    """Extracted networks of 82, 82.2, 70 and 20 % at NAPL 6, 3, 1.5 and 0.3; from scratch 40 + 10 depth at NAPL depth.

    Weighted path lengths of the extracted are half of that; ReLU networks have both the same.
    """
    base = {"task": "sum10", "data": None, "intervention": "none", "kind": "extracted", "shallow_depth": None}
    protocol = Protocol(base | {"remaining": 0.1, "strength": 4.0, "width": 64} | dict(settings or {}))
    generator = np.random.default_rng(3)
    for seed in range(seeds):
        own = generator.normal(0, 2)
        draw = lambda: own + generator.normal(0, noise)  # noqa: B023, E731

        def size(napl: float, share: float = 1.0, parameters: int = 5000) -> dict[str, float]:
            return {"napl": napl, "weighted_napl": share * napl, "active_units": 64 * napl, "parameters": parameters}

        trunk = protocol.add("trunk", seed, {}, 82 + draw(), **size(6))
        for remaining, accuracy in ((0.5, 82.2), (0.25, 70.0), (0.05, 20.0)):
            arm = {"intervention": "linearize", "remaining": remaining}
            protocol.add("arm", seed, arm, accuracy + draw(), trunk, **size(6 * remaining, 0.5))
        protocol.add("arm", seed, {"intervention": "linear"}, 10 + draw(), trunk, **size(0))
        for depth in (1, 2, 7) if scratch else ():
            for kind, more in (("scratch", 0), ("scratch-wide", 3000)):
                arm = {"kind": kind, "shallow_depth": depth}
                protocol.add("arm", seed, arm, 40 + 10 * depth + draw(), **size(depth, 1, 2000 + more))
    return protocol.sweep()


def core_network_sweep(
    *,
    seeds: int = 4,
    tasks: Mapping[str, int] = {"sum10": 20, "first": 5},
    starts: tuple[tuple[int, int], ...] = ((64, 3), (128, 3), (256, 3), (128, 2), (128, 6)),
) -> Sweep:
    """Cores of c, 2c and c units in layers at depth 3 whatever the width, and c units a layer at other depths."""
    base = {"data": None, "intervention": "none", "penalty_weight": 0.02, "ramp_epochs": 6}
    protocol = Protocol(base)
    for task, core in tasks.items():
        for width, depth in starts:
            settings = {"task": task, "width": width, "depth": depth}
            for seed in range(seeds):
                trunk = protocol.add("trunk", seed, settings, 80.0, active_units=width * depth, napl=float(depth))
                active = np.array([core, 2 * core, core] if depth == 3 else [core] * depth)
                active[0] += seed % 2 if core else 0
                units = {
                    "units/step": np.array([0, 9]),
                    "units/active": np.stack([np.full(depth, width), active]),
                    "units/total": np.full(depth, width),
                }
                arm = settings | {"intervention": "linearize", "penalty_weight": 0.01}
                size = {"active_units": float(active.sum()), "napl": float(active.sum() / width)}
                protocol.add("arm", seed, arm, 70.0 + seed, trunk, arrays=units, **size)
    return protocol.sweep()


def layerwise_vs_channelwise_sweep(*, seeds: int = 4, noise: float = 0.1, task: str | None = "sum10") -> Sweep:
    """Channel by channel 80, 75 and 60 % at three shares, layer by layer 80, 70 and 40 %."""
    protocol = Protocol({"task": task, "data": None if task else "cifar-10", "intervention": "none", "remaining": 0.1})
    generator = np.random.default_rng(4)
    for seed in range(seeds):
        own = generator.normal(0, 2)
        for granularity, accuracies in (("channel", (80.0, 75.0, 60.0)), ("layer", (80.0, 70.0, 40.0))):
            dense = {"napl": 4.0, "active_share": 1.0, "survivor_nonlinearity": 1.0}
            trunk = protocol.add("trunk", seed, {"granularity": granularity}, 82 + own, **dense)
            for remaining, accuracy in zip((0.75, 0.5, 0.25), accuracies, strict=True):
                arm = {"granularity": granularity, "remaining": remaining, "intervention": "linearize"}
                share = remaining - 0.05 * (granularity == "layer" and remaining == 0.25)
                results = {"napl": 4 * share, "active_share": share}
                results["survivor_nonlinearity"] = 0.4 if granularity == "channel" else 0.8
                protocol.add("arm", seed, arm, accuracy + own + generator.normal(0, noise), trunk, **results)
    return protocol.sweep()


def linearized_training_sweep(*, seeds: int = 4, noise: float = 0.05, kernels: bool = True) -> Sweep:
    """A network of 80 %; what children lose in the weights from epochs 0, 2, 4, 6 on: 30, 10, 0.1, 0 points.

    In the units from 0 and 4 on: 20 and 5 points.
    """
    base = {
        "task": "sum10",
        "data": None,
        "intervention": "none",
        "child": "network",
        "start_epoch": 0,
        "strength": 4.0,
    }
    protocol = Protocol(base)
    generator = np.random.default_rng(6)
    for seed in range(seeds):
        own = generator.normal(0, 2)
        arrays = run(seed=seed, snapshots=7).arrays if kernels else {}
        trunk = protocol.add("trunk", seed, {}, 80 + own, arrays=arrays, dense_accuracy=0.1)
        for child, lost in (("weights", {0: 30.0, 2: 10.0, 4: 0.1, 6: 0.0}), ("units", {0: 20.0, 4: 5.0})):
            for start, points in lost.items():
                arm = {"child": child, "start_epoch": start}
                if child == "units":
                    arm |= {"intervention": "linearize", "strength": 2.0}
                accuracy = 80 + own - points + generator.normal(0, noise)
                protocol.add("arm", seed, arm, accuracy, trunk, dense_accuracy=0.1 + 0.1 * start)
    return protocol.sweep()


def translation_sweep(*, seeds: int = 4, noise: float = 0.1) -> Sweep:
    """BLEU 34 dense and 25 linear; learned masks 26, 28 and 30 from epochs 0, 2 and 4, random ones 27 and 27.

    From epoch 4 on also 33.8 and 25 at NAPL 2 and 0.1 besides 30 at 0.5; dense 4.
    """
    base = {"data": "multi30k", "intervention": "none", "mask": "learned", "start_epoch": 0, "remaining": 0.1}
    protocol = Protocol(base)
    generator = np.random.default_rng(8)
    for seed in range(seeds):
        own = generator.normal(0, 1)

        def add(
            kind: str, bleu: float, napl: float, trunk: str | None, seed: int = seed, own: float = own, **arm: Any
        ) -> str:
            results = {"test_bleu": bleu + own + generator.normal(0, noise), "napl": napl, "active_units": 64 * napl}
            return protocol.add(kind, seed, arm, 60.0, trunk, **results)

        trunk = add("trunk", 34, 4, None)
        arm = {"intervention": "linearize"}
        for start, bleu in ((0, 26), (2, 28), (4, 30)):
            add("arm", bleu, 0.5, trunk, **arm, start_epoch=start)
        for start in (0, 4):
            add("arm", 27, 0.5, trunk, **arm, start_epoch=start, mask="random")
        for remaining, bleu, napl in ((0.5, 33.8, 2.0), (0.02, 25, 0.1)):
            add("arm", bleu, napl, trunk, **arm, start_epoch=4, remaining=remaining)
        add("arm", 25, 0, trunk, intervention="linear")
    return protocol.sweep()


PROTOCOLS = {
    "collapse": collapse_sweep,
    "core-network": core_network_sweep,
    "layerwise-vs-channelwise": layerwise_vs_channelwise_sweep,
    "linearized-training": linearized_training_sweep,
    "translation": translation_sweep,
}
"""Sweeps of the studies that belong to one experiment each."""
