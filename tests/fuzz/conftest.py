"""Fixtures of the fuzzers: what they share, and a folder in memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def harness(module_of: Callable[[str], ModuleType]) -> ModuleType:
    """tests/fuzz/harness.py."""
    return module_of("fuzz/harness")


@pytest.fixture(scope="session")
def guided(module_of: Callable[[str], ModuleType]) -> ModuleType:
    """tests/fuzz/coverage.py, which needs no atheris to be imported."""
    return module_of("fuzz/coverage")


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has such: thousands of files are nothing for a disk."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path))
    yield folder
    shutil.rmtree(folder)
