"""Forms: what they cost is what the modules built from them cost, and what does not fit a layer is refused."""

from __future__ import annotations

import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

from lamina import BlockTerm, Dense, LowRank, RankError, Separable
from lamina.forms import Form, candidates
from lamina.layers.build import skeleton
from lamina.network.readers import reader_of
from lamina.values import Geometry, Use

CONV = Geometry("Conv2d", 12, 8, True, (3, 2), (1, 1), (1, 0), (1, 1))
LINEAR = Geometry("Linear", 12, 8, True)
POINTWISE = Geometry("Conv2d", 12, 8, False, (1, 1), (2, 2), (0, 0), (1, 1))


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Layers of every type, most attributes drawn."""
    unit = draw(st.integers(1, 3))  # so that groups which divide both sides are no rarity
    out, into, bias = unit * draw(st.integers(1, 4)), unit * draw(st.integers(1, 4)), draw(st.booleans())
    dims = draw(st.integers(0, 3))
    if dims == 0:
        return Geometry("Linear", out, into, bias)

    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(dims))

    kernel = (1,) * dims if draw(st.booleans()) else each(1, 3)
    numbers = out, into, bias, kernel, each(1, 2), each(0, 1), each(1, 2)
    if draw(st.booleans()):
        return Geometry(f"ConvTranspose{dims}d", *numbers, output_padding=each(0, 0))
    groups = draw(st.integers(1, 3))
    return Geometry(f"Conv{dims}d", out * groups, into * groups, *numbers[2:], groups=groups)


@st.composite
def forms_of(draw: st.DrawFn, layer: Geometry) -> Form:
    """A form that fits a layer, `Dense` among them."""
    I, O = layer.widths
    if draw(st.integers(0, 4)) == 0:
        return Dense()
    if layer.pointwise:
        return LowRank(draw(st.integers(1, min(O, I))))
    separable = layer.groups == 1 and len(layer.kernel) == 2 and min(layer.kernel) > 1 and not layer.transposed
    if separable and draw(st.booleans()):
        return Separable(draw(st.integers(1, Separable(1).at_full_rank(layer).rank)))
    groups = draw(st.sampled_from([g for g in (3, 2, 1) if O % g == 0 and I % g == 0]))
    s, t = (draw(st.integers(1, full // groups)) * groups for full in (I, O))
    return BlockTerm(draw(st.sampled_from([s, None])), draw(st.sampled_from([t, None])), groups)


def run(layer: Geometry, form: Form, batch: int = 2) -> tuple[int, int, Use]:
    """Parameters and MACs of the module that a form becomes, counted by PyTorch itself, and the use they were counted on."""
    if isinstance(form, Dense):
        weight = torch.empty(layer.out_channels, layer.widths[0], *layer.kernel, device="meta")
        bias = torch.empty(layer.out_channels, device="meta") if layer.bias else None
        module = reader_of(layer).dense(layer, weight, bias)
    else:
        module = skeleton(layer, form)
    sides = (9, 8, 7)[: len(layer.kernel)]
    shape = (batch, layer.in_channels, *sides) if layer.kernel else (batch, 5, layer.in_channels)
    with FlopCounterMode(display=False) as counter:
        y = module(torch.empty(shape, device="meta"))
    biases = y.numel() if layer.bias else 0
    return sum(p.numel() for p in module.parameters()), counter.get_total_flops() // 2 + biases, Use(shape, tuple(y.shape))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_cost_of_a_form_is_the_cost_of_the_module_it_becomes(data: st.DataObject) -> None:
    layer = data.draw(geometries())
    form = data.draw(forms_of(layer))
    form.check(layer)
    parameters, macs, use = run(layer, form)
    assert form.parameters(layer) == parameters
    assert form.macs(layer, use) == macs


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_form_at_full_rank_fits_its_layer_and_is_exact(data: st.DataObject) -> None:
    layer = data.draw(geometries())
    full = data.draw(forms_of(layer)).at_full_rank(layer)
    full.check(layer)
    assert full.is_exact(layer)


def test_macs_grow_with_the_number_of_calls() -> None:
    once, thrice = Use((2, 8, 5, 5), (2, 12, 5, 4)), Use((2, 8, 5, 5), (2, 12, 5, 4), calls=3)
    for form in (Dense(), BlockTerm(4, 6), BlockTerm(None, 6), Separable(5)):
        assert form.macs(CONV, thrice) == 3 * form.macs(CONV, once)


def test_an_unbatched_input_costs_what_a_batch_of_one_does() -> None:
    alone, batched = Use((8, 5, 5), (12, 5, 4)), Use((1, 8, 5, 5), (1, 12, 5, 4))
    for form in (BlockTerm(4, 6), Separable(5)):
        assert form.macs(CONV, alone) == form.macs(CONV, batched)


def test_an_empty_batch_costs_nothing() -> None:
    for form in (BlockTerm(4, 6), Separable(5)):
        assert form.macs(CONV, Use((0, 8, 5, 5), (0, 12, 5, 4))) == 0


def test_a_square_linear_layer_at_half_its_rank_saves_nothing() -> None:
    square = Geometry("Linear", 64, 64, False)
    assert LowRank(32).parameters(square) == Dense().parameters(square)


def test_ranks_beyond_what_the_weight_can_hold_are_exact_though_below_the_channels() -> None:
    widening = Geometry("Conv1d", 64, 2, False, (3,), (1,), (0,), (1,))
    assert BlockTerm(2, 6).is_exact(widening)  # a weight (64, 2, 3) has no more than 6 independent output channels
    assert not BlockTerm(2, 5).is_exact(widening)
    assert not BlockTerm(2, 6, groups=2).is_exact(widening)
    narrowing = Geometry("Conv1d", 2, 64, False, (3,), (1,), (0,), (1,))
    assert BlockTerm(6, 2).is_exact(narrowing) and not BlockTerm(5, 2).is_exact(narrowing)


def test_a_core_in_groups_has_one_gth_of_the_weights() -> None:
    whole, grouped = (BlockTerm(4, 4, groups).parameters(CONV) for groups in (1, 4))
    assert whole - grouped == 4 * 4 * 6 * 3 // 4


def test_a_whole_side_stays_whole_at_full_rank() -> None:
    assert BlockTerm(None, 3).at_full_rank(CONV) == BlockTerm(None, 12)
    assert BlockTerm(3, None).at_full_rank(CONV) == BlockTerm(8, None)
    assert BlockTerm(2, 2, 2).at_full_rank(CONV) == BlockTerm(8, 12)


NONSENSE = {
    "rank 0": lambda: LowRank(0),
    "negative rank": lambda: LowRank(-3),
    "fraction": lambda: LowRank(2.5),  # type: ignore[arg-type]
    "truth": lambda: LowRank(True),
    "rank in 0": lambda: BlockTerm(0, 3),
    "rank out 0": lambda: BlockTerm(3, 0),
    "separable rank 0": lambda: Separable(0),
    "groups 0": lambda: BlockTerm(3, 3, 0),
    "groups do not divide": lambda: BlockTerm(4, 6, 4),
    "text": lambda: BlockTerm("4", 6),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("make", NONSENSE.values(), ids=NONSENSE)
def test_a_form_of_nonsense_is_refused_when_it_is_made(make: object) -> None:
    with pytest.raises(RankError):
        make()  # type: ignore[operator]


MISFITS = {
    "low rank for a kernel": (CONV, LowRank(4), "BlockTerm"),
    "block term for a linear layer": (LINEAR, BlockTerm(4, 4), "LowRank"),
    "block term for a 1×1": (POINTWISE, BlockTerm(4, 4), "LowRank"),
    "rank above full": (LINEAR, LowRank(9), "between 1 and 8"),
    "rank in above its side": (CONV, BlockTerm(9, 4), "between 1 and 8"),
    "rank out above its side": (CONV, BlockTerm(4, 13), "between 1 and 12"),
    "separable for a linear layer": (LINEAR, Separable(4), "LowRank"),
    "separable for a 1×1": (POINTWISE, Separable(4), "LowRank"),
    "separable for one dimension": (Geometry("Conv1d", 12, 8, True, (3,), (1,), (0,), (1,)), Separable(4), "BlockTerm"),
    "separable for a kernel of one row": (
        Geometry("Conv2d", 12, 8, True, (1, 3), (1, 1), (0, 0), (1, 1)),
        Separable(4),
        "both sides above 1.*BlockTerm",
    ),
    "separable for groups": (dataclasses.replace(CONV, groups=2), Separable(4), "of one group.*BlockTerm"),
    "rank above a group's": (dataclasses.replace(POINTWISE, groups=2), LowRank(5), "between 1 and 4.*in 2 groups"),
    "rank out above a group's": (dataclasses.replace(CONV, groups=2), BlockTerm(4, 7), "between 1 and 6"),
    "separable rank above full": (CONV, Separable(25), "between 1 and 24"),
    "groups against a whole side": (CONV, BlockTerm(None, 9, 3), "3 groups do not divide"),
}


@pytest.mark.parametrize(("layer", "form", "says"), MISFITS.values(), ids=MISFITS)
def test_a_form_that_does_not_fit_its_layer_says_so_in_one_line(layer: Geometry, form: Form, says: str) -> None:
    with pytest.raises(RankError, match=says) as caught:
        form.check(layer)
    assert "\n" not in str(caught.value)


def test_a_rank_above_full_rank_is_told_the_break_even() -> None:
    with pytest.raises(RankError, match="ranks up to 4 make it smaller"):
        LowRank(9).check(LINEAR)
    with pytest.raises(RankError, match="ranks up to 12 make it smaller"):
        Separable(25).check(CONV)
    assert Separable(12).parameters(CONV) <= CONV.parameters < Separable(13).parameters(CONV)


def test_a_form_prints_as_its_ranks() -> None:
    printed = [str(f) for f in (Dense(), LowRank(204), BlockTerm(309, 308), BlockTerm(None, 27), BlockTerm(8, None, 4))]
    assert [*printed, str(Separable(48))] == ["dense", "rank 204", "309→308", "whole→27", "8→whole in 4 groups", "separable 48"]


def test_equal_forms_are_one_key() -> None:
    assert len({BlockTerm(4, 6), BlockTerm(4, 6, 1), LowRank(4), LowRank(4), Separable(4), Dense(), Dense()}) == 4


@pytest.mark.parametrize("form", [Dense(), LowRank(4), BlockTerm(4, 6), Separable(4)], ids=str)
def test_a_form_cannot_be_changed(form: Form) -> None:
    with pytest.raises(AttributeError):
        form.form = "other"  # type: ignore[attr-defined]


def test_the_narrow_middle_is_what_a_core_reads_and_writes() -> None:
    assert BlockTerm(4, None).widths(CONV) == (4, 12)
    assert math.prod(BlockTerm(None, 6).widths(CONV)) == 48


# ---- smaller forms of the same kind ----


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_descent_begins_with_the_form_fits_its_layer_throughout_and_shrinks_with_every_step(data: st.DataObject) -> None:
    layer = data.draw(geometries())
    form = data.draw(forms_of(layer))
    steps = list(form.descent())
    assert steps[0] == form and {type(step) for step in steps} == {type(form)}
    for step in steps:
        step.check(layer)
    sizes = [step.parameters(layer) for step in steps]
    assert sizes == sorted(set(sizes), reverse=True)


def test_a_descent_goes_down_rank_by_rank_and_the_other_rank_follows_in_proportion() -> None:
    assert list(LowRank(3).descent()) == [LowRank(3), LowRank(2), LowRank(1)]
    assert list(BlockTerm(3, 5).descent()) == [BlockTerm(3, 5), BlockTerm(2, 3), BlockTerm(1, 1)]
    assert list(BlockTerm(None, 2).descent()) == [BlockTerm(None, 2), BlockTerm(None, 1)]
    assert list(BlockTerm(4, 6, 2).descent()) == [BlockTerm(4, 6, 2), BlockTerm(2, 2, 2)]
    assert list(Separable(2).descent()) == [Separable(2), Separable(1)]
    assert list(Dense().descent()) == [Dense()]


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 6))
def test_a_form_cut_to_a_multiple_is_the_largest_below_it_and_none_where_a_rank_would_vanish(
    data: st.DataObject, multiple: int
) -> None:
    form = data.draw(forms_of(data.draw(geometries())))
    ranks = [getattr(form, name, None) for name in ("rank", "rank_in", "rank_out")]
    step = math.lcm(multiple, getattr(form, "groups", 1))
    cut = form.cut_to(multiple)
    if cut is None:
        assert any(rank is not None and rank < step for rank in ranks)
    else:
        found = [getattr(cut, name, None) for name in ("rank", "rank_in", "rank_out")]
        assert found == [None if rank is None else max(n for n in range(step, rank + 1, step)) for rank in ranks]
        assert type(cut) is type(form) and getattr(cut, "groups", None) == getattr(form, "groups", None)


# ---- what a budget may choose among ----


@settings(max_examples=150, deadline=None)
@given(geometries())
def test_every_candidate_fits_its_layer_and_is_smaller_and_dense_is_among_them(layer: Geometry) -> None:
    found = candidates(layer)
    assert Dense() in found and len(set(found)) == len(found)
    for form in found:
        form.check(layer)
        assert form == Dense() or form.parameters(layer) < layer.parameters


@pytest.mark.parametrize("side", [1, 2, 7, 16, 64, 100, 512, 4096, 28672])
def test_the_number_of_candidates_is_bounded_however_large_the_layer(side: int) -> None:
    conv = Geometry("Conv2d", side, side, True, (3, 3), (1, 1), (1, 1), (1, 1))
    assert len(candidates(conv)) <= 1200 and len(candidates(Geometry("Linear", side, side, True))) <= 40


def test_ranks_in_and_out_are_independent_and_either_side_may_be_whole() -> None:
    layer = Geometry("Conv2d", 128, 64, True, (3, 3), (1, 1), (1, 1), (1, 1))
    found = set(candidates(layer))
    assert {BlockTerm(16, 96), BlockTerm(48, 16), BlockTerm(32, None), BlockTerm(None, 64)} <= found
    assert {BlockTerm(64, 64, 64), BlockTerm(64, 64, 8), BlockTerm(64, 64, 2)} <= found
    assert {LowRank(8), LowRank(40)} <= set(candidates(Geometry("Linear", 128, 64, True)))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_forms_of_one_structure_become_the_same_modules_in_other_widths(data: st.DataObject) -> None:
    layer = data.draw(geometries())
    kinds: dict[object, set[object]] = {}
    for form in candidates(layer):
        if form != Dense():
            factors = skeleton(layer, form).factors()
            kinds.setdefault(form.structure, set()).add(tuple(type(factor) for factor in factors))
    assert all(len(each) == 1 for each in kinds.values())
