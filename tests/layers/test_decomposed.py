"""What a decomposed layer is to the code around it: plain factors that answer for the layer they replace."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from lamina import BlockTerm, LayerError, LowRank, Separable
from lamina.forms import Form
from lamina.layers import decomposed
from lamina.layers.build import factored, skeleton
from lamina.layers.decomposed import BlockTermLayer, DecomposedLayer, laid_out, memory_format
from lamina.network.readers import reader_of
from lamina.network.walk import walk
from lamina.values import Geometry

NORMS: dict[int, type[nn.Module]] = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}

CASES = {
    "linear": (nn.Linear(6, 4), LowRank(3)),
    "1×1": (nn.Conv2d(6, 4, 1, stride=2, bias=False), LowRank(3)),
    "3×3": (nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), BlockTerm(3, 2)),
    "3×3, whole in": (nn.Conv2d(6, 4, 3, padding="same"), BlockTerm(None, 2)),
    "3×3, whole out": (nn.Conv2d(6, 4, (3, 2), stride=(1, 2)), BlockTerm(3, None)),
    "separable": (nn.Conv2d(6, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(1, 2)), Separable(5)),
    "separable, reflect": (nn.Conv2d(6, 4, 3, padding="same", padding_mode="reflect"), Separable(5)),
    "1d": (nn.Conv1d(6, 4, 3, dilation=2), BlockTerm(3, 2)),
    "3d": (nn.Conv3d(6, 4, 3), BlockTerm(3, 2)),
    "1×1 in groups": (nn.Conv2d(32, 34, 1, stride=2, groups=2), LowRank(3)),
    "1×1 in groups, narrowing": (nn.Conv1d(36, 32, 1, groups=2, bias=False), LowRank(16)),
    "3×3 in groups": (nn.Conv2d(32, 34, 3, padding=1, groups=2, padding_mode="reflect"), BlockTerm(5, 7)),
    "3×3 in groups, whole in": (nn.Conv2d(32, 34, (3, 2), (1, 2), groups=2), BlockTerm(None, 7)),
    "3×3 in groups, whole out": (nn.Conv2d(32, 34, 3, padding="same", groups=2), BlockTerm(5, None)),
    "3×3 in groups, whole": (nn.Conv2d(32, 34, 3, groups=2), BlockTerm(None, None)),
    "groups in groups": (nn.Conv1d(48, 54, 3, dilation=2, groups=3, bias=False), BlockTerm(8, 6, 2)),
    "groups in groups, whole sides": (nn.Conv3d(32, 36, 2, groups=2), BlockTerm(None, None, 2)),
    "groups, channels last": (nn.Conv2d(48, 48, 3, groups=3).to(memory_format=torch.channels_last), BlockTerm(5, 6)),
    "transposed 1×1": (nn.ConvTranspose2d(6, 4, 1, stride=2, output_padding=1), LowRank(3)),
    "transposed": (nn.ConvTranspose2d(6, 4, (3, 2), (2, 3), (1, 0), (1, 2), dilation=(2, 1)), BlockTerm(3, 2)),
    "transposed in groups": (nn.ConvTranspose1d(6, 4, 3, 2, bias=False), BlockTerm(4, 2, 2)),
    "transposed, whole in": (nn.ConvTranspose3d(6, 4, 2, 2), BlockTerm(None, 2)),
    "transposed, whole sides in groups": (nn.ConvTranspose2d(6, 4, 3), BlockTerm(None, None, 2)),
    "transposed, channels last": (nn.ConvTranspose2d(6, 4, 3).to(memory_format=torch.channels_last), BlockTerm(3, None)),
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
    x = example(dense)
    torch.testing.assert_close(stack(x), same(x), rtol=1e-4, atol=1e-5)


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
    x = example(dense)
    torch.testing.assert_close(merged(x), stack(x), rtol=1e-4, atol=1e-5)


def test_a_merged_layer_has_storage_of_its_own(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    _, stack = pair
    stored = {p.untyped_storage().data_ptr() for p in stack.parameters()}
    assert not stored & {p.untyped_storage().data_ptr() for p in stack.merged().parameters()}


def test_its_factors_are_plain_layers_of_torch(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    dense, stack = pair
    beside = {nn.ConvTranspose1d: nn.Conv1d, nn.ConvTranspose2d: nn.Conv2d, nn.ConvTranspose3d: nn.Conv3d}
    plain = (type(dense), *[kind for own, kind in beside.items() if type(dense) is own])
    assert all(type(factor) in plain for factor in stack.factors())
    assert [name for name, _ in stack.named_children()] in (
        ["first", "second"],
        ["reduce", "core", "expand"],
        ["core"],
        ["core", "expand"],
        ["reduce", "core"],
        ["vertical", "horizontal"],
    )


def test_only_the_last_factor_has_a_bias(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    dense, stack = pair
    *inner, last = stack.factors()
    assert all(factor.bias is None for factor in inner)
    assert (last.bias is None) == (dense.bias is None)


def test_along_each_side_of_the_map_only_one_factor_moves(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    dense, stack = pair
    if isinstance(dense, nn.Linear):  # it has no map: every factor is as plain as itself
        assert {type(factor) for factor in stack.factors()} == {nn.Linear}
        return
    for side in range(dense.weight.ndim - 2):
        moving = [f for f in stack.factors() if f.stride[side] != 1 or f.kernel_size[side] > 1] or stack.factors()[:1]
        assert len(moving) == 1 and moving[0].padding_mode == dense.padding_mode
        padding = dense.padding if isinstance(dense.padding, str) else dense.padding[side]
        assert (moving[0].padding if isinstance(padding, str) else moving[0].padding[side]) == padding


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


# ---- the geometry it tells of ----


def told(stack: DecomposedLayer) -> dict[str, Any]:
    names = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    return {name: getattr(stack, name) for name in (*names, "padding_mode", "groups", "transposed") if hasattr(stack, name)}


OTHER: dict[type, Any] = {int: 99, bool: True, str: "circular", tuple: (7, 7)}


def test_what_tells_of_its_geometry_cannot_be_changed(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    stack = copy.deepcopy(pair[1])
    before = told(stack)
    for name, value in before.items():
        with pytest.raises(LayerError, match=rf"^{name} of a \w+ \(.*\) cannot be set to .*before it is decomposed"):
            setattr(stack, name, not value if isinstance(value, bool) else OTHER[type(value)])
        setattr(stack, name, value)  # what it is already
    assert told(stack) == before and len(before) >= 2


@pytest.mark.parametrize("value", [None, nn.Parameter(torch.zeros(1)), torch.zeros(1)], ids=["None", "parameter", "tensor"])
def test_a_weight_or_a_bias_cannot_be_tied_to_it(pair: tuple[nn.Module, DecomposedLayer], value: Any) -> None:
    stack = copy.deepcopy(pair[1])
    for name in ("weight", "bias"):
        with pytest.raises(
            LayerError, match=rf"^{name} of a \w+ \(.*\) cannot be set: it lives in the factors; .*lamina\.merge$"
        ):
            setattr(stack, name, value)
    assert stack.state_dict().keys() == pair[1].state_dict().keys()


def channels_of(stack: DecomposedLayer, values: Tensor) -> Tensor:
    """A value a channel, in the shape in which it goes with an output."""
    return values if not stack.geometry.kernel else values.reshape(-1, *[1] * len(stack.geometry.kernel))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_its_own_weight_with_scaled_outputs_and_any_bias_can_be_set(
    pair: tuple[nn.Module, DecomposedLayer], dtype: torch.dtype
) -> None:
    # what fusing a batch norm does: conv.weight, conv.bias = fuse_conv_bn_weights(…)
    stack, x = copy.deepcopy(pair[1]).to(dtype), example(pair[0]).double()
    reader, strides = reader_of(stack.geometry), [weight.stride() for weight in stack.weights()]
    O = stack.geometry.out_channels
    scale, shift = (torch.tensor(each, dtype=dtype).repeat(O)[:O] for each in ([0.5, -2.0, 1.0, 3.0], [0.1, 0.2, 0.3, 0.4]))

    def answer(module: nn.Module) -> Tensor:
        found: Tensor = copy.deepcopy(module).double()(x)
        return found

    with torch.no_grad():
        bias = torch.zeros(O, dtype=dtype) if stack.bias is None else stack.bias.clone()
        wanted = (answer(stack) - channels_of(stack, bias)) * channels_of(stack, scale) + channels_of(
            stack, bias * scale + shift
        )
        weight = reader.weight(stack.weight).clone()
        stack.weight = nn.Parameter(reader.stored(weight * scale.reshape(-1, *[1] * (weight.ndim - 1))))
        stack.bias = nn.Parameter(bias * scale + shift)
        near = {"rtol": 0.1, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(answer(stack), wanted, **near)
        torch.testing.assert_close(answer(stack.merged()), wanted, **near)
    assert [weight.stride() for weight in stack.weights()] == strides and {p.dtype for p in stack.parameters()} == {dtype}


def test_pytorchs_own_fusion_of_a_batch_norm_keeps_the_factors(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    dense, stack = pair
    sides = len(stack.geometry.kernel)
    norm: Any = NORMS[sides](stack.geometry.out_channels)
    fuse: Any = functools.partial(fuse_conv_bn_eval, transpose=stack.geometry.transposed) if sides else fuse_linear_bn_eval
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        x = example(dense) if sides else example(dense).reshape(-1, 6)
        fused = fuse(copy.deepcopy(stack).eval(), norm.eval())
        torch.testing.assert_close(fused(x), norm(stack(x)), rtol=1e-4, atol=1e-5)
    assert type(fused) is type(stack) and [p.shape for p in fused.weights()] == [p.shape for p in stack.weights()]


SPOILT: dict[str, Callable[[Tensor], Tensor]] = {
    "the same": lambda weight: weight.clone(),
    "one entry more": lambda weight: torch.cat([weight.flatten()[:1] + 1e-3, 2 * weight.flatten()[1:]]).view(weight.shape),
    "another": lambda weight: torch.randn_like(weight),
    "NaN": lambda weight: torch.full_like(weight, torch.nan),
    "another dtype": lambda weight: 2 * weight.double(),
    "without values": lambda weight: 2 * weight.to("meta"),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_weight_that_is_no_scaling_of_its_own_cannot_be_set(
    pair: tuple[nn.Module, DecomposedLayer], spoil: Callable[[Tensor], Tensor]
) -> None:
    stack = copy.deepcopy(pair[1])
    with torch.no_grad():
        weight = nn.Parameter(spoil(stack.weight + 0))
    with pytest.raises(LayerError, match="cannot be set: it lives in the factors"):
        stack.weight = weight
    assert all(torch.equal(a, b) for a, b in zip(stack.parameters(), pair[1].parameters(), strict=True))


def test_any_other_attribute_can_be_set(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    stack = copy.deepcopy(pair[1])
    stack.scale, stack.training = 2.0, False
    assert (stack.scale, stack.training) == (2.0, False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_of_it_is_as_it_is(copied: Callable[[Any], Any], pair: tuple[nn.Module, DecomposedLayer]) -> None:
    dense, stack = pair
    twin, x = copied(stack), example(dense)
    assert torch.equal(twin(x), stack(x)) and repr(twin) == repr(stack)
    assert torch.equal(twin.weight, stack.weight)
    (name, value), *_ = told(stack).items()
    with pytest.raises(LayerError, match=rf"^{name} "):
        setattr(twin, name, value + 1)
    with torch.no_grad():
        twin.factors()[0].weight.add_(1)
    assert not torch.equal(twin(x), stack(x))


# ---- how it is called ----


def example(dense: nn.Module) -> Tensor:
    return torch.randn(2, getattr(dense, "in_channels", 6), *(7, 9, 8)[: dense.weight.ndim - 2])


def test_its_input_has_the_name_that_the_dense_layers_has(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    dense, stack = pair
    x = example(dense)
    assert dense(input=x).shape == stack(input=x).shape
    assert torch.equal(stack(input=x), stack(x))


@pytest.mark.parametrize("form", [BlockTerm(None, None), BlockTerm(4, 2, 2)], ids=str)
def test_scripted_with_whole_sides_or_in_groups_it_computes_the_same(form: BlockTerm) -> None:
    scripted_is_the_same(nn.Conv2d(6, 4, 3, padding=1), form)


def test_scripted_it_computes_the_same(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    dense, stack = pair
    scripted_is_the_same(dense, stack.form)


def scripted_is_the_same(dense: nn.Module, form: Form) -> None:
    net, x = nn.Sequential(built(dense, form), nn.ReLU()), example(dense).requires_grad_()
    with pytest.warns((DeprecationWarning, FutureWarning)):  # one or the other, by the version of torch
        scripted = torch.jit.script(net)
    assert torch.equal(scripted(x), net(x))
    found, wanted = (torch.autograd.grad(each(x).square().sum(), [x, *each.parameters()]) for each in (scripted, net))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("form", [LowRank(2), BlockTerm(3, 2), BlockTerm(None, None), BlockTerm(4, 2, 2)], ids=str)
def test_the_lines_that_are_scripted_compute_the_same_when_they_are_run(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, x = nn.Conv2d(6, 4, 1 if isinstance(form, LowRank) else 3), torch.randn(2, 6, 5, 5)
    stack = factored(walk(dense).layers[""], form)
    wanted = stack(x)
    monkeypatch.setattr(torch.jit, "is_scripting", lambda: True)
    monkeypatch.setattr(decomposed, "run_factor", None)  # not called there
    assert torch.equal(stack(x), wanted)


# ---- what other tools put there ----


class Quantised(nn.Module):
    """Its ``weight`` is a method, as that of PyTorch's quantised layers is."""

    def weight(self) -> Tensor:
        return torch.ones(4, 3)

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight().T


