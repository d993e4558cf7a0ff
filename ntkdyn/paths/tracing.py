"""The graph of a network: by torch.fx, and by torch.export where that fails.

torch.fx runs forward on symbols and keeps every module that has a rule as one node. Where forward decides on shapes,
takes arguments by name or is decorated (Hugging Face), torch.export runs it on tensors without data instead and
writes down ATen operators. Modules of the user and gates stay one node there too: while it traces, their forward is
one operator, whose number says which call of which module it was.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import operator
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..call_sites import ROOT, disable_fast_paths
from ..errors import NtkdynError, TraceError
from .rules import class_with_rule, rule_for_module


class ExampleError(TraceError):
    """The network fails on the example itself."""

    def __init__(self, where: str, error: Exception) -> None:
        super().__init__(
            f"path lengths: {where} fails on the example: {one_line(error)}; give an example that the network accepts"
        )


class Untraceable(TraceError):
    """A tracer has failed. reason: what it says.  where: the layer that it was in, and the line."""

    def __init__(self, reason: str, where: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.reason = reason
        self.where = where


@dataclass
class Kept:
    """One call of a module that is a single node for torch.export.

    given: its arguments with a mark in place of tensors, flat.  spec: how they nest.
    result, result_spec: the same for what it returned.
    """

    name: str
    module: nn.Module
    given: list[Any]
    spec: TreeSpec
    result: list[Any] = field(default_factory=list)
    result_spec: TreeSpec | None = None

    def arguments(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments with these in place of the tensors."""
        arguments, keywords = tree_unflatten(_filled(self.given, tensors), self.spec)
        return tuple(arguments), dict(keywords)

    def returned(self, tensors: Sequence[Any]) -> Any:
        """What the module returns, with these in place of the tensors."""
        if self.result_spec is None:
            raise TraceError(f"path lengths: layer '{self.name}' was not called while tracing; file a bug")
        return tree_unflatten(_filled(self.result, tensors), self.result_spec)


@dataclass
class Traced:
    """A graph, ready to be walked.

    root: holds what the graph calls.  network: the network itself.  inputs: for the graph's placeholders.
    kept: calls of modules by their number.
    """

    root: nn.Module
    network: nn.Module
    graph: torch.fx.Graph
    inputs: list[Any]
    kept: list[Kept]

    @property
    def single(self) -> bool:
        """Whether the network is one layer, inside a container."""
        return isinstance(self.root, nn.Sequential) and self.root is not self.network

    def kept_call(self, target: Any, arguments: Sequence[Any]) -> Kept | None:
        """The module's call that a call of a function stands for, None for other functions."""
        return self.kept[arguments[1]] if self.kept and target is _operator() else None

    def kept_at(self, node: torch.fx.Node) -> Kept | None:
        """The module's call that a node stands for, None for other nodes."""
        return self.kept_call(node.target, node.args)

    def owner(self, node: torch.fx.Node) -> str:
        """Dotted name of the module whose forward makes the call; empty for the network itself."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        return str(stack[-1][0]).partition("@")[0] if stack else ""


def trace_by_fx(network: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Traced:
    """Trace a network whose arguments are tensors by position.

    Raises: Untraceable: other arguments, or torch.fx fails.
    """
    if keywords or not all(isinstance(value, Tensor) for value in arguments):
        raise Untraceable("arguments by name, or arguments that are no tensors", "forward")
    # A network that is one layer would be traced through; inside a container it stays one node.
    root = nn.Sequential(network) if rule_for_module(network) is not None else network
    tracer = _Tracer()
    with _failures(tracer.entered):
        graph = tracer.trace(root, concrete_args=_defaults_beyond(root, len(arguments)))
    return Traced(root, network, graph, list(arguments), [])


def trace_by_export(network: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Traced:
    """Trace any network that torch.export can run on tensors without data.

    Raises: ExampleError: the network fails on the example.  Untraceable: torch.export fails.
    """
    disable_fast_paths(network)
    kept: list[Kept] = []
    entered: list[tuple[str, nn.Module]] = []
    with _watched(network, entered):
        try:
            # torch.export would log pages about an example that does not fit.
            network(*_copied(arguments), **_copied(dict(keywords)))
        except Exception as error:
            name, layer = entered[-1]
            raise ExampleError(f"layer '{name or ROOT}' ({type(layer).__name__})", error) from error
    with ExitStack() as stack:
        stack.enter_context(_kept_modules(network, kept))
        stack.enter_context(_watched(network, entered))
        stack.enter_context(_failures(entered))
        stack.enter_context(_ValuesStay())
        module = torch.export.export(network, arguments, dict(keywords), strict=False).module()
    inputs, _ = tree_flatten((arguments, dict(keywords)))
    return Traced(module, network, module.graph, inputs, kept)


def _defaults_beyond(root: nn.Module, given: int) -> dict[str, Any] | None:
    """Optional arguments of forward that the example does not give, fixed at their defaults while tracing."""
    parameters = list(inspect.signature(root.forward).parameters.values())
    return {p.name: p.default for p in parameters[given:] if p.default is not inspect.Parameter.empty} or None


class _Tracer(torch.fx.Tracer):
    """Tracer for which every module with a rule is one node. entered: the modules that it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.entered: list[tuple[str, nn.Module]] = []

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return rule_for_module(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.entered.append((self.path_of_module(m), m))
        result = super().call_module(m, forward, args, kwargs)
        self.entered.pop()
        return result


class _InPlace(torch.fx.Proxy):
    """Symbol whose `x += y` is a node that writes into x, as for a tensor; that of torch.fx is `x = x + y`.

    Setting an attribute (`x.data = y`), which torch.fx would forget, fails.
    """

    def __getattr__(self, k: str) -> torch.fx.proxy.Attribute:
        return _Attribute(self, k)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):
            raise AttributeError(f"symbolically traced variables take no attribute '{name}'")
        object.__setattr__(self, name, value)


