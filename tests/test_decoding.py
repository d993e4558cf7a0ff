"""Greedy translations against the network's own choices, and BLEU."""

from __future__ import annotations

import math
import sys
from collections import Counter

import pytest
import torch
from torch import Tensor

from ntkdyn.errors import ConfigurationError
from ntkdyn.experiments.decoding import bleu, greedy
from ntkdyn.experiments.networks import Transformer
from ntkdyn.experiments.sentences import BEGIN, END

TOKENS = 24


def network(seed: int = 0) -> Transformer:
    """A network of random weights, large enough for words to differ from those before them."""
    torch.manual_seed(seed)
    model = Transformer(TOKENS, width=16, depth=2, heads=2, feedforward=12, positions=40).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.5 * torch.randn_like(parameter))
            elif name.startswith("decoder"):
                parameter.mul_(6)
        model.targets.weight[END] *= 1.5
    return model


def sources(lengths: list[int]) -> Tensor:
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    generator = torch.Generator().manual_seed(1)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(4, TOKENS, (length,), generator=generator)
        row[length - 1] = END
    return tokens


@pytest.mark.parametrize("seed", range(4))
def test_each_word_is_the_likeliest_after_those_before(seed: int) -> None:
    model, given = network(seed), sources([5, 2, 7, 3, 6, 4])
    said = greedy(model, given, batch_size=4)
    for source, tokens in zip(given, said, strict=True):
        length = int((source != 0).sum())
        ended = len(tokens) < 2 * length + 10
        # Teacher-forced: the whole translation at once, without padding, alone.
        target = torch.tensor([[BEGIN, *tokens]])
        likeliest = model(source[None, :length], target).argmax(2)[0].tolist()
        assert likeliest[: len(tokens)] == tokens
        assert END not in tokens
        assert not ended or likeliest[-1] == END


def test_sentences_end_at_their_own_length() -> None:
    lengths = {len(tokens) for seed in range(6) for tokens in greedy(network(seed), sources([5, 2, 7, 3]))}
    assert len(lengths) > 2
    assert min(lengths) < 12


def test_what_does_not_end_is_cut_off() -> None:
    model = network()
    with torch.no_grad():
        model.decoder_norm.weight.zero_()
        model.decoder_norm.bias.copy_(model.targets.weight[7])
        model.targets.weight[7] *= 100
    assert greedy(model, sources([3, 2, 20])) == [[7] * 16, [7] * 14, [7] * 40]


def test_batches_do_not_change_translations() -> None:
    model, given = network(2), sources([5, 2, 7, 3, 6])
    assert greedy(model, given) == greedy(model, given, batch_size=1) == greedy(model, given, batch_size=2)


def by_hand(hypotheses: list[list[str]], references: list[list[str]]) -> float:
    """BLEU of Papineni et al. 2002 on words: brevity penalty times the geometric mean of the n-gram precisions."""
    logs = 0.0
    for n in range(1, 5):
        matched = total = 0
        for said, meant in zip(hypotheses, references, strict=True):
            grams = [Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1)) for text in (said, meant)]
            matched += sum((grams[0] & grams[1]).values())
            total += sum(grams[0].values())
        logs += math.log(matched / total) / 4
    lengths = [sum(map(len, texts)) for texts in (hypotheses, references)]
    return 100 * math.exp(logs) * min(1.0, math.exp(1 - lengths[1] / lengths[0]))


def test_bleu_of_a_perfect_translation_is_100() -> None:
    sentences = ["Zwei junge weiße Männer sind im Freien.", "Ein kleines Mädchen klettert, es lacht."]
    assert bleu(sentences, sentences) == pytest.approx(100, abs=1e-9)
    assert bleu([one.lower() for one in sentences], sentences) < 90  # case counts


def test_bleu_equals_its_formula() -> None:
    references = ["ein kleines Mädchen klettert in ein Spielhaus aus Holz", "zwei Männer stehen am Herd und kochen"]
    hypotheses = ["ein kleines Mädchen klettert in ein Haus aus Holz", "zwei Männer stehen am Herd"]
    expected = by_hand([one.split() for one in hypotheses], [one.split() for one in references])
    assert 30 < expected < 90
    assert bleu(hypotheses, references) == pytest.approx(expected, rel=1e-9)
    # Punctuation is a word of its own, as 13a has it.
    dotted = bleu([one + "." for one in hypotheses], [one + "." for one in references])
    with_dots = by_hand([[*one.split(), "."] for one in hypotheses], [[*one.split(), "."] for one in references])
    assert dotted == pytest.approx(with_dots, rel=1e-9)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigurationError, match=r"sacrebleu is missing; pip install 'ntkdyn\[translation\]'"):
        bleu(["a"], ["a"])
