"""Names, files and modules become probes, experiments and studies, or one-line errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ntkdyn.errors import ConfigurationError, UnknownName
from ntkdyn.plugins import installed, kebab, load_experiment, load_object, load_probe, load_study, snake
from ntkdyn.probes import EmpiricalNTK, Outputs, PathLength

PROBE = '''
from dataclasses import dataclass

@dataclass
class Mine:
    """A probe of mine."""
    k: int = 1
    scale: float = 2.0
    label: str = "x"
    flag: bool = False
    name = "mine"
    def fields(self, snapshot): return []
    def measure(self, snapshot): return {}

ready = Mine(k=7)
nothing = 3

class Unnamed:
    def fields(self, snapshot): return []
    def measure(self, snapshot): return {}
'''


@pytest.fixture
def probe_file(tmp_path: Path) -> Path:
    file = tmp_path / "my probes.py"
    file.write_text(PROBE)
    return file


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("path-length", "path_length"),
        ("PathLength", "path_length"),
        ("NTKProbe", "ntk_probe"),
        ("a b", "a_b"),
        ("x2", "x2"),
    ],
)
def test_snake(name: str, expected: str) -> None:
    assert snake(name) == expected
    assert kebab(name) == expected.replace("_", "-")


def test_installed_probes() -> None:
    assert {"ntk", "gates", "units", "path-length", "outputs"} <= set(installed("ntkdyn.probes"))
    assert isinstance(load_probe("ntk"), EmpiricalNTK)
    assert isinstance(load_probe("path_length"), PathLength)
    assert isinstance(load_probe("ntkdyn.probes:Outputs"), Outputs)


def test_options_reach_the_constructor(probe_file: Path) -> None:
    probe = load_probe("ntk:reduce=full,per=layer")
    assert (probe.reduce, probe.per) == ("full", "layer")  # type: ignore[attr-defined]
    assert load_probe("ntk:per=none").per is None  # type: ignore[attr-defined]
    assert load_probe("ntkdyn.probes.ntk:EmpiricalNTK:reduce=mean").reduce == "mean"  # type: ignore[attr-defined]
    mine = load_probe(f"{probe_file}:Mine:k=3, scale=1e-2,label=5,flag=true")
    assert (mine.k, mine.scale, mine.label, mine.flag) == (3, 0.01, "5", True)  # type: ignore[attr-defined]


def test_a_file_joins_no_search_path(probe_file: Path) -> None:
    before = list(sys.path)
    assert load_probe(f"{probe_file}:ready").k == 7  # type: ignore[attr-defined]
    assert load_object(f"{probe_file}:nothing") == 3
    assert sys.path == before
    assert "my probes" not in sys.modules


def test_experiment_and_study(tmp_path: Path) -> None:
    file = tmp_path / "more.py"
    file.write_text(
        "class E:\n    name = 'e'\n    Config = dict\n    def run(self, config, *, seed, recorder, start=None):\n"
        "        return {}\n"
        "class S:\n    name = 's'\n    def unavailable(self, source): return None\n"
        "    def measure(self, source): return None\n"
    )
    assert load_experiment(f"{file}:E").name == "e"
    assert load_study(f"{file}:S").name == "s"
    with pytest.raises(ConfigurationError, match="without run, expected an experiment"):
        load_experiment(f"{file}:S")
    with pytest.raises(ConfigurationError, match="without unavailable"):
        load_study(f"{file}:E")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("ntc", UnknownName, "probe 'ntc' is unknown; did you mean 'ntk'"),
        ("zzzzzz", UnknownName, "known: gates, ntk"),
        ("ntk:reduce=sum", ConfigurationError, "reduce is 'sum'; expected one of trace, mean, each, full"),
        ("ntk:per=unit", ConfigurationError, "per is 'unit'; expected one of none, layer, parameter"),
        ("ntk:redcue=full", ConfigurationError, "option 'redcue' is unknown; it takes reduce, per"),
        ("ntk:reduce=full,per", ConfigurationError, "found option 'per', expected key=value"),
        ("units:k=3", ConfigurationError, "option 'k' is unknown; it takes no options"),
        ("nowhere.py:X", UnknownName, "there is no file nowhere.py"),
        ("no_such_module_x:X", UnknownName, "there is no module 'no_such_module_x'"),
        ("ntkdyn.probes:Outputz", UnknownName, "did you mean 'Outputs'"),
        ("{file}:Mien", UnknownName, "did you mean 'Mine'"),
        ("{file}:nothing", ConfigurationError, "without fields(snapshot), expected a probe"),
        ("{file}:Unnamed", ConfigurationError, "without a name"),
        ("{file}:ready:k=3", ConfigurationError, "found options for an object"),
        ("{file}:", ConfigurationError, "expected file.py:object"),
        ("", UnknownName, "probe '' is unknown"),
    ],
)
def test_one_line_errors(text: str, error: type[Exception], message: str, probe_file: Path) -> None:
    with pytest.raises(error) as caught:
        load_probe(text.replace("{file}", str(probe_file)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("x = 1\ndef f(:\n")
    with pytest.raises(ConfigurationError, match=r"broken\.py line 2: SyntaxError"):
        load_probe(f"{file}:X")
    file.write_text("x = 1\n\ny = 1 / 0\n")
    with pytest.raises(ConfigurationError, match=r"broken\.py line 3: ZeroDivisionError: division by zero"):
        load_probe(f"{file}:X")
    file.write_text("class X:\n    name = 'x'\n    def __init__(self): raise KeyError('k')\n")
    with pytest.raises(ConfigurationError, match=r"cannot be constructed \(KeyError: 'k'\)"):
        load_probe(f"{file}:X")
    file.write_text("import no_such_package_y\n")
    with pytest.raises(ConfigurationError, match=r"line 1: ModuleNotFoundError: No module named 'no_such_package_y'"):
        load_probe(f"{file}:X")
