"""Subwords, and sentence pairs in batches of similar length."""

from __future__ import annotations

import os
import subprocess
import sys
import unicodedata

import pytest
import torch

from ntkdyn.datasets import SentencePairs
from ntkdyn.errors import ConfigurationError
from ntkdyn.experiments.sentences import BEGIN, END, Subwords, TokenPairs, as_tokens, chosen, trimmed

SENTENCES = [
    "Two young, white males are outside near many bushes.",
    "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.",
    "Several men in hard hats are operating a giant pulley system.",
    "Mehrere Männer mit Schutzhelmen bedienen ein Antriebsradsystem.",
    "A little girl climbing into a wooden playhouse - it's hers (2016).",
] * 3  # fmt: skip


def test_what_was_encoded_is_decoded_as_it_was_written() -> None:
    subwords = Subwords(SENTENCES, size=200)
    assert subwords.decode(subwords.encode(SENTENCES)) == SENTENCES
    assert all(4 <= token < len(subwords) for sentence in subwords.encode(SENTENCES) for token in sentence)
    decomposed = unicodedata.normalize("NFD", SENTENCES[1])
    assert decomposed != SENTENCES[1]
    assert subwords.encode([decomposed]) == subwords.encode([SENTENCES[1]])


def test_special_tokens_and_sizes() -> None:
    subwords = Subwords(SENTENCES, size=80)
    assert len(subwords) == 80
    # As many as there are in these sentences, where more are asked for.
    assert 100 < len(Subwords(SENTENCES, size=10_000)) < 1000
    assert 3 in subwords.encode(["Щ"])[0]
    assert subwords.decode([[BEGIN, *subwords.encode(["A girl."])[0], END, 0, 0]]) == ["A girl."]
    # Words are split at punctuation: none is learned together with a word.
    assert subwords.encode(["girl"])[0] + subwords.encode(["a."])[0][-1:] == subwords.encode(["girl."])[0]


def test_subwords_are_the_same_in_every_process() -> None:
    code = (
        "from ntkdyn.experiments.sentences import Subwords\n"
        f"print(Subwords({SENTENCES!r}, size=150).encode({SENTENCES!r}))"
    )
    # Another order of hashes, and one thread.
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == f"{Subwords(SENTENCES, size=150).encode(SENTENCES)}\n"


def test_pairs_are_what_the_network_is_given_and_should_say() -> None:
    subwords = Subwords(SENTENCES, size=120)
    pairs = as_tokens(subwords, SentencePairs(("A girl.", "Two men"), ("Männer", "Zwei weiße Männer sind")), longest=64)
    girl, men = subwords.encode(["A girl.", "Two men"])
    man, four = subwords.encode(["Männer", "Zwei weiße Männer sind"])
    assert trimmed(pairs.source[:1]).tolist() == [[*girl, END]]
    assert trimmed(pairs.source[1:]).tolist() == [[*men, END]]
    (source, given), following = pairs[0:1]
    assert (source.tolist(), given.tolist(), following.tolist()) == ([[*girl, END]], [[BEGIN, *man]], [[*man, END]])
    (_, given), following = pairs[:2]
    rest = [0] * (len(four) - len(man))
    assert given.tolist() == [[BEGIN, *man, END, *rest][: len(four) + 1], [BEGIN, *four]]
    assert following.tolist() == [[*man, END, *rest], [*four, END]]


def some_pairs(count: int) -> TokenPairs:
    """Pairs of random lengths; the first token of a source tells which it is."""
    generator = torch.Generator().manual_seed(0)
    source, target = torch.zeros(count, 20, dtype=torch.int64), torch.zeros(count, 22, dtype=torch.int64)
    for row, (one, other) in enumerate(torch.randint(1, 20, (count, 2), generator=generator).tolist()):
        source[row, :one] = target[row, :other] = 5
        source[row, 0] = 10 + row
    return TokenPairs(source, target)


def test_an_epoch_takes_every_pair_once_in_batches_of_similar_length() -> None:
    pairs = some_pairs(1003)
    epoch = pairs.epoch(batch_size=10, seed=1, data_order=0, epoch=4)
    assert len(epoch) == 1000
    numbers = epoch.source[:, 0].sub(10).tolist()
    assert len(set(numbers)) == 1000
    for row, number in enumerate(numbers[:50]):
        assert torch.equal(epoch.source[row], pairs.source[number])
        assert torch.equal(epoch.target[row], pairs.target[number])
    lengths = (epoch.target != 0).sum(1).view(100, 10)
    spread = (lengths.amax(1) - lengths.amin(1)).double().mean()
    # In pools of 160 sorted pairs a batch has a sixteenth of all lengths; ten random lengths span 15 of 19.
    assert spread < 3
    assert lengths[:, 0].sort().values.tolist() != lengths[:, 0].tolist()


def test_the_order_belongs_to_seed_stream_and_epoch() -> None:
    pairs = some_pairs(64)
    words = {"batch_size": 8, "seed": 1, "data_order": 0, "epoch": 0}
    first = pairs.epoch(**words).source
    torch.manual_seed(3)
    assert torch.equal(pairs.epoch(**words).source, first)
    for name in ("seed", "data_order", "epoch"):
        assert not torch.equal(pairs.epoch(**words | {name: words[name] + 1}).source, first)


def test_a_choice_of_pairs_is_fixed_and_in_their_order() -> None:
    assert chosen(5, 5, split_seed=0) == [0, 1, 2, 3, 4]
    assert chosen(100, 7, split_seed=0) == sorted(set(chosen(100, 7, split_seed=0)))
    assert chosen(100, 7, split_seed=0) != chosen(100, 7, split_seed=1)
    with pytest.raises(ConfigurationError, match="found 5 sentence pairs, expected at least 6; ask for fewer"):
        chosen(5, 6, split_seed=0)


def test_sentences_that_are_too_long_are_refused() -> None:
    subwords = Subwords(SENTENCES, size=120)
    with pytest.raises(ConfigurationError, match=r"found a sentence of \d+ tokens, expected at most 8; leave it out"):
        as_tokens(subwords, SentencePairs(tuple(SENTENCES[:2]), tuple(SENTENCES[:2])), longest=8)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigurationError, match=r"tokenizers is missing; pip install 'ntkdyn\[translation\]'"):
        Subwords(SENTENCES, size=100)
