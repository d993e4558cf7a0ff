"""A forward method written anew, with gates at its call sites: tracing with torch.fx, and the class that holds it."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
import torch.fx
from torch import nn

from ..call_sites import CONVERTIBLE, PLAIN_TYPES, ROOT, classify
from ..errors import ConversionError


def _expect(value: Any, fixed: Any, argument: str, owner: str) -> None:
    if value is not fixed and value != fixed:
        raise ConversionError(
            f"forward of {owner!r}: {argument} is {value!r}; its gates were made with {argument}={fixed!r}; "
            f"call gate_network with an example that passes this {argument}"
        )


# Inside somebody else's trace the value is a placeholder without a value to compare.
torch.fx.wrap("_expect")


class ForwardTracer(torch.fx.Tracer):
    """Traces one forward method; arguments that are no tensors keep the value they have in `fixed`.

    leaves: "all": every module is one node; "torch": the modules of torch.nn are, the user's are looked into.
    """

    proxy_buffer_attributes = True

    def __init__(self, owner: str, fixed: Mapping[str, Any], leaves: str) -> None:
        super().__init__()
        self.owner, self.fixed, self.leaves = owner, fixed, leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.leaves == "all" or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,
    ) -> tuple[Callable[..., Any], list[Any]]:
        positional: list[Any] = []
        named: dict[str, Any] = {}
        empty = inspect.Parameter.empty
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                continue
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                raise TypeError(f"forward takes *{parameter.name}")
            default = () if parameter.default is empty else (parameter.default,)
            value: Any = self.create_proxy("placeholder", parameter.name, default, {})
            fixed = self.fixed.get(parameter.name, parameter.default)
            if isinstance(fixed, PLAIN_TYPES):
                check = self.create_proxy("call_function", _expect, (value, fixed, parameter.name, self.owner), {})
                check.node.meta["is_wrapped"] = True
                value = fixed
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                named[parameter.name] = value
            else:
                positional.append(value)
        return lambda *args: root_fn(self.root, *positional, **named), []


def trace(owner: nn.Module, name: str, fixed: Mapping[str, Any], leaves: str) -> torch.fx.Graph:
    """Graph of the owner's forward.

    Raises: ConversionError: forward branches on values, takes *args, or calls a module that is not its own.
    """
    try:
        return ForwardTracer(name or ROOT, fixed, leaves).trace(owner)
    # Tracing runs the user's forward on placeholders: whatever that raises is the reason why it cannot be traced.
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ConversionError(
            f"forward of {name or ROOT!r} ({type(owner).__name__}) cannot be traced ({type(error).__name__}: {reason}"
            "); expected a forward without branches on tensor values; give each activation its own nn.ReLU attribute, "
            "called once, or put a Gate there"
        ) from error


def call_nodes(owner: nn.Module, graph: torch.fx.Graph) -> list[tuple[torch.fx.Node, str, str | None]]:
    """Nodes that call something convertible, in order: (node, function name, path of the activation module or None)."""
    found: list[tuple[torch.fx.Node, str, str | None]] = []
    for node in graph.nodes:
        if node.op == "call_module":
            label = CONVERTIBLE.get(type(owner.get_submodule(node.target)))
            if label:
                found.append((node, label, node.target))
        elif node.op in ("call_function", "call_method"):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            kind = classify(name)
            if kind and kind[0] == "convertible":
                found.append((node, name.removesuffix("_"), None))
    return found


def _in_place(owner: nn.Module, node: torch.fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(owner.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") or node.kwargs.get("inplace") is True


def own_weight(node: torch.fx.Node) -> str | None:
    """Name of the owner's own parameter that a functional prelu reads as its weight."""
    weight = node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
    own = isinstance(weight, torch.fx.Node) and weight.op == "get_attr" and "." not in str(weight.target)
    return str(weight.target) if own and isinstance(weight, torch.fx.Node) else None


def place_gate(owner: nn.Module, graph: torch.fx.Graph, node: torch.fx.Node, gate_name: str) -> None:
    """Put a call of the owner's gate in place of the node."""
    value = node.args[0] if node.args else node.kwargs["input"]
    with graph.inserting_before(node):
        gated = graph.call_module(gate_name, (value,))
    if _in_place(owner, node) and isinstance(value, torch.fx.Node):
        # A Gate is not in place: whoever read the overwritten tensor afterwards reads the gate's output.
        order = {other: index for index, other in enumerate(graph.nodes)}
        for user in list(value.users):
            if order[user] > order[node]:
                user.replace_input_with(value, gated)
    node.replace_all_uses_with(gated)
    graph.erase_node(node)


