"""Where a network calls its nonlinearities: found by running it once on an example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

ROOT = "<root>"
PLAIN_TYPES = (type(None), bool, int, float, str)

Kind = Literal["convertible", "always_active", "uncounted"]

CONVERTIBLE: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.PReLU: "prelu"}
# Nonlinear at all times, so never linearized: listed beside the counts instead of being lost.
ALWAYS_ACTIVE: tuple[type[nn.Module], ...] = (
    nn.CELU, nn.ELU, nn.GELU, nn.GLU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.PReLU, nn.ReLU, nn.RReLU, nn.RNNBase, nn.RNNCellBase, nn.SELU, nn.SiLU, nn.Sigmoid,
    nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
# Nonlinear, but made of no units that could be counted.
UNCOUNTED: tuple[type[nn.Module], ...] = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, nn.LPPool1d, nn.LPPool2d, nn.LPPool3d, nn.LogSoftmax,
    nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.Softmin,
)  # fmt: skip

# By name: torch.relu, Tensor.relu and F.relu are three objects, and an in-place variant ends in "_".
_FUNCTIONS: dict[str, tuple[Kind, str]] = {
    **{name: ("convertible", label) for name, label in (("relu", "ReLU"), ("leaky_relu", "LeakyReLU"),
                                                        ("prelu", "PReLU"))},
    **{name: ("always_active", label) for name, label in (
        ("celu", "CELU"), ("elu", "ELU"), ("gelu", "GELU"), ("glu", "GLU"), ("hardshrink", "Hardshrink"),
        ("hardsigmoid", "Hardsigmoid"), ("hardswish", "Hardswish"), ("hardtanh", "Hardtanh"),
        ("log_sigmoid", "LogSigmoid"), ("logsigmoid", "LogSigmoid"), ("mish", "Mish"), ("relu6", "ReLU6"),
        ("rrelu", "RReLU"), ("selu", "SELU"), ("silu", "SiLU"), ("sigmoid", "Sigmoid"), ("softplus", "Softplus"),
        ("softshrink", "Softshrink"), ("softsign", "Softsign"), ("tanh", "Tanh"), ("tanhshrink", "Tanhshrink"),
        ("special_expit", "Sigmoid"), ("threshold", "Threshold"), ("_threshold", "Threshold"))},
    **dict.fromkeys((
        "softmax", "log_softmax", "softmin", "gumbel_softmax", "scaled_dot_product_attention",
        "multi_head_attention_forward"), ("uncounted", "softmax")),
    **dict.fromkeys((
        "max_pool1d", "max_pool2d", "max_pool3d", "max_pool1d_with_indices", "max_pool2d_with_indices",
        "max_pool3d_with_indices", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
        "fractional_max_pool2d", "fractional_max_pool3d"), ("uncounted", "max-pool")),
    **dict.fromkeys(("lp_pool1d", "lp_pool2d", "lp_pool3d"), ("uncounted", "power-average pool")),
}  # fmt: skip
# Functions that are a ReLU for some arguments, and what their arguments mean; see `rectifies`.
_BOUNDS = {
    "clamp": ("input", "min", "max"), "clip": ("input", "min", "max"), "clamp_min": ("input", "min"),
    "maximum": ("input", "other"),
}  # fmt: skip
# Axis of the channels in the output, from the end, for functions that make new channels.
_CHANNELS_LAST = frozenset(
    ("linear", "bilinear", "layer_norm", "rms_norm", "embedding", "embedding_bag", "matmul", "__matmul__",
     "__rmatmul__", "mm", "addmm", "scaled_dot_product_attention", "multi_head_attention_forward")
)  # fmt: skip
_CHANNELS_SECOND = frozenset(("batch_norm", "instance_norm", "group_norm"))


def classify(name: str) -> tuple[Kind, str] | None:
    """Kind and label of a function by its name, None if it is no nonlinearity; "relu_" counts as "relu"."""
    return _FUNCTIONS.get(name) or _FUNCTIONS.get(name.removesuffix("_"))


def rectifies(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is a ReLU in other words: clamp, clip or clamp_min at 0 without an upper end, maximum with 0."""
    given = dict(zip(_BOUNDS.get(name.removesuffix("_"), ()), args, strict=False)) | dict(kwargs)
    if given.get("max") is not None or not any(value.is_floating_point() for value in _tensors(given.values())):
        return False
    bounds = [given.get("min")] if name != "maximum" else [given.get("input"), given.get("other")]
    return any(
        bool((bound.detach() == 0).all()) if isinstance(bound, Tensor) else bound is not None and bound == 0
        for bound in bounds
    )


