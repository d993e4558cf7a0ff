"""What the sources must not do with files of strangers and the network; read from the sources themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [file for folder in ("ntkdyn", "probes", "experiments") for file in sorted((ROOT / folder).rglob("*.py"))]
# Modules that run what they read, or that talk to other machines.
FORBIDDEN = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "ctypes",
    "socket", "ssl", "http", "urllib", "ftplib", "smtplib", "xmlrpc", "requests", "httpx", "aiohttp", "telnetlib",
}  # fmt: skip
# Builtins and methods that run text or unpickle.
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
# Rewrites the forward functions of the user's own network, which she has imported herself.
MAY_COMPILE = {"ntkdyn/conversion/retrace.py"}


def _called(node: ast.Call) -> str:
    parts: list[str] = []
    function: ast.expr = node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    # A method of something that was computed has no name of its own: model().eval() is not eval().
    parts.append(function.id if isinstance(function, ast.Name) else "()")
    return ".".join(reversed(parts))


def _keywords(node: ast.Call) -> dict[str, object]:
    return {word.arg or "**": getattr(word.value, "value", None) for word in node.keywords}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_run_and_nobody_is_called(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert (node.module or "").split(".")[0] not in FORBIDDEN, node.lineno
        elif isinstance(node, ast.Call):
            name, keywords = _called(node), _keywords(node)
            assert name not in RUNS_TEXT or str(file.relative_to(ROOT)) in MAY_COMPILE, f"{name} in line {node.lineno}"
            if name in ("torch.load", "load") and "weights_only" in keywords:
                assert keywords["weights_only"] is True, node.lineno
            assert name != "torch.load" or "weights_only" in keywords, node.lineno
            if name in ("np.load", "numpy.load"):
                assert keywords.get("allow_pickle") is False, node.lineno
            assert keywords.get("shell") is not True, node.lineno
            assert name not in ("os.system", "os.popen", "torch.hub.load", "pd.read_pickle"), node.lineno


def test_the_sources_were_found() -> None:
    assert len(SOURCES) > 100
