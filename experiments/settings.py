"""The settings that experiments share, checked together: training, data and network, linearization.

An experiment's configuration is put together from these classes, so that a setting has one name, one meaning and one
check in all of them. Impossible settings are refused by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..datasets import Task
from .networks import NETWORKS

# Settings that another one replaces: they become None, and giving them explicitly is an error.
_REPLACED = {"data": ("task", "pairs", "test_pairs"), "model": ("network", "width", "depth")}

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
# TOML and JSON know lists only.
Epochs = Annotated[tuple[Natural, ...], BeforeValidator(lambda value: tuple(value) if type(value) is list else value)]


class TrainingSettings(BaseModel):
    """Settings of every training.

    epochs: of the whole run. decay_share: share of ``epochs`` over which the learning rate falls to 0 at the end.
    granularity: one slope a channel or a layer. device: where it trains. checkpoint_epochs: epochs after which training
    is saved, for ``ntkdyn record --resume``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    epochs: Positive = 24
    batch_size: Positive = 128
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decay_share: Share = 0.25
    granularity: Literal["channel", "layer"] = "channel"
    device: Literal["cpu", "cuda"] = "cpu"
    checkpoint_epochs: Epochs = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, value in self._without_effect():
            # Past the frozen model's own setter, which guards against changes after validation.
            object.__setattr__(self, name, value)
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        for warning in self._warnings():
            warnings.warn(warning, RuntimeWarning, stacklevel=2)
        return self

    def _without_effect(self) -> Iterator[tuple[str, Any]]:
        """Settings that change nothing beside the others, with the value they get, so that equal runs are equal."""
        yield from ()

    def _problems(self) -> Iterator[str]:
        yield from ()

    def _warnings(self) -> Iterator[str]:
        yield from ()

    @property
    def total_epochs(self) -> int:
        """Epochs of the run."""
        return self.epochs


