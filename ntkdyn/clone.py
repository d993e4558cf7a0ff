"""Copy of a network that can be called, traced and differentiated without the live one noticing.

copy.deepcopy and torch.func.functional_call both run the user's hooks on the copy and move the plain attributes that
a forward pass writes (measured with torch 2.13); hence a copy made member by member.
"""

from __future__ import annotations

import copy
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedLayer

# Values that need no copy: most attributes of most modules.
_IMMUTABLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type)

# A LightningModule in training holds its Trainer, whose copy would be one of optimizers, data and loggers each time.
_TRAINERS = ("pytorch_lightning.trainer.trainer", "lightning.pytorch.trainer.trainer")


def structural_clone(model: nn.Module, *, share_parameters: bool = True) -> nn.Module:
    """Copy a network: own module dictionaries, detached parameters, copied buffers, none of the user's hooks.

    Whatever is one object in the network is one object in the clone: tied weights, aliases, the same module under two
    names or in a plain list, the `_flat_weights` of an LSTM, a function whose closure holds a layer. Training flags
    stay as they are. Hooks that belong to torch.nn.utils (weight_norm, spectral_norm, prune of the older kind) are
    part of the forward pass and are copied. Wrappers (torch.compile, DataParallel, DistributedDataParallel) are taken
    off, so that a call compiles nothing and communicates with nobody. An attribute that cannot be copied and
    the Trainer that a LightningModule holds are kept by reference.

    Args:
        model: the live network; nothing in it is touched.
        share_parameters: True: the clone's parameters are detached views of the live ones, without cost in memory;
            nothing may write into them. False: they are copies.

    Returns: a network of the same classes; floating parameters require gradients, whatever the live ones do.
    Raises: UnsupportedLayer: a TorchScript module or a parameter that is not initialized yet.
    """
    root = unwrapped(model)
    memo: dict[int, Any] = {}
    modules = _reachable_modules(root)
    for _, module in modules.values():
        # object.__new__: the constructors of fx.GraphModule and of lazy modules make more than an empty shell.
        memo[id(module)] = object.__new__(type(module))
    for _, module in modules.values():
        for wrapper in _wrappers_in(module):
            memo[id(wrapper)] = memo[id(unwrapped(wrapper))]
    for name, module in modules.values():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = _clone_parameter(parameter, f"{name}.{key}".lstrip("."), share_parameters)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo[id(buffer)] = _clone_tensor(buffer)
    for _, module in modules.values():
        for leaf in _leaves(list(_plain_attributes(module).values())):
            _prepare(leaf, memo, share_parameters)
    for _, module in modules.values():
        _fill(memo[id(module)], module, memo)
    clone: nn.Module = memo[id(root)]
    return clone


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside torch.compile, DataParallel and DistributedDataParallel; itself where there is no wrapper."""
    while not isinstance(module, torch.jit.ScriptModule):
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(module._modules.get("_orig_mod"), nn.Module):  # torch.compile(module)
            module = module._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            break
    return module


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        key: value
        for key, value in module.__dict__.items()
        if key not in ("_parameters", "_buffers", "_modules", "_compiled_call_impl") and not key.endswith("_hooks")
    }


def _leaves(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """What lies in nested lists, tuples, dictionaries and sets, in bound methods and in closures."""
    if isinstance(value, _IMMUTABLE):
        return
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item, seen)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _leaves(item, seen)
    elif isinstance(value, types.MethodType):
        yield from _leaves(value.__self__, seen)
    elif isinstance(value, types.FunctionType) and value.__closure__:
        for content in _cell_contents(value):
            yield from _leaves(content, seen)
        yield value  # after what it closes over
    else:
        yield value


def _cell_contents(function: types.FunctionType) -> list[Any]:
    contents = []
    for cell in function.__closure__ or ():
        try:
            contents.append(cell.cell_contents)
        except ValueError:  # a cell that is still empty
            contents.append(None)
    return contents


def _reachable_modules(root: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Registered modules and those in plain attributes, unwrapped, each once with its dotted name."""
    found: dict[int, tuple[str, nn.Module]] = {}
    waiting = [("", root)]
    while waiting:
        name, module = waiting.pop(0)
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedLayer(
                f"layer {name or '<root>'!r} ({type(module).__name__}) is a TorchScript module and cannot be cloned; "
                "pass the network as it was before torch.jit"
            )
        module = unwrapped(module)
        if id(module) in found:
            continue
        found[id(module)] = (name, module)
        prefix = f"{name}." if name else ""
        waiting += [(prefix + key, child) for key, child in module._modules.items() if child is not None]
        for key, value in _plain_attributes(module).items():
            waiting += [(prefix + key, leaf) for leaf in _leaves(value) if isinstance(leaf, nn.Module)]
    return found


