"""Turn the ReLUs of a network into gates: one Gate per call site, named by the site."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..call_sites import (
    ALWAYS_ACTIVE,
    CONVERTIBLE,
    ROOT,
    UNCOUNTED,
    Call,
    CallLog,
    disable_fast_paths,
    record_calls,
    untouched_generators,
)
from ..clone import structural_clone, unwrapped
from ..errors import ConversionError
from ..gates import Gate, Granularity
from .retrace import call_nodes, own_weight, place_gate, take_parameters, trace, write_forward
from .static_sites import predicted_calls


@dataclass
class _Rewrite:
    """A forward to be traced anew: its gates in the order of the calls, and how many of them each mode reaches."""

    gates: list[tuple[str, Call]]
    reached: dict[bool, int]
    arguments: dict[str, Any]


@dataclass
class _Plan:
    """What becomes a Gate: registered modules and held functions by dotted name, and forwards to be traced anew."""

    attributes: dict[str, Call] = field(default_factory=dict)
    rewrites: dict[str, _Rewrite] = field(default_factory=dict)


def gate_network(
    model: nn.Module, example: Any = None, *, granularity: Granularity = "channel", inplace: bool = False
) -> nn.Module:
    """Replace every ReLU, LeakyReLU and PReLU of a network by a Gate, one per call site, named by the site.

    The network computes the same as before: slope 0 for ReLU, the negative slope for LeakyReLU, the copied weight for
    PReLU. Modules called at one site are replaced where they are registered; so are functions that a module holds as
    an attribute (the activation of torch.nn's Transformer layers, whose fused evaluation path is switched off). A
    module whose forward calls relu as a function, or one activation at several sites, gets its forward traced anew
    by torch.fx with gates relu, relu_1, ... in the order of the calls; its other arguments and plain attributes are
    then those of the example. State dicts of the old network still load. ReLU6, GELU, clamp(min=0) and the like
    stay, see nonlinear_units.

    Args:
        example: input to run the network on, at least 2 samples; a tuple gives positional, a mapping keyword
            arguments. Needed where channels cannot be read off the layers. With it the result is checked: no relu
            outside a Gate, the same outputs as before.
        granularity: "channel": one slope per channel; "layer": one slope per call site.
        inplace: convert the network itself; otherwise a deep copy is returned and the network is not touched.

    Raises: ConversionError: names the call site that cannot be converted, and what to do.
    """
    if granularity not in ("channel", "layer"):
        raise ConversionError(f"gate_network: granularity is {granularity!r}; expected 'channel' or 'layer'")
    if unwrapped(model) is not model:
        raise ConversionError(
            f"gate_network: the network is wrapped in {type(model).__name__}; expected the network itself; "
            "convert it first, then wrap it"
        )
    modes = [model.training]
    if example is None:
        studied = structural_clone(model)
        _separate_aliases(studied)
        plan = _plan(studied, [predicted_calls(studied)])
    else:
        logs = [_record(model, example)]
        # In the other mode the network may not run, e.g. BatchNorm on a single sample: then nothing is known of it.
        with suppress(Exception):
            logs.append(_record(model, example, other_mode=True))
            modes.append(not model.training)
        plan = _plan(structural_clone(model), logs)
    gated = copy.deepcopy(model)
    _apply(plan, gated, granularity)
    if example is not None:
        for training in modes:
            _check(model, gated, example, training)
    if not inplace:
        return gated
    _apply(plan, model, granularity)
    return model


def _record(model: nn.Module, example: Any, *, other_mode: bool = False) -> CallLog:
    studied = structural_clone(model)
    _separate_aliases(studied)
    if other_mode:
        studied.train(not model.training)
    with untouched_generators(model):
        return record_calls(studied, example, opaque=(Gate,))


def _separate_aliases(model: nn.Module) -> None:
    """Give each name under which one activation module is registered a module of its own, so that names are sites."""
    seen: set[int] = set()
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and type(child) in CONVERTIBLE:
                if id(child) in seen:
                    parent._modules[key] = copy.deepcopy(child)
                seen.add(id(child))


def _plan(studied: nn.Module, logs: list[CallLog]) -> _Plan:
    calls: dict[str, dict[bool, list[list[Call]]]] = {}
    arguments: dict[str, dict[str, Any]] = {}
    for log in logs:
        for (owner, training), lists in log.invocations.items():
            kept = [[call for call in one if call.kind == "convertible"] for one in lists]
            if any(kept):
                calls.setdefault(owner, {}).setdefault(training, []).extend(kept)
        for owner, values in log.arguments.items():
            arguments.setdefault(owner, values)
    if not calls:
        found = sorted({call.label for log in logs for call in log.calls()} | _kinds_of(studied))
        raise ConversionError(
            f"gate_network: {type(studied).__name__} calls no ReLU, LeakyReLU or PReLU; found "
            f"{', '.join(found) or 'no nonlinearity'}; only those three become gates"
        )
    owners_of: dict[str, set[str]] = {}
    for owner, by_mode in calls.items():
        for call in (call for lists in by_mode.values() for one in lists for call in one):
            if call.module is not None:
                owners_of.setdefault(call.module, set()).add(owner)
    plan = _Plan()
    for owner, by_mode in calls.items():
        remaining = _take_single_sites(plan, owner, by_mode, owners_of)
        if any(one for lists in remaining.values() for one in lists):
            plan.rewrites[owner] = _rewrite(studied, owner, remaining, arguments.get(owner, {}))
    return plan


def _kinds_of(model: nn.Module) -> set[str]:
    kinds: tuple[type[nn.Module], ...] = (Gate, *ALWAYS_ACTIVE, *UNCOUNTED)
    return {type(module).__name__ for module in model.modules() if isinstance(module, kinds)}


def _take_single_sites(
    plan: _Plan, owner: str, by_mode: dict[bool, list[list[Call]]], owners_of: Mapping[str, set[str]]
) -> dict[bool, list[list[Call]]]:
    """Plan the modules and held functions that one forward calls once; returns the calls that are left."""
    most: Counter[str] = Counter()
    found: dict[str, list[Call]] = {}
    for call_list in (one for lists in by_mode.values() for one in lists):
        counts = Counter(place for call in call_list if (place := _place(call)) is not None)
        most |= counts
        for call in call_list:
            if (place := _place(call)) is not None:
                found.setdefault(place, []).append(call)
    for place, same in found.items():
        callers = owners_of.get(place, {owner})
        if len(callers) > 1:
            raise ConversionError(
                f"call site {same[0].site}: called by {' and '.join(repr(name or ROOT) for name in sorted(callers))}; "
                "expected one module whose forward calls it; give each its own activation module"
            )
        if place == "":
            raise ConversionError(
                f"gate_network: the network is a single {same[0].label}; expected a module that holds it; "
                "wrap it: nn.Sequential(activation)"
            )
        if most[place] == 1:
            plan.attributes[place] = _merged(same)
    return {
        mode: [[call for call in one if (place := _place(call)) is None or most[place] > 1] for one in lists]
        for mode, lists in by_mode.items()
    }


def _place(call: Call) -> str | None:
    if call.module is not None:
        return call.module
    return None if call.attribute is None else f"{call.owner}.{call.attribute}".lstrip(".")


def _merged(calls: list[Call]) -> Call:
    sizes = {(call.channels, call.dim) for call in calls}
    first = calls[0]
    if len(sizes) > 1:
        raise ConversionError(
            f"call site {first.site}: met (channels, axis) {' and '.join(map(str, sorted(sizes, key=str)))}; expected "
            "one size; give each use its own module"
        )
    if first.channels is None:
        raise ConversionError(
            f"call site {first.site}: the layers before it do not tell the channel axis of its input; expected the "
            "output of a linear, convolution or normalization layer; call gate_network(model, example), or put a "
            "ntkdyn.Gate there"
        )
    return first


def _rewrite(
    studied: nn.Module, owner: str, by_mode: dict[bool, list[list[Call]]], arguments: dict[str, Any]
) -> _Rewrite:
    longest = max((one for lists in by_mode.values() for one in lists), key=len)
    signature = [_signature(call) for call in longest]
    reached: dict[bool, int] = {}
    columns: list[list[Call]] = [[] for _ in longest]
    for mode, lists in by_mode.items():
        lengths = {len(one) for one in lists}
        for one in lists:
            if [_signature(call) for call in one] != signature[: len(one)] or len(lengths) > 1:
                raise ConversionError(
                    f"forward of {owner or ROOT!r}: calls different activations from call to call; expected the same "
                    "sequence every time; give each activation its own nn.ReLU attribute, called once"
                )
            for column, call in zip(columns, one, strict=False):
                column.append(call)
        reached[mode] = lengths.pop()
    module = studied.get_submodule(owner)
    names: list[str] = []
    for call in longest:
        path = None if call.module is None else call.module[len(owner) :].lstrip(".")
        base = call.function if path is None else path.replace(".", "_")
        candidates = [base, *(f"{base}_{number}" for number in range(1, len(longest) + len(dir(module))))]
        if path is not None and path not in names:
            names.append(path)
            continue
        names.append(next(name for name in candidates if name not in names and not hasattr(module, name)))
    return _Rewrite([(name, _merged(column)) for name, column in zip(names, columns, strict=True)], reached, arguments)


def _signature(call: Call) -> tuple[str, str | None]:
    return call.function, call.module


def _gate(call: Call, granularity: Granularity, training: bool) -> Gate:
    if call.channels is None or call.dim is None or call.like is None:
        raise ConversionError(f"call site {call.site}: its channels are not known; call gate_network(model, example)")
    slope = call.slope if isinstance(call.slope, Tensor) else torch.tensor(call.slope, dtype=torch.float64)
    if granularity == "layer":
        if bool((slope != slope.flatten()[0]).any()):
            raise ConversionError(
                f"call site {call.site}: its slopes differ between channels; a layer-wise gate has one; "
                "use granularity='channel'"
            )
        slope = slope.flatten()[:1]
    gate = Gate(call.channels, slope.to(call.like), call.dim, granularity=granularity)
    return gate.train(training)


def _apply(plan: _Plan, model: nn.Module, granularity: Granularity) -> None:
    _separate_aliases(model)
    for place, call in plan.attributes.items():
        parent, _, key = place.rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, key, _gate(call, granularity, holder.training))
    for owner, rewrite in plan.rewrites.items():
        _apply_rewrite(model.get_submodule(owner), owner, rewrite, granularity)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and isinstance(module.activation, Gate):
            disable_fast_paths(module)
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _apply_rewrite(owner: nn.Module, name: str, rewrite: _Rewrite, granularity: Granularity) -> None:
    training = owner.training
    expected = [(call.function, None if call.module is None else call.module[len(name) :].lstrip("."))
                for _, call in rewrite.gates]  # fmt: skip
    graphs: dict[bool, torch.fx.Graph] = {}
    placed: dict[bool, list[torch.fx.Node]] = {}
    for mode in (True, False):
        owner.training = mode
        try:
            graphs[mode] = trace(owner, name, rewrite.arguments, "all")
        finally:
            owner.training = training
        found = call_nodes(owner, graphs[mode])
        length = rewrite.reached.get(mode, len(found))
        if [(function, path) for _, function, path in found] != expected[:length]:
            met = ", ".join(path or function for _, function, path in found) or "none"
            raise ConversionError(
                f"forward of {name or ROOT!r}: traced in {'training' if mode else 'evaluation'} mode it calls {met}; "
                f"expected {', '.join(path or function for function, path in expected[:length])} as in the run; give "
                "each activation its own nn.ReLU attribute, called once"
            )
        placed[mode] = [node for node, _, _ in found]
    held: dict[str, str] = {}
    for mode, nodes in placed.items():
        for node, (gate_name, call) in zip(nodes, rewrite.gates, strict=False):
            if call.function == "prelu" and call.module is None and (weight := own_weight(node)):
                held[gate_name] = weight
            place_gate(owner, graphs[mode], node, gate_name)
    origins = take_parameters(owner, graphs.values(), held)
    for gate_name, call in rewrite.gates:
        parent, _, key = gate_name.rpartition(".")
        setattr(owner.get_submodule(parent), key, _gate(call, granularity, training))
        path = None if call.module is None else call.module[len(name) :].lstrip(".")
        if path is not None and path != gate_name:
            origins[gate_name] = f"{path}.weight"
    write_forward(owner, graphs, origins)


def _outputs(model: nn.Module, example: Any, training: bool) -> tuple[list[Any], CallLog]:
    studied = structural_clone(model)
    _separate_aliases(studied)
    if training != model.training:
        studied.train(training)
    outputs: list[Any] = []
    studied.register_forward_hook(lambda module, args, output: outputs.extend(tree_leaves(output)))
    with untouched_generators(model):
        log = record_calls(studied, example, opaque=(Gate,))
    return [value.detach() for value in outputs if isinstance(value, Tensor)], log


def _check(model: nn.Module, gated: nn.Module, example: Any, training: bool) -> None:
    """The gated network calls no relu outside a Gate and computes what the original computes."""
    expected, _ = _outputs(model, example, training)
    found, log = _outputs(gated, example, training)
    left = sorted({call.site for call in log.calls() if call.kind == "convertible"})
    if left:
        raise ConversionError(f"gate_network: still called outside a Gate: {', '.join(left)}; put a ntkdyn.Gate there")
    mode = "training" if training else "evaluation"
    for before, after in zip(expected, found, strict=True):
        if before.shape != after.shape or not torch.allclose(before, after, rtol=1e-4, atol=1e-6, equal_nan=True):
            raise ConversionError(
                f"gate_network: outputs in {mode} mode differ from those of the original; expected the same; likely an "
                "in-place activation whose input is used again: set inplace=False there"
            )
