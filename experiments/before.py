"""Interventions on the dense training before the switch, which move the kernel more or less; after it nothing differs.

Each makes one part of training another one up to the switch: its learning rate, the objective, its labels, or the
weights that learn.

Source: Chizat et al. 2019 (arXiv 1812.07956) for the scaled output; the others are our own controls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional

from ..clone import structural_clone
from ..datasets import Dataset
from ..errors import ConfigurationError
from ..gates import weights
from ..kernel.problem import default_forward
from ..recorder.snapshots import has_running_norms
from ..training_loop import Batches
from .advantage_config import AdvantageConfig
from .training import Objective, Training

_ANCHOR_SAMPLES = 16


class Epochs(Protocol):
    """Training data by the epoch."""

    def epoch_data(self, epoch: int, *, data_order: int = 0) -> Batches: ...


class BeforeSwitch:
    """Nothing is changed before the switch; ``Intervention`` changes something."""

    def __init__(self, training: Epochs) -> None:
        self._epochs = training

    def rate_factor(self, step: int) -> float:
        """Factor on the learning rate of a step."""
        return 1.0

    def epoch_data(self, epoch: int, *, data_order: int = 0) -> Batches:
        """Samples of one epoch."""
        return self._epochs.epoch_data(epoch, data_order=data_order)

    @property
    def objective(self) -> Objective | None:
        """What is trained, None for the loss of the outputs."""
        return None


class Intervention(BeforeSwitch):
    """The intervention of a configuration, up to the switch.

    Args:
        training: of the run.
        model: at its initial weights, which "scale" and "anchor" refer to.
        switch: step at which the intervention ends.
    """

    def __init__(self, training: Training, config: AdvantageConfig, model: nn.Module, *, switch: int) -> None:
        super().__init__(training)
        self._training = training
        self.switch = switch
        self._config = config
        self._model = model
        self._relabeled = training if config.labels_before == "own" else training.with_labels(config.labels_before)
        self._objective = self._make_objective()

    def rate_factor(self, step: int) -> float:
        """Factor on the learning rate of a step."""
        if step >= self.switch:
            return 1.0
        config = self._config
        # Adam divides the gradient by its own size, which takes one factor of the scale away.
        power = 1 if config.optimizer == "adam" else 2
        return config.rate_before / config.scale_before**power

    def epoch_data(self, epoch: int, *, data_order: int = 0) -> Dataset:
        """Samples of one epoch, with the labels that the intervention wants."""
        before = epoch * self._training.steps_per_epoch < self.switch
        return (self._relabeled if before else self._training).epoch_data(epoch, data_order=data_order)

    @property
    def objective(self) -> Objective | None:
        """What is trained, None for the loss of the outputs."""
        return self._objective

    def _make_objective(self) -> Objective | None:
        config, switch, model = self._config, self.switch, self._model
        plain = functional.cross_entropy
        if config.scale_before != 1:
            scale, start = config.scale_before, structural_clone(model, share_parameters=False)

            def scaled(step: int, inputs: Tensor, targets: Tensor) -> Tensor:
                outputs = default_forward(model, inputs)
                if step < switch:
                    with torch.no_grad():
                        origin = default_forward(start, inputs)
                    outputs = scale * (outputs - origin)
                return plain(outputs, targets)

            return scaled
        if config.train_before == "readout":
            names = _all_but_readout(model)

            def of_readout(step: int, inputs: Tensor, targets: Tensor) -> Tensor:
                if step >= switch:
                    return plain(default_forward(model, inputs), targets)
                present = dict(model.named_parameters())
                # Detached, not frozen: a recorder takes the kernel of the weights that require gradients at attach.
                return plain(
                    functional_call(model, {name: present[name].detach() for name in names}, (inputs,)), targets
                )

            return of_readout
        if config.anchor_before:
            drift = _relative_drift(model, self._training.calibration[:_ANCHOR_SAMPLES])

            def anchored(step: int, inputs: Tensor, targets: Tensor) -> Tensor:
                loss = plain(default_forward(model, inputs), targets)
                return loss + config.anchor_before * drift() if step < switch else loss

            return anchored
        return None


def _all_but_readout(model: nn.Module) -> list[str]:
    """Names of the parameters outside the last linear layer."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ConfigurationError(
            f"train_before: found {type(model).__name__} without a linear layer, expected one as readout; drop it"
        )
    readout = {id(parameter) for parameter in layers[-1].parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in readout]


def _relative_drift(model: nn.Module, inputs: Tensor) -> Callable[[], Tensor]:
    """Return a function that gives |K - K_0|_F^2 / |K_0|_F^2 of centered trace kernels, differentiable in the weights.

    Centered (rows and columns without their means), as the drift that is judged: most of an uncentered kernel is its
    constant direction.
    """
    if has_running_norms(model):
        raise ConfigurationError(
            "anchor_before: found BatchNorm, which couples the samples of a batch in training, expected a network "
            "without; drop anchor_before"
        )

    def outputs(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        result: Tensor = functional_call(model, values, (sample[None],))
        return result[0]

    def kernel() -> Tensor:
        jacobian = vmap(jacrev(outputs), (None, 0))(dict(weights(model)), inputs)
        rows = torch.cat([part.flatten(2) for part in jacobian.values()], dim=2)
        rows = rows - rows.mean(0)
        return torch.einsum("ncp,mcp->nm", rows, rows)

    start = kernel().detach()
    return lambda: ((kernel() - start) ** 2).sum() / (start**2).sum()