@pytest.mark.parametrize("other", [nn.Identity(), nn.Sequential(nn.Linear(3, 4)), Quantised()], ids=lambda m: type(m).__name__)
def test_a_factor_without_a_weight_is_called_but_cannot_be_read(other: nn.Module) -> None:
    stack = built(nn.Linear(6, 4), LowRank(3))
    stack.second = other
    x = torch.randn(2, 6)
    assert torch.equal(stack(x), other(stack.first(x)))
    for read in (lambda: stack.weight, stack.merged):
        with pytest.raises(LayerError, match=f"a {type(other).__name__} stands where a factor stood"):
            read()


# ---- the way back ----


@pytest.mark.parametrize("trains", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_merged_weight_trains_if_any_factor_does_and_its_bias_as_the_bias(trains: tuple[bool, bool], bias: bool) -> None:
    stack = built(nn.Linear(6, 4), LowRank(3))
    for factor, flag in zip(stack.factors(), trains, strict=True):
        factor.weight.requires_grad_(flag)
    stack.bias.requires_grad_(bias)
    merged = stack.merged()
    assert (merged.weight.requires_grad, merged.bias.requires_grad) == (any(trains), bias)
    assert merged.weight.is_leaf and merged.bias.is_leaf


def test_a_layer_merged_under_autocast_is_the_one_merged_without(pair: tuple[nn.Module, DecomposedLayer]) -> None:
    _, stack = pair
    with torch.autocast("cpu", torch.bfloat16):
        merged = stack.merged()
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert torch.equal(merged.weight, stack.merged().weight)


LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}


