"""A layer in a form: exact at full rank for every attribute, and in everything else what it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from lamina import BlockTerm, Dense, LowRank, RankError, Separable
from lamina.forms import Form, candidates
from lamina.layers.build import empty, exact, factored, losses, needs_fit, placeholder, random
from lamina.layers.decomposed import DecomposedLayer, laid_out
from lamina.network.surgery import HOOKS
from lamina.network.walk import walk

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

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
    """Any convolution, with an input that it takes; in groups it is wide enough to be decomposed."""
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
    if draw(st.integers(0, 2)):
        more = {"padding": padding, "padding_mode": mode, "groups": draw(st.sampled_from([1, 1, 2, 3]))}
        if more["groups"] > 1:
            I, O = (more["groups"] * (16 + width // 3) for width in (I, O))
        kind: Any = CONVOLUTIONS[d]
    else:
        most = [max(s, d) for s, d in zip(stride, dilation, strict=True)]
        kind = TRANSPOSED[d]
        more = {
            "padding": 0 if isinstance(padding, str) else padding,
            "output_padding": [draw(st.integers(0, m - 1)) for m in most],
        }
    dense = kind(I, O, kernel, stride, dilation=dilation, bias=draw(st.booleans()), dtype=dtype, **more)
    x = torch.randn(unequal(draw(st.integers(0, 2)), I, d), dtype=dtype)
    if d > 1 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last if d == 2 else torch.channels_last_3d)
    return dense, x


KINDS: list[Form] = [LowRank(1), BlockTerm(1, 1), BlockTerm(None, 1), BlockTerm(1, None), BlockTerm(None, None), Separable(1)]
"""One form of each kind; what is a kind's is that of every rank."""


def kinds(dense: nn.Module) -> st.SearchStrategy[Form]:
    """The kinds of forms that a layer may take."""
    geometry = walk(dense).layers[""].geometry

    def fits(form: Form) -> bool:
        try:
            form.check(geometry)
        except RankError:
            return False
        return True

    return st.sampled_from([form for form in KINDS if fits(form)])


@given(st.booleans().flatmap(convolutions), st.data())
@settings(max_examples=150, deadline=None)
def test_the_exact_stack_needs_no_factorisation(case: tuple[nn.Module, Tensor], data: st.DataObject) -> None:
    dense, x = case
    form = data.draw(kinds(dense))
    stack = exact(walk(dense).layers[""], form, {})
    assert type(stack) is type(built(dense, form))  # whatever looks at types sees what it will see
    assert error(stack(x), dense(x)) <= EXACT[x.dtype]


def test_exact_stacks_of_one_width_share_their_identities_and_their_layers_weight() -> None:
    layers = [walk(nn.Linear(5, 5)).layers[""] for _ in range(3)]
    identities: dict[Any, Tensor] = {}
    stacks = [exact(layer, LowRank(2), identities) for layer in layers]
    places = [{p.data_ptr() for p in stack.parameters() if p.ndim == 2} for stack in stacks]
    assert len(identities) == 1 and len(set.union(*places)) == 4
    assert all(layer.parameter.data_ptr() in own for layer, own in zip(layers, places, strict=True))


@given(st.booleans().flatmap(convolutions), st.data())
@settings(max_examples=300, deadline=None)
def test_at_full_rank_every_form_of_a_convolution_is_the_same_function(
    case: tuple[nn.Module, Tensor], data: st.DataObject
) -> None:
    # traps: full rank not exact; padding modes, same/valid, asymmetric, dilation, Conv1d, Conv3d, channels_last, empty batch
    dense, x = case
    form = data.draw(kinds(dense)).at_full_rank(walk(dense).layers[""].geometry)
    assert error(built(dense, form)(x), dense(x)) <= EXACT[x.dtype]


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
    apart = (built(dense, LowRank(min(O, I)))(x) - dense(x)).double().norm()
    # Not relative to the output: a single one may be a small difference of large products.
    assert apart <= EXACT[dtype] * dense.weight.double().norm() * x.double().norm()


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
    for form in (BlockTerm(16, 24), Separable(48)):
        assert error(built(conv, form)(x), conv(x)) <= share
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


LAYOUTS: dict[int, list[torch.memory_format]] = {
    1: [torch.contiguous_format],
    2: [torch.contiguous_format, torch.channels_last],
    3: [torch.contiguous_format, torch.channels_last_3d],
}


def made_in(layout: torch.memory_format, dense: nn.Module) -> Any:
    """A layer as a network in that layout has it, also where a side of its weight is 1."""
    dense.weight = nn.Parameter(laid_out(dense.weight.detach(), layout))
    return dense


