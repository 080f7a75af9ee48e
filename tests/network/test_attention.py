"""Attention with projections of its own computes what `nn.MultiheadAttention` does, whatever it is asked."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lamina.network.attention import PARTS, Attention


def parts_of(dense: nn.MultiheadAttention) -> dict[str, nn.Module]:
    """Linear layers with copies of an attention's weights."""
    if dense._qkv_same_embed_dim:
        weights = dense.in_proj_weight.chunk(3)
    else:
        weights = (dense.q_proj_weight, dense.k_proj_weight, dense.v_proj_weight)
    biases = (None, None, None) if dense.in_proj_bias is None else dense.in_proj_bias.chunk(3)
    pairs = [*zip(weights, biases, strict=True), (dense.out_proj.weight, dense.out_proj.bias)]
    made = {}
    for name, (weight, bias) in zip(PARTS, pairs, strict=True):
        made[name] = nn.Linear(*reversed(weight.shape), bias=bias is not None, dtype=weight.dtype)
        made[name].load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return made


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.MultiheadAttention, tuple[Tensor, ...], dict[str, Any]]:
    torch.manual_seed(draw(st.integers(0, 99)))
    heads, d = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    E, N, L, S = heads * d, draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kdim, vdim = (draw(st.sampled_from([None, 5])) for _ in range(2))
    itself = kdim is None and vdim is None and draw(st.booleans())
    dense = nn.MultiheadAttention(
        E, heads, bias=draw(st.booleans()), add_bias_kv=draw(st.booleans()), add_zero_attn=draw(st.booleans()),
        kdim=kdim, vdim=vdim, batch_first=draw(st.booleans()), dtype=torch.float64,
    )  # fmt: skip
    for parameter in dense.parameters():
        nn.init.normal_(parameter)
    S = L if itself else S
    shapes = [(N, L, E), (N, S, kdim or E), (N, S, vdim or E)]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    batched = draw(st.booleans())
    if not batched:
        inputs, N = [x[0] for x in inputs], 1
    elif not dense.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    inputs = [inputs[0]] * 3 if itself else inputs
    asked: dict[str, Any] = {"need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}
    kind = draw(st.sampled_from(["bool", "float"]))

    def mask(*shape: int) -> Tensor:
        allowed = torch.rand(shape) < 0.6
        allowed[..., 0] = True  # a query without any key attends to nothing, which is NaN
        return ~allowed if kind == "bool" else torch.randn(shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)

    masks = draw(st.sampled_from(["none", "2d", "3d", "causal"]))
    if masks in ("2d", "3d"):
        asked["attn_mask"] = mask(L, S) if masks == "2d" else mask(N * heads, L, S)
    elif masks == "causal" and L == S and not (dense.bias_k is not None or dense.add_zero_attn):
        asked["attn_mask"] = torch.ones(L, L, dtype=torch.bool).triu(1)
        asked["is_causal"] = True
        kind = "bool"
    if draw(st.booleans()):
        asked["key_padding_mask"] = mask(N, S) if batched else mask(S)
    return dense, tuple(inputs), asked


@given(cases())
@settings(max_examples=300, deadline=None)
def test_it_answers_what_pytorchs_own_does(case: tuple[nn.MultiheadAttention, tuple[Tensor, ...], dict[str, Any]]) -> None:
    # traps: masks, need_weights, batch_first, cross-attention
    dense, inputs, asked = case
    opened = Attention(dense, parts_of(dense))
    for training in (True, False):
        wanted, found = (net.train(training)(*inputs, **asked) for net in (dense, opened))
        torch.testing.assert_close(found, wanted, equal_nan=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_it_drops_out_what_pytorchs_own_does(need_weights: bool) -> None:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    opened, x, answers = Attention(dense, parts_of(dense)), torch.randn(2, 5, 8), []
    for net in (dense, opened):
        torch.manual_seed(1)
        answers.append(net.train()(x, x, x, need_weights=need_weights))
    torch.testing.assert_close(answers[1], answers[0])


@pytest.mark.parametrize("asked", [
    {"attn_mask": torch.zeros(1, 5)},
    {"attn_mask": torch.zeros(2, 5, 5)},
    {"attn_mask": torch.zeros(5)},
    {"key_padding_mask": torch.zeros(1, 5)},
    {"is_causal": True},
], ids=["rows", "heads", "dimensions", "batch", "no mask"])  # fmt: skip
def test_it_refuses_the_masks_that_pytorchs_own_refuses(asked: dict[str, Any]) -> None:
    dense = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    for net in (dense, Attention(dense, parts_of(dense))):
        with pytest.raises((RuntimeError, AssertionError)):
            net(x, x, x, **asked)


def test_a_fused_encoder_calls_its_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    other = copy.deepcopy(encoder)
    called = []
    for each in other.layers:
        each.self_attn = Attention(each.self_attn, parts_of(each.self_attn))
        for name in PARTS:
            getattr(each.self_attn, name).register_forward_hook(lambda *_, name=name: called.append(name))
    other.eval()
    x = torch.randn(3, 5, 8)
    with torch.inference_mode():
        torch.testing.assert_close(other(x), encoder(x))
    assert called == [*PARTS] * 2


@pytest.mark.parametrize("at", [0, 1])
def test_sequences_of_unequal_length_reach_it_through_a_fused_layer(at: int) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    other = copy.deepcopy(encoder)
    opened = Attention(other.layers[at].self_attn, parts_of(other.layers[at].self_attn))
    other.layers[at].self_attn = opened.eval()
    x, padding = torch.randn(3, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", UserWarning)  # nested tensors are a prototype, PyTorch says
        wanted, found = (net(x, src_key_padding_mask=padding) for net in (encoder, other))
    torch.testing.assert_close(found[~padding], wanted[~padding], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_an_encoder_with_it_is_exported(strict: bool) -> None:
    torch.manual_seed(0)
    encoder, x = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval(), torch.randn(3, 5, 8)
    for layer in encoder.layers:
        layer.self_attn = Attention(layer.self_attn, parts_of(layer.self_attn)).eval()
    program = torch.export.export(encoder, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), encoder(x))
