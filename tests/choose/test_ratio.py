"""Ranks from a ratio: the papers' values, and the laws that hold for every layer."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lamina import BlockTerm, GoalError, LowRank
from lamina.choose.ratio import aligned, default_beta, form_at, path, tucker_at
from lamina.forms import Form
from lamina.values import Geometry


def conv(O: int, I: int, *kernel: int) -> Geometry:
    ones = (1,) * len(kernel)
    return Geometry(f"Conv{len(kernel)}d", O, I, False, kernel, ones, (0,) * len(kernel), ones)


def linear(O: int, I: int, bias: bool = False) -> Geometry:
    return Geometry("Linear", O, I, bias)


# arXiv 2309.03824 and 2407.20266, as gathered in the design notes (methods, section 2).
GOLDEN = {
    "3×3 512→512 at 2": (conv(512, 512, 3, 3), 2, 1.0, BlockTerm(309, 309)),
    "3×3 64→64 at 2": (conv(64, 64, 3, 3), 2, 1.0, BlockTerm(38, 38)),
    "1×1 64→64 at 2": (conv(64, 64, 1, 1), 2, None, LowRank(16)),
    "1×1 64→256 at 2": (conv(256, 64, 1, 1), 2, None, LowRank(25)),
    "1×1 2048→512 at 2": (conv(512, 2048, 1, 1), 2, None, LowRank(204)),
    "1×1 512→2048 at 2": (conv(2048, 512, 1, 1), 2, None, LowRank(204)),
    "fc 2048→1000 at 2": (linear(1000, 2048), 2, None, LowRank(335)),
    "3×3 512→512 at 3": (conv(512, 512, 3, 3), 3, 1.0, BlockTerm(244, 244)),
    "3×3 64→64 at 3": (conv(64, 64, 3, 3), 3, 1.0, BlockTerm(30, 30)),
}


@pytest.mark.parametrize(("layer", "ratio", "beta", "form"), GOLDEN.values(), ids=GOLDEN)
def test_ranks_are_those_that_the_papers_print(layer: Geometry, ratio: float, beta: float | None, form: Form) -> None:
    assert form_at(layer, ratio, beta) == form


def test_a_widening_convolutions_rank_out_is_floored_after_the_product_with_beta() -> None:
    assert form_at(conv(512, 256, 3, 3), 2) == BlockTerm(168, 269)  # β = 1.6; the product of the floored 168 would give 268


def test_ranks_solve_the_equation_at_beta_two() -> None:
    """18 r² + 1280 r = 589824 at r = 148.92."""
    assert tucker_at(conv(512, 256, 3, 3), 2, 2.0) == BlockTerm(148, 297)


def test_a_side_whose_rank_would_exceed_its_channels_stays_whole_and_the_other_is_found_again() -> None:
    assert form_at(conv(64, 512, 3, 3), 2) == BlockTerm(64 * 512 * 9 // 2 // (512 + 64 * 9), None)


def test_a_stem_keeps_its_few_input_channels_whole() -> None:
    form = form_at(conv(64, 3, 7, 7), 2)
    assert isinstance(form, BlockTerm)
    assert form.rank_in is None
    assert form.rank_out == 64 * 3 * 49 // 2 // (3 * 49 + 64)


def test_a_long_one_channel_convolution_keeps_its_input_whole() -> None:
    assert form_at(conv(1024, 1, 512), 2) == BlockTerm(None, 1024 * 512 // 2 // (512 + 1024))


def test_beta_is_what_musco_takes() -> None:
    assert default_beta(conv(512, 256, 3, 3)) == 1.6
    assert default_beta(conv(256, 512, 3, 3)) == 1.0


def test_a_layer_too_small_for_the_ratio_has_no_form() -> None:
    assert form_at(linear(2, 2), 2) is None
    assert path(linear(2, 2), 2) == ()
    assert aligned(linear(2, 2), ()) == ()
    assert form_at(conv(1, 1, 3, 3), 2) is None


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_a_beta_that_is_no_positive_number_is_refused(beta: float) -> None:
    with pytest.raises(GoalError, match="β"):
        form_at(conv(64, 64, 3, 3), 2, beta)


CHANNELS = st.one_of(st.integers(1, 40), st.integers(1, 2048), st.sampled_from([3, 64, 256, 512]))
LAYERS = st.one_of(
    st.builds(linear, CHANNELS, CHANNELS, st.booleans()),
    st.builds(lambda O, I, k: conv(O, I, *k), CHANNELS, CHANNELS, st.lists(st.integers(1, 7), min_size=1, max_size=3)),
)
RATIOS = st.one_of(st.floats(1, 50), st.sampled_from([1.0, 1.5, 2.0, 3.0, 4.0]))
BETAS = st.one_of(st.none(), st.floats(0.25, 4))


def weights(form: Form, layer: Geometry) -> int:
    return form.parameters(layer) - layer.bias_parameters


@settings(max_examples=400, deadline=None)
@given(LAYERS, RATIOS, BETAS)
def test_every_form_fits_its_layer_is_smaller_than_it_and_reaches_the_ratio(
    layer: Geometry, ratio: float, beta: float | None
) -> None:
    form = form_at(layer, ratio, beta)
    if form is not None:
        form.check(layer)
        assert form.parameters(layer) < layer.parameters
        dense = layer.parameters - layer.bias_parameters
        assert dense / weights(form, layer) >= ratio * (1 - 1e-9)


@settings(max_examples=400, deadline=None)
@given(LAYERS, RATIOS)
def test_a_pointwise_layers_rank_is_the_largest_that_reaches_the_ratio(layer: Geometry, ratio: float) -> None:
    form = form_at(layer, ratio)
    if layer.pointwise and isinstance(form, LowRank):
        larger = (form.rank + 1) * (layer.out_channels + layer.in_channels)
        dense = layer.out_channels * layer.in_channels
        assert dense / larger < ratio * (1 + 1e-9) or larger >= dense


@settings(max_examples=300, deadline=None)
@given(LAYERS, RATIOS, BETAS)
def test_a_path_starts_at_the_ratio_and_shrinks_with_every_step(layer: Geometry, ratio: float, beta: float | None) -> None:
    steps = path(layer, ratio, beta)
    assert (steps[0] if steps else None) == form_at(layer, ratio, beta)
    sizes = [step.parameters(layer) for step in steps]
    assert all(large > small for large, small in pairwise(sizes))
    for step in steps:
        step.check(layer)


@settings(max_examples=300, deadline=None)
@given(LAYERS, RATIOS, BETAS)
def test_a_path_of_several_forms_ends_where_a_ratio_one_higher_begins(
    layer: Geometry, ratio: float, beta: float | None
) -> None:
    steps, end = path(layer, ratio, beta), form_at(layer, ratio + 1, beta)
    if len(steps) > 1 and end is not None:
        assert steps[-1] == end


def test_at_a_ratio_of_one_the_first_form_is_the_largest_below_break_even() -> None:
    assert form_at(linear(64, 64), 1.0) == LowRank(31)
    assert path(linear(64, 64), 1.0) == tuple(LowRank(rank) for rank in range(31, 15, -1))


def test_a_path_holds_every_rank_of_the_papers_window() -> None:
    assert path(conv(512, 512, 3, 3), 2, 1.0) == tuple(BlockTerm(r, r) for r in range(309, 243, -1))
    assert path(linear(1000, 2048), 2) == tuple(LowRank(r) for r in range(335, 222, -1))


@settings(max_examples=300, deadline=None)
@given(LAYERS, RATIOS, BETAS)
def test_aligned_forms_lie_in_the_window_largest_first(layer: Geometry, ratio: float, beta: float | None) -> None:
    steps = path(layer, ratio, beta)
    found = aligned(layer, steps)
    sizes = [form.parameters(layer) for form in found]
    assert sizes == sorted(sizes, reverse=True)
    for form in found:
        form.check(layer)
        assert steps[-1].parameters(layer) <= form.parameters(layer) <= steps[0].parameters(layer)
        ranks = [form.rank] if isinstance(form, LowRank) else [form.rank_in, form.rank_out]  # type: ignore[attr-defined]
        assert all(rank % 8 == 0 for rank in ranks if rank is not None)


def test_the_aligned_forms_of_the_papers_example_hold_rank_256() -> None:
    layer = conv(512, 512, 3, 3)
    assert aligned(layer, path(layer, 2, 1.0))[-1] == BlockTerm(248, 248)
    assert BlockTerm(256, 256) in aligned(layer, path(layer, 2, 1.0))
