"""Configuration of the experiment translation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from .settings import LinearizationSettings, Natural, Positive, Share


class TranslationConfig(LinearizationSettings):
    """Settings of one trunk or arm.

    data: name of a parallel text. pairs, test_pairs: so many of its training pairs, and of its validation and its test
    pairs; none: all. vocabulary: subwords, of both languages together. width, depth, heads, feedforward, dropout: of
    the Transformer, whose gates are the hidden features of the feed-forward parts. warmup_steps: steps in which the
    learning rate rises to ``learning_rate``. label_smoothing: share of the target's probability that is spread over all
    subwords. latest_start: the late arm's start, to which budget "after-switch" refers. mask: which units remain: those
    that the ramp learns, or random ones. budget: equal ``epochs`` in total, or equal epochs after the switch.
    data_order: another number is another stream of batches from start_epoch on. split_seed: fixes which pairs are taken
    and the probe sets. probe_pairs: sentence pairs of a probe set.
    """

    data: str = "multi30k"
    pairs: Positive | None = None
    test_pairs: Positive | None = None
    vocabulary: Annotated[int, Field(ge=8)] = 3000
    width: Positive = 128
    depth: Positive = 2
    heads: Positive = 4
    feedforward: Positive = 256
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    epochs: Positive = 8
    batch_size: Positive = 64
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    warmup_steps: Natural = 400
    label_smoothing: Share = 0.1
    latest_start: Natural = 4
    ramp_epochs: Positive = 1
    settle_epochs: Natural = 1
    mask: Literal["learned", "random"] = "learned"
    budget: Literal["total", "after-switch"] = "total"
    data_order: Natural = 0
    split_seed: Natural = 0
    probe_pairs: Positive = 32

    OF_THE_LINEARIZATION: ClassVar[tuple[str, ...]] = (
        *LinearizationSettings.OF_THE_LINEARIZATION, "latest_start", "mask", "budget",
    )  # fmt: skip

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.pairs is not None and self.batch_size > self.pairs:
            yield f"setting 'batch_size': found {self.batch_size}, expected at most pairs={self.pairs}"
        for name in ("pairs", "test_pairs"):
            count = getattr(self, name)
            if count is not None and count < self.probe_pairs:
                yield f"setting 'probe_pairs': found {self.probe_pairs}, expected at most {name}={count}"
        if self.width % self.heads or self.width % 2:
            yield f"setting 'width': found {self.width}, expected an even multiple of heads={self.heads}"
        if self.budget == "after-switch" and self.start_epoch > self.latest_start:
            yield (
                f"setting 'start_epoch': found {self.start_epoch}, expected at most latest_start={self.latest_start} "
                "with budget='after-switch'"
            )
        if self.intervention == "linearize" and self.mask == "random" and self.survivors == "keep":
            yield (
                "setting 'survivors': found 'keep' with mask='random', expected 'relu' or 'common'; a given mask "
                "leaves its survivors ReLUs, so 'keep' would be 'relu' under another name"
            )

    @property
    def total_epochs(self) -> int:
        """Epochs of the run, the dense ones before the switch included."""
        return self.epochs if self.budget == "total" else self.start_epoch + self.epochs - self.latest_start

    @property
    def is_trunk(self) -> bool:
        """True for the dense run from which arms branch."""
        return self == self.trunk()

    def trunk(self) -> Self:
        """The dense run on the same sentences with the same network."""
        return self.dense(data_order=0)