@dataclass(frozen=True)
class Call:
    """One call of a nonlinearity, as its owner, the module whose forward makes it, sees it.

    function: "relu", "gelu", ...  module: dotted name of the activation module, None for a function.
    attribute: name of the owner's plain attribute that held the function, None otherwise.
    channels and dim: size and axis of the channels, None where the producing layer does not tell.
    """

    kind: Kind
    label: str
    function: str
    owner: str
    module: str | None = None
    attribute: str | None = None
    slope: float | Tensor = 0.0
    channels: int | None = None
    dim: int | None = None
    like: Tensor | None = None

    @property
    def site(self) -> str:
        """Where it is, for messages: 'block.act (ReLU)', 'relu in forward of block'."""
        if self.module is not None:
            return f"{self.module!r} ({self.label})"
        return f"{self.attribute or self.function!r} in forward of {self.owner or ROOT!r}"


@dataclass
class CallLog:
    """Calls of every module, one list per call of its forward, apart for training and evaluation mode."""

    invocations: dict[tuple[str, bool], list[list[Call]]] = field(default_factory=dict)
    # Arguments of each forward that are no tensors, by name; Ellipsis for those that are not plain values.
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)

    def calls(self) -> Iterator[Call]:
        """Every call, in no particular order."""
        for lists in self.invocations.values():
            for calls in lists:
                yield from calls


def run(model: nn.Module, example: Any) -> Any:
    """Output of the network: a tuple or list gives positional arguments, a mapping keyword arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple | list) else model(example)


@contextmanager
def untouched_generators(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Random numbers inside start from the seed; the generators outside are as before."""
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    cuda = sorted(device.index or 0 for device in devices if device.type == "cuda")
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield


def gate_dim(axis: int, ndim: int) -> int:
    """Channel axis as a Gate names it: 1 after the batch axis, else counted from the end."""
    if axis == 1 and (ndim != 3 or axis != ndim - 1):
        return 1
    return axis - ndim


@dataclass
class _Frame:
    name: str
    training: bool
    activation: bool
    opaque: bool
    calls: list[Call] = field(default_factory=list)
    attribute: str | None = None


class _CallRecorder(TorchFunctionMode):
    """Sees every call of a torch function, and follows the channel axis of every tensor."""

    def __init__(self, log: CallLog) -> None:
        super().__init__()
        self.log = log
        self.stack: list[_Frame] = []
        # Typed here: the class of torch has no types.
        self.axes: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()

    def enter(self, frame: _Frame) -> None:
        self.stack.append(frame)

    def say(self, attribute: str | None) -> None:
        """Name of the plain attribute whose function is running now."""
        self.stack[-1].attribute = attribute

    def leave(self) -> None:
        frame = self.stack.pop()
        if not frame.opaque and (not frame.activation or not self.stack):
            self.log.invocations.setdefault((frame.name, frame.training), []).append(frame.calls)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        inputs = [value for value in _tensors([*args, *kwargs.values()]) if value.dim()]
        before = [(value, tuple(value.shape), tuple(value.stride())) for value in inputs if _plain(value)]
        found = classify(name)
        if found is None and name.removesuffix("_") in _BOUNDS and rectifies(name, args, kwargs):
            # Listed and not converted: the same call guards divisions and square roots.
            found = ("always_active", f"{name.removesuffix('_')} at 0")
        if found and self.stack and before:
            self._note(found, name.removesuffix("_"), args, kwargs, before[0][0])
        outputs = func(*args, **kwargs)
        for output in _tensors([outputs]):
            axis = self._axis_after(name, before, output) if output.dim() and _plain(output) else None
            if axis is not None:
                self.axes[output] = axis
        return outputs

    def _note(
        self, found: tuple[Kind, str], name: str, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
    ) -> None:
        top = self.stack[-1]
        if top.opaque:
            return
        owner = self.stack[-2] if top.activation and len(self.stack) > 1 else top
        module = top.name if top.activation else None
        axis = self.axes.get(value)
        if axis is None or axis >= value.dim():
            axis = {1: 0, 2: 1, 4: 1, 5: 1}.get(value.dim())
        slope: float | Tensor = 0.0
        if name == "leaky_relu":
            slope = float(kwargs.get("negative_slope", args[1] if len(args) > 1 else 0.01))
        elif name == "prelu":
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            slope = weight.detach().clone()
        owner.calls.append(
            Call(
                kind=found[0],
                label=found[1],
                function=name,
                owner=owner.name,
                module=module,
                attribute=top.attribute,
                slope=slope,
                channels=None if axis is None else value.shape[axis],
                dim=None if axis is None else gate_dim(axis, value.dim()),
                like=torch.empty(0, dtype=value.dtype, device=value.device),
            )
        )

    def _axis_after(
        self, name: str, before: list[tuple[Tensor, tuple[int, ...], tuple[int, ...]]], output: Tensor
    ) -> int | None:
        if name in _CHANNELS_LAST:
            return output.dim() - 1
        if name in _CHANNELS_SECOND:
            return 1 if output.dim() > 1 else None
        if name.startswith("conv") and name[-1] == "d":
            return output.dim() - int(name[-2]) - 1
        for value, shape, stride in before:
            axis = self.axes.get(value)
            if axis is None:
                continue
            if tuple(output.shape) == shape and (tuple(output.stride()) == stride or not output._is_view()):
                return axis
            if output._is_view() and tuple(output.stride()) != stride:
                # transpose, permute, flatten, reshape: the axis that walks the memory as the channels did.
                walks = (shape[axis], stride[axis])
                same = [new for new in range(output.dim()) if (output.shape[new], output.stride(new)) == walks]
                if len(same) == 1:
                    return same[0]
                continue
            if output.dim() == len(shape) and tuple(output.stride()) == stride and output._is_view():
                return axis
            if output.dim() == len(shape) and output.shape[axis] == shape[axis]:
                return axis
        return None


