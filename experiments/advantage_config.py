"""Configuration of the experiment nonlinear-advantage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from ..datasets import Task
from .settings import DataSettings, LinearizationSettings, Natural

BEFORE = ("rate_before", "scale_before", "labels_before", "train_before", "anchor_before")
"""Interventions on the dense training before the switch, each a family of its own."""


class AdvantageConfig(LinearizationSettings, DataSettings):
    """Settings of one trunk or arm.

    latest_start: the late arm's start, to which mask "late" and "late-path" and budget "after-switch" refer. mask:
    which units remain: those the ramp learns, random ones, or those that the ramp from latest_start learns, used from
    the start ("late-path": with its slopes). budget: equal ``epochs`` in total, or equal epochs after the switch.
    data_order: another number is another stream of batches from start_epoch on.

    Interventions that move the kernel more or less before the switch, at most one; from start_epoch on everything is
    as without them. rate_before: factor on the learning rate. scale_before: a in a (f - f_0), which is trained at rate
    / a^2 (with Adam, which takes the size of gradients away: / a). labels_before: "random" (of digit pairs, which are
    fresh in every epoch, drawn anew), or another label rule on the same digits. train_before: "readout" trains the last
    linear layer alone. anchor_before: weight of |K_t - K_0|^2 / |K_0|^2, centered, on 16 training samples in the loss.
    What outlives the switch is the state of the optimizer; optimizer_at_switch="new" takes that away too.
    """

    latest_start: Natural = 12
    mask: Literal["learned", "random", "late", "late-path"] = "learned"
    budget: Literal["total", "after-switch"] = "total"
    data_order: Natural = 0
    rate_before: Annotated[float, Field(gt=0)] = 1.0
    scale_before: Annotated[float, Field(gt=0)] = 1.0
    labels_before: Literal["own", "random"] | Task = "own"
    train_before: Literal["all", "readout"] = "all"
    anchor_before: Annotated[float, Field(ge=0)] = 0.0

    OF_THE_LINEARIZATION: ClassVar[tuple[str, ...]] = (
        *LinearizationSettings.OF_THE_LINEARIZATION, "latest_start", "mask", "budget",
    )  # fmt: skip

    def _without_effect(self) -> Iterator[tuple[str, Any]]:
        yield from super()._without_effect()
        if self.labels_before == self.task:
            yield "labels_before", "own"
        if self.budget == "after-switch" and self.start_epoch == self.latest_start:
            yield "budget", "total"
        if not self.uses_late_ramp and self.budget == "total":
            yield "latest_start", type(self).model_fields["latest_start"].default
        if self.mask == "random":
            yield "strength", type(self).model_fields["strength"].default
        if self.intervention == "none" and not self.data_order and not self.before:
            # The trunk itself, from wherever it branches.
            yield "start_epoch", 0

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.budget == "after-switch" and self.start_epoch > self.latest_start:
            yield (
                f"setting 'start_epoch': found {self.start_epoch}, expected at most latest_start={self.latest_start} "
                "with budget='after-switch'"
            )
        yield from self._problems_before()
        if self.intervention != "linearize":
            return
        if self.uses_late_ramp and self.start_epoch:
            yield (
                f"setting 'start_epoch': found {self.start_epoch}, expected 0 with mask={self.mask!r}, which uses the "
                "late arm's mask from the start"
            )
        if self.uses_late_ramp and self.budget == "after-switch":
            yield (
                f"setting 'budget': found 'after-switch' with mask={self.mask!r}, expected 'total'; a start at epoch 0 "
                "has no dense epochs before it"
            )
        if self.mask in ("random", "late") and self.survivors == "keep":
            yield (
                f"setting 'survivors': found 'keep' with mask={self.mask!r}, expected 'relu' or 'common'; a given mask "
                "leaves its survivors ReLUs, so 'keep' would be 'relu' under another name"
            )

    def _problems_before(self) -> Iterator[str]:
        changed = [name for name in BEFORE if getattr(self, name) != type(self).model_fields[name].default]
        if len(changed) > 1:
            yield (
                f"setting {changed[1]!r}: found {getattr(self, changed[1])!r} together with "
                f"{changed[0]}={getattr(self, changed[0])!r}, expected one intervention before the switch; drop one"
            )
        if changed and not self.start_epoch:
            yield (
                f"setting {changed[0]!r}: found {getattr(self, changed[0])!r} with start_epoch=0, expected a later "
                "start; nothing comes before the switch"
            )
        if self.labels_before == "sum":
            yield f"setting 'labels_before': found 'sum' with task={self.task!r}, expected a rule with fewer labels"
        if self.task is None and self.labels_before not in ("own", "random"):
            yield (
                f"setting 'labels_before': found {self.labels_before!r} with data={self.data!r}, expected 'own' or "
                "'random'; other label rules belong to digit pairs"
            )

    def _ramps(self) -> Iterator[tuple[str, int, int]]:
        yield from super()._ramps()
        if self.uses_late_ramp:
            yield "latest_start", self.latest_start, self.epochs

    @property
    def uses_late_ramp(self) -> bool:
        """True where mask or slope path come from the ramp at ``latest_start``."""
        return self.mask in ("late", "late-path")

    @property
    def total_epochs(self) -> int:
        """Epochs of the run, the dense ones before the switch included."""
        return self.epochs if self.budget == "total" else self.start_epoch + self.epochs - self.latest_start

    @property
    def before(self) -> str | None:
        """Name of the intervention before the switch, None where there is none."""
        return next((name for name in BEFORE if getattr(self, name) != type(self).model_fields[name].default), None)

    @property
    def is_trunk(self) -> bool:
        """True for the dense run from which arms branch."""
        return self == self.trunk()

    def trunk(self) -> Self:
        """The dense run on the same data with the same network and, up to the switch, the same intervention."""
        return self.dense(data_order=0, start_epoch=self.start_epoch if self.before else 0)
