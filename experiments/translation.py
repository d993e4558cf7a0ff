"""What gates are worth in translation: a Transformer's feed-forward parts are made linear early or late in training.

As in nonlinear-advantage, arms leave a dense trunk at ``start_epoch`` and lose all but a share of their gates. Quality
is that of greedy translations, by BLEU. Kernels are those of the mean log-probability of a sentence's reference.

Source: protocol after Mehmeti-Göpel and Disselhoff 2023 (arXiv 2211.17180), whose data and network for translation are
not known; schedule, survivor rules and controls are our own. Data: Elliott et al. 2016 (arXiv 1605.00459), task 1.
"""

from __future__ import annotations

from torch import nn

from ..checkpoint import Checkpoint
from ..experiment import RecorderFactory, StagedExperiment, Stages
from ..linearization import random_mask
from .arm import OF_EVERY_ARM, SlopeOwner, arm_stages, linearizer, mask_ramp
from .translation_config import TranslationConfig
from .translation_training import TranslationTraining, steps_per_epoch


class Translation(StagedExperiment):
    """BLEU after early against late linearization of a Transformer, at the same number of nonlinear units."""

    name = "translation"
    Config = TranslationConfig
    results = (*TranslationTraining.results, *OF_EVERY_ARM)

    def trunk(self, config: TranslationConfig) -> tuple[TranslationConfig, int] | None:
        """Return the dense run that a configuration branches from and the step, or None for the dense run itself."""
        if config.is_trunk:
            return None
        return config.trunk(), config.start_epoch * steps_per_epoch(config)

    def steps(self, config: TranslationConfig) -> int:
        """Return how many steps a run takes that starts from its trunk's checkpoint."""
        epochs = config.total_epochs if config.is_trunk else config.total_epochs - config.start_epoch
        return epochs * steps_per_epoch(config)

    def stages(
        self, config: TranslationConfig, *, seed: int, recorder: RecorderFactory, start: Checkpoint | None = None
    ) -> Stages:
        """Train one trunk or arm and return its results; without ``start`` the dense epochs are trained here.

        Results: those of ``arm_stages``; what is measured at the end and at the switch says ``TranslationTraining``.
        """
        training = TranslationTraining.of(config, seed)
        per_epoch = training.steps_per_epoch

        def owner(model: nn.Module) -> SlopeOwner:
            if config.mask == "random":
                mask = random_mask(model, config.target, seed)
                return mask_ramp(config, model, mask, steps_per_epoch=per_epoch)
            return linearizer(config, model, steps_per_epoch=per_epoch)

        return arm_stages(
            training,
            recorder,
            start=start,
            switch=config.start_epoch * per_epoch,
            ramp_steps=config.ramp_epochs * per_epoch,
            settle_steps=config.effective_settle_epochs * per_epoch,
            begin=(lambda: owner) if config.intervention == "linearize" else None,
            linear=config.intervention == "linear",
            trunk=config.is_trunk,
            data_order=config.data_order,
            new_optimizer=config.optimizer_at_switch == "new",
        )
