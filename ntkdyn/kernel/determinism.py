"""Where two runs of one network part: the layer that is random, or looks at other samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Call:
    """One call of a layer: its first argument and its output, None where they are no tensors."""

    name: str
    kind: str
    inputs: Tensor | None
    outputs: Tensor | None


def differ(first: Tensor, second: Tensor) -> bool:
    """Whether two runs gave other outputs, by more than the rounding of differently blocked matrix products.

    Measured with torch 2.13 on a CPU, ReLU networks of 20 and 50 linear layers or convolutions and 2 to 64 samples: at
    most 2.5e-6 of the largest output in float32, 7.4e-15 in float64. Allowed are 1000 roundings (1.2e-4 and 2.2e-13,
    at most 5 % in half precision), and 1 % for float32 on CUDA, where products may be rounded to TF32. Dropout or
    batch statistics move outputs by percents and more.
    """
    if first.shape != second.shape:
        return True
    if not first.is_floating_point():
        return not torch.equal(first, second)
    rounding = torch.finfo(first.dtype).eps
    least = 0.01 if first.is_cuda and first.dtype == torch.float32 else 0.0
    allowed = max(min(1000 * rounding, 0.05), least)
    finite = first.isfinite() & second.isfinite()
    if not torch.equal(first.isnan(), second.isnan()):
        return True
    scale = first[finite].abs().max() if finite.any() else first.new_zeros(())
    return bool(((first - second)[finite].abs() > allowed * scale).any())


def first_difference(model: nn.Module, once: Callable[[], Any], again: Sequence[Callable[[], Any]]) -> str:
    """The layer, named, whose outputs differ first, in the order in which layers finish: children before parents."""
    expected = _traced(model, once)
    found = [_traced(model, run) for run in again]
    for index, call in enumerate(expected):
        calls = [trace[index] for trace in found if index < len(trace)]
        if len(calls) == len(found) and _moved(call.outputs, [one.outputs for one in calls]):
            # A layer with other inputs is not to blame: a function called between the layers is.
            before = "something before " if _moved(call.inputs, [one.inputs for one in calls]) else ""
            return f"{before}layer {call.name or '<root>'!r} ({call.kind})"
    return f"the forward pass outside the layers of {type(model).__name__}"


def _moved(whole: Tensor | None, parts: Sequence[Tensor | None]) -> bool:
    if whole is None or any(part is None for part in parts):
        return False
    joined = parts[0] if len(parts) == 1 else _concatenated(parts, whole)
    return joined is not None and differ(whole, joined)


def _concatenated(parts: Sequence[Any], whole: Tensor) -> Tensor | None:
    try:
        joined = torch.cat(list(parts))
    except RuntimeError:
        return None
    return joined if joined.shape == whole.shape else None


def _traced(model: nn.Module, run: Callable[[], Any]) -> list[_Call]:
    finished: list[_Call] = []
    entered: list[Tensor | None] = []

    def enter(module: nn.Module, arguments: Any) -> None:
        # Before the call: a layer may work in place.
        entered.append(_copy(arguments[0]) if arguments else None)

    with ExitStack() as stack:
        for name, module in model.named_modules():

            def take(module: nn.Module, arguments: Any, output: Any, name: str = name) -> None:
                finished.append(_Call(name, type(module).__name__, entered.pop(), _copy(output)))

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(take).remove)
        run()
    return finished


def _copy(value: Any) -> Tensor | None:
    return value.detach().clone() if isinstance(value, Tensor) else None