@pytest.mark.parametrize("channels", [(8, 6), (1, 6), (8, 1), (1, 1)], ids="{0[0]}→{0[1]}".format)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_output_lies_in_memory_as_it_did(dims: int, kernel: int, channels: tuple[int, int]) -> None:
    # traps: channels_last in and out; one channel or a rank of 1, whose weight is contiguous in every layout
    I, O = channels
    forms: list[Form] = [LowRank(min(I, O, 3)), LowRank(1)]
    if kernel > 1:
        forms = [BlockTerm(min(I, 3), None), BlockTerm(1, None), BlockTerm(None, None)]
        if dims == 2:
            forms += [Separable(min(5, 3 * I, 3 * O)), Separable(1)]
        if dims < 3:  # on one thread of a CPU, PyTorch's own 1×1×1 convolution answers contiguous, whatever it is given
            forms += [BlockTerm(min(I, 3), min(O, 4)), BlockTerm(None, min(O, 4)), BlockTerm(1, 1)]
    for of_layer in LAYOUTS[dims]:
        dense = made_in(of_layer, CONVOLUTIONS[dims](I, O, kernel))
        for of_input in LAYOUTS[dims] if dims < 3 else [of_layer]:
            x = laid_out(torch.randn(unequal(2, I, dims)), of_input)
            for form in forms:
                assert built(dense, form)(x).stride() == dense(x).stride(), (form, of_layer, of_input)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [(8, 6), (1, 6), (8, 1)], ids="{0[0]}→{0[1]}".format)
def test_every_factor_lies_in_memory_as_one_made_in_the_layers_layout(dims: int, channels: tuple[int, int]) -> None:
    I, O = channels
    for layout in LAYOUTS[dims]:
        layer = walk(made_in(layout, CONVOLUTIONS[dims](I, O, 3))).layers[""]
        forms: list[Form] = [BlockTerm(min(I, 3), min(O, 4)), BlockTerm(1, 1), BlockTerm(None, 1)]
        for form in forms + [Separable(2), Separable(1)] * (dims == 2):
            for stack in (factored(layer, form), empty(layer, form), random(layer.geometry, form, layer.module)):
                for factor in stack.factors():
                    made = torch.empty(factor.weight.shape, memory_format=layout)
                    assert factor.weight.stride() == made.stride(), (form, layout)


# ---- what goes along ----

BUILDERS = {
    "factored": factored,
    "placeholder": placeholder,
    "empty": empty,
    "exact": lambda layer, form: exact(layer, form, {}),
}


@pytest.fixture(params=BUILDERS.values(), ids=BUILDERS)
def build(request: pytest.FixtureRequest) -> Callable[[nn.Module, Form], DecomposedLayer]:
    """The four ways in which a layer in a form takes a layer's place."""
    return lambda dense, form: request.param(walk(dense).layers[""], form)


def hooked(order: list[str]) -> nn.Linear:
    """A layer with every kind of hook; each notes that it ran."""
    dense = nn.Linear(6, 4)
    dense.register_forward_pre_hook(lambda module, args: order.append("before"))
    dense.register_forward_pre_hook(lambda module, args, kwargs: order.append("before, with kwargs"), with_kwargs=True)
    dense.register_forward_pre_hook(lambda module, args: order.append("first of all"), prepend=True)
    dense.register_forward_hook(lambda module, args, output: order.append("after"))
    dense.register_forward_hook(lambda module, args, kwargs, output: order.append("after, with kwargs"), with_kwargs=True)
    dense.register_forward_hook(lambda module, args, output: order.append("always"), always_call=True)
    dense.register_full_backward_hook(lambda module, before, after: order.append("backward"))
    dense.register_full_backward_pre_hook(lambda module, gradient: order.append("before backward"))
    return dense


def test_hooks_of_every_kind_are_kept_and_run_in_their_order(build: Callable[[nn.Module, Form], DecomposedLayer]) -> None:
    order: list[str] = []
    dense = hooked(order)
    stack = build(dense, LowRank(2))
    runs = []
    for layer in (dense, stack):
        order.clear()
        layer(torch.randn(3, 6, requires_grad=True)).sum().backward()
        # One that always runs does so where the forward fails.
        with pytest.raises(RuntimeError):
            layer(torch.randn(3, 7))
        runs.append(list(order))
    assert runs[0] == runs[1] and len(set(runs[0])) == 8 and runs[0].count("always") == 2