def _in_place(function: Callable[..., Any]) -> Callable[..., torch.fx.Proxy]:
    def write(self: torch.fx.Proxy, other: Any) -> torch.fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return write


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(_InPlace, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class _Proxy(_InPlace):
    """What a node returns."""


class _Attribute(_InPlace, torch.fx.proxy.Attribute):
    """An attribute of it, or a method before it is called."""


def one_line(error: BaseException) -> str:
    """Message of an exception in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _copied(example: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, example)


@contextmanager
def _failures(entered: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Say where a tracer failed: what is still entered then is the layer."""
    try:
        yield
    except NtkdynError:
        raise
    except Exception as error:
        name, module = entered[-1] if entered else (ROOT, None)
        where = f"layer '{name or ROOT}'" + (f" ({type(module).__name__})" if module is not None else "")
        line = _user_line(error)
        reason = str(error) if isinstance(error, _ValueTaken) else one_line(error)[:200]
        raise Untraceable(reason, f"{where} at '{line}'" if line else where) from error


def _user_line(error: BaseException) -> str:
    """The innermost line of source outside torch and this package."""
    own = [str(Path(torch.__file__).parent), str(Path(__file__).parent.parent)]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        library = any(frame.filename.startswith(folder) for folder in own) or frame.filename.startswith("<")
        if not library and (line := linecache.getline(frame.filename, frame.lineno or 0).strip()):
            return line[:120]
    return ""


@contextmanager
def _watched(network: nn.Module, entered: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Keep the list of modules whose forward is running."""
    with ExitStack() as stack:
        for name, module in network.named_modules():

            def enter(module: nn.Module, args: Any, name: str = name) -> None:
                entered.append((name, module))

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                entered.pop()

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield


# ---- values that leave tensors --------------------------------------------------------------------------------------

# Functions by which a value of a tensor becomes one of Python.
TAKING_VALUES = frozenset(
    ("__bool__", "__int__", "__float__", "__complex__", "__index__", "item", "tolist", "numpy", "equal", "allclose",
     "is_nonzero")
)  # fmt: skip


class _ValueTaken(Exception):
    """A network decides on a value of a tensor."""


class _ValuesStay(TorchFunctionMode):
    """Names the function that takes a value; torch.export alone prints pages and names a symbol of its own."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name not in TAKING_VALUES:
            return func(*args, **(kwargs or {}))
        taken = _ValueTaken(f"values of tensors leave them by '{name}'")
        try:
            result = func(*args, **(kwargs or {}))
        except Exception as error:
            raise taken from error
        if any(isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)) for leaf in tree_leaves(result)):
            raise taken
        return result


# ---- modules that stay one node for torch.export --------------------------------------------------------------------

_TRACING: ContextVar[list[Kept]] = ContextVar("ntkdyn_path_tracing")
# Stands for a tensor among arguments.
_TENSOR = object()


@contextmanager
def _kept_modules(network: nn.Module, kept: list[Kept]) -> Iterator[None]:
    """While inside, forward of every gate and every other module with a rule that is not torch.nn's is one operator."""
    with ExitStack() as stack:
        stack.callback(_TRACING.reset, _TRACING.set(kept))
        for name, module in network.named_modules():
            base = class_with_rule(module)
            if base is not None and not base.__module__.startswith("torch.nn."):
                vars(module)["forward"] = functools.partial(_forward, name or ROOT, module)
                stack.callback(vars(module).pop, "forward")
        yield


def _forward(name: str, module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
    leaves, spec = tree_flatten((arguments, keywords))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    calls = _TRACING.get()
    call = Kept(name, module, _emptied(leaves), spec)
    calls.append(call)
    return call.returned(_operator()(tensors, len(calls) - 1))


@functools.cache
def _operator() -> Any:
    """The operator that stands for a module's forward while torch.export traces; it never runs on data."""
    torch.library.define("ntkdyn::layer", "(Tensor[] tensors, int call) -> Tensor[]")

    def layer(tensors: list[Tensor], call: int) -> list[Tensor]:
        kept = _TRACING.get()[call]
        arguments, keywords = kept.arguments(tensors)
        leaves, kept.result_spec = tree_flatten(type(kept.module).forward(kept.module, *arguments, **keywords))
        kept.result = _emptied(leaves)
        # The result of an operator must not be one of its operands.
        return [torch.empty_like(leaf) for leaf in leaves if isinstance(leaf, Tensor)]

    torch.library.register_fake("ntkdyn::layer", layer)
    return torch.ops.ntkdyn.layer.default


def _filled(given: Sequence[Any], tensors: Sequence[Any]) -> list[Any]:
    waiting = iter(tensors)
    return [next(waiting) if leaf is _TENSOR else leaf for leaf in given]


def _emptied(leaves: Sequence[Any]) -> list[Any]:
    return [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
