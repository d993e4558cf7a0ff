"""Plain data out of a pickle, without running it: what the official python layouts of CIFAR hold, and nothing else.

A pickle is a program that may call anything. Here ``pickletools`` only cuts it into operations, and those needed for
dictionaries, lists, tuples, strings, integers and numpy arrays of bytes are interpreted; any other is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import DamagedData

_OPERATIONS_AT_MOST = 500_000  # the largest official file, 50,000 names and two labels each, has 200,000


class _Refused(Exception):
    """The pickle holds something else than plain data."""


class _Mark:
    """Where the items of a list, tuple or dictionary begin on the stack."""


class _Function:
    """A name that the pickle may call, by a stand-in of ours."""

    def __init__(self, call: Callable[[tuple[Any, ...]], Any] | None) -> None:
        self.call = call


class _Bytes:
    """The element type of an array: unsigned bytes, the only one that is read."""


class _ArrayInTheMaking:
    """A numpy array before its state is set."""

    array: np.ndarray[Any, Any] | None = None


def _reconstruct(arguments: tuple[Any, ...]) -> _ArrayInTheMaking:
    if len(arguments) != 3 or arguments[0] is not _NDARRAY:
        raise _Refused("an array of another class than numpy.ndarray")
    return _ArrayInTheMaking()


def _dtype(arguments: tuple[Any, ...]) -> _Bytes:
    if not arguments or _as_bytes(arguments[0]) not in (b"u1", b"|u1"):
        raise _Refused(f"an array of type {arguments[0] if arguments else None!r}")
    return _Bytes()


def _encode(arguments: tuple[Any, ...]) -> bytes:
    # Bytes as Python 3 writes them in protocol 2, for Python 2 to read.
    if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] not in ("latin1", "latin-1"):
        raise _Refused("text in another encoding than latin1")
    return arguments[0].encode("latin-1")


_NDARRAY = _Function(None)
_FUNCTIONS = {
    "numpy ndarray": _NDARRAY,
    "numpy dtype": _Function(_dtype),
    "numpy.core.multiarray _reconstruct": _Function(_reconstruct),
    "numpy._core.multiarray _reconstruct": _Function(_reconstruct),
    "_codecs encode": _Function(_encode),
}
_VALUES = {"BININT", "BININT1", "BININT2", "SHORT_BINSTRING", "BINSTRING", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickled(content: bytes, *, where: str) -> Any:
    """Return what a pickle of protocol 2 or 3 holds; strings of Python 2 become str by latin-1.

    Raises: DamagedData: truncated, or an operation that plain data do not need, by its name and place.
    """
    machine = _Machine()
    end = position = 0
    try:
        for count, (operation, argument, place) in enumerate(pickletools.genops(content)):
            position = place or 0
            if count >= _OPERATIONS_AT_MOST:
                raise _Refused(f"more than {count} operations")
            machine.run(operation.name, argument)
            end = position + 1  # that of STOP, the last one
        result = machine.result()
    except _Refused as error:
        raise DamagedData(
            f"{where}: found {error} in the pickle at byte {position}, expected only dictionaries, lists, text, "
            "integers and arrays of bytes; nothing of it was run"
        ) from error
    except (ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:100]
        raise DamagedData(f"{where}: no whole pickle (after byte {position}: {reason})") from error
    if end != len(content):
        raise DamagedData(f"{where}: found {len(content) - end} bytes behind the pickle, expected none")
    return result


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """Interpret one operation."""
        stack = self._stack
        if name in _VALUES:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise _Refused(f"a reference to {argument}, which nothing put,")
            stack.append(self._memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            stack.append(tuple(self._last(_TUPLES[name])))
        else:
            rule = _OPERATIONS.get(name)
            if rule is None:
                raise _Refused(f"operation {name}")
            rule(self, argument)

    def result(self) -> Any:
        """The one value that is left."""
        if len(self._stack) != 1:
            raise _Refused(f"{len(self._stack)} values")
        return _finished(self._stack[0])

    def _last(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise _Refused("too few values")
        taken = self._stack[-count:]
        del self._stack[-count:]
        return taken

    def _since_mark(self) -> list[Any]:
        for depth in range(len(self._stack) - 1, -1, -1):
            if isinstance(self._stack[depth], _Mark):
                taken = self._stack[depth + 1 :]
                del self._stack[depth:]
                return taken
        raise _Refused("a list, tuple or dictionary without a beginning")

    def protocol(self, argument: Any) -> None:
        if argument not in (2, 3):
            raise _Refused(f"protocol {argument}")

    def stop(self, _: Any) -> None:
        """The end; ``result`` looks at what is left."""

    def mark(self, _: Any) -> None:
        self._stack.append(_Mark())

    def empty_list(self, _: Any) -> None:
        self._stack.append([])

    def empty_dict(self, _: Any) -> None:
        self._stack.append({})

    def empty_tuple(self, _: Any) -> None:
        self._stack.append(())

    def long_tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._since_mark()))

    def append(self, _: Any) -> None:
        self._extend(self._last(1))

    def appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def set_item(self, _: Any) -> None:
        self._update(self._last(2))

    def set_items(self, _: Any) -> None:
        self._update(self._since_mark())

    def name(self, argument: Any) -> None:
        if argument not in _FUNCTIONS:
            raise _Refused(f"the name {str(argument)[:60]!r}")
        self._stack.append(_FUNCTIONS[argument])

    def call(self, _: Any) -> None:
        function, arguments = self._last(2)
        if not isinstance(function, _Function) or function.call is None or not isinstance(arguments, tuple):
            raise _Refused("a call of something else")
        self._stack.append(function.call(arguments))

    def build(self, _: Any) -> None:
        (state,) = self._last(1)
        target = self._stack[-1]
        if isinstance(target, _Bytes) and isinstance(state, tuple):
            return  # byte order and alignment, which bytes do not have
        if not isinstance(target, _ArrayInTheMaking):
            raise _Refused("the state of an object")
        target.array = _array(state)

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise _Refused("items for something that is no list")
        self._stack[-1].extend(map(_finished, items))

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
            raise _Refused("entries that are no dictionary by names")
        target.update(zip(items[::2], map(_finished, items[1::2]), strict=True))


_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.protocol,
    "STOP": _Machine.stop,
    "MARK": _Machine.mark,
    "EMPTY_LIST": _Machine.empty_list,
    "EMPTY_DICT": _Machine.empty_dict,
    "EMPTY_TUPLE": _Machine.empty_tuple,
    "TUPLE": _Machine.long_tuple,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.name,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
}


def _finished(value: Any) -> Any:
    """A value as it is handed out; stand-ins of ours are not."""
    if isinstance(value, _ArrayInTheMaking):
        if value.array is None:
            raise _Refused("an array without content")
        return value.array
    if isinstance(value, (_Function, _Bytes, _Mark)):
        raise _Refused("a function or type as a value")
    return value


def _array(state: Any) -> np.ndarray[Any, Any]:
    """An array from numpy's state: version, shape, type, whether in Fortran order, content."""
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _Bytes):
        raise _Refused("an array of something else than bytes")
    _, shape, _, by_columns, content = state
    sizes = shape if isinstance(shape, tuple) else ()
    if not sizes or len(sizes) > 4 or not all(type(size) is int and size >= 0 for size in sizes):
        raise _Refused(f"an array of shape {str(shape)[:60]}")
    values = np.frombuffer(_as_bytes(content), np.uint8)
    count = 1
    for size in sizes:
        count *= size
    if count != len(values):
        raise _Refused(f"an array of shape {list(sizes)} with {len(values)} bytes")
    return values.reshape(sizes, order="F" if by_columns else "C")


def _as_bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode("latin-1")  # strings of Python 2 hold bytes
    if isinstance(value, bytes):
        return value
    raise _Refused(f"{type(value).__name__} in place of bytes")
