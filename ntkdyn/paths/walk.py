"""Runs a traced graph on the example and follows the channels from node to node."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx.node import map_aggregate, map_arg
from torch.utils._pytree import tree_flatten

from ..call_sites import ROOT, classify
from ..errors import TraceError
from .algebra import Source
from .rules import (
    Call,
    Carried,
    Node,
    Pathless,
    Program,
    Track,
    pathless_like,
    rule_for_function,
    rule_for_module,
    takes_pathless,
)
from .tracing import TAKING_VALUES, ExampleError, Traced


class Walk(torch.fx.Interpreter):
    """Follows the channels through one traced graph; `program` and `outputs` hold what it found."""

    def __init__(self, traced: Traced) -> None:
        super().__init__(traced.root, graph=traced.graph)
        # With it, torch.fx appends its own lines to every message.
        self.extra_traceback = False
        self.traced = traced
        self.modules = dict(traced.network.named_modules(remove_duplicate=False))
        self.carried: dict[torch.fx.Node, Carried] = {}
        self.program = Program(Node("", ""))
        self.outputs: list[Track] = []

    def run_node(self, n: torch.fx.Node) -> Any:
        versions = {node: value._version for node, value in self._operands(n)}
        try:
            result = super().run_node(n)
        except Exception as error:
            raise ExampleError(self._where(n), error) from error
        self.carried[n] = self._carried(n, result)
        for node, version in versions.items():
            if self.env[node]._version != version:
                self._written(n, node, result)
        if isinstance(result, Tensor):
            # After an in-place node, the earlier name of the tensor holds the new value too.
            for earlier, value in self.env.items():
                if value is result:
                    self.carried[earlier] = self.carried[n]
        return result

    def _operands(self, n: torch.fx.Node) -> Iterator[tuple[torch.fx.Node, Tensor]]:
        for node in n.all_input_nodes:
            value = self.env[node]
            if isinstance(value, Tensor) and not value.is_inference():
                yield node, value

    def _written(self, n: torch.fx.Node, node: torch.fx.Node, result: Any) -> None:
        """Refuse a write into part of a tensor that is needed later: what it carries then is not known here."""
        written = self.env[node]
        if not isinstance(self.carried[n], Track) and not isinstance(self.carried[node], Track):
            return
        shared = [
            other
            for other, value in self.env.items()
            if isinstance(value, Tensor)
            and value is not written
            and any(user not in self.carried for user in other.users)
            and value.untyped_storage().data_ptr() == written.untyped_storage().data_ptr()
        ]
        if shared or result is not written:
            raise TraceError(
                f"path lengths: {self._where(n)} writes in place into a tensor of which other parts are used later; "
                f"write it without assignment into parts (torch.cat, torch.where)"
            )

    def _carried(self, n: torch.fx.Node, result: Any) -> Carried:
        if n.op == "placeholder":
            if not isinstance(result, Tensor):
                return None
            if not (result.is_floating_point() or result.is_complex()):
                return Pathless(True, tuple(result.shape))
            self.program.node = Node(n.name, "input")
            return Track(self.program.add(Source(1)), tuple(result.shape), 1, None)
        if n.op == "get_attr":
            return None
        arguments, keywords = map_arg((n.args, n.kwargs), self._symbolic)
        concrete = map_arg((n.args, n.kwargs), lambda node: self.env[node])
        call = self._call(n, tuple(arguments), dict(keywords), concrete, result)
        if n.op == "output":
            self.outputs = call.tracks()
            return None
        carried = self._through(n, call)
        if isinstance(carried, Pathless) and call.operands():
            self.program.ends.append(call.where)
        if self.traced.kept_at(n) is None or carried is None:
            return carried
        # The operator that stands for the module returns its tensors as a list.
        parts = carried if isinstance(carried, tuple) else (carried,)
        real = call.result if isinstance(carried, tuple) else (call.result,)
        return tuple(part for part, value in zip(parts, real, strict=True) if isinstance(value, Tensor))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kept = self.traced.kept_call(target, args)
        if kept is None:
            return super().call_function(target, args, kwargs)
        arguments, keywords = kept.arguments(args[0])
        leaves, _ = tree_flatten(kept.module(*arguments, **keywords))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def _through(self, n: torch.fx.Node, call: Call) -> Carried:
        """What the rule says."""
        result = call.result
        if not call.operands() and not call.pathless():
            return None
        if n.target is operator.getitem and isinstance(call.arguments[0], tuple):
            picked = call.arguments[0][call.arguments[1]]
            return picked if isinstance(picked, (Track, Pathless)) else None
        if call.name in TAKING_VALUES and (call.operands() or call.weights()):
            raise call.error("makes a constant of what depends on the network's input")
        if not _holds_tensor(result):
            return None
        rule = rule_for_function(call.target) if call.module is None else rule_for_module(call.module)
        self.program.node = self._place(n, call)
        if rule is None or not takes_pathless(rule):
            if not call.operands():
                self._listed(call)
                return pathless_like(result, discrete=not call.weights())
            if rule is not None and call.weights():
                raise call.error("takes a value that carries no path (attention weights, or a comparison)")
        if rule is None:
            raise call.error("has no rule for paths")
        return rule(call)

    def _listed(self, call: Call) -> None:
        """List nonlinear nodes off all paths, such as the softmax of attention weights."""
        if call.weights() and (found := classify(call.name)):
            self.program.note(Node(self.program.node.name, found[1]))

    def _symbolic(self, n: torch.fx.Node) -> Any:
        carried = self.carried[n]
        if isinstance(carried, tuple):
            real = self.env[n]
            return tuple(real[i] if part is None else part for i, part in enumerate(carried))
        return self.env[n] if carried is None else carried

    def _call(self, n: torch.fx.Node, arguments: Any, keywords: Any, concrete: Any, result: Any) -> Call:
        module: nn.Module | None = None
        target: Any = n.target
        kept = self.traced.kept_at(n)
        if kept is not None:
            module, target, result = kept.module, kept.name, kept.returned(result)
            (arguments, keywords), concrete = kept.arguments(arguments[0]), kept.arguments(concrete[0][0])
        elif n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            target = self._name(str(n.target))
        name = _short(n) if module is None else type(module).__name__
        return Call(self._where(n), name, target, module, arguments, keywords, concrete, result, self.program)

    def _name(self, target: str) -> str:
        return ROOT if self.traced.single else target

    def _place(self, n: torch.fx.Node, call: Call) -> Node:
        """The module, or its caller and the function."""
        if call.module is not None:
            return Node(str(call.target), call.name)
        owner = self.traced.owner(n)
        module = self.modules.get(owner) if owner else None
        if module is not None and rule_for_module(module) and not list(module.children()):
            # torch.export sees into modules that are one node for torch.fx.
            return Node(owner, type(module).__name__)
        plain = call.name.strip("_") or call.name
        found = classify(plain)
        return Node(".".join(part for part in (owner, plain) if part), found[1] if found else plain)

    def _where(self, n: torch.fx.Node) -> str:
        kept = self.traced.kept_at(n)
        if kept is not None:
            return f"layer '{kept.name}' ({type(kept.module).__name__})"
        if n.op == "call_module":
            kind = type(self.fetch_attr(str(n.target))).__name__
            return f"layer '{self._name(str(n.target))}' ({kind})"
        if n.op == "call_function":
            target: Any = n.target
            what = f"{getattr(target, '__module__', None) or 'torch'}.{target.__name__}"
            if getattr(target, "namespace", None) == "aten":
                what = f"aten.{target.overloadpacket.__name__}"
        else:
            what = f"Tensor.{n.target}" if n.op == "call_method" else n.op
        owner = self.traced.owner(n)
        return f"node '{n.name}' ({what})" + (f" in layer '{owner}'" if owner else "")


def _short(n: torch.fx.Node) -> str:
    target: Any = n.target
    if getattr(target, "namespace", None) == "aten":
        return str(target.overloadpacket.__name__)
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _holds_tensor(value: Any) -> bool:
    found = False

    def look(part: Any) -> Any:
        nonlocal found
        found = found or isinstance(part, Tensor)
        return part

    map_aggregate(value, look)
    return found