class _Retraced:
    """Mixed into the class of a module whose forward was written anew; the class keeps its name and its bases."""

    _original_class: type[nn.Module]
    _sources: Mapping[bool, str]
    _globals: Mapping[bool, dict[str, Any]]
    # Gates whose slope an old state dict holds under another name: gate -> "act.weight" or "weight" in this module.
    gate_origins: Mapping[str, str]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class exists in this process only; copies and files hold what it takes to make it again.
        packed = {mode: _pack(values) for mode, values in self._globals.items()}
        state: Any = super().__reduce_ex__(4)
        return (_empty_instance, (self._original_class, dict(self._sources), packed), *state[2:])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        used: set[str] = set()
        for gate, origin in self.gate_origins.items():
            weight = state_dict.get(prefix + origin)
            if weight is not None and f"{prefix}{gate}.slope" not in state_dict:
                state_dict[f"{prefix}{gate}.weight"] = weight
                # A parameter that only gates read is gone from this module; a module's is taken by its own Gate.
                used |= {prefix + origin} if "." not in origin else set()
        for key in used:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *arguments)  # type: ignore[misc]


def _pack(values: Mapping[str, Any]) -> dict[str, tuple[bool, Any]]:
    return {key: (True, value.__name__) if isinstance(value, types.ModuleType) else (False, value)
            for key, value in values.items()}  # fmt: skip


def _unpack(values: Mapping[str, tuple[bool, Any]]) -> dict[str, Any]:
    return {key: import_module(value) if is_module else value for key, (is_module, value) in values.items()}


def _empty_instance(
    original: type[nn.Module], sources: Mapping[bool, str], packed: Mapping[bool, Mapping[str, tuple[bool, Any]]]
) -> nn.Module:
    cls = _class_with(original, sources, {mode: _unpack(values) for mode, values in packed.items()})
    return cls.__new__(cls)


def _class_with(
    original: type[nn.Module], sources: Mapping[bool, str], global_names: Mapping[bool, dict[str, Any]]
) -> type[nn.Module]:
    forwards = {}
    for mode, source in sources.items():
        namespace = dict(global_names[mode])
        exec(compile(source, f"<gated forward of {original.__qualname__}>", "exec"), namespace)
        forwards[mode] = namespace["forward"]
    members: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_original_class": original,
        "_sources": sources,
        "_globals": global_names,
    }
    if len(forwards) == 1:
        members["forward"] = forwards.popitem()[1]
    else:
        members["_forward_in_training"], members["_forward_in_evaluation"] = forwards[True], forwards[False]
        # The signature stays that of the original, so that tracing and keyword arguments work.
        names = [name for name in inspect.signature(forwards[True]).parameters if name != "self"]
        members["forward"] = _dispatching_forward(names, forwards[True])
    return type(original.__name__, (_Retraced, original), members)


def _dispatching_forward(names: list[str], like: types.FunctionType) -> types.FunctionType:
    given = ", ".join(names)
    signature = ", ".join(["self", *names])
    source = (
        f"def forward({signature}):\n"
        f"    if self.training:\n        return self._forward_in_training({given})\n"
        f"    return self._forward_in_evaluation({given})\n"
    )
    namespace: dict[str, Any] = {}
    exec(compile(source, "<gated forward>", "exec"), namespace)
    forward: types.FunctionType = namespace["forward"]
    forward.__defaults__ = like.__defaults__
    return forward


def take_parameters(owner: nn.Module, graphs: Iterable[torch.fx.Graph], held: Mapping[str, str]) -> dict[str, str]:
    """Remove parameters of the owner that only gates read now; held and result: gate name -> parameter name."""
    reads = [node for graph in graphs for node in graph.nodes if node.op == "get_attr"]
    gone = {name for name in held.values() if not any(node.users for node in reads if node.target == name)}
    for node in reads:
        if node.target in gone:
            node.graph.erase_node(node)
    for name in gone:
        delattr(owner, name)
    return {gate: name for gate, name in held.items() if name in gone}


def write_forward(owner: nn.Module, graphs: Mapping[bool, torch.fx.Graph], origins: Mapping[str, str]) -> None:
    """Give the owner the traced forward: of training and evaluation mode where they differ, else one for both."""
    sources: dict[bool, str] = {}
    global_names: dict[bool, dict[str, Any]] = {}
    for mode, graph in graphs.items():
        graph.lint()
        code = graph.python_code("self")
        sources[mode], global_names[mode] = code.src, dict(code.globals)
    if sources[True] == sources[False]:
        sources, global_names = {True: sources[True]}, {True: global_names[True]}
    owner.__class__ = _class_with(type(owner), sources, global_names)
    owner.gate_origins = dict(origins)  # type: ignore[assignment]
