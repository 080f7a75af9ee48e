"""`lamina.staircase`: one layer's time in each form, a value that prints and draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lamina
from lamina import BlockTerm, Dense, LowRank, PlanError, RankError, Staircase
from lamina.forms import candidates
from lamina.measure.table import TimingTable

from ..machine import Machine, Net, X


def found(model: nn.Module, layer: str = "body.0", **options: object) -> Staircase:
    return lamina.staircase(model, X, layer, timings=TimingTable(None), **options)  # type: ignore[arg-type]


def test_each_form_has_its_time_as_a_share_of_the_dense_layers(model: Net, machine: Machine) -> None:
    told = found(model)
    geometry = told.geometry
    assert set(told.shares) <= set(candidates(geometry)) - {Dense()} and len(told.shares) > 10
    use = next(iter(lamina.make_plan(model, X, lamina.Ratio(2.0), timings=TimingTable(None)).layers["body.0"].uses))
    for form, share in told.shares.items():
        assert share == pytest.approx(form.macs(geometry, use) / Dense().macs(geometry, use))
        assert told.weights(form) == form.parameters(geometry) / Dense().parameters(geometry)


def test_forms_that_are_named_are_those_that_are_timed(model: Net, machine: Machine) -> None:
    asked = [BlockTerm(4, 4), BlockTerm(4, 4), Dense(), BlockTerm(None, 8)]
    assert set(found(model, forms=asked).shares) == {BlockTerm(4, 4), BlockTerm(None, 8)}
    with pytest.raises(RankError, match=r"^body\.0: "):
        found(model, forms=[LowRank(4)])


def test_kinds_go_from_the_smallest_form_to_the_largest_and_all_of_them_are_printed(model: Net, machine: Machine) -> None:
    told = found(model)
    assert {form for forms in told.kinds.values() for form in forms} == set(told.shares)
    for forms in told.kinds.values():
        sizes = [told.weights(form) for form in forms]
        assert sizes == sorted(sizes)
    assert all(str(form) in str(told) for form in told.shares) and f"{len(told.shares)} forms" in repr(told)


def test_it_draws_a_line_for_each_kind_and_the_dense_layer(model: Net, machine: Machine, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = found(model)
    (axes,) = told.plot(tmp_path / "s.png").axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [*told.kinds, "the dense layer"] and (tmp_path / "s.png").stat().st_size > 0


def test_a_layer_that_is_not_there_or_refused_is_named(model: Net, machine: Machine) -> None:
    with pytest.raises(PlanError, match=r"bdy\.0: no such layer in this network.*body\.0"):
        found(model, "bdy.0")
    grouped = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=64)).eval()
    with pytest.raises(PlanError, match=r"0: cannot be decomposed: .*depthwise"):
        lamina.staircase(grouped, torch.randn(1, 64, 8, 8), "0", timings=TimingTable(None))
