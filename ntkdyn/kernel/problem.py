"""What an engine is given: the clone, the wanted parameters, the inputs; and how the clone is run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from ..errors import ConfigurationError, ShapeError, UnsupportedLayer
from .precision import exact_products
from .reduction import Reduction, directions

Forward = Callable[[nn.Module, Any], Tensor]

ROOT = "<root>"
_FOREIGN = (
    "the outputs do not depend on the model's parameters; forward must call the model that it is given, with "
    "gradients enabled"
)


@dataclass(kw_only=True)
class Problem:
    """One kernel to compute.

    Attributes:
        model: structural clone; engines may do with it what they like.
        parameters: wanted leaves of the clone by dotted name.
        keys: name of a parameter -> name of the block that its contribution is added to.
        scales: metric s of the parameters that have one: a number, or a tensor of the parameter's shape.
        inputs, inputs_2: pytrees; inputs_2 is None for the symmetric kernel.
        sizes: numbers of samples (N1, N2).
        forward: forward(model, inputs) -> outputs.
        reduce: what is wanted of the outputs.
        dtype: precision of the blocks; result_dtype: what they are rounded to at the end.
        cast_inputs: floating inputs are brought to dtype as well.
        train_mode: names of layers that may run in training mode.
        max_memory: bytes, or None.
        outputs: number of outputs C; known after the first run.
        channels_last: images go through the network with their channels innermost in memory.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    keys: Mapping[str, str]
    scales: Mapping[str, float | Tensor]
    inputs: Any
    inputs_2: Any
    sizes: tuple[int, int]
    forward: Forward
    reduce: Reduction
    dtype: torch.dtype
    result_dtype: torch.dtype
    cast_inputs: bool
    train_mode: frozenset[str]
    max_memory: int | None
    outputs: int = field(default=0, init=False)
    channels_last: bool = field(default=False, init=False)
    running: list[str] = field(default_factory=list, init=False)

    @property
    def layer(self) -> str:
        """Dotted name of the module that runs just now."""
        return (self.running[-1] if self.running else "") or ROOT

    @property
    def combine(self) -> Literal["trace", "each", "full"]:
        """How the directions of the outputs are combined: summed, each by itself, or in all pairs."""
        return self.reduce if self.reduce in ("each", "full") else "trace"

    def directions(self, outputs: Tensor) -> Tensor | None:
        """Directions [K, C] in output space that the kernel is taken along; None stands for the C unit vectors."""
        return directions(self.reduce, self.outputs, outputs)

    def run(self, side: int, *modes: TorchFunctionMode, samples: slice = slice(None)) -> Tensor:
        """Outputs [N, C] of one side, or of some of its samples, with their graph; modes watch the calls."""
        inputs = self.inputs if side == 0 else self.inputs_2
        # Copies, because a network whose first layer works in place would otherwise change the caller's tensors.
        copies = tree_map_only(Tensor, lambda tensor: self._copy(tensor[samples]), inputs)
        with torch.enable_grad(), _same_random_numbers(self.model), ExitStack() as stack:
            for handle in self._name_running_layers():
                stack.callback(handle.remove)
            stack.callback(self.running.clear)
            for mode in (RefuseCoupling(self), *modes):
                stack.enter_context(mode)
            return self._flat(self.forward(self.model, copies), len(range(self.sizes[side])[samples]))

    def _name_running_layers(self) -> Iterator[RemovableHandle]:
        for name, module in self.model.named_modules():

            def enter(_: nn.Module, __: Any, name: str = name) -> None:
                self.running.append(name)

            def leave(*_: Any) -> None:
                self.running.pop()

            yield module.register_forward_pre_hook(enter)
            yield module.register_forward_hook(leave)

    def _copy(self, tensor: Tensor) -> Tensor:
        copy = tensor.detach().clone()
        if self.channels_last and copy.dim() == 4:
            copy = copy.contiguous(memory_format=torch.channels_last)
        return copy.to(self.dtype) if self.cast_inputs and copy.is_floating_point() else copy

    def refuse_foreign_outputs(self, outputs: Tensor) -> None:
        """Raise ConfigurationError where the outputs come from another network than the one to differentiate."""
        found = gradients(outputs, list(self.model.parameters()), torch.ones_like(outputs))
        if all(gradient is None for gradient in found):
            raise ConfigurationError(_FOREIGN)

    def _flat(self, outputs: Any, size: int) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise ShapeError(
                f"the forward pass returned {type(outputs).__name__}; expected a tensor [N, ...] or an object with "
                f".logits; give forward=lambda model, inputs: ..."
            )
        if not outputs.is_floating_point():
            raise ShapeError(f"the outputs have dtype {outputs.dtype}; expected real floating outputs")
        if outputs.dim() == 0 or outputs.shape[0] != size or outputs.numel() == 0:
            raise ShapeError(f"the outputs have shape {tuple(outputs.shape)}; expected {size} samples on axis 0")
        if not outputs.requires_grad:
            raise ConfigurationError(_FOREIGN)
        # Not reshaped where nothing changes: the last layer is recognized by the identity of the outputs.
        flat = outputs if outputs.dim() == 2 else outputs.reshape(size, -1)
        if self.outputs and flat.shape[1] != self.outputs:
            raise ShapeError(f"x1 gives {self.outputs} outputs a sample, x2 gives {flat.shape[1]}; expected the same")
        self.outputs = flat.shape[1]
        return flat


