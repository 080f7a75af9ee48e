"""What a decomposed layer is to the code around it: plain factors that answer for the layer they replace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lamina import BlockTerm, LowRank
from lamina.forms import Form
from lamina.layers.build import factored, skeleton
from lamina.layers.decomposed import BlockTermLayer, DecomposedLayer
from lamina.network.walk import walk
from lamina.values import Geometry

CASES = {
    "linear": (nn.Linear(6, 4), LowRank(3)),
    "1×1": (nn.Conv2d(6, 4, 1, stride=2, bias=False), LowRank(3)),
    "3×3": (nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), BlockTerm(3, 2)),
    "3×3, whole in": (nn.Conv2d(6, 4, 3, padding="same"), BlockTerm(None, 2)),
    "3×3, whole out": (nn.Conv2d(6, 4, (3, 2), stride=(1, 2)), BlockTerm(3, None)),
    "1d": (nn.Conv1d(6, 4, 3, dilation=2), BlockTerm(3, 2)),
    "3d": (nn.Conv3d(6, 4, 3), BlockTerm(3, 2)),
}


def built(dense: nn.Module, form: Form) -> DecomposedLayer:
    return factored(walk(dense).layers[""], form)


@pytest.fixture(params=CASES.values(), ids=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, DecomposedLayer]:
    dense, form = request.param
    return dense, built(dense, form)


def test_it_answers_for_the_geometry_of_the_layer_it_replaces(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    # traps: code that reads .weight, .in_features, .out_channels
    dense, stack = pair
    asked = ["in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
    asked += ["padding_mode", "groups", "transposed", "output_padding"]
    assert {name: getattr(stack, name) for name in asked if hasattr(dense, name)} == {
        name: getattr(dense, name) for name in asked if hasattr(dense, name)
    }


def test_its_weight_answers_for_shape_dtype_and_device(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    # traps: code that reads .weight.dtype, .weight.device
    dense, stack = pair
    assert (stack.weight.shape, stack.weight.dtype, stack.weight.device) == (
        dense.weight.shape,
        dense.weight.dtype,
        dense.weight.device,
    )
    assert (stack.bias is None) == (dense.bias is None)


def test_its_weight_is_that_of_the_function_it_computes(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    dense, stack = pair
    same = copy.deepcopy(dense)
    with torch.no_grad():
        same.weight.copy_(stack.weight)
    x = torch.randn(2, 6, *(7, 9, 8)[: dense.weight.ndim - 2])
    torch.testing.assert_close(stack(x), same(x), rtol=1e-4, atol=1e-5)


def test_its_weight_is_read_only(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    _, stack = pair
    with pytest.raises((AttributeError, KeyError)):
        stack.weight = nn.Parameter(torch.zeros(4, 6))
    with pytest.raises(AttributeError):
        stack.weight = torch.zeros(4, 6)
    assert "weight" not in stack.state_dict()


def test_a_gradient_through_its_weight_reaches_the_factors(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    _, stack = pair
    stack.zero_grad()
    stack.weight.square().sum().backward()
    assert all(factor.weight.grad.abs().sum() > 0 for factor in stack.factors())


def test_merged_is_a_layer_of_the_replaced_type_with_that_weight(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    dense, stack = pair
    merged = stack.merged()
    assert type(merged) is type(dense) and repr(merged) == repr(dense)
    torch.testing.assert_close(merged.weight.detach(), stack.weight.detach().clone())
    x = torch.randn(2, 6, *(7, 9, 8)[: dense.weight.ndim - 2])
    torch.testing.assert_close(merged(x), stack(x), rtol=1e-4, atol=1e-5)


def test_a_merged_layer_has_storage_of_its_own(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    _, stack = pair
    stored = {p.untyped_storage().data_ptr() for p in stack.parameters()}
    assert not stored & {p.untyped_storage().data_ptr() for p in stack.merged().parameters()}


def test_its_factors_are_plain_layers_of_torch(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    dense, stack = pair
    plain = (nn.Linear,) if isinstance(dense, nn.Linear) else (type(dense),)
    assert all(type(factor) in plain for factor in stack.factors())
    assert [name for name, _ in stack.named_children()] in (
        ["first", "second"],
        ["reduce", "core", "expand"],
        ["core", "expand"],
        ["reduce", "core"],
    )


def test_only_the_last_factor_has_a_bias(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    dense, stack = pair
    *inner, last = stack.factors()
    assert all(factor.bias is None for factor in inner)
    assert (last.bias is None) == (dense.bias is None)


def test_only_one_factor_moves_over_the_map(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    dense, stack = pair
    if isinstance(dense, nn.Linear):  # it has no map: every factor is as plain as itself
        assert {type(factor) for factor in stack.factors()} == {nn.Linear}
        return
    moving = [f for f in stack.factors() if any(s != 1 for s in f.stride) or max(f.kernel_size) > 1]
    assert len(moving) == 1 and (moving[0].padding, moving[0].padding_mode) == (dense.padding, dense.padding_mode)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("whole", [False, True])
def test_a_block_term_in_groups_composes_to_the_weight_of_its_function(groups: int, whole: bool) -> None:
    geometry = Geometry("Conv2d", 12, 8, True, (3, 3), (1, 1), (1, 1), (1, 1))
    stack = BlockTermLayer(geometry, BlockTerm(None if whole else 4, 8, groups)).to_empty(device="cpu")
    dense = nn.Conv2d(8, 12, 3, padding=1)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.normal_(std=0.3)
        dense.weight.copy_(stack.weight)
        dense.bias.copy_(stack.bias)
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(stack(x), dense(x), rtol=1e-4, atol=1e-5)


def test_a_skeleton_takes_no_memory() -> None:
    geometry = Geometry("Conv2d", 12, 8, True, (3, 3), (1, 1), (1, 1), (1, 1))
    assert all(p.is_meta for p in skeleton(geometry, BlockTerm(4, 4)).parameters())


def test_it_says_what_it_was_and_what_it_is() -> None:
    text = repr(built(nn.Conv2d(6, 4, 3), BlockTerm(3, 2)))
    assert "Conv2d 6→4 3×3" in text and "3→2" in text


def test_it_can_be_copied() -> None:
    stack = built(nn.Conv2d(6, 4, 3), BlockTerm(3, 2))
    x = torch.randn(1, 6, 5, 5)
    assert torch.equal(copy.deepcopy(stack)(x), stack(x))
