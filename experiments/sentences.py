"""Sentence pairs as subwords: one vocabulary of both languages, and batches of sentences of similar length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..datasets import SentencePairs, stream_seed
from ..errors import ConfigurationError
from .networks.transformer import PADDING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BEGIN, END, _UNKNOWN = 1, 2, 3
_SPECIAL = {"<pad>": PADDING, "<s>": BEGIN, "</s>": END, "<unk>": _UNKNOWN}

# First word of every seed of this file, so that no two kinds of draws share a stream.
_ORDER, _CHOICE = 201, 202
# Batches that are sorted by length together: more save little padding, and mix sentences less.
_POOL = 16


class Subwords:
    """Byte-pair encoding learned on sentences, of two languages together: case and accents stay, NFC.

    Words are split at spaces and around punctuation first. Tokens 0 to 3 are padding, begin, end and unknown character.

    Args: sentences: to learn from; the same ones in the same order give the same subwords. size: number of tokens,
        fewer where the sentences do not hold as many.
    Raises: ConfigurationError: the package tokenizers is missing.
    Source: Sennrich et al. 2016 (arXiv 1508.07909).
    """

    def __init__(self, sentences: Iterable[str], *, size: int) -> None:
        try:
            from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
        except ImportError as error:
            raise ConfigurationError(
                "translation: the package tokenizers is missing; pip install 'ntkdyn[translation]'"
            ) from error
        self._tokenizer: Tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        self._tokenizer.normalizer = normalizers.NFC()
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
        )
        self._tokenizer.decoder = decoders.Metaspace()
        self._tokenizer.train_from_iterator(
            sentences,
            trainers.BpeTrainer(vocab_size=size, special_tokens=list(_SPECIAL), show_progress=False),
        )

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Tokens of each sentence, without begin and end."""
        return [list(one.ids) for one in self._tokenizer.encode_batch(list(sentences))]

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Sentences as they are written, without special tokens."""
        return list(self._tokenizer.decode_batch([list(one) for one in tokens]))


@dataclass(frozen=True)
class TokenPairs:
    """N pairs as tokens: source [N, S] up to its end, target [N, T] from begin to end, padded behind.

    ``pairs[index]`` is ((source, target without its last token), target without its first token), cut to the longest
    sentences that are chosen: what the network is given, and what it should say.
    """

    source: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> tuple[tuple[Tensor, Tensor], Tensor]:
        source, target = trimmed(self.source[index]), trimmed(self.target[index])
        return (source, target[:, :-1]), target[:, 1:]

    def epoch(self, *, batch_size: int, seed: int, data_order: int, epoch: int) -> TokenPairs:
        """All pairs but an incomplete batch, in the order of (seed, data_order, epoch).

        Every ``batch_size`` neighbors have similar lengths, target before source: pairs in random order are sorted by
        length within pools of 16 batches, and the batches are shuffled.
        """
        generator = torch.Generator().manual_seed(stream_seed(_ORDER, seed, data_order, epoch))
        batches = len(self) // batch_size
        order = torch.randperm(len(self), generator=generator)[: batches * batch_size]
        lengths = [(tokens != PADDING).sum(dim=1)[order] for tokens in (self.source, self.target)]
        size = lengths[1] * (self.source.shape[1] + 1) + lengths[0]
        pools = zip(*(torch.split(one, _POOL * batch_size) for one in (order, size)), strict=True)
        order = torch.cat([pool[one.argsort(stable=True)] for pool, one in pools])
        order = order.view(batches, batch_size)[torch.randperm(batches, generator=generator)].flatten()
        return TokenPairs(self.source[order], self.target[order])


def trimmed(tokens: Tensor) -> Tensor:
    """The tokens [N, T] without the padding behind the longest sentence."""
    return tokens[:, : int((tokens != PADDING).sum(dim=1).max())]


def as_tokens(subwords: Subwords, pairs: SentencePairs, *, longest: int) -> TokenPairs:
    """Encode sentence pairs.

    Raises: ConfigurationError: a sentence has more tokens than ``longest``.
    """
    source = _padded([[*one, END] for one in subwords.encode(pairs.sources)])
    target = _padded([[BEGIN, *one, END] for one in subwords.encode(pairs.targets)])
    found = max(source.shape[1], target.shape[1])
    if found > longest:
        raise ConfigurationError(
            f"translation: found a sentence of {found} tokens, expected at most {longest}; leave it out of the data "
            "or take a larger vocabulary"
        )
    return TokenPairs(source, target)


def _padded(sentences: Sequence[Sequence[int]]) -> Tensor:
    tokens = torch.full((len(sentences), max(map(len, sentences))), PADDING)
    for row, sentence in zip(tokens, sentences, strict=True):
        row[: len(sentence)] = torch.tensor(sentence)
    return tokens


def chosen(count: int, wanted: int, *, split_seed: int) -> list[int]:
    """Indices below ``count``, ``wanted`` of them in their order, drawn for split_seed.

    Raises: ConfigurationError: there are not as many.
    """
    if wanted > count:
        raise ConfigurationError(
            f"translation: found {count} sentence pairs, expected at least {wanted}; ask for fewer"
        )
    generator = torch.Generator().manual_seed(stream_seed(_CHOICE, split_seed, count))
    return sorted(torch.randperm(count, generator=generator)[:wanted].tolist())
