"""The house rules that a machine can read: floors of imports, packaging, lazy loading, documentation."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = {
    "errors": 0, "progress": 0, "plan_hash": 0, "processor": 0, "adam": 0,
    "captured_step": 0,
    "probe": 1, "gates": 1, "configuration": 1, "schedule": 1, "clone": 1, "conversion": 1,
    "call_sites": 1, "primary": 1,
    "kernel": 2, "store": 2, "analysis": 2, "datasets": 2, "paths": 2, "slope_owner": 2,
    "linearization": 3, "plugins": 3, "chain": 3, "sweep_file": 3, "checkpoint": 3, "theory": 3,
    "probes": 4, "recorder": 4, "experiment": 4, "plots": 4, "trial": 4, "model_file": 4, "training_loop": 4,
    "stack": 4, "together": 4,
    "integrations": 5, "export": 5, "results": 5, "studies": 5, "report": 5, "sweep": 5,
    "glance": 5, "comparison": 5, "preview": 5, "posttraining": 5,
    "commands": 6, "cli": 6, "experiments": 6,
}  # fmt: skip
SIDEWAYS = {
    ("cli", "commands"), ("studies", "results"), ("report", "studies"), ("report", "results"), ("sweep", "results"),
    ("training_loop", "experiment"), ("training_loop", "recorder"), ("stack", "experiment"), ("stack", "training_loop"),
    ("together", "experiment"), ("together", "training_loop"), ("together", "stack"),
    ("experiment", "recorder"), ("experiment", "trial"), ("trial", "recorder"), ("export", "results"),
    ("glance", "results"), ("glance", "studies"), ("comparison", "results"), ("comparison", "studies"),
    ("results", "preview"), ("preview", "results"), ("preview", "glance"),
    ("conversion", "gates"), ("conversion", "clone"),
    ("gates", "clone"), ("results", "studies"), ("gates", "call_sites"), ("conversion", "call_sites"),
}  # fmt: skip
THIRD_PARTY = {
    "h5py": {"store"},
    "click": {"cli", "commands"},
    "matplotlib": {"plots", "studies", "report", "results", "comparison", "posttraining"},
    "sklearn": {"datasets"},
    "PIL": {"datasets"},
    "pytorch_lightning": {"integrations"},
    "lightning": {"integrations"},
    "transformers": {"integrations"},
    "ignite": {"integrations"},
    "jax": {"theory"},
    "neural_tangents": {"theory"},
}


def _sources() -> Iterator[tuple[str, Path]]:
    """Every module of the package as (part on its floor, file)."""
    for file in sorted((ROOT / "ntkdyn").rglob("*.py")):
        first = file.relative_to(ROOT / "ntkdyn").parts[0]
        yield first.removesuffix(".py"), file
    for folder in ("probes", "experiments"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield folder, file


def _module_name(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "ntkdyn":
        parts.insert(0, "ntkdyn")
    return ".".join(parts)


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """Absolute names imported anywhere in a file, functions and TYPE_CHECKING blocks included."""
    name = _module_name(file)
    package = name.rsplit(".", 1)[0]  # __init__ counts as a child of its package, so this is right for both kinds
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            if source in ("ntkdyn",):
                for alias in node.names:
                    yield node.lineno, f"ntkdyn.{alias.name}"
            else:
                yield node.lineno, source


@pytest.mark.parametrize(("part", "file"), [pytest.param(*item, id=_module_name(item[1])) for item in _sources()])
def test_imports_go_down_only(part: str, file: Path) -> None:
    if file == ROOT / "ntkdyn" / "__init__.py":
        return  # the lazy front door names every home
    for line, name in _imports(file):
        where = f"{file.relative_to(ROOT)}:{line} imports {name}"
        if name.startswith("ntkdyn."):
            target = name.split(".")[1]
            if target == part or target.startswith("__"):
                continue
            assert target in FLOORS, f"{where}: give {target!r} a floor"
            assert FLOORS[target] < FLOORS[part] or (part, target) in SIDEWAYS, f"{where}: not down"
        elif name.split(".")[0] in THIRD_PARTY:
            assert part in THIRD_PARTY[name.split(".")[0]], f"{where}: only {THIRD_PARTY[name.split('.')[0]]} may"


def test_every_part_has_a_floor() -> None:
    parts = {part for part, _ in _sources()} - {"__init__"}
    assert parts == set(FLOORS)


def test_analysis_needs_numpy_and_scipy_only() -> None:
    for file in (ROOT / "ntkdyn" / "analysis").glob("*.py"):
        for line, name in _imports(file):
            top = name.split(".")[0]
            assert top in {"ntkdyn", "numpy", "scipy"} | sys.stdlib_module_names, f"{file.name}:{line} imports {name}"


def test_forbidden_ways() -> None:
    for _, file in _sources():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Assert), f"{file.name}:{node.lineno}: assert vanishes under python -O"
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"pickle", "dill"}, f"{file.name}: pickle"
        assert file.name not in {"utils.py", "helpers.py", "common.py", "base.py", "core.py"}


def test_import_is_light() -> None:
    code = "import ntkdyn, sys; print([m for m in ('torch', 'h5py', 'matplotlib', 'scipy') if m in sys.modules])"
    assert _python("-c", code) == "[]"


def test_help_is_light() -> None:
    code = (
        "import sys; from ntkdyn.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([m for m in ('torch', 'h5py', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    output = _python("-c", code)
    assert output.splitlines()[-1] == "[]"
    assert "Example" in output


def test_public_names_exist() -> None:
    import ntkdyn

    for name in ntkdyn.__all__:
        assert (getattr(ntkdyn, name).__doc__ or "").strip(), f"ntkdyn.{name} has no docstring"
    with pytest.raises(AttributeError, match="has no attribute 'empirical_kernel'"):
        ntkdyn.empirical_kernel  # noqa: B018


def _installed_in_site_packages() -> bool:
    spec = importlib.util.find_spec("ntkdyn")
    return spec is not None and spec.origin is not None and "site-packages" in Path(spec.origin).parts


def test_tested_package_is_the_installed_one() -> None:
    if not os.environ.get("CI"):
        pytest.skip("editable installs are fine for developers; CI tests the wheel")
    assert _installed_in_site_packages()


def test_wheel_holds_the_tree() -> None:
    if not _installed_in_site_packages():
        pytest.skip("needs the wheel; this is an editable install")
    expected = {_module_name(file).replace(".", "/") + ".py" for _, file in _sources()} | {"ntkdyn/py.typed"}
    for folder, home in (("ntkdyn", "ntkdyn"), ("experiments", "ntkdyn/experiments")):
        for suffix in ("*.toml", "*.html"):
            expected |= {f"{home}/{file.relative_to(ROOT / folder)}" for file in (ROOT / folder).glob(suffix)}
    files = importlib.metadata.files("ntkdyn") or []
    shipped = {str(file) for file in files if str(file).startswith("ntkdyn/") and "__pycache__" not in str(file)}
    assert shipped == expected


def test_tests_are_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def _python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-P", *arguments], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()
