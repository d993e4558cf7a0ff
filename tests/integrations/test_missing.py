"""A framework that is not installed is named with the command that installs it."""

from __future__ import annotations

import importlib
import sys

import pytest

from ntkdyn.errors import MissingPackage


@pytest.mark.parametrize(
    ("module", "package", "install"),
    [
        ("lightning", "pytorch_lightning", "pytorch-lightning"),
        ("huggingface", "transformers", "transformers accelerate"),
        ("ignite", "ignite.engine", "pytorch-ignite"),
    ],
)
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, module: str, package: str, install: str) -> None:
    name = f"ntkdyn.integrations.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=f"{package}.*pip install -c constraints.txt {install}$"):
        importlib.import_module(name)
