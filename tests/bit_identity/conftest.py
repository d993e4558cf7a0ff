"""The families of networks, loaded by path as test files cannot import each other."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def families() -> ModuleType:
    """tests/bit_identity/families.py."""
    specification = importlib.util.spec_from_file_location(
        "ntkdyn_tests_families", Path(__file__).with_name("families.py")
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
