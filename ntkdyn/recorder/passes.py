"""One probe set at one step: what the recorder computes for probes when they first ask for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import ConfigurationError, ShapeError
from ..gates import gates
from ..kernel import empirical_ntk
from ..kernel.selfcheck import check_ntk
from .snapshots import Forward, ProbeSet, checked_outputs, copied

Loss = Callable[[Tensor, Any], Tensor]
# Samples of a kernel larger than memory that are compared with plain autograd.
_CHECKED_OF_BANDS = 64


class Pass:
    """One probe set at one step: outputs, preactivations, loss and kernels, each computed when first asked for.

    ``model`` is a clone in evaluation mode that probes do not get, so that none can spoil it for the others.

    Args:
        checked: kernels that a self-check has passed, by whatever they depend on; ``state`` stands for the modes and
            the parameters of the network. A kernel that is not among them is checked and entered.

    ``seconds_checking`` are those that self-checks took.
    """

    def __init__(
        self,
        model: nn.Module,
        probe_set: ProbeSet,
        *,
        forward: Forward,
        loss: Loss | None,
        parameters: tuple[str, ...],
        with_preactivations: bool,
        checked: set[Hashable],
        state: Hashable,
    ) -> None:
        self._model = model
        self._set = probe_set
        self._forward = forward
        self._loss = loss
        self._parameters = parameters
        self._checked = checked
        self._state = state
        self.seconds_checking = 0.0
        self._outputs: Tensor | None = None
        self._preactivations: dict[str, Tensor] | None = None
        self._losses: Tensor | None = None
        self._kernels: dict[tuple[Any, str | None], Any] = {}
        # Keeping every gate's input costs memory; asked for once, it is taken along with the outputs from then on.
        self.with_preactivations = with_preactivations

    def outputs(self) -> Tensor:
        """Outputs [N, ...] without gradient.

        Raises: ShapeError: no tensor with the samples on axis 0.
        """
        if self._outputs is None:
            self._run()
        return self._outputs  # type: ignore[return-value]  # _run has set it

    def preactivations(self) -> Mapping[str, Tensor]:
        """Input of every gate [N, channels, *space]; of a gate that is called several times, its uses along axis 2.

        Raises: ShapeError: a gate whose input has not the samples on axis 0.
        """
        if self._preactivations is None:
            self.with_preactivations = True
            self._run()
        return self._preactivations  # type: ignore[return-value]  # _run has set it

    def loss(self, outputs: Tensor) -> Tensor | None:
        """Loss per sample [N], None without targets.

        Raises: ShapeError: a loss that is not per sample.  ConfigurationError: targets that the default does not take.
        """
        if self._losses is None and self._set.targets is not None:
            with torch.no_grad():
                function = self._loss or default_loss
                losses = function(outputs, self._set.targets)
            if not isinstance(losses, Tensor) or losses.shape != (self._set.size,):
                found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                raise ShapeError(
                    f"the loss gave {found} for {self._set.size} samples, expected one value a sample; use "
                    "reduction='none'"
                )
            self._losses = losses
        return self._losses

    def kernel(self, reduce: Any, per: str | None) -> Any:
        """Empirical NTK over the recorder's parameters; the whole is the sum of contributions already known.

        Raises: UnsupportedLayer: a self-check found a layer whose contribution is wrong.
        """
        key = (reduce, per)
        if key not in self._kernels:
            known = self._kernels.get((reduce, "layer")) or self._kernels.get((reduce, "parameter"))
            if per is None and known:
                parts = list(known.values())
                self._kernels[key] = sum(parts[1:], parts[0])
            else:
                self._refuse_no_parameters()
                kernel: Any = empirical_ntk(
                    self._model,
                    self._set.inputs,
                    reduce=reduce,
                    per=per,  # type: ignore[arg-type]  # checked there
                    forward=self._forward,
                    parameters=self._parameters,
                )
                self._check(kernel, reduce, per)
                self._kernels[key] = kernel
        return self._kernels[key]

    def kernel_bands(self, reduce: Any, samples: int, max_memory: int | None) -> Callable[[], Iterator[Tensor]]:
        """What makes the same kernel in bands of so many samples, [samples, N, ...].

        Raises: as ``kernel``; of its first samples a self-check is made.
        """
        self._refuse_no_parameters()
        # Here, so that it is not charged to the bands, which may be made several times.
        self._check(None, reduce, None, first=_CHECKED_OF_BANDS)
        return lambda: self._bands(reduce, samples, max_memory)

    def _bands(self, reduce: Any, samples: int, max_memory: int | None) -> Iterator[Tensor]:
        for start in range(0, self._set.size, samples):
            yield empirical_ntk(
                self._model,
                _rows(self._set.inputs, slice(start, start + samples)),
                self._set.inputs,
                reduce=reduce,
                forward=self._forward,
                parameters=self._parameters,
                max_memory=max_memory,
            )

    def _refuse_no_parameters(self) -> None:
        if not self._parameters:
            raise ConfigurationError(
                "the network has no parameter with requires_grad besides slopes; name some by parameters="
            )

    def _check(self, kernel: Any, reduce: Any, per: Any, *, first: int | None = None) -> None:
        """Compare rows of the kernel with plain autograd, once for each state of the network.

        Args: first: only that of so many samples.
        """
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in tree_leaves(self._set.inputs))
        which = (self._set.name, shapes, reduce, per, self._state, first)
        if which in self._checked:
            return
        started = time.perf_counter()
        check_ntk(
            self._model,
            _rows(self._set.inputs, slice(first)),
            reduce=reduce,
            per=per,
            forward=self._forward,
            parameters=self._parameters,
            kernel=kernel,
        )
        self._checked.add(which)
        self.seconds_checking += time.perf_counter() - started

    def _run(self) -> None:
        taken: dict[str, list[Tensor]] = {}
        found = gates(self._model) if self.with_preactivations else {}
        with torch.no_grad(), ExitStack() as stack:
            for name, gate in found.items():
                # A copy: what follows the gate may work in place on the same tensor.
                def take(module: Any, arguments: tuple[Tensor, ...], name: str = name) -> None:
                    taken.setdefault(name, []).append(arguments[0].detach().clone())

                stack.callback(gate.register_forward_pre_hook(take).remove)
            outputs = self._forward(self._model, copied(self._set.inputs))
        if self._outputs is None:
            self._outputs = checked_outputs(outputs, self._set.size)
        if self.with_preactivations:
            size = self._set.size
            self._preactivations = {
                name: _joined(name, [_channels_second(name, use, gate.dim, size) for use in taken[name]])
                for name, gate in found.items()
                if name in taken
            }


def _rows(inputs: Any, rows: slice) -> Any:
    return tree_map_only(Tensor, lambda leaf: leaf[rows], inputs)


def _channels_second(name: str, inputs: Tensor, dim: int, size: int) -> Tensor:
    if inputs.dim() < 2 or len(inputs) != size:
        raise ShapeError(
            f"gate {name!r} sees {list(inputs.shape)} for {size} samples; expected samples on axis 0; keep the batch "
            "axis first up to the gate, or leave the probes that need preactivations out"
        )
    return inputs.movedim(dim, 1)


def _joined(name: str, uses: Sequence[Tensor]) -> Tensor:
    return (
        uses[0]
        if len(uses) == 1
        else torch.cat([use.flatten(2) if use.dim() > 2 else use[..., None] for use in uses], 2)
    )


def default_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Loss per sample [N]: cross-entropy (nat) for class numbers, mean squared error over outputs for real targets.

    Raises: ShapeError, ConfigurationError: targets that do not fit the outputs.
    """
    if targets.is_floating_point():
        if targets.numel() != outputs.numel():
            raise ShapeError(
                f"default loss: found targets {list(targets.shape)} for outputs {list(outputs.shape)}, expected "
                "equally many values; give loss=function(outputs, targets) -> [N]"
            )
        squares = (outputs - targets.reshape(outputs.shape).to(outputs.dtype)).square()
        return squares if squares.dim() == 1 else squares.flatten(1).mean(1)
    if outputs.dim() < 2 or outputs.shape[1] < 2 or targets.shape != outputs.shape[:1] + outputs.shape[2:]:
        raise ConfigurationError(
            f"default loss: found class numbers {list(targets.shape)} for outputs {list(outputs.shape)}, expected "
            "outputs [N, C] with C >= 2; give float targets or loss=function(outputs, targets) -> [N]"
        )
    classes = outputs.shape[1]
    if int(targets.min()) < 0 or int(targets.max()) >= classes:
        raise ConfigurationError(
            f"default loss: found class numbers from {int(targets.min())} to {int(targets.max())}, expected 0 to "
            f"{classes - 1} for {classes} outputs; give loss=function(outputs, targets) -> [N]"
        )
    losses = functional.cross_entropy(outputs, targets.long(), reduction="none")
    return losses if losses.dim() == 1 else losses.flatten(1).mean(1)