@pytest.mark.parametrize("channels", [(6, 4), (1, 4), (6, 1)], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_merged_layer_lies_in_memory_as_the_dense_one_did(dims: int, kernel: int, channels: tuple[int, int]) -> None:
    for layout in (torch.contiguous_format, LAYOUTS[dims]):
        dense = {2: nn.Conv2d, 3: nn.Conv3d}[dims](*channels, kernel)
        dense.weight = nn.Parameter(laid_out(dense.weight.detach(), layout))
        merged = built(dense, LowRank(1) if kernel == 1 else BlockTerm(1, 1)).merged()
        assert merged.weight.stride() == dense.weight.stride(), layout


def test_a_merged_layer_of_gpt2_is_contiguous() -> None:
    dense = pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 6)
    merged = built(dense, LowRank(4)).merged()
    assert type(merged) is type(dense) and merged.weight.is_contiguous() and merged.weight.shape == (6, 4)
    torch.testing.assert_close(merged.weight, dense.weight)


# ---- layouts ----


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("shape", [(4, 6, 3), (1, 6, 3), (4, 1, 3), (4, 6, 1), (1, 6, 1)], ids=str)
def test_a_weight_tells_the_layout_that_it_was_made_in(dims: int, shape: tuple[int, int, int]) -> None:
    O, I, k = shape
    for layout in (torch.contiguous_format, LAYOUTS[dims]):
        made = torch.empty(O, I, *(k,) * dims, memory_format=layout)
        assert memory_format(made) == layout
        for other in (torch.contiguous_format, LAYOUTS[dims]):
            weight = laid_out(torch.randn(O, I, *(k,) * dims).contiguous(memory_format=other), layout)
            assert weight.stride() == made.stride() and memory_format(weight) == layout


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (1, 1, 1), (4, 1, 1, 1)], ids=str)
def test_a_weight_of_no_layout_of_its_own_counts_as_contiguous(shape: tuple[int, ...]) -> None:
    assert memory_format(torch.empty(shape)) == torch.contiguous_format


def test_a_weight_laid_out_keeps_its_values() -> None:
    for shape in ((4, 1, 3, 2), (1, 6, 1, 1), (4, 6, 3, 2)):
        weight = torch.randn(shape)
        assert torch.equal(laid_out(weight, torch.channels_last), weight)


@pytest.mark.parametrize(
    ("geometry", "form"),
    [
        (Geometry("Linear", 2**20, 2**20, True), LowRank(2)),
        (Geometry("Conv2d", 2**19, 2**19, True, (3, 3), (1, 1), (1, 1), (1, 1)), BlockTerm(2, 2)),
    ],
    ids=str,
)
def test_a_layer_without_values_takes_no_memory(geometry: Geometry, form: Form) -> None:
    stack = skeleton(geometry, form)
    assert all(p.is_meta for p in stack.parameters())
    assert stack.weight.shape[:2] == (geometry.out_channels, geometry.in_channels)