def test_a_backward_hook_of_the_old_kind_is_kept(build: Callable[[nn.Module, Form], DecomposedLayer]) -> None:
    calls: list[int] = []
    dense = nn.Linear(6, 4)
    dense.register_backward_hook(lambda *_: calls.append(1))
    stack = build(dense, LowRank(2))
    stack(torch.randn(3, 6)).sum().backward()
    assert calls == [1] and stack._is_full_backward_hook is False


def test_hooks_registered_later_are_the_new_layers_alone(build: Callable[[nn.Module, Form], DecomposedLayer]) -> None:
    dense = hooked([])
    before = {name: copy.copy(getattr(dense, name)) for name in HOOKS}
    stack = build(dense, LowRank(2))
    stack.register_forward_hook(lambda *_: None, always_call=True, with_kwargs=True)
    stack.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    stack.register_full_backward_hook(lambda *_: None)
    assert {name: getattr(dense, name) for name in HOOKS} == before


def test_the_users_attributes_go_along(build: Callable[[nn.Module, Form], DecomposedLayer]) -> None:
    dense: Any = nn.Conv2d(6, 4, 3)
    dense.scale, dense.note = 2.0, {"by": "the user"}
    dense.weight.no_decay, dense.weight.tensor_model_parallel, dense.bias.lr_scale = True, False, 2.0
    stack = build(dense, BlockTerm(3, 2))
    assert (stack.scale, stack.note) == (2.0, {"by": "the user"}) and stack.note is dense.note
    assert [vars(weight) for weight in stack.weights()] == [{"no_decay": True, "tensor_model_parallel": False}] * 3
    assert stack.bias is not None and vars(stack.bias) == {"lr_scale": 2.0}


def test_no_attribute_of_the_users_takes_the_place_of_the_new_layers_own(
    build: Callable[[nn.Module, Form], DecomposedLayer],
) -> None:
    dense: Any = nn.Conv2d(6, 4, 3)
    geometry, dense.geometry, dense.form = walk(dense).layers[""].geometry, "the user's", "the user's"
    stack = build(dense, BlockTerm(3, 2))
    assert (stack.geometry, set(stack._modules)) == (geometry, {"reduce", "core", "expand"})
    assert stack.form in (BlockTerm(3, 2), BlockTerm(6, 4))  # the exact one is at full rank


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_kept(training: bool, build: Callable[[nn.Module, Form], DecomposedLayer]) -> None:
    stack = build(nn.Linear(6, 4).train(training), LowRank(2))
    assert all(module.training is training for module in stack.modules())


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_factors_are_frozen_as_the_weight_was_and_the_bias_as_the_bias(
    weight: bool, bias: bool, build: Callable[[nn.Module, Form], DecomposedLayer]
) -> None:
    dense = nn.Conv2d(6, 4, 3)
    dense.weight.requires_grad_(weight)
    dense.bias.requires_grad_(bias)
    stack = build(dense, BlockTerm(3, 2))
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


# ---- wherever it is built ----


def parameters(stack: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in stack.named_parameters()}


class default_dtype(AbstractContextManager[None]):
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.before = dtype, torch.get_default_dtype()

    def __enter__(self) -> None:
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


class default_device(AbstractContextManager[None]):
    def __enter__(self) -> None:
        torch.set_default_device("meta")

    def __exit__(self, *_: object) -> None:
        torch.set_default_device(None)


PLACES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "another device": lambda: torch.device("meta"),
    "another default device": default_device,
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
}
DENSE: dict[str, tuple[Callable[[], nn.Module], Form]] = {
    "linear": (lambda: nn.Linear(6, 4), LowRank(3)),
    "3×3": (lambda: nn.Conv2d(6, 4, 3), BlockTerm(3, 2)),
    "groups": (lambda: nn.Conv2d(6, 4, 3), BlockTerm(4, 4, 2)),
    "separable": (lambda: nn.Conv2d(6, 4, 3), Separable(5)),
    "float64": (lambda: nn.Conv2d(6, 4, 3, dtype=torch.float64), BlockTerm(3, 2)),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)
def test_wherever_it_is_built_it_has_the_same_bits(
    case: tuple[Callable[[], nn.Module], Form], place: Callable[[], AbstractContextManager[Any]]
) -> None:
    layer, form = walk(case[0]()).layers[""], case[1]
    wanted = parameters(factored(layer, form))
    with place():
        found = parameters(factored(layer, form))
    for name, value in wanted.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype and not value.is_meta, name


