"""Inputs of every shape that users hand over: several arguments, batches by name, outputs as an object."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkdyn import empirical_ntk, explain_ntk


def _close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    difference = (found.double() - expected).abs().max()
    assert difference <= tolerance * expected.abs().max()


class Classifier(nn.Module):
    """A small BERT: token, position and kind embeddings, masked self-attention, pooled head, outputs as an object."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions, self.kinds = nn.Embedding(12, 8), nn.Embedding(6, 8), nn.Embedding(2, 8)
        self.norm = nn.LayerNorm(8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="gelu")
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Any = None) -> Any:
        places = torch.arange(input_ids.shape[1])
        kinds = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        hidden = self.norm(self.words(input_ids) + self.positions(places) + self.kinds(kinds))
        hidden = self.encoder(hidden, src_key_padding_mask=None if attention_mask is None else attention_mask == 0)
        return SimpleNamespace(logits=self.head(hidden[:, 0].tanh()), hidden=hidden)


def _batch(size: int) -> dict[str, Tensor]:
    mask = torch.ones(size, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    return {"input_ids": torch.randint(0, 12, (size, 6)), "attention_mask": mask}


@pytest.mark.parametrize("reduce", ["trace", "full"])
def test_batch_by_name(reduce: str, oracles: ModuleType) -> None:
    torch.manual_seed(0)
    model, x1, x2 = Classifier().eval(), _batch(4), _batch(3)
    expected = oracles.ntk_by_loop(model, x1, x2, reduce=reduce, forward=lambda model, batch: model(**batch).logits)
    _close(empirical_ntk(model, x1, x2, reduce=reduce, dtype=torch.float64), expected)


def test_source_and_target(oracles: ModuleType) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True).eval()
    x = torch.randn(4, 5, 8), torch.randn(4, 3, 8)
    expected = oracles.ntk_by_loop(model, x, forward=lambda model, pair: model(*pair))
    _close(empirical_ntk(model, x, dtype=torch.float64), expected)


def test_dictionary_as_one_argument(oracles: ModuleType) -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.layer(batch["left"] + batch["right"])

    model, x = Summed(), {"left": torch.randn(4, 3), "right": torch.randn(4, 3)}
    _close(empirical_ntk(model, x, dtype=torch.float64), oracles.ntk_by_loop(model, x))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_hugging_face_networks(kind: str, oracles: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra test")
    torch.manual_seed(0)
    if kind == "bert":
        sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 8}
        config = transformers.BertConfig(vocab_size=20, intermediate_size=12, num_labels=3, **sizes)
        model = transformers.BertForSequenceClassification(config).eval()
    else:
        sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8}
        config = transformers.GPT2Config(vocab_size=20, bos_token_id=0, eos_token_id=0, **sizes)
        model = transformers.GPT2LMHeadModel(config).eval()
    x = _batch(4) | {"input_ids": torch.randint(0, 20, (4, 6))}
    expected = oracles.ntk_by_loop(model, x, forward=lambda model, batch: model(**batch).logits)
    _close(empirical_ntk(model, x, dtype=torch.float64), expected)
    _close(empirical_ntk(model, x), expected, 1e-5)
    places = {"bert.embeddings.position_embeddings", "transformer.wpe"}  # the same for all samples
    assert {row.layer for row in explain_ntk(model, x).layers if row.route == "autograd"} <= places
