"""Gates: ReLUs whose negative side has a trainable slope, and how many of them are still nonlinear."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.fx
from torch import Tensor, nn

from .call_sites import ALWAYS_ACTIVE, UNCOUNTED, record_calls, untouched_generators
from .call_sites import ROOT as ROOT
from .clone import structural_clone
from .errors import ConfigurationError, ShapeError

Granularity = Literal["channel", "layer"]


def _apply_gate(inputs: Tensor, slope: Tensor, frozen: Tensor, dim: int, channels: int) -> Tensor:
    # A sample without a batch axis has its channels in the only axis it has.
    axis = dim if inputs.dim() > 1 else -1
    axis = axis + inputs.dim() if axis < 0 else axis
    if not 0 <= axis < inputs.dim() or inputs.shape[axis] != channels:
        raise ShapeError(
            f"Gate({channels}, dim={dim}) got an input of shape {tuple(inputs.shape)}; expected size {channels} on "
            f"axis {dim}; give the Gate the channel axis of its input"
        )
    # Frozen channels are linear whatever an optimizer, its momentum or weight decay writes into the slope.
    effective = torch.where(frozen, 1.0, slope).to(inputs.dtype)
    effective = effective.view(-1, *[1] * (inputs.dim() - 1 - axis))
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if tracing or torch.compiler.is_compiling() or _transforming() or _wrapped(inputs) or _wrapped(effective):
        # Compilers and torch.jit take no Function with a jvp, transforms none without setup_context.
        # Not torch.where: slower, and not bitwise ReLU at -0.0.
        return torch.addcmul(torch.relu(inputs), inputs.clamp_max(0), effective)
    result: Tensor = _Sloped.apply(inputs, effective)  # type: ignore[no-untyped-call]
    return result


def _transforming() -> bool:
    """Whether a transform of torch.func runs, also where it does not look at the tensors at hand."""
    return bool(torch._C._are_functorch_transforms_active())


def _wrapped(tensor: Tensor) -> bool:
    """Whether a transform of torch.func, or autograd.grad(is_grads_batched=True), looks at the tensor."""
    functorch = torch._C._functorch
    return bool(functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor))


class _Sloped(torch.autograd.Function):
    """relu(x) + a * clamp_max(x, 0), bit for bit, with a derivative that allocates less.

    Training the activation alone on 32 x 64 x 32 x 32 numbers takes 0.5 to 0.6 times as long as nn.PReLU, and 1.3 to
    1.7 times with the derivative that autograd puts together (tests/benchmarks/gate.py).
    Not torch.prelu: its second derivatives and its forward mode take 1 for the slope at exactly 0, and under
    vmap(jacrev) it is silently wrong when samples == outputs (torch 2.13; test_derivatives_where_prelu_is_wrong).
    """

    # Without setup_context, for which torch looks at the signature at each call: that took as long as a layer of 64.
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, slope)
        ctx.save_for_forward(inputs, slope)
        return torch.relu(inputs).addcmul_(inputs.clamp_max(0), slope)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        inputs, slope = ctx.saved_tensors
        # In place where nobody differentiates, vectorizes or compiles this function in turn.
        plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or _wrapped(upstream))
        of_inputs = of_slope = None
        if ctx.needs_input_grad[1]:
            negative = inputs.clamp_max(0)
            of_slope = (negative.mul_(upstream) if plain else negative * upstream).sum_to_size(slope.shape)
        if ctx.needs_input_grad[0]:
            of_inputs = _backward_in_place(upstream, inputs, slope) if plain else _derivative(inputs, slope) * upstream
        return of_inputs, of_slope

    @staticmethod
    def jvp(ctx: Any, of_inputs: Tensor, of_slope: Tensor) -> Tensor:
        inputs, slope = ctx.saved_tensors
        result: Tensor = _derivative(inputs, slope) * of_inputs + inputs.clamp_max(0) * of_slope
        return result


def _derivative(inputs: Tensor, slope: Tensor) -> Tensor:
    # Derivative at exactly 0 is the slope, as in PReLU and, for slope 0, ReLU; see test_derivative_at_zero.
    # Not torch.where, which takes 7 times as long (torch 2.13, one CPU thread); at weights 0 and 1 lerp gives its ends.
    return torch.lerp(slope.new_ones(()), slope, (inputs <= 0).to(slope.dtype))


def _backward_in_place(upstream: Tensor, inputs: Tensor, slope: Tensor) -> Tensor:
    # The same numbers as by _derivative: one of the two terms is 0. It takes half as long on 128 x 64 numbers.
    positive = torch.ops.aten.threshold_backward(upstream, inputs, 0)
    result: Tensor = positive.addcmul_(upstream - positive, slope)
    return result


# One node in a traced graph: the axis arithmetic above needs the number of dimensions, which tracing does not know.
torch.fx.wrap("_apply_gate")


class Gate(nn.Module):
    """Unit that is a ReLU at slope 0 and linear at slope 1, with one slope per channel or per layer.

    y = relu(x) + a * min(x, 0),  a = 1 where frozen, else the slope;  dy/da = min(x, 0);
    dy/dx = 1 for x > 0 and a for x <= 0 (at exactly 0 the slope, as in PReLU).
    Slope 0 equals ReLU and slope 1 the identity bit for bit, with one exception: at x = -inf and slope 0 the result
    is NaN (0 * inf), as it is for PReLU.

    Args:
        channels: size of the channel axis; the number of units that the gate counts.
        slope: initial slope, a number or a tensor [channels].
        dim: channel axis of the input; an input with one axis is a single sample and has its channels there.
        granularity: "channel": slope and frozen are [channels]; "layer": one slope for all channels, both are [1].

    The buffer `frozen` [channels or 1] is part of the state dict. A state dict that lacks `slope` or `frozen` loads,
    also strictly, and leaves them as they are; the `weight` of an nn.PReLU loads into the slope.

    Raises:
        ConfigurationError: channels below 1, an unknown granularity, a slope of another shape.
        ShapeError: an input whose channel axis has another size.
    Source: He et al. 2015 (arXiv 1502.01852) for the form; Mehmeti-Göpel and Disselhoff 2023 (arXiv 2211.17180).

    >>> Gate(2, slope=0.25)(torch.tensor([[-4.0, 4.0]])).detach()
    tensor([[-1.,  4.]])
    """

    frozen: Tensor

    def __init__(
        self, channels: int, slope: float | Tensor = 0.0, dim: int = 1, *, granularity: Granularity = "channel"
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ConfigurationError(f"Gate: channels is {channels}; expected at least 1")
        if granularity not in ("channel", "layer"):
            raise ConfigurationError(f"Gate: granularity is {granularity!r}; expected 'channel' or 'layer'")
        self.channels = channels
        self.dim = dim
        self.granularity = granularity
        size = channels if granularity == "channel" else 1
        start = slope.detach() if isinstance(slope, Tensor) else torch.tensor(float(slope))
        if start.dim() > 1 or start.numel() not in (1, size):
            raise ConfigurationError(f"Gate: slope has shape {tuple(start.shape)}; expected a number or [{size}]")
        if not start.is_floating_point():
            start = start.to(torch.get_default_dtype())
        self.slope = nn.Parameter(start.reshape(-1).expand(size).clone())
        self.register_buffer("frozen", torch.zeros(size, dtype=torch.bool, device=start.device))

    @property
    def effective_slope(self) -> Tensor:
        """Slopes that the forward pass uses, [channels] or [1]: 1 where frozen."""
        return torch.where(self.frozen, 1.0, self.slope)

    @property
    def units_per_slope(self) -> int:
        """Number of units that share one slope: 1, or all channels of a layer-wise gate."""
        return 1 if self.granularity == "channel" else self.channels

    def freeze(self, mask: Tensor | None = None) -> None:
        """Make the channels in mask (bool [channels] or [1]; default all) linear for good."""
        with torch.no_grad():
            self.frozen |= torch.ones_like(self.frozen) if mask is None else mask.to(self.frozen.device)
            self.slope[self.frozen] = 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        return _apply_gate(inputs, self.slope, self.frozen, self.dim, self.channels)

    def extra_repr(self) -> str:
        layer = ", granularity='layer'" if self.granularity == "layer" else ""
        return f"{self.channels}, dim={self.dim}{layer}"

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Networks saved before they were gated: a ReLU has no keys, a PReLU has `weight` with 1 or `channels` values.
        if prefix + "weight" in state_dict and prefix + "slope" not in state_dict:
            weight = state_dict.pop(prefix + "weight")
            fits = weight.dim() <= 1 and weight.numel() in (1, self.slope.numel())
            state_dict[prefix + "slope"] = weight.reshape(-1).expand(self.slope.numel()) if fits else weight
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        own = {prefix + "slope", prefix + "frozen"}
        missing_keys += [key for key in missing if key not in own]


def gates(model: nn.Module) -> dict[str, Gate]:
    """Gates of a network by dotted name, in module order; a network that is a Gate itself is named "<root>"."""
    return {name or ROOT: module for name, module in model.named_modules() if isinstance(module, Gate)}


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a network that are no slopes of its gates, by dotted name."""
    of_gates = {id(gate.slope) for gate in gates(model).values()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in of_gates}