def layer_of(name: str) -> str:
    """Dotted name of the layer that owns a parameter."""
    return name.rpartition(".")[0] or ROOT


def default_forward(model: nn.Module, inputs: Any) -> Tensor:
    """Outputs of model(inputs): the tensor itself, or its .logits.

    A mapping whose keys are names of arguments of the model is handed over by name, and a tuple or list by position
    where the model requires several arguments.
    """
    if isinstance(inputs, Mapping) and _accepts_by_name(model, inputs):
        outputs = model(**inputs)
    elif isinstance(inputs, tuple | list) and _required(model) > 1:
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    # Problem.run refuses what is no tensor.
    return outputs if isinstance(outputs, Tensor) else cast(Tensor, getattr(outputs, "logits", outputs))


def _accepts_by_name(model: nn.Module, inputs: Mapping[Any, Any]) -> bool:
    try:
        inspect.signature(type(model).forward).bind(model, **inputs)
    except TypeError:
        return False
    return True


def _required(model: nn.Module) -> int:
    """Number of positional arguments without a default, besides self."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    arguments = list(inspect.signature(type(model).forward).parameters.values())[1:]
    return sum(one.kind in positional and one.default is inspect.Parameter.empty for one in arguments)


def sample_count(inputs: Any, name: str) -> int:
    """Samples on axis 0 of every tensor of a pytree."""
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if not shapes:
        raise ShapeError(f"{name} holds no tensor; expected a tensor, or a pytree of tensors, with samples on axis 0")
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) > 1 or 0 in sizes:
        found = ", ".join(map(str, shapes))
        raise ShapeError(
            f"{name} has tensors of shape {found}; expected the same number of samples, at least 1, on axis 0"
        )
    return sizes.pop()


def refuse_coupled_layers(model: nn.Module, allowed: frozenset[str]) -> None:
    """Raise UnsupportedLayer for a layer whose output is random, or depends on the other samples."""
    for name, module in model.named_modules():
        if name in allowed:
            continue
        reason = ""
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            reason = "normalizes by the statistics of the batch"
        elif module.training and isinstance(module, _DropoutNd | nn.RReLU) and getattr(module, "p", 1.0) > 0:
            reason = "is random"
        elif module.training and isinstance(module, nn.RNNBase | nn.MultiheadAttention) and module.dropout > 0:
            reason = "drops units at random"
        if reason:
            raise UnsupportedLayer(coupled_message(name, type(module).__name__, reason))


def coupled_message(name: str, kind: str, reason: str) -> str:
    """The one line with which a layer in training mode is refused."""
    return (
        f"layer {name or ROOT!r} ({kind}) {reason}; the kernel needs one function of each sample; "
        f"call model.eval() first, or allow it by train_mode=[{name!r}]"
    )


# Functions that are random, or couple samples, where an argument says so: its position, its name, its default.
_SWITCHES: Mapping[Any, tuple[int, str, bool]] = {
    functional.dropout: (2, "training", True),
    functional.dropout1d: (2, "training", True),
    functional.dropout2d: (2, "training", True),
    functional.dropout3d: (2, "training", True),
    functional.alpha_dropout: (2, "training", False),
    functional.feature_alpha_dropout: (2, "training", False),
    torch.dropout: (2, "train", False),
    functional.rrelu: (3, "training", False),
    functional.scaled_dot_product_attention: (4, "dropout_p", False),
    functional.batch_norm: (5, "training", False),
}


class RefuseCoupling(TorchFunctionMode):
    """Raise UnsupportedLayer at a functional call that is random or couples samples, by the layer that makes it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self._problem = problem

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        switch = _SWITCHES.get(func)
        layer = (self._problem.running or [""])[-1]
        if switch is not None and layer not in self._problem.train_mode:
            position, flag, default = switch
            name = func.__name__
            active = kwargs.get(flag, args[position] if len(args) > position else default)
            harmless = "dropout" in name and kwargs.get("p", args[1] if len(args) > 1 else 0.5) == 0
            if active and not harmless:
                reason = "normalizes by the statistics of the batch" if name == "batch_norm" else "is random"
                raise UnsupportedLayer(coupled_message(layer, name, reason))
        return func(*args, **kwargs)


def gradients(outputs: Tensor, inputs: Sequence[Tensor | GradientEdge], seed: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of Σ seed · outputs; None where the outputs do not depend on an input; the graph stays."""
    try:
        # The annotation of torch knows either tensors or edges, the function takes both.
        return torch.autograd.grad(outputs, inputs, seed, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise UnsupportedLayer(
            "the network changes in place what its own backward pass needs, so that it has no gradient; "
            "remove the in-place operation that torch.autograd.set_detect_anomaly(True) points to"
        ) from error


def plain_autograd(model: nn.Module) -> ExitStack:
    """Whatever the caller has switched on: no gradients, no inference mode, no autocast, no rounded products."""
    stack = ExitStack()
    stack.enter_context(exact_products())
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    stack.enter_context(torch.autocast(_device(model).type, enabled=False))
    return stack


@contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    # Every run starts from the caller's random state and leaves it as it was.
    device = _device(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
