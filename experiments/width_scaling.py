"""How fast the tangent kernel at initialization stops depending on the draw: gated MLPs of growing width.

Many networks of every width are drawn and never trained. Measured are the spread of their kernels over draws, and,
where neural-tangents is installed, their deviation from the analytic kernel of infinitely wide networks; both should
fall as width^-1/2 once they are small.

In NTK parametrization every layer keeps its share of the kernel. In standard parametrization the first layer's part
stays as it is while the others grow with the width: as long as the width is not far above the number of inputs the
composition of the kernel changes with the width, and the exponent is not -1/2 yet.

Source: Jacot et al. 2018 (arXiv 1806.07572); Huang and Yau 2020 (arXiv 1909.08156) for corrections at finite width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from ..analysis import width_exponent
from ..checkpoint import Checkpoint
from ..datasets import Task, digit_pairs, probe_batch, stream_seed
from ..errors import ConfigurationError, MissingPackage
from ..experiment import RecorderFactory
from ..gates import gates
from ..kernel import empirical_ntk
from ..probe import Field as Recorded
from ..probe import Snapshot
from ..progress import progress_bar
from ..schedule import every
from ..theory import Parametrization, infinite_width_ntk
from .networks import GatedMLP

Positive = Annotated[int, Field(ge=1)]

# Of GatedMLP: variance of weights times inputs of the layer.
_WEIGHT_VARIANCE = 2.0


class WidthScalingConfig(BaseModel):
    """Settings of one comparison of widths.

    widths: units per hidden layer, increasing. fit_from: least width of the fit; narrower networks, whose spread is no
    small number, are recorded and shown. depth: hidden layers. slope: of all gates, 0 for ReLU. initializations:
    networks drawn a width. parametrization: "ntk" weighs the derivatives by each weight with 2 / inputs of its layer,
    the variance it is drawn with, and those by biases, which start at 0, with 0; "standard" counts all alike. task,
    probe_per_class, split_seed: the pairs of digits on which kernels are taken.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    widths: list[int] = [16, 32, 64, 128, 256, 512, 1024]
    fit_from: Positive = 64
    depth: Positive = 3
    slope: Annotated[float, Field(ge=-0.5, lt=1)] = 0.0
    initializations: Annotated[int, Field(ge=3)] = 100
    parametrization: Parametrization = "ntk"
    task: Task = "sum10"
    probe_per_class: Positive = 2
    split_seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> WidthScalingConfig:
        if sorted({0, *self.widths}) != [0, *self.widths] or len(self.widths) < 2:
            raise ValueError(
                f"setting 'widths': found {self.widths}, expected two or more widths, increasing from 1 on"
            )
        if sum(width >= self.fit_from for width in self.widths) < 2:
            raise ValueError(
                f"setting 'fit_from': found {self.fit_from}, expected at most the second largest width, "
                f"{self.widths[-2]}"
            )
        return self


class WidthScaling:
    """Spread of kernels over initializations, and deviation from the infinite-width kernel, against width."""

    name = "width-scaling"
    Config = WidthScalingConfig

    def run(
        self, config: WidthScalingConfig, *, seed: int, recorder: RecorderFactory, start: Checkpoint | None = None
    ) -> Mapping[str, float]:
        """Draw the networks, record their kernels and return exponents; nothing is trained.

        Results: spread_slope and deviation_slope (log-log, against width), each with _low and _high, its 95 %
        interval; widest_spread and widest_deviation (relative, of the widest networks). Without neural-tangents
        the deviation is NaN, and a warning says so.

        Raises: ConfigurationError: ``start`` is given.
        """
        if start is not None:
            raise ConfigurationError(
                f"width-scaling: found a checkpoint of step {start.step}, expected none: it trains nothing"
            )
        data = digit_pairs(config.task, split_seed=config.split_seed).test
        inputs, targets = probe_batch(data, per_class=config.probe_per_class, seed=config.split_seed)
        kernels, widest = _draw(config, seed, inputs, data.classes, shown=recorder.progress)
        analytic = _analytic(config, inputs, data.classes)
        recording = recorder(
            widest,
            sets=(inputs, targets),
            steps_per_epoch=1,
            total_steps=0,
            probes=[_Kernels(config, kernels, analytic), "ntk"],
            schedule=every(1),
        )
        recording.record(step=0)
        results = _exponent("spread", config, kernels, None)
        if analytic is not None:
            return results | _exponent("deviation", config, kernels, analytic)
        return results | dict.fromkeys(
            ("deviation_slope", "deviation_slope_low", "deviation_slope_high", "widest_deviation"), math.nan
        )