def learn_slopes(model: nn.Module, learn: bool) -> None:
    """Let the loss reach the slopes, or not: gradients of slopes that do not learn would only cost time."""
    for gate in gates(model).values():
        gate.slope.requires_grad_(learn)


def slopes(model: nn.Module) -> dict[str, Tensor]:
    """Effective slopes [channels] (layer-wise: [1]) of every gate by dotted name, detached copies; 1 where frozen."""
    return {name: gate.effective_slope.detach().clone() for name, gate in gates(model).items()}


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """Frozen channels, bool [channels] (layer-wise: [1]), of every gate by dotted name; copies."""
    return {name: gate.frozen.clone() for name, gate in gates(model).items()}


def _gates_of(model: nn.Module, caller: str) -> dict[str, Gate]:
    found = gates(model)
    if not found:
        raise ConfigurationError(
            f"{caller}: {type(model).__name__} has no Gate; expected at least one; "
            "call ntkdyn.gate_network(model) first"
        )
    return found


def slope_penalty(model: nn.Module, exponent: float = 0.5, *, tolerance: float = 0.01) -> Tensor:
    """Price of nonlinearity  P = sum_i |1 - a_i|^exponent  over all slopes that are not frozen; scalar, dimensionless.

    The gradient is that of the formula down to |1 - a| = tolerance and keeps its value there below it (5 for the
    default exponent: the formula's own grows without bound), 0 at exactly a = 1. A plain sum: not divided by the
    number of units. A layer-wise gate has one slope and so one term.

    Raises: ConfigurationError: no gates, or exponent or tolerance not positive.
    Source: Mehmeti-Göpel and Disselhoff 2023 (arXiv 2211.17180).
    """
    if exponent <= 0 or tolerance <= 0:
        raise ConfigurationError(
            f"slope_penalty: exponent is {exponent} and tolerance {tolerance}; expected positive numbers"
        )
    found = list(_gates_of(model, "slope_penalty").values())
    total = found[0].slope.new_zeros(())
    for gate in found:
        distance = (1 - gate.slope).abs()
        far = distance.clamp_min(tolerance) ** exponent
        if exponent < 1:
            steepest = exponent * tolerance ** (exponent - 1)
            # The value of the formula, the gradient of a line.
            near = distance.detach() ** exponent + steepest * (distance - distance.detach())
        else:
            near = distance**exponent
        price = torch.where(distance < tolerance, near, far)
        total = total + torch.where(gate.frozen, 0.0, price).sum().to(total.device)
    return total


