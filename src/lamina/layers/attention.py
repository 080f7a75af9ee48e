"""`nn.MultiheadAttention` with projections that are modules, so that each can be decomposed like any other linear layer.

PyTorch's own keeps the weights of three projections in one parameter, hands them to a function, and never calls its output
projection as a module. Here all four are called. The rest computes what `torch.nn.functional.multi_head_attention_forward` does.

    L, S   positions of queries, of keys and values      N   batch      E   width of queries      H   heads, d = E / H
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
_TOLD = ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn", "bias_k", "bias_v")
_PACKED = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@final
class Attention(nn.MultiheadAttention):
    """An `nn.MultiheadAttention` whose projections are modules.

    It says of itself that it holds no packed weights, so PyTorch's fused encoders leave it alone.

    Args:
        like: What it takes the place of: heads, dropout, layout and the biases of keys and values are its own.
        parts: ``q_proj`` E→E, ``k_proj`` and ``v_proj`` from their own widths to E, and ``out_proj`` E→E.
    """

    def __init__(self, like: nn.MultiheadAttention, parts: Mapping[str, nn.Module]) -> None:
        nn.Module.__init__(self)
        for name in _TOLD:
            setattr(self, name, getattr(like, name))
        self._qkv_same_embed_dim = False
        for name in _PACKED:
            self.register_parameter(name, None)
        for name in PARTS:
            self.register_module(name, parts[name])

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention` has it: ``(L, N, E)``, ``(N, L, E)`` with ``batch_first``, or ``(L, E)``."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        N, L = q.shape[:2]
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None  # the hint says what it holds
        else:
            is_causal = False
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, b.expand(N, 1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        more = (self.bias_k is not None) + self.add_zero_attn
        mask = mask if mask is None or not more else F.pad(mask, (0, more))
        q, k, v = (x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.mT
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        output = self.out_proj(mixed.transpose(1, 2).reshape(N, L, self.embed_dim))
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """What is added to the scores, of a shape that goes with ``(N, H, L, S)``."""
        (N, L, _), S = q.shape, k.shape[1]
        found = None
        if attention is not None:
            if tuple(attention.shape) not in ((L, S), (N * self.num_heads, L, S)):
                raise RuntimeError(
                    f"attn_mask is {tuple(attention.shape)}; it must be {(L, S)} or {(N * self.num_heads, L, S)}"
                )
            found = _added(attention, q.dtype)
            found = found.unflatten(0, (N, self.num_heads)) if found.dim() == 3 else found
        if padding is not None:
            if tuple(padding.shape) != (N, S):
                raise RuntimeError(f"key_padding_mask is {tuple(padding.shape)}; it must be {(N, S)}")
            padding = _added(padding, q.dtype)[:, None, None]
            found = padding if found is None else found + padding
        return found


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask.to(dtype)