def test_of_a_layer_made_in_inference_mode_a_stack_that_can_be_trained_is_built(
    build: Callable[[nn.Module, Form], DecomposedLayer],
) -> None:
    with torch.inference_mode():
        dense = nn.Conv2d(6, 4, 3)
    stack = build(dense, BlockTerm(3, 2))
    assert not any(p.is_inference() for p in stack.parameters() if p is not dense.bias)


@pytest.mark.parametrize("place", [nullcontext, *PLACES.values()], ids=["here", *PLACES])
def test_building_draws_no_number_of_the_users(place: Callable[[], AbstractContextManager[Any]]) -> None:
    layer = walk(nn.Conv2d(6, 4, 3)).layers[""]
    before = torch.get_rng_state()
    with place():
        for build in BUILDERS.values():
            build(layer, BlockTerm(4, 4, 2))
    assert torch.equal(torch.get_rng_state(), before)


# ---- placeholders ----

HELD: dict[str, tuple[Callable[[], nn.Module], Form]] = {
    **DENSE,
    "1d": (lambda: nn.Conv1d(6, 4, 3), BlockTerm(3, 2)),
    "3d": (lambda: nn.Conv3d(6, 4, 2), BlockTerm(None, 2)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, 2), BlockTerm(3, 2)),
    "large": (lambda: nn.Linear(300, 200), LowRank(150)),
    "one channel": (lambda: nn.Conv2d(1, 4, 3), BlockTerm(1, 2)),
    "bfloat16": (lambda: nn.Linear(30, 20, dtype=torch.bfloat16), LowRank(15)),
    "no bias": (lambda: nn.Conv2d(6, 4, 3, bias=False), BlockTerm(3, 2)),
}


@pytest.fixture(params=HELD.values(), ids=HELD)
def held(request: pytest.FixtureRequest) -> tuple[nn.Module, DecomposedLayer]:
    make, form = request.param
    dense = make()
    return dense, placeholder(walk(dense).layers[""], form)


def test_the_factors_of_a_placeholder_are_of_full_rank(held: tuple[nn.Module, DecomposedLayer]) -> None:
    # A network that inverts, factorises or divides by a norm runs with them as with the real ones.
    for weight in held[1].weights():
        matrix = weight.detach().flatten(1).double()
        assert int(torch.linalg.matrix_rank(matrix)) == min(matrix.shape)


def test_the_values_of_a_placeholder_are_finite_and_no_larger_than_a_layers_own(
    held: tuple[nn.Module, DecomposedLayer],
) -> None:
    for weight in held[1].weights():
        size = weight.detach().float().flatten(1).norm(dim=1)
        # Rows of norm one on average, so that activations keep their size.
        assert bool(torch.isfinite(weight).all()) and 0.1 < float(size.mean()) < 3 and float(size.max()) < 10


def test_a_placeholder_takes_memory_for_the_sum_of_its_sides_alone(held: tuple[nn.Module, DecomposedLayer]) -> None:
    dense, stack = held
    for weight in stack.weights():
        assert weight.untyped_storage().nbytes() <= sum(weight.shape) * weight.element_size()
    if dense.bias is not None:
        assert stack.bias.untyped_storage().data_ptr() == dense.bias.untyped_storage().data_ptr()  # type: ignore[union-attr]


def test_a_placeholder_is_like_the_layer_in_all_but_its_values(held: tuple[nn.Module, DecomposedLayer]) -> None:
    dense, stack = held
    real = factored(walk(dense).layers[""], stack.form)
    seen = [
        {name: (p.shape, p.dtype, p.device, p.requires_grad) for name, p in each.named_parameters()} for each in (stack, real)
    ]
    assert seen[0] == seen[1]
    assert (stack.bias is None) == (dense.bias is None) and (stack.bias is None or torch.equal(stack.bias, dense.bias))


def test_a_placeholder_runs_and_passes_gradients_on(held: tuple[nn.Module, DecomposedLayer]) -> None:
    dense, stack = held
    I = stack.geometry.in_channels
    x = torch.randn(2, I, *(5, 6, 7)[: dense.weight.ndim - 2], dtype=dense.weight.dtype, requires_grad=True)
    y = stack(x)
    assert y.shape == dense(x).shape and y.dtype == dense(x).dtype and bool(torch.isfinite(y).all())
    y.square().sum().backward()
    assert all(p.grad is not None for p in [x, *stack.parameters()])


def test_two_placeholders_have_the_same_values() -> None:
    layer = walk(nn.Conv2d(6, 4, 3)).layers[""]
    first = parameters(placeholder(layer, BlockTerm(3, 2)))
    torch.manual_seed(7)
    assert all(torch.equal(first[name], value) for name, value in parameters(placeholder(layer, BlockTerm(3, 2))).items())