def freeze_linear(model: nn.Module, tolerance: float = 0.01) -> int:
    """Freeze at exactly 1 every slope with |1 - a| < tolerance; returns the number of units newly frozen.

    A frozen unit stays linear for good, so the number of active units never grows.

    Raises: ConfigurationError: no gates, or tolerance not positive.
    """
    if tolerance <= 0:
        raise ConfigurationError(f"freeze_linear: tolerance is {tolerance}; expected a positive number")
    count = 0
    for gate in _gates_of(model, "freeze_linear").values():
        newly = ~gate.frozen & ((1 - gate.slope.detach()).abs() < tolerance)
        gate.freeze(newly)
        count += int(newly.sum()) * gate.units_per_slope
    return count


@dataclass(frozen=True)
class UnitCounts:
    """Nonlinear units of a gated network; all counts are numbers of channels.

    active: gate -> units that are not frozen.  total: gate -> all units.
    weighted: gate -> sum of |1 - slope| over units that are not frozen.
    always_active: dotted name -> kind of every nonlinearity that is no gate.  uncounted: max-pooling and softmax.
    """

    active: Mapping[str, int]
    total: Mapping[str, int]
    weighted: Mapping[str, float]
    always_active: Mapping[str, str]
    uncounted: Mapping[str, str]

    @property
    def active_total(self) -> int:
        """Units that are not frozen, over all gates."""
        return sum(self.active.values())

    @property
    def total_total(self) -> int:
        """Units of all gates."""
        return sum(self.total.values())

    @property
    def weighted_total(self) -> float:
        """Sum of |1 - slope| over the units of all gates that are not frozen."""
        return sum(self.weighted.values())

    @property
    def active_share(self) -> float:
        """Share of the units that are not frozen, in [0, 1]; NaN without gates."""
        return self.active_total / self.total_total if self.total else float("nan")


