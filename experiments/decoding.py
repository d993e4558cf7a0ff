"""What a translation network says, word by word, and how good it is by BLEU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .networks.transformer import PADDING, Transformer
from .sentences import BEGIN, END, trimmed

# A translation may have this many tokens more than its source has, twice over; German has about as many as English.
_FURTHER = 10


@torch.no_grad()
def greedy(model: Transformer, sources: Tensor, *, batch_size: int = 256) -> list[list[int]]:
    """Translate sources [N, S] token by token, each time the likeliest; the model must be in evaluation mode.

    Returns: tokens of each translation, without begin and end; one that does not end stops at twice the tokens of its
        source and 10 more, or where the network knows no further positions.
    """
    lengths = (sources != PADDING).sum(dim=1)
    translations: list[list[int]] = [[] for _ in range(len(sources))]
    # Sentences of similar length end together.
    for batch in torch.split(lengths.argsort(stable=True), batch_size):
        said = _say(model, trimmed(sources[batch]))
        for index, tokens in zip(batch.tolist(), said, strict=True):
            translations[index] = tokens
    return translations


def _say(model: Transformer, sources: Tensor) -> list[list[int]]:
    features, present = model.encode(sources)
    said = torch.full((len(sources), 1), BEGIN, device=sources.device)
    # Sentences that go on, by their numbers; the others are not computed any further.
    active = torch.arange(len(sources), device=sources.device)
    finished: list[list[int]] = [[] for _ in range(len(sources))]
    limits = (2 * (sources != PADDING).sum(dim=1) + _FURTHER).clamp_max(len(model.waves))
    while len(active):
        token = model.read(model.decode(said, features, present)[:, -1]).argmax(dim=1)
        ends = (token == END) | (limits == said.shape[1])
        said = torch.cat([said, token[:, None]], dim=1)
        for index, row in zip(active[ends].tolist(), said[ends, 1:].tolist(), strict=True):
            finished[index] = row[:-1] if row[-1] == END else row
        active, limits, said, features, present = (one[~ends] for one in (active, limits, said, features, present))
    return finished


def bleu(translations: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of a corpus against one reference each, in [0, 100]: sacrebleu, tokenization 13a, case counts.

    Raises: ConfigurationError: the package sacrebleu is missing.
    Source: Post 2018 (arXiv 1804.08771).
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise ConfigurationError(
            "translation: the package sacrebleu is missing; pip install 'ntkdyn[translation]'"
        ) from error
    return float(sacrebleu.corpus_bleu(list(translations), [list(references)]).score)
