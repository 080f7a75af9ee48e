"""The series layer: every form at once, and in each the same bits, gradients and layout as the plain layer of that form."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from lamina import BlockTerm, Dense, LayerError, LowRank, RankError, Separable
from lamina.factorize.block_term import block_term
from lamina.factorize.low_rank import low_rank
from lamina.factorize.tucker import hosvd
from lamina.forms import Form
from lamina.layers.decomposed import DecomposedLayer, laid_out, memory_format
from lamina.layers.series import SeriesLayer, _Steps, series
from lamina.network.walk import walk

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
GROUPS = [BlockTerm(8, 8, 8), BlockTerm(8, 8, 2), BlockTerm(8, 8)]
MIXED: list[Form] = [*GROUPS, BlockTerm(2, 3), BlockTerm(4, 6), BlockTerm(None, 4, 2), BlockTerm(None, 4), Dense()]


def built(dense: nn.Module, forms: list[Form], **options: Any) -> SeriesLayer:
    return series(walk(dense).layers[""], forms, **options)


def conv(**attributes: Any) -> nn.Module:
    return nn.Conv2d(8, 12, 3, padding=1, **attributes)


CASES: dict[str, tuple[Callable[[], nn.Module], list[Form], tuple[int, ...]]] = {
    "Conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), MIXED, (2, 8, 7)),
    "Conv2d": (conv, MIXED, (2, 8, 7, 9)),
    "Conv3d": (lambda: nn.Conv3d(8, 12, (3, 1, 2)), MIXED, (2, 8, 4, 5, 6)),
    "1×1": (lambda: nn.Conv2d(8, 12, 1), [LowRank(2), LowRank(8), LowRank(5), Dense()], (2, 8, 7, 9)),
    "linear": (lambda: nn.Linear(8, 12), [Dense(), LowRank(2), LowRank(5)], (2, 3, 8)),
    "channels last": (lambda: conv().to(memory_format=torch.channels_last), MIXED, (2, 8, 7, 9)),
    "float64": (lambda: conv(dtype=torch.float64), MIXED, (2, 8, 7, 9)),
    "bfloat16": (lambda: conv(dtype=torch.bfloat16), MIXED, (2, 8, 7, 9)),
    "no bias": (lambda: conv(bias=False), MIXED, (2, 8, 7, 9)),
    "reflect": (lambda: conv(padding_mode="reflect"), MIXED, (2, 8, 7, 9)),
    "separable": (conv, [Separable(2), BlockTerm(4, 6), Separable(9), Separable(24), Dense()], (2, 8, 7, 9)),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, SeriesLayer, Tensor]:
    make, forms, shape = CASES[request.param]
    dense = make()
    return dense, built(dense, forms), torch.randn(shape, dtype=dense.weight.dtype)


def conv1d_of_gpt2() -> nn.Module:
    layer: nn.Module = pytest.importorskip("transformers.pytorch_utils").Conv1D(12, 8)
    return layer


# ---- what it computes ----


def test_taking_a_form_out_is_truncating_to_the_bit(case: tuple[nn.Module, SeriesLayer, Tensor]) -> None:
    _, layer, x = case
    for form in layer.forms:
        layer.set_active(form)
        plain = layer.extract()
        assert not isinstance(plain, SeriesLayer)
        with_gradients = layer(x)
        with torch.no_grad():
            kept = layer(x)
        for found in (with_gradients, kept):
            assert torch.equal(found, plain(x)) and found.stride() == plain(x).stride(), form
        for name, value in layer._weights(form).items():
            parameter = plain.get_parameter(name)
            assert torch.equal(value, parameter) and value.stride() == parameter.stride(), name


def test_gradients_are_those_of_the_plain_form(case: tuple[nn.Module, SeriesLayer, Tensor]) -> None:
    _, layer, x = case
    for form in layer.forms:
        layer.set_active(form)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        plain = layer.extract()
        layer(ours).square().sum().backward()
        plain(theirs).square().sum().backward()
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
        # The last term has the shape of the factor and stands for all of it.
        if isinstance(form, BlockTerm) and form.groups > 1 and form in GROUPS:
            assert torch.equal(layer.branches["groups_8_8"].get_parameter(f"core_{form.groups}").grad, plain.core.weight.grad)  # type: ignore[arg-type, union-attr]
        layer.zero_grad()


def test_gradients_reach_the_active_terms_and_no_other(case: tuple[nn.Module, SeriesLayer, Tensor]) -> None:
    _, layer, x = case
    for form in layer.forms:
        layer.zero_grad(set_to_none=True)
        layer.set_active(form)
        layer(x).square().sum().backward()
        active = {id(term) for term in layer.terms()} | {id(layer.bias)}
        for name, parameter in layer.named_parameters():
            assert (parameter.grad is not None) == (id(parameter) in active), (form, name)
            assert parameter.grad is None or bool(parameter.grad.abs().sum() > 0), (form, name)


def test_what_rests_is_not_moved_by_momentum_or_weight_decay() -> None:
    layer, x = built(conv(), MIXED), torch.randn(2, 8, 5, 5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for form in (MIXED[-1], GROUPS[2], GROUPS[0]):
        layer.set_active(form)
        before = {name: p.detach().clone() for name, p in layer.named_parameters()}
        optimizer.zero_grad(set_to_none=True)
        layer(x).square().sum().backward()
        optimizer.step()
        active = {id(term) for term in layer.terms()} | {id(layer.bias)}
        for name, parameter in layer.named_parameters():
            assert torch.equal(before[name], parameter) != (id(parameter) in active), (form, name)


@pytest.mark.parametrize("form", GROUPS, ids=str)
def test_truncated_at_a_group_count_the_faithful_series_is_the_fit_there(form: BlockTerm) -> None:
    dense = conv()
    layer = built(dense, GROUPS, method="faithful")
    layer.set_active(form)
    fit = block_term(dense.weight, 8, 8, form.groups).composed()
    torch.testing.assert_close(layer.weight.detach(), fit, rtol=1e-4, atol=1e-5)


def test_truncated_at_a_rank_it_is_the_truncated_svd() -> None:
    linear, convolution = nn.Linear(8, 12), conv()
    ranks = built(linear, [LowRank(2), LowRank(5), LowRank(8)])
    for form in ranks.forms:
        assert isinstance(form, LowRank)
        ranks.set_active(form)
        A, B = low_rank(linear.weight, form.rank)
        torch.testing.assert_close(ranks.weight.detach(), B @ A)
    forms = [BlockTerm(2, 3), BlockTerm(4, 3), BlockTerm(8, 12)]
    tucker = built(convolution, forms)
    for form in forms:
        tucker.set_active(form)
        factors = hosvd(convolution.weight, form.rank_in, form.rank_out)
        wanted = torch.einsum("ot,tsxy,si->oixy", factors.expand, factors.core, factors.reduce)
        torch.testing.assert_close(tucker.weight.detach(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make", [conv, lambda: nn.Linear(8, 12), lambda: nn.Conv3d(8, 12, 2), conv1d_of_gpt2], ids=["3×3", "linear", "3d", "Conv1D"]
)
def test_the_dense_member_is_the_dense_layer_exactly(make: Callable[[], nn.Module]) -> None:
    dense = make()
    kernel = walk(dense).layers[""].geometry.kernel
    layer = built(dense, [BlockTerm(4, 4, 2) if len(kernel) and max(kernel) > 1 else LowRank(3), Dense()])
    x = torch.randn(2, *((8, 5, 5, 5)[: len(kernel) + 1] if kernel else (3, 8)))
    assert torch.equal(layer(x), dense(x))
    assert torch.equal(layer.weight, dense.weight)
    assert type(layer.extract()) is type(dense)


@st.composite
def any_series(draw: st.DrawFn) -> tuple[nn.Module, list[Form], Tensor]:
    """Any convolution of eight by twelve channels, some of its forms in any order, and an input."""
    d = draw(st.integers(1, 3))
    kernel = (*draw(st.lists(st.integers(1, 3), min_size=d - 1, max_size=d - 1)), 3)
    padding = draw(st.sampled_from(["same", "valid", 1]))
    stride = 1 if padding == "same" else draw(st.integers(1, 2))
    dense = CONVOLUTIONS[d](
        8,
        12,
        kernel,
        stride,
        padding,
        draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
    )
    forms = draw(st.permutations(MIXED))[: draw(st.integers(1, 4))]
    x = torch.randn(draw(st.integers(0, 2)), 8, *(7, 8, 9)[:d], dtype=dense.weight.dtype)
    if d == 2 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    return dense, forms, x


@given(any_series())
@settings(max_examples=25, deadline=None)
def test_for_any_attributes_a_form_taken_out_has_the_same_bits(drawn: tuple[nn.Module, list[Form], Tensor]) -> None:
    dense, forms, x = drawn
    layer = built(dense, forms)
    for form in forms:
        layer.set_active(form)
        plain = layer.extract()
        assert torch.equal(layer(x), plain(x)) and layer(x).stride() == plain(x).stride()
        assert layer(x).shape == dense(x).shape and layer(x).dtype == dense(x).dtype


def test_float32_terms_compose_to_what_float64_terms_do() -> None:
    layer, x = built(conv(), MIXED), torch.randn(2, 8, 7, 9)
    wide = copy.deepcopy(layer).double()
    for form in MIXED:
        layer.set_active(form)
        wide.set_active(form)
        exact = wide(x.double()).detach()
        assert float((layer(x).detach() - exact).norm() / exact.norm()) <= 1e-5


# ---- its dense weight ----


def dense_like(layer: SeriesLayer, dense: nn.Module) -> nn.Module:
    """The dense layer with the weight that the series answers."""
    same = copy.deepcopy(dense)
    with torch.no_grad():
        same.weight.copy_(layer.weight)
    return same


def test_the_weight_of_each_form_is_that_of_the_function_it_computes(case: tuple[nn.Module, SeriesLayer, Tensor]) -> None:
    dense, layer, x = case
    # In bfloat16 the composed weight and each value between factors are rounded once.
    tolerance = 1e-4 if x.dtype != torch.bfloat16 else 16 * torch.finfo(torch.bfloat16).eps
    for form in layer.forms:
        layer.set_active(form)
        found, wanted = layer(x).detach(), dense_like(layer, dense)(x).detach()
        assert float((found - wanted).norm() / wanted.norm()) <= tolerance, form
        assert torch.equal(layer.weight, layer.composed()) and layer.weight.is_contiguous(), form


def test_the_weight_of_each_form_is_that_of_the_form_taken_out(case: tuple[nn.Module, SeriesLayer, Tensor]) -> None:
    _, layer, _ = case
    for form in layer.forms:
        layer.set_active(form)
        plain = layer.extract()
        assert torch.equal(layer.weight, plain.weight), form
        assert (layer.weight.shape, layer.weight.dtype) == (plain.weight.shape, plain.weight.dtype), form


def test_a_gradient_through_its_weight_reaches_the_active_terms_and_no_other(
    case: tuple[nn.Module, SeriesLayer, Tensor],
) -> None:
    _, layer, _ = case
    for form in layer.forms:
        layer.zero_grad(set_to_none=True)
        layer.set_active(form)
        layer.weight.square().sum().backward()
        reached = {id(p) for p in layer.parameters() if p.grad is not None and bool(p.grad.any())}
        assert reached == {id(term) for term in layer.terms()}, form


def test_the_weight_of_gpt2s_layer_has_the_shape_that_it_stores() -> None:
    dense = conv1d_of_gpt2()
    layer = built(dense, [LowRank(2), LowRank(8), Dense()])
    for form in layer.forms:
        layer.set_active(form)
        assert layer.weight.shape == dense.weight.shape == (8, 12)
        assert layer.composed().shape == (12, 8) and torch.equal(layer.composed().T, layer.weight)
        assert layer.extract().weight.is_contiguous()
    assert torch.equal(layer.weight, dense.weight)


# ---- function transforms ----


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_maps_over_inputs_with_and_without_gradients(
    quiet: Callable[[], Any], case: tuple[nn.Module, SeriesLayer, Tensor]
) -> None:
    _, layer, x = case
    layer.eval()
    several = torch.stack([x, 2 * x, -x])
    before = torch.get_rng_state()
    for form in layer.forms:
        layer.set_active(form)
        with quiet():
            found = torch.func.vmap(layer)(several)
            wanted = torch.stack([layer(one) for one in several])
        # Sums in another order.
        tolerance = 16 * torch.finfo(x.dtype).eps
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.detach().abs().max()))
    assert torch.equal(torch.get_rng_state(), before)


def test_it_maps_over_many_networks_without_gradients() -> None:
    layers = [built(conv_of(seed), MIXED).eval() for seed in range(3)]
    x = torch.randn(2, 8, 5, 5)
    for form in MIXED:
        for layer in layers:
            layer.set_active(form)
        stacked, buffers = torch.func.stack_module_state(layers)
        with torch.no_grad():
            found = torch.func.vmap(lambda p, b: torch.func.functional_call(layers[0], (p, b), (x,)))(stacked, buffers)
            torch.testing.assert_close(found, torch.stack([layer(x) for layer in layers]), rtol=1e-4, atol=1e-5)


def test_what_a_transform_saw_is_not_kept() -> None:
    layer, x = built(conv(), MIXED).eval(), torch.randn(3, 2, 8, 5, 5)
    with torch.no_grad():
        torch.func.vmap(layer)(x)
        assert layer._ready is None
        assert torch.equal(layer(x[0]), layer.extract()(x[0]))


# ---- layouts ----

LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [(8, 12), (1, 12), (8, 1)], ids="{0[0]}→{0[1]}".format)
def test_terms_forms_and_outputs_lie_in_memory_as_the_dense_layers(dims: int, channels: tuple[int, int]) -> None:
    # traps: one channel or a rank of 1, whose weight is contiguous in every layout
    I, O = channels
    x = torch.randn(2, I, *(5, 6, 7)[:dims])
    for layout in (torch.contiguous_format, LAYOUTS[dims]):
        dense = CONVOLUTIONS[dims](I, O, 3)
        dense.weight = nn.Parameter(laid_out(dense.weight.detach(), layout))
        forms = [BlockTerm(1, 1), BlockTerm(None, 1), BlockTerm(1, None), BlockTerm(min(I, 4), min(O, 6)), Dense()]
        layer = built(dense, list(dict.fromkeys(forms)))
        for form in layer.forms:
            layer.set_active(form)
            plain = layer.extract()
            for weight in (*layer.terms(), *plain.parameters()):
                if weight.ndim > 2:
                    assert weight.stride() == torch.empty(weight.shape, memory_format=layout).stride(), form
            with_gradients = layer(laid_out(x, layout))
            with torch.no_grad():
                kept = layer(laid_out(x, layout))
            assert with_gradients.stride() == kept.stride() == plain(laid_out(x, layout)).stride(), form
            if dims < 3 or not isinstance(form, BlockTerm) or form.rank_out is None:  # see test_build
                assert kept.stride() == dense(laid_out(x, layout)).stride(), form
        assert {memory_format(term) for term in layer.terms(Dense())} == {layout}


# ---- taking a form out ----


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_form_taken_out_trains_as_its_terms_and_its_bias_do(weight: bool, bias: bool) -> None:
    layer = built(conv(), MIXED)
    for form in MIXED:
        layer.requires_grad_(False)
        layer.terms(form)[-1].requires_grad_(weight)
        layer.bias.requires_grad_(bias)  # type: ignore[union-attr]
        plain = layer.extract(form)
        assert all(
            p.requires_grad == (bias if name.endswith("bias") else weight) and p.is_leaf for name, p in plain.named_parameters()
        ), form


def test_taking_a_form_out_changes_nothing() -> None:
    layer, x = built(conv(), MIXED).eval(), torch.randn(2, 8, 5, 5)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    with torch.no_grad():
        y = layer(x)
        for form in MIXED:
            plain = layer.extract(form)
            for p in plain.parameters():
                p.zero_()
        assert layer.active == MIXED[-1] and torch.equal(layer(x), y)
    assert all(torch.equal(before[name], p) for name, p in layer.named_parameters())


def test_a_form_taken_out_under_autocast_has_the_same_bits() -> None:
    layer = built(conv(), MIXED)
    for form in MIXED:
        wanted = layer.extract(form)
        with torch.autocast("cpu", torch.bfloat16):
            found = layer.extract(form)
        for one, other in zip(found.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(one, other) and one.dtype == other.dtype, form


# ---- normalised steps ----


def test_a_normalised_step_moves_the_composed_weights_as_a_plain_one_would() -> None:
    x = torch.randn(2, 8, 7, 9)
    for form in GROUPS:
        moved = []
        for layer in (built(conv_of(0), GROUPS, normalise=True), built(conv_of(0), GROUPS).extract(form)):
            if isinstance(layer, SeriesLayer):
                layer.set_active(form)
            optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
            layer(x).square().sum().backward()
            optimizer.step()
            moved.append(layer._weights(form) if isinstance(layer, SeriesLayer) else dict(layer.named_parameters()))
        for name, value in moved[1].items():
            torch.testing.assert_close(moved[0][name], value, rtol=1e-4, atol=1e-6)


def conv_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return conv()


def test_without_normalising_all_terms_of_a_1x1_get_the_same_gradient() -> None:
    layer = built(conv(), GROUPS)
    layer(torch.randn(2, 8, 7, 9)).square().sum().backward()
    branch = layer.branches["groups_8_8"]
    first, second, third = (branch.get_parameter(f"reduce_{count}").grad for count in (8, 2, 1))
    assert torch.equal(first, second) and torch.equal(second, third)  # type: ignore[arg-type]


def test_normalising_changes_no_output() -> None:
    dense, x = conv(), torch.randn(2, 8, 7, 9)
    assert torch.equal(built(dense, GROUPS, normalise=True)(x), built(dense, GROUPS)(x))


# ---- composed weights that are kept ----


def change_in_place(layer: SeriesLayer) -> None:
    with torch.no_grad():
        layer.terms()[0].mul_(2)


def change_bias(layer: SeriesLayer) -> None:
    with torch.no_grad():
        layer.bias.add_(1)  # type: ignore[union-attr]


def load_other(layer: SeriesLayer) -> None:
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})


def assign_other(layer: SeriesLayer) -> None:
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()}, assign=True)


def step(layer: SeriesLayer, **options: Any) -> None:
    with torch.enable_grad():
        layer(torch.ones(1, 8, 5, 5)).square().sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.1, **options).step()


def new_data(layer: SeriesLayer) -> None:
    # Twice: the second storage may lie where the first one was.
    for _ in range(2):
        for term in layer.terms():
            term.data = term.data * 2


CHANGES: dict[str, Callable[[SeriesLayer], None]] = {
    "in place": change_in_place,
    "the bias": change_bias,
    "load_state_dict": load_other,
    "load_state_dict(assign=True)": assign_other,
    "optimizer": step,
    "foreach optimizer": lambda layer: step(layer, foreach=True),
    "fused optimizer": lambda layer: step(layer, fused=True),
    "new data": new_data,
    "another form": lambda layer: layer.set_active(GROUPS[0]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_by_the_next_forward(change: Callable[[SeriesLayer], None]) -> None:
    layer, x = built(conv(), MIXED).eval(), torch.randn(2, 8, 5, 5)
    layer.set_active(GROUPS[1])
    with torch.no_grad():
        before = layer(x)
        change(layer)
        after = layer(x)
    assert torch.equal(after, layer.extract()(x)) and not torch.equal(after, before)


def test_a_move_to_another_dtype_is_seen() -> None:
    layer, x = built(conv(), MIXED).eval(), torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        layer(x)
        assert layer.double()(x.double()).dtype == torch.float64
        assert torch.equal(layer.float()(x), layer.extract()(x))


def test_composed_weights_are_kept_while_nothing_changes() -> None:
    layer, x = built(conv(), MIXED).eval(), torch.randn(2, 8, 5, 5)
    layer.set_active(GROUPS[2])
    with torch.no_grad():
        layer(x)
        kept = layer._ready
        layer(x)
        assert layer._ready is kept
        layer.train().eval()
        assert layer._ready is None


def test_what_was_kept_in_inference_mode_serves_where_gradients_flow() -> None:
    layer, x = built(conv(), MIXED).eval().requires_grad_(False), torch.randn(2, 8, 5, 5)
    layer.set_active(GROUPS[1])
    with torch.inference_mode():
        before = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), before)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_what_is_kept_is_neither_saved_nor_copied(case: tuple[nn.Module, SeriesLayer, Tensor]) -> None:
    _, layer, x = case
    layer.eval()
    names = set(layer.state_dict())
    with torch.no_grad():
        layer(x)
    assert set(layer.state_dict()) == names == {name for name, _ in layer.named_parameters()}
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin._ready is None and torch.equal(twin(x), layer(x))
        with torch.no_grad():
            twin.terms()[0].mul_(2)
        assert not torch.equal(twin(x), layer(x))


# ---- the layer it stands for ----


def test_a_state_dict_goes_into_an_unfitted_series_of_the_same_forms(case: tuple[nn.Module, SeriesLayer, Tensor]) -> None:
    _, layer, x = case
    empty = SeriesLayer(layer.geometry, layer.forms, dtype=x.dtype)
    empty.load_state_dict(layer.state_dict(), strict=True)
    for form in layer.forms:
        layer.set_active(form)
        empty.set_active(form)
        torch.testing.assert_close(empty(x), layer(x))


def test_it_answers_for_the_layer_it_replaces(case: tuple[nn.Module, SeriesLayer, Tensor]) -> None:
    dense, layer, _ = case
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "in_features", "out_features"):
        assert getattr(layer, name, None) == getattr(dense, name, None)
    for form in layer.forms:
        layer.set_active(form)
        assert layer.weight.shape == dense.weight.shape and layer.weight.dtype == dense.weight.dtype
    with pytest.raises(LayerError, match=r"^weight of a SeriesLayer .* cannot be set"):
        layer.weight = torch.zeros(1)


def test_dtype_layout_mode_hooks_and_what_trains_are_kept() -> None:
    dense, calls = conv(dtype=torch.float64).to(memory_format=torch.channels_last).eval(), []
    dense.weight.requires_grad_(False)
    dense.register_forward_hook(lambda *_: calls.append(1))
    layer = built(dense, MIXED)
    assert not layer.training and layer.bias is not None and layer.bias.requires_grad
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert not any(term.requires_grad for form in MIXED for term in layer.terms(form))
    plain = layer.extract(GROUPS[1])
    assert isinstance(plain, DecomposedLayer) and not plain.training
    assert {name: p.requires_grad for name, p in plain.named_parameters()}["expand.bias"] is True
    assert not any(p.requires_grad for name, p in plain.named_parameters() if name.endswith("weight"))
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64)
    layer(x), plain(x)
    assert len(calls) == 2
    assert layer(x).is_contiguous(memory_format=torch.channels_last) == dense(x).is_contiguous(
        memory_format=torch.channels_last
    )


def test_nothing_is_stored_where_another_stores(case: tuple[nn.Module, SeriesLayer, Tensor]) -> None:
    dense, layer, _ = case
    tensors = [*dense.parameters(), *layer.parameters(), *(p for form in layer.forms for p in layer.extract(form).parameters())]
    pointers = [p.untyped_storage().data_ptr() for p in tensors]
    assert len(set(pointers)) == len(pointers)


def test_it_holds_the_terms_and_one_composed_copy_of_the_active_form() -> None:
    layer = built(conv(bias=False), GROUPS).eval()
    with torch.no_grad():
        layer(torch.randn(1, 8, 5, 5))
    assert layer._ready is not None
    kept = sum(p.numel() for p in layer._ready.layer.parameters())
    assert kept == GROUPS[-1].parameters(layer.geometry)
    assert sum(p.numel() for p in layer.parameters()) == sum(form.parameters(layer.geometry) for form in GROUPS)


def test_autograd_keeps_the_composed_weights_and_the_plain_layers_activations_alone() -> None:
    layer, x = built(conv(), GROUPS), torch.randn(2, 8, 7, 9)

    def saved(module: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = module(x)
        assert y.requires_grad
        return sum(sizes.values())

    assert saved(layer) <= saved(layer.extract())


def test_two_fits_are_equal() -> None:
    dense = conv()
    first, second = built(dense, MIXED), built(dense, MIXED)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_compiled_it_computes_the_same() -> None:
    layer, x = built(conv(), MIXED).eval(), torch.randn(2, 8, 5, 5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        for form in (GROUPS[1], MIXED[-1]):
            layer.set_active(form)
            torch.testing.assert_close(compiled(x), layer(x))


REFUSED: dict[str, tuple[list[Form], str]] = {
    "no form": ([], "at least one form"),
    "twice": ([Dense(), Dense()], "dense stands twice"),
    "too high": ([BlockTerm(9, 8)], "rank in 9"),
    "does not divide": ([BlockTerm(None, 4, 4), BlockTerm(None, 6, 3)], "3 groups do not divide"),
    "does not nest": ([BlockTerm(6, 12, 3), BlockTerm(6, 12, 2)], "3 and 2 do not nest"),
    "another kind": ([LowRank(2)], "use BlockTerm"),
}


@pytest.mark.parametrize(("forms", "says"), REFUSED.values(), ids=REFUSED)
def test_forms_that_make_no_series_are_refused(forms: list[Form], says: str) -> None:
    with pytest.raises(RankError, match=says):
        built(conv(), forms)


def test_a_form_that_is_not_among_them_is_refused() -> None:
    layer = built(conv(), GROUPS)
    for act in (layer.set_active, layer.extract, layer.terms):
        with pytest.raises(RankError, match="none of the forms of this series"):
            act(Dense())
    assert layer.active == GROUPS[-1]


def test_the_steps_of_every_optimizer_are_counted() -> None:
    steps, parameters = _Steps(), [nn.Parameter(torch.ones(2))]
    for number, optimizer in enumerate((torch.optim.SGD(parameters), torch.optim.Adam(parameters)), 1):
        optimizer.step()
        assert steps.taken == number
