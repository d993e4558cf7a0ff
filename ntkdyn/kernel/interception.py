"""Which calls of a forward pass used wanted parameters: recorded while the network runs, without hooks of its layers.

Functional calls are caught, not modules, so that functional networks and in-place activations work. At a recognized
call the parameter is replaced by a detached alias. It thereby leaves the graph through this call, and whatever
gradient still reaches the parameter itself is exactly the use that no rule knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from .attention import attention_call
from .problem import Problem
from .rules import Rule, rules

# A network that differentiates itself uses its weights a second time in the graph of that derivative, past the output
# of the call; then plain autograd has to see every weight.
_DIFFERENTIATION = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One recognized call.

    Attributes:
        number: position in the order of recognizable calls; the same in every run of the same network.
        names: role of the argument -> name of the parameter.
        input, arguments: as the rule will see them; version is the input's count of in-place changes.
        edge, shape: of the output, taken before anything could change it in place.
        layer: dotted name of the module that made the call.
    """

    number: int
    rule: Rule
    names: Mapping[str, str]
    input: Tensor
    version: int
    arguments: Mapping[str, Any]
    edge: GradientEdge
    shape: torch.Size
    layer: str


class Interception(TorchFunctionMode):
    """Collect the recognized calls of one forward pass.

    Args:
        problem: whose parameters are wanted.
        excluded: numbers of calls to leave to plain autograd; None means all.
    """

    def __init__(self, problem: Problem, excluded: frozenset[int] | None) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.differentiates = False
        self._problem = problem
        self._wanted = {id(parameter): name for name, parameter in problem.parameters.items()}
        self._rules = rules()
        self._excluded = excluded
        self._number = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = self._rules.get(func)
        if rule is None:
            self.differentiates |= func in _DIFFERENTIATION
            return func(*args, **kwargs)
        if rule.commutes and len(args) == 2 and id(args[0]) in self._wanted and _is_other_tensor(args[1], self._wanted):
            args = (args[1], args[0])
        arguments = dict(zip(rule.arguments, args, strict=False)) | kwargs
        names = {
            role: self._wanted[id(arguments[role])] for role in rule.roles if id(arguments.get(role)) in self._wanted
        }
        if not self._takes(rule, names, arguments):
            return func(*args, **kwargs)
        for role in names:
            arguments[role] = _alias(arguments[role])
        taken = [arguments[name] for name in rule.arguments[: len(args)]]
        output = func(*taken, **{name: arguments[name] for name in kwargs})
        self._record(rule, names, arguments, output)
        return output

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Catch the modules that have a rule as a whole, for as long as the context lasts."""
        with ExitStack() as stack:
            # The fast path of nn.TransformerEncoder hides the weights, and runs where those of its first layer are not
            # asked for.
            stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
            for module in self._problem.model.modules():
                if type(module) is nn.MultiheadAttention and "forward" not in vars(module):
                    module.forward = attention_call(module)  # type: ignore[method-assign]
                    stack.callback(vars(module).pop, "forward")
                rule = self._rules.get(type(module))
                if rule is not None:
                    module.forward = self._module_call(rule, module)
                    stack.callback(vars(module).pop, "forward")
            yield

    def _module_call(self, rule: Rule, module: nn.Module) -> Callable[..., Any]:
        original = module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            own = module._parameters
            arguments = {"input": (*args, *kwargs.values())[0], "module": module}
            names = {role: self._wanted[id(own[role])] for role in rule.roles if id(own.get(role)) in self._wanted}
            if not self._takes(rule, names, arguments):
                return original(*args, **kwargs)
            kept = {role: self._problem.parameters[name] for role, name in names.items()}
            try:
                for role, parameter in kept.items():
                    own[role] = nn.Parameter(parameter.detach())
                output = original(*args, **kwargs)
            finally:
                own.update(kept)
            self._record(rule, names, arguments, output)
            return output

        return call

    def _takes(self, rule: Rule, names: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
        if not names or not torch.is_grad_enabled():
            return False
        inputs = arguments.get("input")
        if not isinstance(inputs, Tensor):
            return False
        # Inside vmap or grad of torch.func the tensors are wrapped and mean nothing outside of it.
        if inputs.is_nested or inputs.is_sparse or torch._C._functorch.is_functorch_wrapped_tensor(inputs):
            return False
        if not rule.applies(arguments):
            return False
        self._number += 1
        return self._excluded is not None and self._number not in self._excluded

    def _record(self, rule: Rule, names: Mapping[str, str], arguments: Mapping[str, Any], output: Tensor) -> None:
        inputs = arguments["input"].detach()
        if not rule.reads:
            # What is not kept may be changed in place.
            inputs = inputs.new_zeros(()).expand(inputs.shape)
        self.calls.append(
            Call(
                number=self._number,
                rule=rule,
                names=names,
                input=inputs,
                version=inputs._version,
                arguments=arguments,
                edge=get_gradient_edge(output),
                shape=output.shape,
                layer=self._problem.layer,
            )
        )


def _alias(parameter: Tensor) -> Tensor:
    # It requires a gradient so that the output has a node in the graph even where nothing before it does, as in the
    # first layer; the gradient of the alias itself is never asked for.
    return parameter.detach().requires_grad_()


def _is_other_tensor(value: Any, wanted: Mapping[int, str]) -> bool:
    return isinstance(value, Tensor) and id(value) not in wanted