def _plain_arguments(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return {}
    return {name: value if isinstance(value, PLAIN_TYPES) else ... for name, value in bound.items()}


def _plain(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_nested


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


class HeldFunction:
    """Stands in for a function that a module holds as a plain attribute, and says so while it runs."""

    def __init__(self, function: Callable[..., Any], attribute: str, say: Callable[[str | None], None]) -> None:
        self.function, self.attribute, self.say = function, attribute, say

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.say(self.attribute)
        try:
            return self.function(*args, **kwargs)
        finally:
            self.say(None)


@contextmanager
def announced_functions(modules: Iterable[nn.Module], say: Callable[[str | None], None]) -> Iterator[None]:
    """While inside, nonlinear functions that these modules hold as attributes say their attribute's name."""
    with ExitStack() as stack:
        for module in modules:
            for key, value in list(vars(module).items()):
                if held_function(value):
                    vars(module)[key] = HeldFunction(value, key, say)
                    stack.callback(vars(module).__setitem__, key, value)
        yield


def held_function(value: Any) -> tuple[Kind, str] | None:
    """Kind and label of a nonlinear function (or functools.partial of one), None for anything else."""
    function = value.func if isinstance(value, partial) else value
    if isinstance(function, nn.Module | type) or not callable(function):
        return None
    home = getattr(function, "__module__", None) or ""
    foreign = home.split(".")[0] not in ("", "torch") or not hasattr(function, "__name__")
    return None if foreign else classify(function.__name__)


def disable_fast_paths(model: nn.Module) -> None:
    """Make torch.nn's Transformer layers call their activation: their fused evaluation path would not."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def record_calls(model: nn.Module, example: Any, *, opaque: tuple[type[nn.Module], ...] = ()) -> CallLog:
    """Run the network on the example in the mode it is in, and log every call of a nonlinearity.

    The network is changed (hooks, held functions, running statistics): give a clone. Nothing inside modules of the
    opaque types is looked at.
    """
    recorder = _CallRecorder(CallLog())
    disable_fast_paths(model)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            kinds = (*ALWAYS_ACTIVE, *UNCOUNTED)
            frame = partial(_Frame, name, activation=isinstance(module, kinds), opaque=isinstance(module, opaque))

            def enter(
                module: nn.Module, args: Any, kwargs: Any, frame: Callable[..., _Frame] = frame, name: str = name
            ) -> None:
                recorder.enter(frame(training=module.training))
                recorder.log.arguments.setdefault(name, _plain_arguments(module, args, kwargs))

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                recorder.leave()

            stack.callback(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        looked_at = [module for module in model.modules() if not isinstance(module, opaque)]
        stack.enter_context(announced_functions(looked_at, recorder.say))
        stack.enter_context(recorder)
        run(model, example)
    return recorder.log
