"""Names to objects: an installed name, ``package.module:object`` or ``file.py:object``, each with options.

House and third parties add theirs through the entry-point groups ntkdyn.probes, ntkdyn.experiments, ntkdyn.studies;
nothing is imported before it is asked for.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError, NtkdynError, UnknownName

if TYPE_CHECKING:
    from .probe import Probe

_WORDS = {"true": True, "false": False, "none": None}


def snake(name: str) -> str:
    """Return a name as it stands in recordings.

    >>> snake("path-length"), snake("OpenFraction"), snake("my NTK")
    ('path_length', 'open_fraction', 'my_ntk')
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return re.sub(r"[\s_-]+", "_", words).strip("_").lower()


def kebab(name: str) -> str:
    """Return a name as it stands on the command line.

    >>> kebab("path_length")
    'path-length'
    """
    return snake(name).replace("_", "-")


# Every run of a sweep asks; looking through all packages takes milliseconds.
@cache
def installed(group: str) -> Mapping[str, EntryPoint]:
    """Return the entry points of a group ("ntkdyn.probes", "ntkdyn.experiments", "ntkdyn.studies") by name.

    As they were when the process first asked.
    """
    return {entry.name: entry for entry in entry_points(group=group)}


def load_probe(text: str) -> Probe:
    """Return a probe by name, with options of its constructor: "ntk:reduce=full,per=layer", "my.py:MyProbe:k=3".

    Raises: UnknownName: nothing has that name; the nearest installed ones are named.
        ConfigurationError: an option that the constructor does not take, a file that does not run, no probe.
    """
    found = _load(text, "ntkdyn.probes", "probe")
    for member in ("fields", "measure"):
        if not callable(getattr(found, member, None)):
            raise ConfigurationError(
                f"probe {text!r}: found {_kind(found)} without {member}(snapshot), expected a probe; see ntkdyn.Probe"
            )
    if not isinstance(getattr(found, "name", None), str):
        raise ConfigurationError(f"probe {text!r}: found {_kind(found)} without a name, expected name = '...'")
    probe: Probe = found
    return probe


def load_experiment(text: str) -> Any:
    """Return an experiment by name, "package.module:Class" or "file.py:Class".

    Raises: UnknownName, ConfigurationError: as ``load_probe``.
    """
    found = _load(text, "ntkdyn.experiments", "experiment")
    for member in ("run", "Config"):
        if not callable(getattr(found, member, None)):
            raise ConfigurationError(
                f"experiment {text!r}: found {_kind(found)} without {member}, expected an experiment with Config and "
                "run(config, *, seed, recorder, start=None)"
            )
    return found


def load_study(name: str) -> Any:
    """Return a study by name, in snake or kebab case, "package.module:Class" or "file.py:Class".

    Raises: UnknownName, ConfigurationError: as ``load_probe``.
    """
    found = _load(name, "ntkdyn.studies", "study")
    for member in ("unavailable", "measure"):
        if not callable(getattr(found, member, None)):
            raise ConfigurationError(
                f"study {name!r}: found {_kind(found)} without {member}(source), expected a study; see `ntkdyn studies`"
            )
    return found


def load_object(text: str) -> Any:
    """Return the object behind "package.module:object" or "file.py:object"; the file's folder joins no search path.

    Raises: UnknownName: no such file, module or object.  ConfigurationError: the module raises when it is loaded.
    """
    source, separator, name = text.rpartition(":")
    if not separator or not source or not name:
        raise ConfigurationError(f"{text!r}: expected file.py:object or package.module:object")
    module = _module_from_file(Path(source)) if source.endswith(".py") else _module_by_name(source)
    missing = object()
    found = getattr(module, name, missing)
    if found is missing:
        public = [key for key in dir(module) if not key.startswith("_")]
        raise UnknownName(f"{source} has no {name!r}; {_nearest(name, public)}")
    return found


def _load(text: str, group: str, kind: str) -> Any:
    target, options = _parts(text)
    if ":" in target:
        found = load_object(target)
    else:
        entries = installed(group)
        name = target if target in entries else kebab(target)
        if name not in entries:
            raise UnknownName(
                f"{kind} {target!r} is unknown; {_nearest(kebab(target), list(entries))}; your own: file.py:Class"
            )
        try:
            found = entries[name].load()
        except (ImportError, AttributeError) as error:
            raise ConfigurationError(
                f"{kind} {name!r}: its package does not load ({_one_line(error)}); reinstall the package of "
                f"{entries[name].value}"
            ) from error
    if isinstance(found, type):
        return _construct(found, options, target, kind)
    if options:
        raise ConfigurationError(f"{kind} {target!r}: found options for an object, expected a class to construct")
    return found


def _parts(text: str) -> tuple[str, str]:
    """Split "target[:options]"; options hold "=", and a file's path may hold ":" itself."""
    file = re.match(r"(?P<file>.+\.py):(?P<rest>.*)", text)
    if file:
        name, _, options = file["rest"].partition(":")
        return f"{file['file']}:{name}", options
    head, _, rest = text.partition(":")
    if not rest or "=" in rest.partition(":")[0]:
        return head, rest
    name, _, options = rest.partition(":")
    return f"{head}:{name}", options


def _construct(found: type, options: str, target: str, kind: str) -> Any:
    where = f"{kind} {target!r}"
    parameters = inspect.signature(found).parameters
    values: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in options.split(","))):
        name, separator, value = part.partition("=")
        if not separator:
            raise ConfigurationError(f"{where}: found option {part!r}, expected key=value")
        if name not in parameters:
            known = ", ".join(parameters) or "no options"
            raise ConfigurationError(f"{where}: option {name!r} is unknown; it takes {known}")
        values[name] = _value(value.strip(), parameters[name])
    try:
        return found(**values)
    except NtkdynError:
        raise
    except Exception as error:
        raise ConfigurationError(f"{where}: cannot be constructed ({_one_line(error)}); check its options") from error


def _value(text: str, parameter: inspect.Parameter) -> Any:
    if parameter.annotation in ("str", str):
        return text
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UnknownName(f"there is no file {path}; expected file.py:object with the path of an existing file")
    # A name of its own: a user's probes.py must not hide, or be hidden by, an importable module.
    identity = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"ntkdyn_file_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}_{identity}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{path}: not a Python file; expected file.py:object")
    module = importlib.util.module_from_spec(spec)
    # dataclasses and typing look their module up there while the file runs.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigurationError(f"{_place(error, path)}: {_one_line(error)}; the file must load by itself") from error
    return module


def _module_by_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UnknownName(
                f"there is no module {name!r}; is its package installed? a file is named file.py:object"
            ) from error
        raise ConfigurationError(f"module {name!r} does not load: {_one_line(error)}") from error
    except Exception as error:
        raise ConfigurationError(f"module {name!r} does not load: {_one_line(error)}") from error


def _place(error: Exception, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{error.filename or path} line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path} line {lines[-1]}" if lines else str(path)


def _one_line(error: Exception) -> str:
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(message.split())}"


def _kind(found: Any) -> str:
    return f"the {type(found).__name__} {getattr(found, 'name', '')}".strip()


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(map(repr, near))}?"
    return f"known: {', '.join(sorted(known)) or 'nothing'}"