def _wrappers_in(module: nn.Module) -> Iterator[nn.Module]:
    candidates = [child for child in module._modules.values() if child is not None]
    candidates += [leaf for leaf in _leaves(_plain_attributes(module)) if isinstance(leaf, nn.Module)]
    for candidate in candidates:
        inner = candidate
        while inner is not unwrapped(inner):
            yield inner
            inner = next(child for child in inner._modules.values() if child is not None)


def _clone_parameter(parameter: Tensor, name: str, share: bool) -> Tensor:
    if torch.nn.parameter.is_lazy(parameter):
        raise UnsupportedLayer(f"parameter {name!r} is not initialized yet; run one batch through the network first")
    data = parameter.detach() if share else parameter.detach().clone()
    differentiable = parameter.is_floating_point() or parameter.is_complex()
    return nn.Parameter(data, requires_grad=differentiable)


def _clone_tensor(tensor: Tensor) -> Tensor:
    # A tensor with a history cannot be deep-copied; the copy of one without keeps its requires_grad.
    return tensor.detach().clone().requires_grad_(tensor.requires_grad and tensor.is_leaf)


def _prepare(leaf: Any, memo: dict[int, Any], share: bool) -> None:
    """Enter into the memo what copy.deepcopy would copy wrongly or not at all."""
    if id(leaf) in memo:
        return
    if isinstance(leaf, nn.Parameter):
        memo[id(leaf)] = _clone_parameter(leaf, "in a plain attribute", share)
    elif isinstance(leaf, Tensor):
        memo[id(leaf)] = _clone_tensor(leaf)
    elif isinstance(leaf, torch.Generator):
        memo[id(leaf)] = leaf.clone_state()
    elif any(kind.__module__ in _TRAINERS for kind in type(leaf).__mro__):
        memo[id(leaf)] = leaf
    elif isinstance(leaf, weakref.ref):
        target = leaf()
        if id(target) in memo:
            memo[id(leaf)] = weakref.ref(memo[id(target)])
    elif isinstance(leaf, types.FunctionType) and any(id(content) in memo for content in _cell_contents(leaf)):
        # copy.deepcopy leaves functions alone, and this one would call the live layer.
        cells = tuple(types.CellType(memo.get(id(content), content)) for content in _cell_contents(leaf))
        function = types.FunctionType(leaf.__code__, leaf.__globals__, leaf.__name__, leaf.__defaults__, cells)
        function.__kwdefaults__ = leaf.__kwdefaults__
        memo[id(leaf)] = function


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, _IMMUTABLE):
        return value
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # locks, open files, whatever a user keeps there: documented
        return value


def _fill(shell: nn.Module, module: nn.Module, memo: dict[int, Any]) -> None:
    members: dict[str, Any] = {}
    for key, value in module.__dict__.items():
        if key in ("_parameters", "_buffers", "_modules"):
            members[key] = {name: None if item is None else memo[id(item)] for name, item in value.items()}
        elif key in ("_forward_pre_hooks", "_forward_hooks"):
            kept = {number: hook for number, hook in value.items() if _belongs_to_torch(hook)}
            members[key] = OrderedDict((number, _copied(hook, memo)) for number, hook in kept.items())
        elif key.endswith("_hooks") and isinstance(value, dict):
            members[key] = OrderedDict()
    for key in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        members[key] = OrderedDict()
    members |= {key: _copied(value, memo) for key, value in _plain_attributes(module).items() if key not in members}
    # Past __setattr__: that of nn.Module would register, that of a subclass might compute.
    shell.__dict__.update(members)


def _belongs_to_torch(hook: Any) -> bool:
    kind = hook if isinstance(hook, types.FunctionType) else type(hook)
    return str(kind.__module__).startswith("torch.nn.utils.")
