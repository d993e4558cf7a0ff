"""What all tests share: the oracles, real data where they are, one thread a worker."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# Before NumPy and torch are there to read it, for them and for the processes that tests start: two workers with two
# threads each would only wait for one another on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

HERE = Path(__file__).parent


def _load(name: str) -> ModuleType:
    """The module tests/<name>.py."""
    # By path, not by package: with --import-mode=importlib test files cannot import each other.
    spec = importlib.util.spec_from_file_location(f"ntkdyn_tests_{name.replace('/', '_')}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the long checks too, and bounded ones in full")


def pytest_configure(config: pytest.Config) -> None:
    # What a file's tests share, recorded runs and imported frameworks, is then made in one worker, not in each.
    if config.getoption("dist", "no") == "load":
        config.option.dist = "loadfile"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="a long check; pytest --long runs it"))


@pytest.fixture(scope="session")
def module_of() -> Callable[[str], ModuleType]:
    """What loads a module of the tests by its place below tests/, for the conftest.py of a folder."""
    return _load


@pytest.fixture(scope="session")
def oracles() -> ModuleType:
    """Slow, obviously right formulas that share no code with the library, tests/oracles.py."""
    return _load("oracles")


@pytest.fixture(scope="session")
def zoo() -> ModuleType:
    """Small networks, each with something that an engine may get wrong, tests/problems.py."""
    return _load("problems")


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """Runs and sweeps that no training made, tests/synthetic.py."""
    return _load("synthetic")


@pytest.fixture(scope="session")
def families() -> ModuleType:
    """Kinds of networks with all that a recorder might disturb, tests/bit_identity/families.py."""
    return _load("bit_identity/families")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of real data sets, from NTKDYN_DATA."""
    folder = os.environ.get("NTKDYN_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("NTKDYN_DATA does not name a folder of real data sets")
    return Path(folder)


@pytest.fixture(autouse=True)
def _single_threaded() -> None:
    torch.set_num_threads(1)


SMALL_PLANS = {
    "collapse": """
        survivors = "keep"
        [[grid]]
        remaining = [0.5, 0.2]
        [[grid]]
        intervention = ["none"]
        [[grid]]
        kind = ["scratch", "scratch-wide"]
        shallow_depth = [1]
    """,
    "core-network": """
        penalty_weight = 0.2
        [[grid]]
        width = [4, 8]
    """,
    "layerwise-vs-channelwise": """
        [[grid]]
        granularity = ["channel", "layer"]
        remaining = [0.5]
    """,
    "linearized-training": """
        remaining = 0.5
        [[grid]]
        child = ["weights", "units"]
        start_epoch = [0, 1]
        [[grid]]
        child = ["network"]
    """,
}


@pytest.fixture(scope="session")
def small_plan(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """What writes the plan of a sweep with every kind of run of an experiment, as small and short as they can be."""

    def plan(experiment: str, *, seeds: int = 1) -> Path:
        file = tmp_path_factory.mktemp("plan") / "plan.toml"
        settle = "" if experiment == "core-network" else "settle_epochs = 1"
        file.write_text(
            f"""
            seeds = {seeds}
            [settings]
            width = 6
            depth = 2
            epochs = 4
            pairs = 64
            test_pairs = 40
            batch_size = 32
            probe_per_class = 1
            start_epoch = 1
            ramp_epochs = 1
            {settle}
            {SMALL_PLANS[experiment]}
            """
        )
        return file

    return plan


@pytest.fixture(scope="session")
def small_sweep(small_plan: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What trains the sweep of a small plan, once and in this process, and gives its folder; nobody may change it."""
    made: dict[str, Path] = {}

    def sweep(experiment: str) -> Path:
        from ntkdyn.sweep import make_plan, run_sweep

        if experiment not in made:
            folder = tmp_path_factory.mktemp("sweep") / "sweep"
            assert not run_sweep(make_plan(experiment, file=small_plan(experiment)), folder, jobs=1).failed
            made[experiment] = folder
        return made[experiment]

    return sweep


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of chains whose steps were taken together."""
    from ntkdyn import stack

    taken: list[int] = []
    step = stack.Stack.step

    def noted(self: stack.Stack, send_back: Callable[[], None]) -> None:
        taken.append(len(self._loops))
        step(self, send_back)

    monkeypatch.setattr(stack.Stack, "step", noted)
    return taken