class _Kernels:
    """Kernels of all networks on the probe set; they belong to the run, not to the recorded network."""

    name = "widths"

    def __init__(
        self, config: WidthScalingConfig, kernels: NDArray[np.float32], analytic: NDArray[np.float32] | None
    ) -> None:
        self._parametrization = config.parametrization
        self._arrays: dict[str, NDArray[Any]] = {"hidden_units": np.asarray(config.widths), "kernel": kernels}
        if analytic is not None:
            self._arrays["analytic"] = analytic

    def fields(self, snapshot: Snapshot, /) -> Sequence[Recorded]:
        """Declare widths, kernels and, where there is one, the analytic kernel of each width."""
        dims = {
            "hidden_units": ("width",),
            "kernel": ("width", "initialization", "sample", "sample_2"),
            "analytic": ("width", "sample", "sample_2"),
        }
        names = {
            "hidden_units": "units per hidden layer",
            "kernel": "empirical NTK over weights and biases",
            "analytic": "analytic NTK at infinite width",
        }
        facts = {"reduction": "trace", "parametrization": self._parametrization}
        return [
            Recorded(
                name=name,
                dims=dims[name],
                shape=array.shape,
                dtype="i8" if name == "hidden_units" else "f4",
                long_name=names[name],
                attributes={} if name == "hidden_units" else facts,
            )
            for name, array in self._arrays.items()
        ]

    def measure(self, snapshot: Snapshot, /) -> Mapping[str, Any]:
        """Return the arrays."""
        return self._arrays


def _network(config: WidthScalingConfig, inputs: int, outputs: int, width: int) -> GatedMLP:
    model = GatedMLP(inputs, outputs, width=width, depth=config.depth)
    for gate in gates(model).values():
        with torch.no_grad():
            gate.slope.fill_(config.slope)
        # The kernel is that of weights and biases.
        gate.slope.requires_grad_(False)
    return model


def _draw(
    config: WidthScalingConfig, seed: int, inputs: Tensor, outputs: int, *, shown: bool
) -> tuple[NDArray[np.float32], GatedMLP]:
    """Return the trace kernels [W, D, N, N], and the first network of the largest width."""
    kernels = np.empty((len(config.widths), config.initializations, len(inputs), len(inputs)), dtype=np.float32)
    with progress_bar(len(config.widths) * config.initializations, what="networks", shown=shown) as bar:
        for place, width in enumerate(config.widths):
            # Downwards, so that the network that is left is number 0.
            for number in reversed(range(config.initializations)):
                torch.manual_seed(stream_seed(seed, width, number))
                model = _network(config, inputs[0].numel(), outputs, width)
                kernels[place, number] = _kernel(config, model, inputs).numpy()
                bar.update()
    return kernels, model


def _kernel(config: WidthScalingConfig, model: GatedMLP, inputs: Tensor) -> Tensor:
    """Return the trace kernel over weights and biases."""
    if config.parametrization == "standard":
        return empirical_ntk(model, inputs)
    scales = {
        f"{name}.weight": _WEIGHT_VARIANCE / layer.in_features
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    return empirical_ntk(model, inputs, parameters=list(scales), metric=scales)


def _analytic(config: WidthScalingConfig, inputs: Tensor, outputs: int) -> NDArray[np.float32] | None:
    """Return the analytic trace kernels [W, N, N], or None with a warning where neural-tangents is missing."""
    kernels = []
    for width in config.widths:
        model = _network(config, inputs[0].numel(), outputs, width)
        try:
            kernel = infinite_width_ntk(
                model,
                inputs,
                parametrization=config.parametrization,
                weight_variance=_WEIGHT_VARIANCE,
                bias_variance=0.0,
            )
        except MissingPackage as error:
            warnings.warn(
                f"width-scaling measures the spread over initializations only, not the deviation from the analytic "
                f"kernel: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        kernels.append(kernel.numpy())
    return np.stack(kernels)


def _exponent(
    name: str, config: WidthScalingConfig, kernels: NDArray[np.float32], analytic: NDArray[np.float32] | None
) -> dict[str, float]:
    fitted = np.asarray(config.widths) >= config.fit_from
    found = width_exponent(
        np.asarray(config.widths)[fitted], kernels[fitted], None if analytic is None else analytic[fitted]
    )
    return {
        f"{name}_slope": found.slope,
        f"{name}_slope_low": found.low,
        f"{name}_slope_high": found.high,
        f"widest_{name}": float(found.values[-1]),
    }
