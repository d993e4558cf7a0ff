"""Probe ``outputs``: what the network says on the probe sets, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..probe import Field, Snapshot


class Outputs:
    """Outputs of each probe set; with targets also the loss, and the accuracy where targets are class numbers.

    Fields: ``logits`` [N, C]; ``loss`` [N], by the recorder's loss; ``accuracy`` (scalar, share in [0, 1]), the arg
    max over axis 1. Outputs [N] are recorded as [N, 1]; deeper ones keep their axes, [N, C, *space], and accuracy is
    then over all positions.
    """

    name = "outputs"

    def fields(self, snapshot: Snapshot, /) -> Sequence[Field]:
        """Declare what the targets allow."""
        shape = tuple(snapshot.outputs.shape)
        if len(shape) == 1:
            shape = (*shape, 1)
        dims = ("sample", "output", *(f"axis_{axis}" for axis in range(2, len(shape))))
        dtype = "f8" if snapshot.outputs.element_size() == 8 else "f4"
        declared = [Field(name="logits", dims=dims, shape=shape, dtype=dtype, long_name="outputs")]
        if snapshot.targets is not None:
            declared.append(
                Field(name="loss", dims=("sample",), shape=shape[:1], dtype=dtype, long_name="loss of each sample")
            )
        if _has_classes(snapshot):
            declared.append(Field(name="accuracy", dtype="f8", long_name="accuracy"))
        return declared

    def measure(self, snapshot: Snapshot, /) -> Mapping[str, Any]:
        """Return outputs, loss and accuracy at this step."""
        outputs = snapshot.outputs
        measured: dict[str, Any] = {"logits": outputs[:, None] if outputs.dim() == 1 else outputs}
        if snapshot.targets is not None:
            measured["loss"] = snapshot.loss
        if _has_classes(snapshot):
            measured["accuracy"] = (outputs.argmax(1) == snapshot.targets).double().mean()
        return measured


def _has_classes(snapshot: Snapshot) -> bool:
    outputs, targets = snapshot.outputs, snapshot.targets
    if targets is None or targets.is_floating_point() or outputs.dim() < 2 or outputs.shape[1] < 2:
        return False
    return bool(targets.shape == outputs.shape[:1] + outputs.shape[2:])