def nonlinear_units(model: nn.Module, example: Any = None) -> UnitCounts:
    """Count the units that are still nonlinear, and list what is nonlinear but no gate.

    A unit is active if and only if it is not frozen, however close to 1 its slope is; a layer-wise gate counts all
    its channels. GELU, SiLU, tanh, an un-gated ReLU and the like are listed as always active, max-pooling and softmax
    as uncounted: modules by their dotted name; functions, which are found only by running a clone of the network on
    an example (as in gate_network), by their caller's name and their own, "block.gelu"; so are clamp, clip, clamp_min
    and maximum at 0, which are ReLUs in other words.
    """
    active: dict[str, int] = {}
    total: dict[str, int] = {}
    weighted: dict[str, float] = {}
    for name, gate in gates(model).items():
        open_units = ~gate.frozen
        active[name] = int(open_units.sum()) * gate.units_per_slope
        total[name] = gate.channels
        distance = (1 - gate.slope.detach()).abs().double()
        weighted[name] = float(distance[open_units].sum()) * gate.units_per_slope
    always_active: dict[str, str] = {}
    uncounted: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, ALWAYS_ACTIVE):
            always_active[name or ROOT] = type(module).__name__
        elif isinstance(module, UNCOUNTED):
            uncounted[name or ROOT] = type(module).__name__
    if example is not None:
        studied = structural_clone(model)
        with untouched_generators(model):
            log = record_calls(studied, example, opaque=(Gate,))
        for (owner, _), lists in log.invocations.items():
            seen: Counter[str] = Counter()
            # A forward that runs several times has the same call sites each time.
            for call in max(lists, key=len):
                if call.module is None:
                    base = ".".join(part for part in (owner, call.attribute or call.function) if part)
                    name = f"{base}_{seen[base]}" if seen[base] else base
                    seen[base] += 1
                    (uncounted if call.kind == "uncounted" else always_active)[name] = call.label
    return UnitCounts(active, total, weighted, always_active, uncounted)
