"""Whether the outputs of a network are one function of each sample; if not, which layer is to blame."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import NondeterministicForward
from ..kernel.determinism import differ, first_difference
from .snapshots import Forward, ProbeSet, checked_outputs, run_forward


def check_forward(model: nn.Module, probe_set: ProbeSet, forward: Forward) -> None:
    """Run the set twice, and once split in two; outputs must agree.

    Batches of other sizes take other matrix kernels, which add in another order; ``differ`` says how much is allowed.

    Raises: NondeterministicForward: names the first layer whose output differs.  ConfigurationError: the network
        does not take the inputs.
    """
    inputs, size = probe_set.inputs, probe_set.size
    where = f"set {probe_set.name!r}: " if probe_set.name else ""

    def run(part: slice) -> Tensor:
        samples = tree_map(lambda leaf: leaf[part].clone(), inputs)
        owner = f"probe set {probe_set.name!r}" if probe_set.name else "the probe set"
        return checked_outputs(run_forward(forward, model, samples, owner), len(range(size)[part]))

    whole, halves = slice(None), (slice(0, size // 2), slice(size // 2, None))
    with torch.no_grad():
        first, second = run(whole), run(whole)
        if differ(first, second):
            layer = first_difference(model, lambda: run(whole), [lambda: run(whole)])
            raise NondeterministicForward(
                f"{where}{layer} gives other outputs on the same inputs when called again; expected a deterministic "
                "forward pass in evaluation mode; switch its randomness off where self.training is False"
            )
        if size > 1 and differ(first, torch.cat([run(half) for half in halves])):
            layer = first_difference(model, lambda: run(whole), [lambda: run(halves[0]), lambda: run(halves[1])])
            raise NondeterministicForward(
                f"{where}{layer} gives a sample outputs that depend on the other samples of the batch; expected one "
                "function of each sample in evaluation mode; use running statistics there (track_running_stats=True)"
            )
