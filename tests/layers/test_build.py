"""A layer in a form: exact at full rank for every attribute, and in everything else what it was."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from lamina import BlockTerm, LowRank
from lamina.forms import Form
from lamina.layers.build import factored
from lamina.layers.decomposed import DecomposedLayer
from lamina.network.walk import walk

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

# The promise at full rank, as a share of the output's size.
EXACT = {torch.float32: 1e-5, torch.float64: 1e-10}


def built(dense: nn.Module, form: Form) -> DecomposedLayer:
    return factored(walk(dense).layers[""], form)


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    found, wanted = found.detach(), wanted.detach()
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


def unequal(batch: int, channels: int, dimensions: int) -> tuple[int, ...]:
    """An input shape with unequal sides: a swapped axis shows."""
    return (batch, channels, *(7, 9, 6)[:dimensions])


@st.composite
def convolutions(draw: st.DrawFn, pointwise: bool) -> tuple[nn.Module, Tensor]:
    """Any convolution of one group, with an input that it takes."""
    d = draw(st.integers(1, 3))
    kernel = (1,) * d if pointwise else tuple(draw(st.lists(st.integers(1, 3), min_size=d, max_size=d)))
    if not pointwise and max(kernel) == 1:
        kernel = (*kernel[:-1], 3)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    stride: tuple[int, ...] = tuple(draw(st.lists(st.integers(1, 2), min_size=d, max_size=d)))
    dilation = tuple(draw(st.lists(st.integers(1, 2), min_size=d, max_size=d)))
    padding: Any = draw(
        st.one_of(st.sampled_from(["same", "valid"]), st.lists(st.integers(0, 2), min_size=d, max_size=d).map(tuple))
    )
    if padding == "same":
        stride = (1,) * d
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    I, O = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    dense = CONVOLUTIONS[d](I, O, kernel, stride, padding, dilation, bias=draw(st.booleans()), padding_mode=mode, dtype=dtype)
    x = torch.randn(unequal(draw(st.integers(0, 2)), I, d), dtype=dtype)
    if d > 1 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last if d == 2 else torch.channels_last_3d)
    return dense, x


@given(convolutions(pointwise=False), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_block_term_at_full_rank_is_the_same_function(case: tuple[nn.Module, Tensor], whole_in: bool, whole_out: bool) -> None:
    # traps: full rank not exact; padding modes, same/valid, asymmetric, dilation, Conv1d, Conv3d, channels_last, empty batch
    dense, x = case
    geometry = walk(dense).layers[""].geometry
    form = BlockTerm(None if whole_in else geometry.in_channels, None if whole_out else geometry.out_channels)
    assert error(built(dense, form)(x), dense(x)) <= EXACT[x.dtype]


@given(convolutions(pointwise=True))
@settings(max_examples=100, deadline=None)
def test_low_rank_at_full_rank_is_the_same_function_for_pointwise_convolutions(case: tuple[nn.Module, Tensor]) -> None:
    dense, x = case
    geometry = walk(dense).layers[""].geometry
    assert error(built(dense, LowRank(min(geometry.out_channels, geometry.in_channels)))(x), dense(x)) <= EXACT[x.dtype]


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from([(), (0,), (3,), (2, 3), (2, 0, 3), (2, 1, 3, 2)]),
    st.sampled_from(list(EXACT)),
)
@settings(max_examples=100, deadline=None)
def test_low_rank_at_full_rank_is_the_same_function_for_linear_layers(
    I: int, O: int, bias: bool, batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    dense = nn.Linear(I, O, bias=bias, dtype=dtype)
    x = torch.randn(*batch, I, dtype=dtype)
    assert error(built(dense, LowRank(min(O, I)))(x), dense(x)) <= EXACT[dtype]


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from(list(EXACT)))
@settings(max_examples=50, deadline=None)
def test_low_rank_at_full_rank_is_the_same_function_for_hugging_face_conv1d(I: int, O: int, dtype: torch.dtype) -> None:
    # traps: HF Conv1D (transposed)
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    dense = conv1d(O, I).to(dtype)
    with torch.no_grad():
        dense.bias.normal_()
    x = torch.randn(2, 3, I, dtype=dtype)
    assert error(built(dense, LowRank(min(O, I)))(x), dense(x)) <= EXACT[dtype]


def test_an_unbatched_input_is_taken_as_before() -> None:
    dense, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(4, 7, 9)
    assert error(built(dense, BlockTerm(4, 6))(x), dense(x)) <= 1e-5


def test_the_border_is_exact_with_a_bias_under_zero_padding() -> None:
    # traps: bias in the first factor, which gives 0.30 of border error
    dense, x = nn.Conv2d(4, 6, 3, padding=2), torch.zeros(1, 4, 5, 5)
    with torch.no_grad():
        dense.bias.fill_(3.0)
    torch.testing.assert_close(built(dense, BlockTerm(2, 3))(x), torch.full((1, 6, 7, 7), 3.0))
    point = nn.Conv2d(4, 6, 1, padding=1)
    torch.testing.assert_close(built(point, LowRank(2))(x), point(x))


@pytest.mark.parametrize(
    ("dtype", "share"),
    # Each of three factors, and each value between them, is rounded once to the dtype: a few units of its epsilon.
    [(torch.bfloat16, 4 * torch.finfo(torch.bfloat16).eps), (torch.float16, 4 * torch.finfo(torch.float16).eps)],
    ids=str,
)
def test_half_precision_at_full_rank_is_off_by_rounding_only(dtype: torch.dtype, share: float) -> None:
    # traps: bfloat16/float16
    conv, x = nn.Conv2d(16, 24, 3, padding=1).to(dtype), torch.randn(2, 16, 7, 9, dtype=dtype)
    assert error(built(conv, BlockTerm(16, 24))(x), conv(x)) <= share
    linear, x = nn.Linear(16, 24).to(dtype), torch.randn(5, 16, dtype=dtype)
    assert error(built(linear, LowRank(16))(x), linear(x)) <= share


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dense", [nn.Linear(8, 6), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 3)], ids=["linear", "1×1", "3×3"])
def test_the_factors_have_the_dtype_of_the_weight(dense: nn.Module, dtype: torch.dtype) -> None:
    # traps: hooks, training flag, requires_grad, device, dtype, memory format
    dense = dense.to(dtype)
    stack = built(dense, LowRank(4) if walk(dense).layers[""].geometry.pointwise else BlockTerm(4, 4))
    assert {p.dtype for p in stack.parameters()} == {dtype}
    assert {p.device for p in stack.parameters()} == {dense.weight.device}


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layer_last", [False, True], ids=["contiguous layer", "channels_last layer"])
@pytest.mark.parametrize("input_last", [False, True], ids=["contiguous input", "channels_last input"])
def test_the_output_lies_in_memory_as_it_did(kernel: int, layer_last: bool, input_last: bool) -> None:
    # traps: channels_last in and out. Not for Conv3d: PyTorch's own 1×1×1 convolution on a CPU always answers contiguous.
    dense, x = nn.Conv2d(8, 6, kernel), torch.randn(unequal(2, 8, 2))
    if layer_last:
        dense = dense.to(memory_format=torch.channels_last)
    if input_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for form in [LowRank(3)] if kernel == 1 else [BlockTerm(3, 4), BlockTerm(None, 4), BlockTerm(3, None)]:
        assert built(dense, form)(x).stride() == dense(x).stride(), form


def test_hooks_are_kept_and_run_in_their_order() -> None:
    dense, order = nn.Linear(6, 4), []
    dense.register_forward_pre_hook(lambda module, args: order.append("before"))
    dense.register_forward_hook(lambda module, args, output: order.append("after"))
    dense.register_forward_hook(lambda module, args, kwargs, output: order.append("after, with kwargs"), with_kwargs=True)
    dense.register_full_backward_hook(lambda module, before, after: order.append("backward"))
    dense.register_full_backward_pre_hook(lambda module, gradient: order.append("before backward"))
    built(dense, LowRank(2))(torch.randn(3, 6, requires_grad=True)).sum().backward()
    assert order == ["before", "after", "after, with kwargs", "before backward", "backward"]


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_kept(training: bool) -> None:
    stack = built(nn.Linear(6, 4).train(training), LowRank(2))
    assert all(module.training is training for module in stack.modules())


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_factors_are_frozen_as_the_weight_was_and_the_bias_as_the_bias(weight: bool, bias: bool) -> None:
    dense = nn.Conv2d(6, 4, 3)
    dense.weight.requires_grad_(weight)
    dense.bias.requires_grad_(bias)
    stack = built(dense, BlockTerm(3, 2))
    assert {name: p.requires_grad for name, p in stack.named_parameters()} == {
        "reduce.weight": weight,
        "core.weight": weight,
        "expand.weight": weight,
        "expand.bias": bias,
    }


@pytest.mark.parametrize("form", [BlockTerm(3, 2), BlockTerm(None, 2), BlockTerm(3, None), BlockTerm(None, None)], ids=str)
def test_nothing_is_stored_where_the_dense_layer_stores(form: Form) -> None:
    # traps: bias storage shared with the original layer
    dense = nn.Conv2d(6, 4, 3)
    before = [p.detach().clone() for p in dense.parameters()]
    with torch.no_grad():
        for parameter in built(dense, form).parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(a, b) for a, b in zip(before, dense.parameters(), strict=True))


def test_each_factor_has_storage_of_its_own() -> None:
    stack = built(nn.Conv2d(6, 4, 3), BlockTerm(3, 2))
    pointers = [p.untyped_storage().data_ptr() for p in stack.parameters()]
    sizes = [p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in stack.parameters()]
    assert len(set(pointers)) == len(pointers) and all(sizes)


def test_a_weight_of_zeros_becomes_factors_that_compute_zeros() -> None:
    dense = nn.Conv2d(6, 4, 3, bias=False)
    nn.init.zeros_(dense.weight)
    assert built(dense, BlockTerm(3, 2))(torch.randn(1, 6, 5, 5)).abs().max() == 0