# ---- to be loaded into, to be timed ----


@pytest.mark.parametrize("case", HELD.values(), ids=HELD)
def test_an_empty_stack_and_a_random_one_are_like_the_fitted_one(case: tuple[Callable[[], nn.Module], Form]) -> None:
    make, form = case
    layer = walk(make()).layers[""]

    def looks(stack: nn.Module) -> dict[str, Any]:
        return {n: (p.shape, p.stride(), p.dtype, p.device, p.requires_grad) for n, p in stack.named_parameters()}

    wanted = looks(factored(layer, form))
    for place in (nullcontext, *PLACES.values()):
        with place():
            stacks = empty(layer, form), random(layer.geometry, form, layer.module)
        assert looks(stacks[0]) == looks(stacks[1]) == wanted


def test_what_is_loaded_into_an_empty_stack_runs_as_the_fitted_one() -> None:
    layer = walk(nn.Conv2d(6, 4, 3)).layers[""]
    fitted, loaded = factored(layer, BlockTerm(3, 2)), empty(layer, BlockTerm(3, 2))
    loaded.load_state_dict(fitted.state_dict(), strict=True)
    x = torch.randn(1, 6, 5, 5)
    assert torch.equal(loaded(x), fitted(x))
    assert not {p.data_ptr() for p in loaded.parameters()} & {p.data_ptr() for p in fitted.parameters()}
    assert loaded.factors()[-1].bias is layer.bias  # whoever else holds it holds the loaded one


def test_a_random_stack_keeps_activations_at_their_size() -> None:
    dense = nn.Conv2d(32, 48, 3, padding=1, bias=False)
    y = random(walk(dense).layers[""].geometry, BlockTerm(24, 24), dense)(torch.randn(4, 32, 16, 16))
    assert 0.5 < float(y.detach().std()) < 2


def test_no_layer_is_changed_by_building_another_in_its_place(build: Callable[[nn.Module, Form], DecomposedLayer]) -> None:
    dense = hooked([]).eval()
    before = [dict(vars(dense)), {name: dict(getattr(dense, name)) for name in HOOKS[:-1]}, dense.weight.tolist()]
    build(dense, LowRank(2))
    assert [dict(vars(dense)), {name: dict(getattr(dense, name)) for name in HOOKS[:-1]}, dense.weight.tolist()] == before


# ---- what a form loses ----


def decaying(O: int, I: int, taps: int, decay: float) -> nn.Module:
    """A convolution whose spectra fall as those of trained ones do."""
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(I, O, taps)
    sides = [torch.linalg.qr(torch.randn(n, n, generator=generator)).Q * decay ** torch.arange(float(n)) for n in (O, I)]
    core = torch.randn(O, I, taps, taps, generator=generator)
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("ot,ts...->os...", sides[0], torch.einsum("ts...,is->ti...", core, sides[1])))
    return conv


def really_lost(dense: nn.Module, form: Form) -> float:
    found = built(dense, form).weight.detach().double()
    weight = dense.weight.detach().double()  # type: ignore[union-attr, operator]
    return float((weight - found).square().sum() / weight.square().sum())


@pytest.mark.parametrize("decay", [0.85, 0.95, 1.0])
def test_what_a_form_is_said_to_lose_is_near_what_it_loses(decay: float) -> None:
    pointwise, spatial = decaying(32, 24, 1, decay), decaying(32, 24, 3, decay)
    cases = [(pointwise, LowRank(rank)) for rank in (4, 12)]
    cases += [(spatial, form) for form in candidates(walk(spatial).layers[""].geometry)[1::7]]
    cases += [(spatial, form) for form in candidates(walk(spatial).layers[""].geometry) if needs_fit(form)]
    cases += [(spatial, Separable(rank)) for rank in (1, 20, 60)]
    for dense, form in cases:
        said, truth = losses(walk(dense).layers[""], [form])[form], really_lost(dense, form)
        # Of ranks a bound, exact with one side; of groups where a fit is going, to half a per cent of the weight.
        assert 0.99 * truth - 1e-6 <= said <= 1.15 * truth + 0.005 * needs_fit(form) + 1e-6, form


def test_dense_and_full_rank_lose_nothing() -> None:
    layer = walk(nn.Conv2d(6, 4, 3)).layers[""]
    assert losses(layer, [Dense(), BlockTerm(6, 4), Separable(12)]) == {Dense(): 0.0, BlockTerm(6, 4): 0.0, Separable(12): 0.0}