class DataSettings(TrainingSettings):
    """Settings of data and network.

    task: label rule on two digits. data: name of a data set, folder of images or npz file, in place of task, pairs and
    test_pairs. samples, test_samples: of these, class-balanced subsets; none: all. augment: "flip-crop" shifts training
    images by up to 4 pixels and mirrors half of them. network: by name, with its width and depth (none: its own) and
    network_options. model: ``file.py:function`` in place of network, width and depth. momentum: of "sgd". split_seed:
    fixes split, subsets, test pairs and probe sets.
    """

    task: Task | None = "sum10"
    data: str | None = None
    samples: Positive | None = None
    test_samples: Positive | None = None
    augment: Literal["none", "flip-crop"] = "none"
    network: str | None = "mlp"
    model: str | None = None
    width: Positive | None = None
    depth: Positive | None = None
    network_options: dict[str, bool | int | float | str] = {}
    pairs: Positive | None = 4096
    test_pairs: Positive | None = 2000
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    split_seed: Natural = 0
    probe_per_class: Positive = 10

    @model_validator(mode="before")
    @classmethod
    def _replace(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        for owner, names in _REPLACED.items():
            if filled.get(owner) is None:
                empty = [name for name in names if name in filled and filled[name] is None]
                # A network of no given size has its own.
                empty = [name for name in empty if name not in ("width", "depth")]
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

    def _without_effect(self) -> Iterator[tuple[str, Any]]:
        yield from super()._without_effect()
        if self.network is not None and self.network in NETWORKS:
            for name in ("width", "depth"):
                if getattr(self, name) is None:
                    yield name, getattr(NETWORKS[self.network], name)
        if self.optimizer == "adam":
            yield "momentum", DataSettings.model_fields["momentum"].default

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.network is not None and self.network not in NETWORKS:
            yield f"setting 'network': found {self.network!r}, expected one of {', '.join(NETWORKS)}"
        if self.network is not None and self.network in NETWORKS:
            known = NETWORKS[self.network].options
            for name in self.network_options:
                if name not in known:
                    expected = f"one of {', '.join(known)}" if known else "none"
                    yield f"setting 'network_options': found {name!r} for network={self.network!r}, expected {expected}"
        elif self.network_options and self.network is None:
            yield f"setting 'network_options': found {self.network_options} with model={self.model!r}, expected none"
        if self.pairs is not None and self.batch_size > self.pairs:
            yield f"setting 'batch_size': found {self.batch_size}, expected at most pairs={self.pairs}"
        if self.samples is not None and self.batch_size > self.samples:
            yield f"setting 'batch_size': found {self.batch_size}, expected at most samples={self.samples}"
        if self.data is None:
            for name, standard in (("samples", None), ("test_samples", None), ("augment", "none")):
                if getattr(self, name) != standard:
                    yield (
                        f"setting {name!r}: found {getattr(self, name)!r} without 'data', expected it only with a data "
                        "set; digit pairs have 'pairs' and 'test_pairs'"
                    )


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a validated configuration less those that another one replaced, to validate them again."""
    replaced = {name for owner, names in _REPLACED.items() if values.get(owner) is not None for name in names}
    return {name: value for name, value in values.items() if name not in replaced}


def implied(values: Mapping[str, Any], owner: str, **settings: Any) -> dict[str, Any]:
    """Return settings with those that another one implies.

    Raises: ValueError: one of them was given and says something else.
    """
    for name, value in settings.items():
        if values.get(name, value) != value:
            raise ValueError(
                f"setting {name!r}: found {values[name]!r} with {owner}={values.get(owner)!r}, expected {value!r}; "
                f"drop {name!r}"
            )
    return {**values, **settings}


class LinearizationSettings(TrainingSettings):
    """Settings of the linearization of units.

    intervention: "linearize" a share of the gates, "none", or "linear" from the start. start_epoch: dense epochs
    before. remaining: share of the units that stay nonlinear, 0 for none; above 1 their number. strength: factor on
    the penalty. survivors, common_slope: where the remaining slopes go within settle_epochs ("keep": nowhere).
    optimizer_at_switch: "kept", or "new": its state of before is forgotten. Where nothing is linearized these have
    their defaults.
    """

    intervention: Literal["linearize", "none", "linear"] = "linearize"
    start_epoch: Natural = 0
    ramp_epochs: Positive = 4
    settle_epochs: Natural = 2
    remaining: Annotated[float, Field(ge=0)] = 0.1
    strength: Annotated[float, Field(ge=0)] = 4.0
    survivors: Literal["keep", "common", "relu"] = "common"
    common_slope: Annotated[float, Field(ge=-0.5, lt=1)] = 0.75
    optimizer_at_switch: Literal["kept", "new"] = "kept"

    OF_THE_LINEARIZATION: ClassVar[tuple[str, ...]] = (
        "ramp_epochs", "settle_epochs", "remaining", "strength", "survivors", "common_slope", "optimizer_at_switch",
    )  # fmt: skip

    def _without_effect(self) -> Iterator[tuple[str, Any]]:
        yield from super()._without_effect()
        if self.intervention != "linearize":
            for name in self.OF_THE_LINEARIZATION:
                yield name, type(self).model_fields[name].default
        if self.survivors == "keep":
            yield "settle_epochs", type(self).model_fields["settle_epochs"].default
        if self.survivors != "common":
            yield "common_slope", type(self).model_fields["common_slope"].default

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.intervention == "linear" and self.start_epoch:
            yield (
                f"setting 'start_epoch': found {self.start_epoch}, expected 0 with intervention='linear', which is "
                "linear from the start"
            )
        if self.intervention != "linearize":
            if self.start_epoch > self.total_epochs:
                yield f"setting 'start_epoch': found {self.start_epoch}, expected at most epochs={self.epochs}"
            return
        if self.remaining > 1 and self.remaining != int(self.remaining):
            yield (
                f"setting 'remaining': found {self.remaining}, expected a share of at most 1 or a whole number of units"
            )
        if not self.effective_settle_epochs and self.survivors == "common":
            yield "setting 'settle_epochs': found 0, expected at least 1 with survivors='common'; a jump hurts"
        for name, start, total in self._ramps():
            allowed = total - self._moving_epochs
            if start > allowed:
                expected = f"at most {allowed}" if allowed >= 0 else "fewer epochs of ramp and settling"
                yield (
                    f"setting {name!r}: found {start}, expected {expected}: {name} + {self._moving_text} must end "
                    f"within the {total} epochs of this run"
                )

    def _warnings(self) -> Iterator[str]:
        yield from super()._warnings()
        if self.intervention != "linearize":
            return
        for name, start, total in self._ramps():
            # Slopes should stand still before the learning rate falls, or the late arm has no time to recover.
            allowed = int(total - self.decay_share * self.epochs + 1e-9) - self._moving_epochs
            if start > allowed:
                remedy = (
                    f"at most {allowed} leaves time" if allowed >= 0 else "more epochs or a shorter ramp leave time"
                )
                yield (
                    f"{name}={start}: {name} + {self._moving_text} ends after the learning rate begins to fall (the "
                    f"last {self.decay_share:g} of epochs={self.epochs}), so this arm has no time to recover; {remedy}"
                )

    def dense(self, **settings: Any) -> Self:
        """Return the dense run on the same data with the same network, from which such runs branch."""
        of_the_arm = {"intervention", "start_epoch", *self.OF_THE_LINEARIZATION}
        kept = {name: value for name, value in self.model_dump().items() if name not in of_the_arm}
        return type(self).model_validate(kept | {"intervention": "none"} | settings)

    def _ramps(self) -> Iterator[tuple[str, int, int]]:
        """Each ramp of this run: the setting that starts it, its start, and the epochs of the run it is part of."""
        yield "start_epoch", self.start_epoch, self.total_epochs

    @property
    def _moving_epochs(self) -> int:
        return self.ramp_epochs + self.effective_settle_epochs

    @property
    def _moving_text(self) -> str:
        return f"ramp_epochs={self.ramp_epochs} + settle_epochs={self.effective_settle_epochs}"

    @property
    def target(self) -> int | float:
        """Units that stay nonlinear: their number (int) or share (float)."""
        return int(self.remaining) if self.remaining > 1 else self.remaining

    @property
    def effective_settle_epochs(self) -> int:
        """Epochs in which survivors move to their slope; 0 where they stay."""
        return 0 if self.survivors == "keep" else self.settle_epochs
