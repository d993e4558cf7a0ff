"""Where a network calls its ReLUs, read off its graph and its layers without running it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..call_sites import ALWAYS_ACTIVE, CONVERTIBLE, Call, CallLog, announced_functions, classify, held_function
from ..errors import ConversionError
from .retrace import ForwardTracer

# Size and axis of the channels, and an empty tensor with the type and device of the values.
_Channels = tuple[int, int, Tensor]

_KEEPS_CHANNELS: tuple[type[nn.Module], ...] = (
    *(kind for kind in ALWAYS_ACTIVE if kind not in (nn.GLU, nn.RNNBase, nn.RNNCellBase)), nn.Dropout, nn.Dropout1d,
    nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity, nn.MaxPool1d, nn.MaxPool2d,
    nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample,
)  # fmt: skip
_KEEPING_FUNCTIONS = frozenset(
    ("add", "sub", "mul", "truediv", "iadd", "isub", "imul", "dropout", "dropout1d", "dropout2d", "dropout3d",
     "contiguous", "clone", "to", "float", "double", "half", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d",
     "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate",
     "batch_norm", "layer_norm")
)  # fmt: skip


class _SiteTracer(ForwardTracer):
    """Notes at each node the plain attribute that held its function."""

    def __init__(self) -> None:
        super().__init__("", {}, "torch")
        self.attribute: str | None = None

    def say(self, attribute: str | None) -> None:
        self.attribute = attribute

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["held_by"] = self.attribute
        return node


def predicted_calls(model: nn.Module) -> CallLog:
    """Calls of relu and its kin, with channels from the layers that produce their inputs.

    Raises: ConversionError: the forward cannot be traced; remedy is an example to run it on.
    """
    tracer = _SiteTracer()
    graph = torch.fx.Graph()
    try:
        if isinstance(model, nn.Sequential) or not type(model).__module__.startswith("torch.nn."):
            with announced_functions(model.modules(), tracer.say):
                graph = tracer.trace(model)
    # Tracing runs the user's forward on placeholders: whatever that raises is the reason why it cannot be traced.
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ConversionError(
            f"gate_network: {type(model).__name__} cannot be traced without an example ({type(error).__name__}: "
            f"{reason}); expected an example input; call gate_network(model, example)"
        ) from error
    modules = dict(model.named_modules())
    channels: dict[torch.fx.Node, _Channels | None] = {}
    invocations: dict[str, tuple[str, list[Call]]] = {}
    for node in graph.nodes:
        channels[node] = _channels_of(node, modules, channels)
        call = _call_of(node, modules, channels)
        scopes = [(key, path) for key, (path, _) in node.meta.get("nn_module_stack", {}).items()]
        if node.op == "call_module":
            scopes = scopes[:-1]
        key, owner = scopes[-1] if scopes else ("", "")
        if call:
            invocations.setdefault(key, (owner, []))[1].append(replace(call, owner=owner))
    log = CallLog()
    for owner, calls in invocations.values():
        log.invocations.setdefault((owner, model.training), []).append(calls)
    for name, module in modules.items():
        # One node in the graph above, with an activation inside.
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            log.invocations.setdefault((name, model.training), []).extend(_transformer_calls(name, module))
    return log


def _transformer_calls(name: str, layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> list[list[Call]]:
    activation: Any = layer.activation
    kind = held_function(activation)
    if type(activation) in CONVERTIBLE:
        call = _module_call(activation, f"{name}.activation".lstrip("."))
    elif kind is not None and kind[0] == "convertible":
        call = Call(kind=kind[0], label=kind[1], function="relu", owner=name, attribute="activation")
    else:
        return []
    hidden = layer.linear1
    return [[replace(call, owner=name, channels=hidden.out_features, dim=-1, like=hidden.weight.detach().new_empty(0))]]


def _module_call(module: nn.Module, name: str) -> Call:
    slope: float | Tensor = 0.0
    if isinstance(module, nn.LeakyReLU):
        slope = module.negative_slope
    elif isinstance(module, nn.PReLU):
        slope = module.weight.detach().clone()
    return Call(
        kind="convertible",
        label=type(module).__name__,
        function=CONVERTIBLE[type(module)],
        owner="",
        module=name,
        slope=slope,
    )


def _call_of(
    node: torch.fx.Node, modules: dict[str, nn.Module], channels: dict[torch.fx.Node, _Channels | None]
) -> Call | None:
    call: Call | None = None
    if node.op == "call_module" and type(modules[str(node.target)]) in CONVERTIBLE:
        call = _module_call(modules[str(node.target)], str(node.target))
    elif node.op in ("call_function", "call_method"):
        name = _name(node)
        kind = classify(name)
        if kind and kind[0] == "convertible":
            slope: float | Tensor = 0.0
            if name.startswith("leaky_relu"):
                slope = _number(node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01))
            elif name == "prelu":
                slope = _parameter(node.kwargs.get("weight", node.args[-1]), modules[""]).detach().clone()
            call = Call(
                kind="convertible",
                label=kind[1],
                function=name.removesuffix("_"),
                owner="",
                attribute=node.meta["held_by"],
                slope=slope,
            )
    if call is None:
        return None
    known = channels.get(node.args[0] if node.args else node.kwargs["input"])  # type: ignore[arg-type]
    return call if known is None else replace(call, channels=known[0], dim=known[1], like=known[2])


def _channels_of(
    node: torch.fx.Node, modules: dict[str, nn.Module], channels: dict[torch.fx.Node, _Channels | None]
) -> _Channels | None:
    before = next((found for value in node.all_input_nodes if (found := channels.get(value)) is not None), None)
    if node.op == "call_module":
        return _channels_of_layer(modules[str(node.target)], before)
    if node.op not in ("call_function", "call_method"):
        return None
    name = _name(node)
    if name in ("linear", "conv1d", "conv2d", "conv3d") and len(node.all_input_nodes) > 1:
        weight = _parameter(node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None), modules[""])
        return weight.shape[0], -1 if name == "linear" else 1, weight.new_empty(0)
    kind = classify(name)
    keeps = name in _KEEPING_FUNCTIONS or (kind is not None and kind[1] not in ("GLU", "max-pool"))
    return before if keeps else None


def _channels_of_layer(layer: nn.Module, before: _Channels | None) -> _Channels | None:
    weight = getattr(layer, "weight", None)
    like = weight.new_empty(0) if isinstance(weight, Tensor) else torch.empty(0)
    if isinstance(layer, nn.Linear | nn.Bilinear):
        return layer.out_features, -1, like
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.out_channels, 1, like
    if isinstance(layer, nn.modules.batchnorm._NormBase):
        return layer.num_features, 1, like
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels, 1, like
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return int(layer.normalized_shape[-1]), -1, like
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, -1, like
    return before if isinstance(layer, _KEEPS_CHANNELS) else None


def _name(node: torch.fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _number(value: Any) -> float:
    if isinstance(value, int | float):
        return float(value)
    raise ConversionError(
        "gate_network: a leaky_relu computes its slope; expected a number, or an example to run the network on; call "
        "gate_network(model, example)"
    )


def _parameter(value: Any, model: nn.Module) -> Tensor:
    if not isinstance(value, torch.fx.Node) or value.op != "get_attr":
        raise ConversionError(
            "gate_network: a functional layer computes its weight; expected a parameter, or an example to run the "
            "network on; call gate_network(model, example)"
        )
    owner, _, name = str(value.target).rpartition(".")
    found: Tensor = getattr(model.get_submodule(owner), name)
    return found
