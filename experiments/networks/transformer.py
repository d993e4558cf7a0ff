"""Encoder-decoder Transformer with a Gate in the place of every feed-forward ReLU."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ConfigurationError
from ...gates import Gate

PADDING = 0


class Transformer(nn.Module):
    """Encoder-decoder Transformer; ``model(source, target)`` gives logits of the token that follows each target token.

    Tokens are integers below ``vocabulary``; token 0 is padding, at the end of a sentence. Embeddings times
    sqrt(width) plus sines and cosines of the position enter ``depth`` encoder and ``depth`` decoder layers. A layer
    normalizes before attention and feed-forward part and adds what they give to its input; a normalization ends each
    stack. The gates are those of the hidden features of the feed-forward parts, all positions of a feature one unit;
    softmax and LayerNorm are untouched. Embedding of targets and readout are one matrix, sources have their own.

    Args:
        vocabulary: number of tokens, of both languages together.
        width: features of a token; a multiple of ``heads`` and even.
        depth: layers of the encoder, and of the decoder.
        heads: attention heads.
        feedforward: hidden features of a feed-forward part.
        dropout: share of dropped numbers, after the embeddings, in the feed-forward parts, and of what is added.
        positions: longest sentence in tokens.
        granularity: of the gates, as in Gate.

    Weights are uniform with variance 2 / (inputs + outputs) of the layer, embeddings normal with variance 1 / width,
    biases 0. Path lengths: a residual sum gives either branch probability 1/2, attention is a path along its values;
    paths from source and target count alike.

    Raises: ConfigurationError: sizes that do not fit.
    Source: Vaswani et al. 2017 (arXiv 1706.03762); normalization first as in Xiong et al. 2020 (arXiv 2002.04745);
        2211.17180 for gates in translation, whose place in the network is our own choice.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        feedforward: int = 256,
        dropout: float = 0.1,
        positions: int = 256,
        granularity: Literal["channel", "layer"] = "channel",
    ) -> None:
        super().__init__()
        if width % heads or width % 2:
            raise ConfigurationError(
                f"Transformer: found width={width} and heads={heads}; expected an even width, a multiple of heads"
            )
        self.width = width
        self.sources = nn.Embedding(vocabulary, width)
        self.targets = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        # Not part of the state: it follows from width and positions.
        self.register_buffer("waves", _waves(positions, width), persistent=False)
        self.encoder = nn.ModuleList()
        self.decoder = nn.ModuleList()
        for _ in range(depth):
            self.encoder.append(_EncoderLayer(width, heads, feedforward, dropout, granularity))
            self.decoder.append(_DecoderLayer(width, heads, feedforward, dropout, granularity))
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder_norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=width**-0.5)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    waves: Tensor

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits [N, T, vocabulary] for sources [N, S] and targets [N, T]; position t sees targets up to t."""
        return self.read(self.decode(target, *self.encode(source)))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Features of the sources [N, S, width], and which tokens are none of padding, bool [N, 1, 1, S]."""
        present = (source != PADDING)[:, None, None, :]
        hidden = self._embedded(self.sources, source)
        for layer in self.encoder:
            hidden = layer(hidden, present)
        return self.encoder_norm(hidden), present

    def decode(self, target: Tensor, sources: Tensor, present: Tensor) -> Tensor:
        """Features [N, T, width] of the targets, given what ``encode`` returned."""
        hidden = self._embedded(self.targets, target)
        for layer in self.decoder:
            hidden = layer(hidden, sources, present)
        normalized: Tensor = self.decoder_norm(hidden)
        return normalized

    def read(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of features [..., width]."""
        return functional.linear(hidden, self.targets.weight)

    def _embedded(self, embedding: nn.Module, tokens: Tensor) -> Tensor:
        # torch.fx traces this narrow, and not the slice waves[:length], whose length is a node of the graph.
        waves = torch.narrow(self.waves, 0, 0, tokens.shape[1])
        embedded: Tensor = self.dropout(embedding(tokens) * math.sqrt(self.width) + waves)
        return embedded


class _EncoderLayer(nn.Module):
    def __init__(
        self, width: int, heads: int, feedforward: int, dropout: float, granularity: Literal["channel", "layer"]
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feedforward = _FeedForward(width, feedforward, dropout, granularity)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, present: Tensor) -> Tensor:
        normalized = self.norm1(hidden)
        hidden = hidden + self.dropout(self.attention(normalized, normalized, present))
        outputs: Tensor = hidden + self.dropout(self.feedforward(self.norm2(hidden)))
        return outputs


class _DecoderLayer(nn.Module):
    def __init__(
        self, width: int, heads: int, feedforward: int, dropout: float, granularity: Literal["channel", "layer"]
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = _Attention(width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.feedforward = _FeedForward(width, feedforward, dropout, granularity)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, sources: Tensor, present: Tensor) -> Tensor:
        normalized = self.norm1(hidden)
        # Padding comes last, so that no token of a sentence sees it through the causal mask.
        hidden = hidden + self.dropout(self.attention(normalized, normalized, None))
        hidden = hidden + self.dropout(self.cross_attention(self.norm2(hidden), sources, present))
        outputs: Tensor = hidden + self.dropout(self.feedforward(self.norm3(hidden)))
        return outputs


class _Attention(nn.Module):
    """softmax(q kᵀ / √d) v in each head; without a mask of present keys it is causal."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, present: Tensor | None) -> Tensor:
        mixed = functional.scaled_dot_product_attention(
            self._by_head(self.query(queries)),
            self._by_head(self.key(keys)),
            self._by_head(self.value(keys)),
            attn_mask=present,
            is_causal=present is None,
        )
        outputs: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return outputs

    def _by_head(self, features: Tensor) -> Tensor:
        return torch.unflatten(features, 2, (self.heads, -1)).transpose(1, 2)


class _FeedForward(nn.Sequential):
    def __init__(self, width: int, hidden: int, dropout: float, granularity: Literal["channel", "layer"]) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.gate = Gate(hidden, dim=-1, granularity=granularity)
        self.dropout = nn.Dropout(dropout)
        self.contract = nn.Linear(hidden, width)


def _waves(positions: int, width: int) -> Tensor:
    """sin(p / 10000^(2i/width)) and the cosines, [positions, width]."""
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(positions)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).to(torch.get_default_dtype())
