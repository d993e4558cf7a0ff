"""Fixtures of the fuzzers: what they share, and a folder in memory."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"ntkdyn_fuzz_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def harness() -> ModuleType:
    """tests/fuzz/harness.py."""
    return _module("harness")


@pytest.fixture(scope="session")
def guided() -> ModuleType:
    """tests/fuzz/coverage.py, which needs no atheris to be imported."""
    return _module("coverage")


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has such: thousands of files are nothing for a disk."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path))
    yield folder
    shutil.rmtree(folder)
