"""`nn.MultiheadAttention` with projections that are modules, so that each can be decomposed like any other linear layer.

PyTorch's own keeps the weights of three projections in one parameter, hands them to a function, and never calls its output
projection as a module. In an `Attention` all four are called. The rest computes what PyTorch's function of attention does.

    L, S   positions of queries, of keys and values      N   batch      E   width of queries      H   heads, d = E / H
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .readers import linear, own_ways, parent_of

PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
_PACKED = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")


ATTENTION = frozenset({*_PACKED, "bias_k", "bias_v"})
"""Names of the parameters that an attention may hold."""


def refusal(attention: nn.MultiheadAttention) -> str | None:
    """Why the projections of an attention cannot be taken apart; None where they can."""
    if own := own_ways(attention, nn.MultiheadAttention):
        return f"{type(attention).__name__} is a subclass of MultiheadAttention with {', '.join(own)} of its own"
    if parent_of(attention.out_proj) is not nn.Linear:  # whatever else stands there, its weight alone is read
        return f"its out_proj is a {type(attention.out_proj).__name__}, whose weight it reads itself"
    return None


def rows_of(attention: nn.MultiheadAttention) -> dict[str, dict[str, tuple[nn.Parameter, int, int]]]:
    """For each projection, of which parameter its weight and its bias are which rows: from one up to another."""
    width, out = attention.embed_dim, attention.out_proj
    found: dict[str, dict[str, tuple[nn.Parameter, int, int]]] = {}
    for number, name in enumerate(PARTS[:3]):
        first, last = number * width, (number + 1) * width
        if attention._qkv_same_embed_dim:
            found[name] = {"weight": (attention.in_proj_weight, first, last)}
        else:
            found[name] = {"weight": (getattr(attention, f"{name}_weight"), 0, width)}
        if attention.in_proj_bias is not None:
            found[name]["bias"] = attention.in_proj_bias, first, last
    found["out_proj"] = {name: (p, 0, len(p)) for name, p in out._parameters.items() if p is not None}
    return found


def parts_of(attention: nn.MultiheadAttention) -> dict[str, nn.Module]:
    """The four projections of an attention as linear layers that lie on its own memory."""
    return {name: _linear(**{what: _some(*rows) for what, rows in told.items()}) for name, told in rows_of(attention).items()}


def _some(parameter: nn.Parameter, first: int, last: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach()[first:last], requires_grad=parameter.requires_grad)


def _linear(weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Module:
    layer = linear(weight.shape[1], weight.shape[0], bias is not None)
    layer._parameters["weight"] = weight
    if bias is not None:
        layer._parameters["bias"] = bias
    return layer


class _Nothing(Tensor):
    """Stands where PyTorch's fused encoders look for packed weights: a tensor of another type, which they leave alone."""


def _nothing(attention: nn.Module) -> Tensor | None:
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return None  # which they leave alone as well; a recorder makes no tensors of other types
    known = next(attention.parameters())
    return torch.empty(0, dtype=known.dtype, device=known.device).as_subclass(_Nothing)


@final
class Attention(nn.MultiheadAttention):
    """An `nn.MultiheadAttention` whose projections are modules.

    It says of itself that its packed weights are of another type, so PyTorch's fused encoders leave it alone.

    Args:
        like: What it takes the place of: heads, dropout and layout are its own; biases of keys and values lie on its memory.
        parts: ``q_proj`` E→E, ``k_proj`` and ``v_proj`` from their own widths to E, and ``out_proj`` E→E.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    in_proj_weight = in_proj_bias = property(lambda self: _nothing(self))

    def __init__(self, like: nn.MultiheadAttention, parts: Mapping[str, nn.Module]) -> None:
        nn.Module.__init__(self)
        mine = vars(self)
        self.like = type(like), like._qkv_same_embed_dim, type(like.out_proj)
        mine.update({name: value for name, value in vars(like).items() if name not in mine})
        self._qkv_same_embed_dim = False
        # In the order in which the other has them: a fingerprint of what it is `closed` to is that one's.
        self._parameters = {name: None if name in _PACKED or p is None else _aliased(p) for name, p in like._parameters.items()}
        for name in PARTS:
            self.register_module(name, parts[name])

    def closed(self, parts: Mapping[str, nn.Module]) -> nn.MultiheadAttention:
        """PyTorch's own attention with the weights of four linear layers.

        Args:
            parts: ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``, all linear, their weights read only.
        """
        kind, packed, out_kind = self.like
        new: nn.MultiheadAttention = kind.__new__(kind)
        nn.Module.__init__(new)
        told = {name: value for name, value in vars(self).items() if name not in vars(new) and name != "like"}
        vars(new).update(told | {"_qkv_same_embed_dim": packed})
        held: dict[str, Any] = dict.fromkeys(_PACKED)
        weights, biases = ([getattr(parts[name], what) for name in PARTS[:3]] for what in ("weight", "bias"))
        alone = {f"{name}_weight": weight for name, weight in zip(PARTS, weights, strict=False)}
        held |= {"in_proj_weight": _joined(weights)} if packed else alone
        held["in_proj_bias"] = None if biases[0] is None else _joined(biases)
        new._parameters = {name: held[name] if name in _PACKED else p for name, p in self._parameters.items()}
        own = parts["out_proj"]
        out: nn.Module = out_kind.__new__(out_kind)
        vars(out).update(vars(own))
        new.register_module("out_proj", out)
        return new

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
        if query.is_nested:  # by a fused layer before it; all three are then
            return self._nested(query, key, value, need_weights, average_attn_weights)
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
        # Positions first in memory, as PyTorch's own leaves it: a dropout behind it draws in the order of the memory.
        output = self.out_proj(mixed.permute(2, 0, 1, 3).reshape(L, N, self.embed_dim))
        if not batched:
            return output[:, 0], None if weights is None else weights[0]
        return output.transpose(0, 1) if self.batch_first else output, weights

    def _nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Of sequences of unequal length, as PyTorch's encoders make them of a padding mask."""
        lengths = torch.tensor([len(each) for each in key.unbind()], device=key.device)
        q, k, v = (torch.nested.to_padded_tensor(x, 0.0) for x in (query, key, value))
        padding = torch.arange(k.shape[1], device=key.device) >= lengths[:, None]
        output, weights = self(q, k, v, padding, need_weights, None, average)
        parts = [row[: len(each)] for row, each in zip(output, query.unbind(), strict=True)]
        return torch.nested.as_nested_tensor(parts), weights

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
            found = found.reshape(N, self.num_heads, L, S) if found.dim() == 3 else found
        if padding is not None:
            if tuple(padding.shape) != (N, S):
                raise RuntimeError(f"key_padding_mask is {tuple(padding.shape)}; it must be {(N, S)}")
            padding = _added(padding, q.dtype)[:, None, None]
            found = padding if found is None else found + padding
        return found


def _aliased(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


def _joined(tensors: list[Tensor]) -> nn.Parameter:
    """One parameter of several, without values where one of them has none."""
    parts = [t.detach() for t in tensors]
    if any(t.is_meta for t in parts):
        parts = [t.to("meta") for t in parts]
    return nn.Parameter(torch.cat(parts), requires_grad=any(t.requires_grad for t in tensors))


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask.to(dtype)
