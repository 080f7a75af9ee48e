"""The curve through measured points: proportional at first, never falling, exact where it was measured."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lamina.curve import Curve, coherence, together

AMOUNT = st.floats(1e-12, 1e6)
POINTS = st.lists(st.tuples(AMOUNT, AMOUNT), max_size=5)


@given(POINTS)
def test_it_goes_through_its_points(points: list[tuple[float, float]]) -> None:
    curve = Curve.of(points)
    assert [curve.at(told) for told, _ in curve.points] == [found for _, found in curve.points]


@given(POINTS, AMOUNT, AMOUNT)
def test_it_never_falls(points: list[tuple[float, float]], a: float, b: float) -> None:
    curve = Curve.of(points)
    assert 0 <= curve.at(min(a, b)) <= curve.at(max(a, b)) < math.inf


@given(POINTS.filter(len), st.floats(0, 1))
def test_below_its_first_point_it_is_in_proportion(points: list[tuple[float, float]], share: float) -> None:
    curve = Curve.of(points)
    told, found = curve.points[0]
    assert curve.at(share * told) == pytest.approx(share * found)


@given(POINTS.filter(len), st.floats(1, 1e3))
def test_beyond_its_last_point_it_rises_at_least_in_proportion_and_no_faster_than_the_third_power(
    points: list[tuple[float, float]], factor: float
) -> None:
    curve = Curve.of(points)
    told, found = curve.points[-1]
    assert factor * (1 - 1e-9) <= curve.at(factor * told) / found <= factor**3 * (1 + 1e-9)


def test_between_two_points_it_is_a_straight_line_in_logarithms_and_goes_on_beyond() -> None:
    curve = Curve.of([(1.0, 1.0), (100.0, 10_000.0)])
    assert curve.at(10.0) == pytest.approx(100.0) and curve.at(1000.0) == pytest.approx(1_000_000.0)


def test_points_that_tell_nothing_are_left_out() -> None:
    assert Curve.of([(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)]) == Curve()
    assert Curve.of([(2.0, 5.0), (1.0, 3.0), (1.0, 3.0), (1.1, 4.0), (3.0, 4.0)]).points == ((1.0, 3.0), (2.0, 5.0))


def test_without_points_what_comes_out_is_what_is_told() -> None:
    assert [Curve().at(told) for told in (0.0, 0.5, 7.0)] == [0.0, 0.5, 7.0]
    assert Curve.of([(2.0, 6.0)]).at(0.0) == 0.0


@given(POINTS)
def test_it_is_the_same_after_it_was_saved(points: list[tuple[float, float]]) -> None:
    curve = Curve.of(points)
    assert Curve.model_validate_json(curve.model_dump_json(), strict=True) == curve


@pytest.mark.parametrize("points", ["[[1,2],[1,3]]", "[[1,2],[2,2]]", "[[0,1]]", "[[1,2,3]]", "[[2,2],[1,3]]"])
def test_a_file_with_points_that_do_not_rise_is_refused(points: str) -> None:
    with pytest.raises(ValidationError):
        Curve.model_validate_json(f'{{"points": {points}}}', strict=True)


LOSSES = st.lists(st.floats(1e-9, 10), max_size=8)


@given(LOSSES, POINTS)
def test_losses_at_once_are_at_least_their_sum_and_of_one_layer_its_own(
    nats: list[float], points: list[tuple[float, float]]
) -> None:
    curve = Curve.of(points)
    assert together(nats, curve) >= math.fsum(nats) == together(nats, Curve())
    assert together(nats[:1], curve) == math.fsum(nats[:1])
    if curve.points and len(nats) > 1:
        assert together([coherence(nats)], Curve()) + math.fsum(nats) == pytest.approx(math.fsum(map(math.sqrt, nats)) ** 2)


def test_the_smaller_all_losses_are_beside_what_was_measured_the_less_is_lost_beyond_their_sum() -> None:
    """Errors of equal layers that all point one way cost as many times as much as there are layers."""
    steep = Curve(points=((3.0, 1.0), (30.0, 30.0)))
    beyond = [together([n] * 4, steep) / (4 * n) - 1 for n in (0.1, 1.0, 5.0)]
    assert beyond == sorted(beyond) and beyond[0] == pytest.approx(1.0) and coherence([1.0] * 4) == pytest.approx(12.0)
