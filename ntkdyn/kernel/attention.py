"""nn.MultiheadAttention with its projections as linear calls that can be seen.

torch.nn.functional.multi_head_attention_forward makes them where no TorchFunctionMode looks, and uses slices of the
stacked weight where queries and keys differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def attention_call(module: nn.MultiheadAttention) -> Callable[..., Any]:
    """Stand-in for module.forward: the same function of the same parameters; its own forward where in doubt.

    softmax(Q Kᵀ / √d_head + mask) V per head, Q = W_q q + b_q and so on. With different queries and keys each call
    computes all three projections and reads its own: the gradient of the others is zero, and the whole parameter
    stays one.
    """
    original = module.forward

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if _unusual(module, query, key, value) or (is_causal and attn_mask is None):
            return original(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = (_heads(module, one) for one in _projections(module, query, key, value))
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if is_causal else _mask(module, q, key_padding_mask, attn_mask)
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / module.head_dim)) @ k.mT
            weights = (scores if mask is None else scores + mask).softmax(-1)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal)
        mixed = mixed.transpose(1, 2).flatten(2)
        if not module.batch_first:
            mixed = mixed.transpose(0, 1)
        return functional.linear(mixed, module.out_proj.weight, module.out_proj.bias), weights

    return call


def _unusual(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        module.bias_k is not None
        or module.bias_v is not None
        or module.add_zero_attn
        or (module.training and module.dropout > 0)
        or any(one.dim() != 3 or one.is_nested for one in (query, key, value))
        or key.shape[:2] != value.shape[:2]
    )


def _projections(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Queries, keys and values in the layout of the inputs."""
    width, bias = module.embed_dim, module.in_proj_bias
    if not module._qkv_same_embed_dim:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        made = [functional.linear(one, weight) for one, weight in zip((query, key, value), weights, strict=True)]
        if bias is None:
            return made
        # The bias of all three is one parameter, added as a whole to each in its place.
        before = (0, width, 2 * width)
        padded = [functional.pad(one, (left, 2 * width - left)) for one, left in zip(made, before, strict=True)]
        return [torch.add(one, bias)[..., left : left + width] for one, left in zip(padded, before, strict=True)]
    seen: dict[int, tuple[Tensor, ...]] = {}
    for one in (query, key, value):
        if id(one) not in seen:
            seen[id(one)] = functional.linear(one, module.in_proj_weight, bias).chunk(3, -1)
    return [seen[id(one)][place] for place, one in enumerate((query, key, value))]


def _heads(module: nn.MultiheadAttention, tensor: Tensor) -> Tensor:
    """[N, T, d] or [T, N, d] -> [N, heads, T, d / heads]."""
    tensor = tensor if module.batch_first else tensor.transpose(0, 1)
    return torch.unflatten(tensor, -1, (module.num_heads, module.head_dim)).transpose(1, 2)


def _mask(
    module: nn.MultiheadAttention, query: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> Tensor | None:
    """Sum of both masks, as numbers that are added to the scores [N, heads, T, S]."""
    total = None
    if attn_mask is not None:
        total = _numbers(attn_mask, query)
        total = torch.unflatten(total, 0, (-1, module.num_heads)) if total.dim() == 3 and len(total) > 1 else total
    if key_padding_mask is not None:
        padding = _numbers(key_padding_mask, query)[:, None, None]
        total = padding if total is None else total + padding
    return total


def _numbers(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)
