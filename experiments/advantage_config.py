"""Configuration of the experiment nonlinear-advantage; impossible settings are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..datasets import Task

# Settings that another one replaces: they become None, and giving them explicitly is an error.
_REPLACED = {"data": ("task", "pairs", "test_pairs"), "model": ("width", "depth")}
# Settings of the linearization; where nothing is linearized they have their defaults, so that equal runs are equal.
_OF_THE_LINEARIZATION = (
    "latest_start", "ramp_epochs", "settle_epochs", "remaining", "strength", "survivors", "common_slope", "mask",
    "budget",
)  # fmt: skip
_OF_THE_ARM = ("intervention", "start_epoch", "data_order", *_OF_THE_LINEARIZATION)

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
# TOML and JSON know lists only.
Epochs = Annotated[tuple[Natural, ...], BeforeValidator(lambda value: tuple(value) if type(value) is list else value)]


class AdvantageConfig(BaseModel):
    """Settings of one trunk or arm.

    task: label rule on two digits. data: npz file with x_train, y_train, x_test, y_test in place of task, pairs and
    test_pairs. model: ``file.py:function`` in place of the MLP of width and depth. decay_share: share of ``epochs``
    over which the learning rate falls to 0 at the end of every run. intervention: "linearize" a share of the gates,
    "none", or "linear" from the start. start_epoch: dense epochs before. latest_start: the late arm's start, to
    which mask "late" and "late-path" and budget "after-switch" refer. remaining: share of units that stays
    nonlinear. strength: factor on the penalty. survivors, common_slope: where the remaining slopes go within
    settle_epochs ("keep": nowhere). mask: which units remain: those the ramp learns, random ones, or those that the
    ramp from latest_start learns, used from the start ("late-path": with its slopes). budget: equal ``epochs`` in
    total, or equal epochs after the switch. Where nothing is linearized these settings have their defaults.
    granularity: one slope a channel or a layer. data_order: another number is another stream of batches from
    start_epoch on. split_seed: fixes split, test pairs and probe sets. checkpoint_epochs: epochs after which
    training is saved, for ``ntkdyn record --resume``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    task: Task | None = "sum10"
    data: str | None = None
    model: str | None = None
    width: Positive | None = 64
    depth: Positive | None = 6
    epochs: Positive = 24
    batch_size: Positive = 128
    pairs: Positive | None = 4096
    test_pairs: Positive | None = 2000
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    decay_share: Annotated[float, Field(ge=0, le=1)] = 0.25
    intervention: Literal["linearize", "none", "linear"] = "linearize"
    start_epoch: Natural = 0
    latest_start: Natural = 12
    ramp_epochs: Positive = 4
    settle_epochs: Natural = 2
    remaining: Annotated[float, Field(gt=0, le=1)] = 0.1
    strength: Annotated[float, Field(ge=0)] = 4.0
    survivors: Literal["keep", "common", "relu"] = "common"
    common_slope: Annotated[float, Field(ge=-0.5, lt=1)] = 0.75
    mask: Literal["learned", "random", "late", "late-path"] = "learned"
    budget: Literal["total", "after-switch"] = "total"
    granularity: Literal["channel", "layer"] = "channel"
    data_order: Natural = 0
    split_seed: Natural = 0
    probe_per_class: Positive = 10
    checkpoint_epochs: Epochs = ()

    @model_validator(mode="before")
    @classmethod
    def _replace(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        for owner, names in _REPLACED.items():
            if filled.get(owner) is None:
                empty = [name for name in names if name in filled and filled[name] is None]
                if empty:
                    raise ValueError(f"setting {empty[0]!r}: found none, expected a value, as {owner!r} is not given")
                continue
            given = [name for name in names if filled.get(name) is not None]
            if given:
                raise ValueError(
                    f"setting {given[0]!r}: found {filled[given[0]]!r} together with {owner}={filled[owner]!r}, which "
                    f"replaces it; drop {given[0]!r} or {owner!r}"
                )
            filled |= dict.fromkeys(names)
        return filled

    @model_validator(mode="after")
    def _check(self) -> AdvantageConfig:
        if self.intervention != "linearize":
            for name in _OF_THE_LINEARIZATION:
                # Past the frozen model's own setter, which guards against changes after validation.
                object.__setattr__(self, name, type(self).model_fields[name].default)
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> list[str]:
        found = []
        if self.pairs is not None and self.batch_size > self.pairs:
            found.append(f"setting 'batch_size': found {self.batch_size}, expected at most pairs={self.pairs}")
        if self.intervention == "linear" and self.start_epoch:
            found.append(
                f"setting 'start_epoch': found {self.start_epoch}, expected 0 with intervention='linear', which is "
                "linear from the start"
            )
        if self.budget == "after-switch" and self.start_epoch > self.latest_start:
            found.append(
                f"setting 'start_epoch': found {self.start_epoch}, expected at most latest_start={self.latest_start} "
                "with budget='after-switch'"
            )
        if self.intervention == "linearize":
            found += self._problems_of_linearization()
        elif self.start_epoch > self.total_epochs:
            found.append(f"setting 'start_epoch': found {self.start_epoch}, expected at most epochs={self.epochs}")
        return found

    def _problems_of_linearization(self) -> list[str]:
        found = []
        if self.uses_late_ramp and self.start_epoch:
            found.append(
                f"setting 'start_epoch': found {self.start_epoch}, expected 0 with mask={self.mask!r}, which uses the "
                "late arm's mask from the start"
            )
        if self.mask in ("random", "late") and self.survivors == "keep":
            found.append(
                f"setting 'survivors': found 'keep' with mask={self.mask!r}, expected 'relu' or 'common'; a given mask "
                "leaves its survivors ReLUs, so 'keep' would be 'relu' under another name"
            )
        if not self.effective_settle_epochs and self.survivors == "common":
            found.append("setting 'settle_epochs': found 0, expected at least 1 with survivors='common'; a jump hurts")
        # Slopes must stand still before the learning rate falls, or the late arm has no time to recover.
        needed = self.ramp_epochs + self.effective_settle_epochs
        parts = f"ramp_epochs={self.ramp_epochs} + settle_epochs={self.effective_settle_epochs}"
        starts = [("start_epoch", self.start_epoch, self.total_epochs)]
        if self.uses_late_ramp:
            starts.append(("latest_start", self.latest_start, self.epochs))
        for name, start, total in starts:
            allowed = int(total - self.decay_share * self.epochs + 1e-9) - needed
            if start > allowed:
                expected = (
                    f"expected at most {allowed}" if allowed >= 0 else "expected fewer epochs of ramp and settling"
                )
                found.append(
                    f"setting {name!r}: found {start}, {expected}: {name} + {parts} must end before the learning rate "
                    f"falls (the last {self.decay_share:g} of epochs={self.epochs}; this run has {total})"
                )
        return found

    @property
    def effective_settle_epochs(self) -> int:
        """Epochs in which survivors move to their slope; 0 where they stay."""
        return 0 if self.survivors == "keep" else self.settle_epochs

    @property
    def uses_late_ramp(self) -> bool:
        """True where mask or slope path come from the ramp at ``latest_start``."""
        return self.mask in ("late", "late-path")

    @property
    def total_epochs(self) -> int:
        """Epochs of the run, the dense ones before the switch included."""
        return self.epochs if self.budget == "total" else self.start_epoch + self.epochs - self.latest_start

    @property
    def is_trunk(self) -> bool:
        """True for the dense run from which arms branch."""
        return self == self.trunk()

    def trunk(self) -> AdvantageConfig:
        """The dense run on the same data with the same network."""
        values = {name: value for name, value in self.model_dump().items() if name not in _OF_THE_ARM}
        return AdvantageConfig.model_validate(values | {"intervention": "none"})
